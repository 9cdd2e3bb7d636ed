"""A run that is killed again and again ends in the bytes of one that was left alone."""

import subprocess
import sys

import pytest

from quantkit import Recipe, quantize_checkpoint
from quantkit.calibration.learn import learn_rounding
from quantkit.quantize import Progress

# Forks its runs, since a process of its own takes longer to import torch than to quantize the model.
RUN = """
import os, random, shutil, signal, sys, time, traceback
from pathlib import Path

import torch

from quantkit import QuantKitError, Recipe, quantize_checkpoint

KILLS = 10
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
source, folder, method = sys.argv[1:]
out, staging = Path(folder, "out"), Path(folder, "out.partial")
tokens = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0))
chance = random.Random(0)

def run(where):
    quantize_checkpoint(source, where, Recipe("w4a16-g32", method), "cpu", tokens)

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def start(at=None):
    pid = os.fork()
    if pid:
        return pid
    changes = []

    def kill_before_a_change(event, args):
        written = event == "open" and isinstance(args[1], str) and args[1][0] != "r" or args[1:2] == ("r+",)
        if (written or event in CHANGES) and str(staging) in str(args[0]):
            changes.append(event)
            if len(changes) == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill_before_a_change)
    try:
        run(out)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def ended(pid):
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, status
    if out.exists():
        assert contents(out) == expected
        if staging.exists() and any(staging.iterdir()):
            try:
                run(out)
            except QuantKitError as error:
                assert "exists already and is complete" in str(error), error
            assert contents(out) == expected
            assert not staging.exists()
            global cleaned
            cleaned += 1
        shutil.rmtree(out)
        shutil.rmtree(staging, ignore_errors=True)
        return killed, True
    return killed, False

run(Path(folder, "warm"))
started = time.monotonic()
run(Path(folder, "whole"))
duration = time.monotonic() - started
expected = contents(Path(folder, "whole"))
assert contents(Path(folder, "warm")) == expected

kills = cleaned = 0
while kills < KILLS:
    pid = start()
    time.sleep(chance.random() * duration)
    os.kill(pid, signal.SIGKILL)
    kills += ended(pid)[0]
assert ended(start()) == (False, True)

at = 0
killed = True
while killed:
    at += 1
    killed, whole = ended(start(at))
print(kills, at - 1, whole, cleaned)
"""


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_runs_killed_at_random_and_at_every_change_of_a_file_end_in_the_same_bytes(source, tmp_path, method):
    folder = source("llama", num_hidden_layers=3)
    command = [sys.executable, "-c", RUN, str(folder), str(tmp_path), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, changes, whole, cleaned = done.stdout.split()
    assert int(kills) == 10
    assert int(changes) >= 12
    assert whole == "True"
    assert int(cleaned) >= 3  # kills while OUT.partial is removed


@pytest.mark.parametrize(
    ("label", "method"),
    [
        ("w4a16-g32", "awq+gptaq"),
        ("w4a16-g32", "gptq+learn"),
        ("fp8-static", "gptaq"),  # whose activation scales are read from what is stored
        ("fp8-static", "rtn"),
        ("w8a8", "smooth+gptq"),
    ],
)
def test_a_run_that_ends_between_blocks_goes_on_as_if_it_had_not(
    label, method, source, tokens, tmp_path, monkeypatch
):
    """Whatever flows between blocks: hidden states, those of the original model, rounded activations."""
    monkeypatch.setitem(learn_rounding.__kwdefaults__, "steps", 4)
    folder, recipe = source("llama", num_hidden_layers=3), Recipe(label, method)
    steps = iter(range(2))  # what is outside the blocks and the first one, and then the end
    with pytest.raises(StopIteration):
        quantize_checkpoint(
            folder, tmp_path / "out", recipe, "cpu", tokens, Progress(step=lambda: next(steps))
        )
    assert (tmp_path / "out.partial" / "block-00000.safetensors").exists()
    assert not (tmp_path / "out.partial" / "block-00002.safetensors").exists()
    quantize_checkpoint(folder, tmp_path / "out", recipe, "cpu", tokens)
    quantize_checkpoint(folder, tmp_path / "whole", recipe, "cpu", tokens)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "whole"))
    assert one == two
