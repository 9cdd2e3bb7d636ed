"""The dry run: its sizes are those of the run, its memory and time add up, and nothing is loaded or written."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from quantkit import CalibrationSpec, QuantKitError, Recipe, Rule, quantize_checkpoint
from quantkit import dry_run as dry_run_module
from quantkit.calibration import awq, grid
from quantkit.checkpoint import CheckpointReader
from quantkit.demo import EXAMPLE
from quantkit.dry_run import COSTS, FACTORING, LEARNED_COPIES, Cost, Rates, Weight, dry_run, steps_of
from quantkit.method import QUALITIES, STEPS
from quantkit.packing import PARTS
from quantkit.recipe import ModulePlan
from quantkit.scheme import parse_scheme

RATES = Rates(products=1e9, passes=1e8, latency=1e-6)
HIDDEN, FFN, LAYERS = 64, 96, 2  # of the tiny models
INPUTS = (HIDDEN, HIDDEN, HIDDEN, FFN)  # K of what feeds q, k and v; o; gate and up; down
SPEC = CalibrationSpec("text.txt", samples=8, seq_len=24)


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    monkeypatch.setattr(dry_run_module, "measured_rates", lambda device: RATES)


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        ("llama", Recipe("w8a16")),
        ("qwen2", Recipe("w4a16-g128-asym", "awq")),  # biases; a smaller group is remarked
        ("phi3", Recipe("fp8-block")),
        ("llama", Recipe("fp8-static", rules=(Rule("o_proj", "keep"), Rule("down_proj", "w4a16-g32")))),
        ("llama", Recipe("w4a16-g32", rules=(Rule("lm_head", "w4a16-g64"), Rule("layers.1", "w8a16")))),
        ("llama", Recipe("w4a16-g32", "rotate+gptaq+learn")),
        ("qwen3_moe", Recipe("w8a8", "gptq")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.scheme,
)
def test_sizes_schemes_and_methods_are_those_of_the_run(architecture, recipe, source, tokens, tmp_path):
    folder = source(architecture, tie_word_embeddings=recipe.rotates)
    recipe = replace(recipe, calibration=SPEC)
    found = dry_run(folder, tmp_path / "out", recipe, "cpu")
    summary = quantize_checkpoint(folder, tmp_path / "out", recipe, "cpu", tokens)
    assert found.packed_bytes == summary.packed_bytes
    assert found.source_bytes == summary.source_bytes
    assert found.bits_per_weight == pytest.approx(summary.bits_per_weight, rel=1e-12)
    planned = {row["name"]: (row["scheme"], row["method"], row["remark"]) for row in found.modules}
    done = {
        name: (row["scheme"], row["method"], row.get("remark", "")) for name, row in summary.modules.items()
    }
    assert planned == done
    stored = CheckpointReader(tmp_path / "out").tensors
    for row in found.modules:
        parts = [stored.get(f"{row['name']}.{s}") for s in PARTS]
        assert row["bytes"] == sum(t.stop - t.start for t in parts if t is not None)
        assert row["bits"] == 8 * row["bytes"] / (row["N"] * row["K"])


def test_nothing_is_loaded_and_nothing_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointReader, "load", None)
    for method in (*STEPS, "rotate+awq+gptaq+learn"):
        dry_run(source(), tmp_path / "out", Recipe("w4a16-g32", method, calibration=SPEC), "cpu")
    assert list(tmp_path.iterdir()) == []


def bytes_of(found, stage: str) -> dict[tuple[str, str], int]:
    return {(held.what, held.place): held.bytes for held in found.memory if held.stage.endswith(stage)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_memory_adds_up(device, method, source, tmp_path):
    found = dry_run(source(), tmp_path / "out", Recipe("w4a16-g32", method, calibration=SPEC), device)
    place, value = ("host", 4) if device == "cpu" else ("device", 2)
    block = CheckpointReader(source()).tensors
    numel = sum((t.stop - t.start) // 2 for name, t in block.items() if name.startswith("model.layers.0."))
    for stage in ("passed", "packed"):
        held = bytes_of(found, stage)
        assert held["weights", place] == numel * value
        assert held["weights as stored", "host"] == numel * 2
        assert held["hidden states", "host"] == 8 * 24 * HIDDEN * value
        assert held["Hessians", place] == 4 * sum(K * K for K in INPUTS)
    working = bytes_of(found, "packed")["working copies", place]
    squares = 5 if method == "gptq" else 0
    assert working == 4 * (max(4, 6 - squares) * HIDDEN * FFN + squares * FFN * FFN)
    scaled = bytes_of(found, "packed").get(("scaled weights", place), 0)
    assert scaled == (4 * (numel - 2 * HIDDEN) if method == "awq" else 0)
    stages = {held.stage for held in found.memory}
    assert len(stages) == 3
    for place, peak in (("host", found.peak_host), ("device", found.peak_device)):
        sums = [
            sum(h.bytes for h in found.memory if (h.stage, h.place) == (stage, place)) for stage in stages
        ]
        assert peak == max(sums)
    assert (found.peak_device == 0) == (device == "cpu")


def test_the_original_model_and_learning_are_in_memory(source, tmp_path):
    found = dry_run(source(), tmp_path / "out", Recipe("w4a16-g32", "gptaq", calibration=SPEC), "cuda")
    block = sum(
        t.stop - t.start
        for name, t in CheckpointReader(source()).tensors.items()
        if name.startswith("model.layers.0.")
    )
    held = bytes_of(found, "passed")
    assert held["hidden states", "host"] == 3 * 8 * 24 * HIDDEN * 2
    assert held["original block", "device"] == block
    assert held["drifts", "device"] == 2 * 4 * FFN * FFN
    recipe = Recipe("w4a16-g32", "gptaq+learn", calibration=SPEC)
    held = bytes_of(dry_run(source(), tmp_path / "out", recipe, "cuda"), "learned")
    weights = block // 2 - 2 * HIDDEN
    assert held["targets, moves, gradients", "device"] == LEARNED_COPIES * 4 * weights
    assert held["drifts", "device"] == held["Hessians", "device"] == 4 * sum(K * K for K in INPUTS)


def test_every_step_has_a_cost_and_steps_are_summed():
    assert COSTS.keys() == STEPS.keys()
    weight = Weight(64, 96, parse_scheme("w4a16-g32"), True, batches=2, hidden=64, compensated=True)
    steps = steps_of(ModulePlan("linear", weight.scheme, "rotate+awq+gptaq+learn"), weight)
    assert list(steps) == ["rotate", "awq", "gptaq", "learn", "errors reported"]
    for step in STEPS:
        assert COSTS[step](weight).passes > 0, step
        assert steps.get(step, COSTS[step](weight)) == COSTS[step](weight)
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 2) == Cost(11, 22, 33, 4)


@pytest.mark.parametrize(
    ("label", "tries"), [("w4a16-g32", 26), ("w4a16-g32-asym", 13), ("w8a16", 7), ("fp8", 0)]
)
def test_a_search_is_counted_as_often_as_the_code_tries(label, tries, monkeypatch):
    calls: list[int] = []
    fit = grid.range_grid
    monkeypatch.setattr(grid, "range_grid", lambda *args: calls.append(1) or fit(*args))
    grid.search_clip(torch.randn(8, 64), parse_scheme(label))
    assert Weight(8, 64, parse_scheme(label)).tries == len(calls) - 1 == tries


def test_awqs_candidates_are_counted_as_the_code_makes_them(monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(awq, "scaled_error", lambda *args: calls.append(1) or 1.0)
    awq.search_scales([torch.randn(8, 64)], torch.eye(64), torch.rand(64) + 0.1, parse_scheme("w4a16-g32"))
    weight = Weight(8, 64, parse_scheme("w4a16-g32"), True)
    assert COSTS["awq"](weight).products == len(calls) * 2 * 8 * 64**2
    by_costs = steps_of(ModulePlan("linear", weight.scheme, "awq+gptq"), weight)["awq"]
    assert by_costs.products < 64**3 * FACTORING * 2
    assert by_costs.passes == COSTS["awq"](weight).passes


def test_more_work_takes_longer(source, tmp_path):
    seconds = [
        dry_run(source(), tmp_path / "out", Recipe("w4a16-g32", method, calibration=SPEC), "cpu").seconds
        for method in ("rtn", "clip", "gptq", "gptaq", "awq+gptaq", "awq+gptaq+learn")
    ]
    assert seconds == sorted(seconds)
    for scheme in ("w4a16-g32", "w8a8", "fp8"):
        by_quality = [
            dry_run(source(), tmp_path / "out", Recipe(scheme, None, (), SPEC, quality), "cpu").seconds
            for quality in QUALITIES
        ]
        assert by_quality == sorted(by_quality)


FACTOR = 4  # between estimate and run, on machines that other work may slow down between the two


@pytest.mark.parametrize(("scheme", "method"), [("w4a16-g128", "gptq"), ("w8a8", "smooth+gptaq")])
def test_time_is_right_within_a_factor(scheme, method, tmp_path, monkeypatch):
    monkeypatch.undo()  # the rates are measured
    tokens = torch.randint(3, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(scheme, method, calibration=CalibrationSpec("text.txt", 4, 64))
    estimated = dry_run(EXAMPLE, tmp_path / "out", recipe, "cpu").seconds
    started = time.perf_counter()
    quantize_checkpoint(EXAMPLE, tmp_path / "out", recipe, "cpu", tokens)
    took = time.perf_counter() - started
    assert took / FACTOR < estimated < took * FACTOR


def test_a_target_is_measured_first_and_refused_where_it_cannot_be_met(source, tmp_path):
    recipe = Recipe("w4a16-g32", target_bpw=5.0, calibration=SPEC)
    found = dry_run(source(), tmp_path / "out", recipe, "cpu")
    assert "measuring" in {work.what for work in found.work}
    assert bytes_of(found, "measuring")["whole model", "host"] > 0
    with pytest.raises(QuantKitError, match="target_bpw 2: this model takes from"):
        dry_run(source(), tmp_path / "out", replace(recipe, target_bpw=2.0), "cpu")


def test_the_whole_model_is_in_memory_while_it_samples(source, tmp_path):
    spec = CalibrationSpec(samples=40, seq_len=24)
    found = dry_run(source(), tmp_path / "out", Recipe("w4a16-g32", calibration=spec), "cpu")
    held = bytes_of(found, "sampling")
    parameters = sum((t.stop - t.start) // 2 for t in CheckpointReader(source()).tensors.values())
    assert held["whole model", "host"] == 4 * parameters
    assert held["whole model as stored", "host"] == 2 * parameters
    assert held["keys and values", "host"] == 2 * LAYERS * 32 * 24 * 2 * (HIDDEN // 4) * 4
    assert found.work[0].what == "sampling"
    assert found.work[0].products == 2 * parameters * 40 * 24


def test_rounding_to_nearest_needs_no_calibration(source, tmp_path):
    found = dry_run(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    assert [work.what for work in found.work] == ["rtn"]
    assert not {"Hessians", "hidden states"} & {held.what for held in found.memory}


def test_time_is_counted_work_over_rates(source, tmp_path):
    found = dry_run(source(), tmp_path / "out", Recipe("w4a16-g32", "gptq", calibration=SPEC), "cpu")
    work = {work.what: work for work in found.work}
    assert set(work) == {"tokens through the blocks", "Hessians", "gptq", "errors reported"}
    assert work["Hessians"].products == LAYERS * sum(2 * 8 * 24 * K * K for K in INPUTS)
    weights = 2 * HIDDEN * HIDDEN + 2 * 32 * HIDDEN + 3 * HIDDEN * FFN
    # twice through the first block, once through the last
    assert work["tokens through the blocks"].products == 3 * 8 * 24 * (2 * weights + 4 * 24 * HIDDEN)
    for part in found.work:
        assert part.seconds == pytest.approx(part.products / 1e9 + part.passes / 1e8 + part.calls * 1e-6)
    assert found.seconds == sum(part.seconds for part in found.work)
    twice = CalibrationSpec("text.txt", samples=16, seq_len=24)
    again = dry_run(source(), tmp_path / "out", Recipe("w4a16-g32", "gptq", calibration=twice), "cpu")
    again = {work.what: work for work in again.work}
    assert again["Hessians"].products == 2 * work["Hessians"].products
    assert again["gptq"] == work["gptq"]


def test_rates_are_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(dry_run_module, "RATE_SECONDS", 0.02)
    rates = dry_run_module.measured_rates(torch.device("cpu"))
    assert 1e7 < rates.products < 1e14
    assert 1e6 < rates.passes < 1e13
    assert 1e-8 < rates.latency < 1e-2


def test_disk_is_counted_twice(source, tmp_path):
    found = dry_run(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    assert found.disk_needed == 2 * found.packed_bytes
    assert found.disk_free > 0


def test_what_the_run_would_refuse_is_refused(source, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(QuantKitError, match="there: exists already"):
        dry_run(source(), tmp_path / "there", Recipe("w8a16"), "cpu")
    with pytest.raises(QuantKitError, match="no such model directory"):
        dry_run(tmp_path / "absent", tmp_path / "out", Recipe("w8a16"), "cpu")
    with pytest.raises(QuantKitError, match="512 tokens exceed the model's context of 64"):
        dry_run(source(), tmp_path / "out", Recipe("w4a16"), "cpu")
    recipe = Recipe("fp8-static", rules=(Rule("lm_head"),), calibration=SPEC)
    with pytest.raises(QuantKitError, match="static activation scale is not calibrated outside"):
        dry_run(source("llama", tie_word_embeddings=False), tmp_path / "out", recipe, "cpu")


def test_it_is_plain_data(source, tmp_path: Path):
    found = dry_run(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    assert json.loads(json.dumps(asdict(found)))["packed_bytes"] == found.packed_bytes
