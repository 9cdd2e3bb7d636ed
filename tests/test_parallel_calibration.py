"""Two processes calibrate what one does: the same codes but for a few, and the same bytes every time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from calibration_ranks import tokens_of
from parallel import run_processes, server
from quantkit import Recipe, quantize_checkpoint
from quantkit.calibration.statistics import InputStatistics
from quantkit.calibration.together import deal
from quantkit.checkpoint import CheckpointReader
from quantkit.load import verify
from quantkit.packing import unpack_codes

# Sums of statistics are rounded elsewhere, by some 1e-7 of a number. A code changes where a weight, after all errors
# that were passed on to it, lies that near to the middle of two; it is passed on too, so that a row then differs.
FEW = 0.01  # of a checkpoint's codes
METHODS = [
    ("llama", "w4a16-g32", "gptq"),
    ("llama", "w4a16-g32", "awq+gptq"),
    ("llama", "w8a8-static", "smooth+gptq"),
    ("llama", "w3a16-g32", "gptaq"),
    ("llama", "w4a16-g32", "rtn"),
    ("qwen3_moe", "w4a16-g32", "awq+gptq"),
]


def job(
    source: Any, out: Path, scheme: str = "w4a16-g32", method: str = "gptq", **more: Any
) -> dict[str, Any]:
    sources = source if isinstance(source, list) else [source]
    return {"sources": [str(s) for s in sources], "out": str(out), "scheme": scheme, "method": method, **more}


def contents(folder: Path) -> dict[str, bytes]:
    timed = ("report.html", "quantkit_timings.json")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in timed}


@pytest.fixture(scope="module")
def two(source, tmp_path_factory) -> tuple[Path, Path]:
    """A folder with what two processes make by each method, i and again-i, and one with what they say."""
    server()
    out, said = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("said")
    jobs = []
    for i, (architecture, scheme, method) in enumerate(METHODS):
        folder = source(architecture)
        jobs.append(job(folder, out / f"{i}", scheme, method, report=i == 0))
        if i < 2:
            jobs.append(job(folder, out / f"again-{i}", scheme, method, report=i == 0))
    other = source("llama", num_hidden_layers=3)
    jobs.append(job([source("llama"), other], out / "differ"))
    jobs.append(job(source("llama"), out / "few", samples=1))
    jobs.append(job(source("llama"), out / "0"))
    jobs.append(job(source("llama"), out / "learned", "w3a16-g32", "gptaq+learn"))
    assert run_processes("calibration_ranks", jobs, said, QUANTKIT_TIMEOUT="60") == [0, 0]
    return out, said


def numbers(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All codes of a checkpoint, and its other tensors."""
    reader = CheckpointReader(folder)
    tensors = reader.load(list(reader.tensors))
    codes = []
    for name in [name for name in tensors if name.endswith(".codes")]:
        stored, (_, K) = tensors.pop(name), tensors[name.removesuffix("codes") + "weight"].tolist()
        whole = stored.dtype != torch.int32
        codes.append((stored if whole else unpack_codes(stored, K, 32 * stored.shape[1] // K)).flatten())
    return torch.cat([c.to(torch.int16) for c in codes]), tensors


@pytest.mark.parametrize("i", range(len(METHODS)), ids=[" ".join(m) for m in METHODS])
def test_two_processes_make_what_one_does(i, two, source, tmp_path):
    architecture, scheme, method = METHODS[i]
    quantize_checkpoint(source(architecture), tmp_path / "one", Recipe(scheme, method), "cpu", tokens_of(8))
    assert verify(two[0] / f"{i}") == []
    one_codes, one_rest = numbers(tmp_path / "one")
    two_codes, two_rest = numbers(two[0] / f"{i}")
    assert (one_codes != two_codes).float().mean() <= FEW
    for name, tensor in one_rest.items():
        scale = tensor.float().abs().max() + 1e-9
        assert (tensor.float() - two_rest[name].float()).abs().max() <= 0.01 * scale, name


def test_two_processes_learn_as_well_as_one(two, source, tmp_path):
    """Roundings that are learned from other batches are others, and as good."""
    tokens = tokens_of(8)
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(source("llama"), dtype=torch.float32)(tokens).logits

    def lost(folder: Path) -> float:
        with torch.no_grad():
            logits = quantkit.load(folder, device="cpu", dtype=torch.float32)(tokens).logits
        return ((logits - original).norm() / original.norm()).item()

    for method in ("gptaq", "gptaq+learn"):
        quantize_checkpoint(source("llama"), tmp_path / method, Recipe("w3a16-g32", method), "cpu", tokens)
    before, learned = lost(tmp_path / "gptaq"), lost(tmp_path / "gptaq+learn")
    gained = before - learned
    assert gained > 0.05 * before
    assert lost(two[0] / "learned") < learned + 0.25 * gained


@pytest.mark.parametrize("i", [0, 1])
def test_the_same_processes_make_the_same_bytes(i, two):
    assert contents(two[0] / f"{i}") == contents(two[0] / f"again-{i}")


@pytest.mark.parametrize(
    ("number", "name", "words"),
    [
        (0, "differ", "model, recipe, tokens and versions: process 1 has"),
        (1, "few", "1 calibration sequences for 2 processes"),
        (2, "0", "exists"),
    ],
)
def test_what_is_wrong_is_said_by_both(number, name, words, two):
    out, said = two
    first = len(METHODS) + 2 + number
    texts = [(said / f"{first}-{rank}").read_text() for rank in range(2)]
    assert all(text.startswith("QuantKitError") and words in text for text in texts)
    assert not (out / f"{name}.partial").exists()


def test_a_process_that_dies_leaves_whole_parts_and_one_process_goes_on(source, tmp_path):
    """Whatever the number of processes, what is done is not done again."""
    lost = job(source("llama"), tmp_path / "out", dead={"block-00001": 1})
    assert run_processes("calibration_ranks", [lost], tmp_path, QUANTKIT_TIMEOUT="30") == [0, 9]
    kind, seconds, text = (tmp_path / "0-0").read_text().split(" ", 2)
    assert kind == "MachineError"
    assert int(seconds) < 30
    assert "process 0 of 2: another one did not answer" in text
    assert not (tmp_path / "out").exists()
    parts = {p.name: p.read_bytes() for p in (tmp_path / "out.partial").glob("*.safetensors")}
    assert set(parts) == {"outer.safetensors", "block-00000.safetensors"}
    quantize_checkpoint(source("llama"), tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens_of(8))
    assert verify(tmp_path / "out") == []
    quantize_checkpoint(source("llama"), tmp_path / "one", Recipe("w4a16-g32", "gptq"), "cpu", tokens_of(8))
    resumed, alone = numbers(tmp_path / "out")[0], numbers(tmp_path / "one")[0]
    assert (resumed != alone).float().mean() <= FEW


def test_a_process_that_never_comes_is_told(source, tmp_path):
    absent = job(source("llama"), tmp_path / "out")
    alone = dict(WORLD_SIZE="2", QUANTKIT_TIMEOUT="1")
    assert run_processes("calibration_ranks", [absent], tmp_path, ranks=1, **alone) == [0]
    kind, seconds, text = (tmp_path / "0-0").read_text().split(" ", 2)
    assert kind == "MachineError"
    assert int(seconds) < 20
    assert "QUANTKIT_TIMEOUT" in text
    assert not (tmp_path / "out.partial").exists()


def test_the_command_runs_in_two_processes(source, tmp_path):
    argv = [
        "quantize",
        source("llama"),
        tmp_path / "out",
        "--scheme",
        "w4a16-g32",
        "--samples",
        "4",
        "--seq-len",
        "16",
    ]
    command = {"argv": [str(word) for word in [*argv, "--device", "cpu", "--json", tmp_path / "told.json"]]}
    assert run_processes("calibration_ranks", [command], tmp_path) == [0, 0]
    assert verify(tmp_path / "out") == []
    assert (tmp_path / "told.json").exists()
    assert run_processes("calibration_ranks", [command], tmp_path) == [2, 2]  # OUT exists


def test_linears_of_one_input_are_dealt_together_the_costliest_first():
    shared, other = InputStatistics(4), InputStatistics(8)
    shapes = {"q": (4, 4), "k": (2, 4), "v": (2, 4), "down": (4, 8), "router": (1, 4)}
    dealt = deal(shapes, {"q": shared, "k": shared, "v": shared, "down": other}, 2)
    assert dealt == {"down": 0, "q": 1, "k": 1, "v": 1, "router": 1}
