"""The benchmark of what rounds activations, run on a CPU at tiny sizes: what it records, and that wrong results have no time."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.eval import attention, producers
from quantkit.eval.producers import PRODUCERS, ROUNDINGS, bench_producers
from quantkit.eval.records import read_records, write_records


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(producers, "PRODUCERS", {name: 200 + i for i, name in enumerate(PRODUCERS)})


def test_every_producer_and_rounding_has_a_record_with_its_error(tmp_path):
    kept = []
    records = bench_producers([1, 3], "cpu", replays=2, working_set=0, on_record=kept.append)
    assert kept == records
    found = [(r["producer"], r["M"], r["rounding"], r["K"]) for r in records]
    assert found == [
        (name, M, rounding, 200 + i)
        for i, name in enumerate(PRODUCERS)
        for M in (1, 3)
        for rounding in ROUNDINGS
    ]
    for record in records:
        assert record["kind"] == "producer"
        assert "refused" not in record
        assert record["us"] > 0
        assert record["limit_us"] is None
    write_records(tmp_path / "producers.jsonl", records)
    assert read_records(tmp_path / "producers.jsonl") == json.loads(json.dumps(records))


def test_a_wrong_result_has_no_time(monkeypatch):
    monkeypatch.setattr(
        producers, "exact", lambda producer, x, *rest: -x.double()[:, : PRODUCERS_K[producer]]
    )
    PRODUCERS_K = producers.PRODUCERS
    records = bench_producers([2], "cpu", replays=1, working_set=0)
    assert all(r["us"] is None and "exceeds" in r["refused"] for r in records)


@pytest.mark.parametrize("module", [attention, producers])
def test_a_device_that_is_not_there_is_refused_in_a_line(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["it"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert "PyTorch sees no GPU here; give --device cpu" in capsys.readouterr().err
