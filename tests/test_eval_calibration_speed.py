"""The calibration benchmark, on a model small enough for a CPU."""

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.eval import calibration_speed, random_model
from quantkit.eval.calibration_speed import time_calibration, write_random_model
from quantkit.eval.records import write_records
from quantkit.eval.tables import tables
from quantkit.recipe import CalibrationSpec, Recipe

TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def test_a_run_is_timed_and_tabulated(tmp_path, monkeypatch):
    monkeypatch.setitem(random_model.CONFIGS, "tiny", TINY)
    spec = CalibrationSpec(samples=2, seq_len=16)
    recipes = [Recipe("w4a16-g32", method, calibration=spec) for method in ("rtn", "gptq")]
    records = list(time_calibration("tiny", recipes, tmp_path, torch.device("cpu")))
    assert [record["method"] for record in records] == ["rtn", "gptq"]
    assert all(record["seconds"] > 0 and record["process_peak_bytes"] > 0 for record in records)
    write_records(tmp_path / "calibration.jsonl", records)  # refuses what JSON cannot hold
    (table,) = tables(records)
    assert [row[:3] for row in table.rows] == [
        ("w4a16-g32", "rtn", "2 x 16"),
        ("w4a16-g32", "gptq", "2 x 16"),
    ]
    assert [row[4] for row in table.rows] == ["0", "1"]  # runs before it in the process


def test_the_random_model_is_one_file_a_block_and_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setitem(calibration_speed.CONFIGS, "tiny", TINY)
    for name in ("a", "b"):
        size = write_random_model("tiny", tmp_path / name, torch.device("cpu"))
    readers = [CheckpointReader(tmp_path / name) for name in ("a", "b")]
    assert len(readers[0].files) == 3
    assert size == sum(t.stop - t.start for t in readers[0].tensors.values())
    names = sorted(readers[0].tensors)
    a, b = (reader.load(names) for reader in readers)
    assert all(torch.equal(a[name], b[name]) for name in names)
    columns = a["model.layers.0.mlp.down_proj.weight"].float().std(0)
    assert columns.max() > 2 * columns.min()  # of different sizes, as real ones
