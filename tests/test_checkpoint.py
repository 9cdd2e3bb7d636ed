"""Checkpoints on disk: the bytes, what damage does, and that a run appears whole or not at all."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import dot_natural_key

from quantkit import QuantKitError, Recipe, Rule, quantize_checkpoint
from quantkit import checkpoint as checkpoint_module
from quantkit.checkpoint import (
    INDEX,
    MANIFEST,
    WEIGHTS,
    CheckpointReader,
    CheckpointWriter,
    damage,
    join_safetensors,
    read_header,
    weight_files,
)
from quantkit.errors import MachineError
from quantkit.load import verify
from quantkit.quantize import Job, Progress
from quantkit.streaming import natural_key

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fnuz,
    torch.float8_e8m0fnu,
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Killed(Exception):
    """What breaks a run off."""


def killed(*args: object) -> None:
    raise Killed


def break_after(steps: int) -> Progress:
    left = [steps]

    def step() -> None:
        left[0] -= 1
        if not left[0]:
            raise Killed

    return Progress(step=step)


# the bytes


def test_joined_files_are_what_save_file_writes_for_every_dtype(tmp_path):
    raw = torch.randint(0, 2, (6, 4, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for i, dtype in enumerate(DTYPES):
        # two of each, the later name first, so that order within a dtype shows
        tensors[f"z{i}.weight"] = raw[:4].clone().view(dtype)
        tensors[f"a{i}.weight"] = raw[4:].clone().view(dtype)
    tensors |= {"naïve": torch.ones(3), "empty": torch.ones(0, 5), "scalar": torch.tensor(2.0)}
    half = len(tensors) // 2
    items = list(tensors.items())
    save_file(dict(items[:half]), tmp_path / "one.safetensors")
    save_file(dict(items[half:]), tmp_path / "two.safetensors", metadata={"format": "pt"})
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})

    sources = read_header(tmp_path / "one.safetensors") | read_header(tmp_path / "two.safetensors")
    sums = join_safetensors(list(tensors), sources, tmp_path / "joined.safetensors")

    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert set(sums) == set(tensors)


def test_tensors_larger_than_a_chunk_are_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "CHUNK", 64)
    monkeypatch.setattr(checkpoint_module, "PIECE", 300)
    tensors = {"a": torch.arange(1000), "b": torch.arange(7, dtype=torch.int8)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    join_safetensors(["a", "b"], read_header(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("known", [True, False], ids=["in place", "joined"])
def test_blocks_lie_in_their_shards_before_the_end(known, source, packed, tokens, tmp_path, monkeypatch):
    join, copied = join_safetensors, []

    def note(names, sources, out, sums, placed):
        copied.extend(set(names) - set(placed))
        return join(names, sources, out, sums, placed)

    monkeypatch.setattr(checkpoint_module, "join_safetensors", note)
    if not known:
        monkeypatch.setattr(CheckpointWriter, "expect", lambda writer, kinds: None)
    quantize_checkpoint(source(), tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
    assert bool(copied) != known
    assert contents(tmp_path / "out") == contents(packed("llama", "w4a16-g32", "gptq"))


UNEXPECTED = {
    "as expected": {"a": ("F32", (2, 3)), "b": ("I8", (5,))},
    "one was left out": {"a": ("F32", (2, 3)), "b": ("I8", (5,)), "c": ("F32", (7,))},
    "another dtype": {"a": ("BF16", (2, 3)), "b": ("I8", (5,))},
    "another shape": {"a": ("F32", (3, 2)), "b": ("I8", (4,))},
    "one more": {"b": ("I8", (5,))},
}


@pytest.mark.parametrize("kinds", UNEXPECTED.values(), ids=UNEXPECTED)
def test_tensors_other_than_were_expected_are_joined(kinds, tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(5, dtype=torch.int8)}
    with CheckpointWriter(tmp_path / "out", {}, 1000) as writer:
        writer.expect(kinds)
        for name, tensor in tensors.items():
            writer.write_part(f"part-{name}", {name: tensor}, [])
        writer.finish(["a", "b"], 11, lambda folder: None)
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert damage(tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [WEIGHTS, MANIFEST]


def test_shards_that_were_not_foreseen_are_gone_before_others_are_written(tmp_path, monkeypatch):
    """OUT takes twice its size on the way, never three times."""
    join = join_safetensors
    seen = []

    def note(*args, **more):
        seen.extend(path.name for path in (tmp_path / "out.partial").iterdir())
        return join(*args, **more)

    monkeypatch.setattr(checkpoint_module, "join_safetensors", note)
    with CheckpointWriter(tmp_path / "out", {}, 1000) as writer:
        writer.expect({"a": ("F32", (6,)), "b": ("F32", (7,))})
        writer.write_part("part", {"a": torch.randn(6)}, [])
        writer.finish(["a"], 6, lambda folder: None)
    assert sorted(seen) == ["job.json", "lock", "out", "part.json", "part.safetensors"]


def test_a_part_that_could_not_be_copied_to_its_shard_is_copied_at_the_end(
    source, packed, tokens, tmp_path, monkeypatch
):
    sync, calls = checkpoint_module.sync, []

    def full_once(file):
        calls.append(file)
        if len(calls) == 2:  # after the job's record
            out_of_space()
        sync(file)

    monkeypatch.setattr(checkpoint_module, "sync", full_once)
    quantize_checkpoint(source(), tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
    assert calls[1].name.endswith(".filling")
    assert contents(tmp_path / "out") == contents(packed("llama", "w4a16-g32", "gptq"))


def test_a_folder_that_can_no_longer_be_changed_does_not_hide_the_error(source, tmp_path, monkeypatch):
    def gone(*args, **more):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def write(writer, name, *args):
        monkeypatch.setattr(Path, "unlink", gone)
        raise MachineError("the first error")

    monkeypatch.setattr(CheckpointWriter, "write_part", write)
    with pytest.raises(MachineError, match="the first error"):
        quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16"), "cpu")


def test_tensors_are_read_in_inference_mode_too(source, packed, tokens, tmp_path):
    with torch.inference_mode():
        quantize_checkpoint(source(), tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
        assert verify(tmp_path / "out") == []
    assert contents(tmp_path / "out") == contents(packed("llama", "w4a16-g32", "gptq"))


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("w4a16-g32", "awq+gptq"), ("w4a16-g32", "rotate+gptq"), ("w8a8", "smooth"), ("fp8-static", "rtn")],
)
def test_the_tensors_that_will_be_stored_are_foreseen(scheme, method, source, tokens, tmp_path, monkeypatch):
    foreseen = []
    monkeypatch.setattr(CheckpointWriter, "expect", lambda writer, kinds: foreseen.append(kinds))
    quantize_checkpoint(source(), tmp_path / "out", Recipe(scheme, method), "cpu", tokens)
    written = CheckpointReader(tmp_path / "out").tensors
    assert [{name: tensor.kind for name, tensor in written.items()}] == foreseen


def test_two_runs_give_the_same_bytes(source, packed, tokens, tmp_path):
    quantize_checkpoint(source(), tmp_path / "again", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
    assert contents(tmp_path / "again") == contents(packed("llama", "w4a16-g32", "gptq"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shards_are_those_of_save_pretrained(tied, source, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "MAX_SHARD_SIZE", "40KB")
    folder = source("llama", tie_word_embeddings=tied)
    quantize_checkpoint(folder, tmp_path / "out", Recipe("w8a16"), "cpu")
    files = weight_files(tmp_path / "out")
    assert len(files) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert verify(tmp_path / "out") == []


def test_shards_are_filled_in_the_order_of_transformers():
    names = [
        f"model.layers.{i}.{part}" for i in (10, 2, 0) for part in ("mlp.fc10", "mlp.fc9", "attn.codes", "0")
    ]
    assert sorted(names, key=natural_key) == sorted(names, key=dot_natural_key)


def test_a_sharded_source_gives_the_same_as_a_whole_one(source, packed, tmp_path):
    AutoModelForCausalLM.from_pretrained(source()).save_pretrained(tmp_path / "source", max_shard_size="40KB")
    assert len(weight_files(tmp_path / "source")) > 2
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Recipe("w8a16", "rtn"), "cpu")
    assert contents(tmp_path / "out") == contents(packed("llama", "w8a16"))


def test_what_lies_beside_the_weights_is_taken_over(source, tmp_path):
    folder = shutil.copytree(source(), tmp_path / "source")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not copied")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false, "top_k": 7}')
    quantize_checkpoint(folder, tmp_path / "out", Recipe("w8a16"), "cpu")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", WEIGHTS, MANIFEST, "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_k"] == 7


# damage


@pytest.fixture
def copied(source, tmp_path) -> Path:
    return shutil.copytree(source(), tmp_path / "copied")


@pytest.fixture
def sharded(source, tmp_path) -> Path:
    AutoModelForCausalLM.from_pretrained(source()).save_pretrained(
        tmp_path / "sharded", max_shard_size="40KB"
    )
    return tmp_path / "sharded"


def read_everything(folder: Path) -> None:
    reader = CheckpointReader(folder)
    reader.load(reader.tensors)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(QuantKitError) as error:
        read_everything(folder)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(copied, kept):
    path = copied / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    refused(copied, str(path), "truncated", "copy it again")


def header_of(path: Path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def with_header(path: Path, header: bytes) -> None:
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"\xff\xfe",
        b'{"a": 5}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    ],
)
def test_a_damaged_header_is_named(copied, header):
    with_header(copied / WEIGHTS, header)
    refused(copied, str(copied / WEIGHTS), "again")


def test_a_header_larger_than_safetensors_reads_is_refused_unread(copied):
    with (copied / WEIGHTS).open("r+b") as file:
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)  # a hole: no such disk space is used
    refused(copied, WEIGHTS, "header of 150000000 bytes", "at most 100000000")


@pytest.mark.parametrize("out", ["", "."])
def test_an_out_without_a_name_is_refused(source, out):
    with pytest.raises(QuantKitError, match="has no name of its own"):
        quantize_checkpoint(source(), Path(out), Recipe("w8a16", "rtn"), "cpu")


def test_every_flipped_bit_of_a_header_is_an_error_or_changes_nothing_that_is_read(copied):
    path = copied / WEIGHTS
    raw = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    names = list(CheckpointReader(copied).tensors)
    for position in torch.randint(0, 2000, (60,), generator=generator).tolist():
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 7
        path.write_bytes(damaged)
        with suppress(QuantKitError):
            assert set(CheckpointReader(copied).load(names)) == set(names)


def test_a_missing_shard_is_named(sharded):
    lost = weight_files(sharded)[1]
    lost.unlink()
    refused(sharded, str(lost), "not found")


def test_a_tensor_that_no_shard_has_is_named(sharded, tmp_path):
    victim = weight_files(sharded)[0]
    tensors = load_file(victim)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, victim, metadata={"format": "pt"})
    with pytest.raises(QuantKitError, match=name):
        quantize_checkpoint(sharded, tmp_path / "out", Recipe("w8a16"), "cpu")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": ["b"]}}',
        "\x00",
    ],
)
def test_a_garbled_index_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, str(sharded / INDEX), "copy it again")


def test_a_folder_without_safetensors_is_refused(copied):
    (copied / WEIGHTS).rename(copied / "pytorch_model.bin")
    refused(copied, str(copied / WEIGHTS), "not found", "reads safetensors weights")


def test_weights_of_another_model_are_refused(source, tmp_path):
    folder = shutil.copytree(source(), tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(QuantKitError, match=r"mlp\.\w+_proj\.weight is \[.*config\.json makes it"):
        quantize_checkpoint(folder, tmp_path / "out", Recipe("w8a16"), "cpu")


# whole or not at all


RESUMED = [("llama", "w8a16", "rtn"), ("llama", "w4a16-g32", "gptq"), ("qwen2", "w4a16-g32", "awq")]


@pytest.mark.parametrize(("architecture", "label", "method"), RESUMED)
@pytest.mark.parametrize(
    "steps", [1, 2, 3]
)  # after the embeddings, after the first block, before the files are joined
def test_a_broken_off_run_leaves_no_model_and_continues_to_the_same_bytes(
    architecture, label, method, steps, source, packed, tokens, tmp_path
):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    recipe = Recipe(label, method)
    with pytest.raises(Killed):
        quantize_checkpoint(source(architecture), out, recipe, "cpu", tokens, break_after(steps))
    assert not out.exists()
    assert partial.is_dir()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial)

    worked = []
    progress = Progress(module=lambda module: worked.append(module["name"]))
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(before) == steps
    quantize_checkpoint(source(architecture), out, recipe, "cpu", tokens, progress)
    assert contents(out) == contents(packed(architecture, label, method))
    assert len(worked) == 2 * 7
    assert not partial.exists()


def test_finished_blocks_are_not_done_again(source, tokens, tmp_path, monkeypatch):
    recipe = Recipe("w4a16-g32", "gptq")
    with pytest.raises(Killed):
        quantize_checkpoint(source(), tmp_path / "out", recipe, "cpu", tokens, break_after(2))
    done = []
    original = Job.quantize_block
    monkeypatch.setattr(Job, "quantize_block", lambda job, i: done.append(i) or original(job, i))
    quantize_checkpoint(source(), tmp_path / "out", recipe, "cpu", tokens)
    assert done == [1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: b"",
        lambda raw: b"\xff" * len(raw),
    ],
    ids=["cut", "a bit", "empty", "garbage"],
)
def test_a_damaged_part_is_made_again(damage, source, packed, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize_checkpoint(source(), out, Recipe("w8a16", "rtn"), "cpu", progress=break_after(2))
    part = tmp_path / "out.partial" / "block-00000.safetensors"
    part.write_bytes(damage(part.read_bytes()))
    quantize_checkpoint(source(), out, Recipe("w8a16", "rtn"), "cpu")
    assert contents(out) == contents(packed("llama", "w8a16"))


def test_an_unfinished_joining_is_done_again(source, packed, tmp_path, monkeypatch):
    def stop(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_manifest", stop)
        with pytest.raises(Killed):
            quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16", "rtn"), "cpu")
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16", "rtn"), "cpu")
    assert contents(tmp_path / "out") == contents(packed("llama", "w8a16"))


RUN = """
import sys, time, torch
from quantkit import Recipe, quantize_checkpoint
from quantkit.quantize import Job, Progress
from quantkit.streaming import natural_key
source, out, mark = sys.argv[1:]
steps = []
def step():
    steps.append(0)
    if len(steps) == 2:
        open(mark, "w").close()
        time.sleep(600)
quantize_checkpoint(source, out, Recipe("w8a16", "rtn"), "cpu", progress=Progress(step=step))
"""


def test_a_killed_process_is_continued_and_a_living_one_is_left_alone(source, packed, tmp_path):
    out, mark = tmp_path / "out", tmp_path / "mark"
    process = subprocess.Popen([sys.executable, "-c", RUN, str(source()), str(out), str(mark)])
    try:
        deadline = time.monotonic() + 120
        while not mark.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(QuantKitError, match=r"out\.partial: another quantkit process is writing it"):
            quantize_checkpoint(source(), out, Recipe("w8a16", "rtn"), "cpu")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 2
    quantize_checkpoint(source(), out, Recipe("w8a16", "rtn"), "cpu")
    assert contents(out) == contents(packed("llama", "w8a16"))


def test_another_job_clears_what_was_left(source, packed, tmp_path):
    with pytest.raises(Killed):
        quantize_checkpoint(source(), tmp_path / "out", Recipe("fp8", "rtn"), "cpu", progress=break_after(2))
    stale = tmp_path / "out.partial" / "block-00007.safetensors"
    shutil.copyfile(tmp_path / "out.partial" / "block-00000.safetensors", stale)
    quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16", "rtn"), "cpu")
    assert contents(tmp_path / "out") == contents(packed("llama", "w8a16"))


def test_an_edited_source_config_is_another_job(source, tmp_path):
    folder = shutil.copytree(source(), tmp_path / "source")
    with pytest.raises(Killed):
        quantize_checkpoint(folder, tmp_path / "out", Recipe("fp8", "rtn"), "cpu", progress=break_after(2))
    job = (tmp_path / "out.partial" / "job.json").read_text()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(Killed):
        quantize_checkpoint(folder, tmp_path / "out", Recipe("fp8", "rtn"), "cpu", progress=break_after(1))
    assert (tmp_path / "out.partial" / "job.json").read_text() != job


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_an_existing_out_is_refused_and_left_as_it_is(source, tmp_path, make):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(QuantKitError, match="out: exists already; remove it or name another"):
        quantize_checkpoint(source(), out, Recipe("w8a16"), "cpu")
    with pytest.raises(QuantKitError, match="exists already"):
        CheckpointWriter(out, {}, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_left_over_from_a_finished_run_is_removed_and_out_called_complete(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint_module, "clear", killed)
    with pytest.raises(Killed):
        quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    monkeypatch.undo()
    assert damage(tmp_path / "out") == []
    with pytest.raises(
        QuantKitError, match=r"out: exists already and is complete: .*; quantkit verify .*out checks"
    ):
        quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_folder_called_out_keeps_what_a_killed_run_left(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(Killed):
        quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    with pytest.raises(QuantKitError, match="out: exists already; remove it"):
        quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    (tmp_path / "out").rmdir()
    quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_weights_leave_nothing(source, tmp_path):
    folder = shutil.copytree(source(), tmp_path / "source")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(QuantKitError, match=r"up_proj\.weight: 1 of \d+ values are NaN or inf"):
        quantize_checkpoint(folder, tmp_path / "out", Recipe("w8a16"), "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# a full disk


NO_SPACE = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def space_for(parts: int, error: Exception, then=save_file):
    """A `save_file` for which the disk has space for so many parts."""
    left = [parts]

    def save(tensors, path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error
        then(tensors, path)

    return save


def out_of_space(*args, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def filled(source, tokens, tmp_path):
    """filled() runs until the disk is full, checks what is said and kept, and returns the parts that are there."""

    def run(file: str, reason: str = "No space left on device") -> list[str]:
        partial = tmp_path / "out.partial"
        with pytest.raises(MachineError) as error:
            quantize_checkpoint(source(), tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
        message = str(error.value)
        assert message.startswith(f"{partial / file}: cannot be written ({reason}); ")
        assert re.search(r"[\d.]+ [MG]B free, about 0\.\d MB needed; ", message)
        assert message.endswith(f"{partial} keeps the finished blocks, and the same command continues")
        assert not (tmp_path / "out").exists()
        return sorted(path.stem for path in partial.glob("*.safetensors"))

    return run


@pytest.fixture
def continues(source, packed, tokens, tmp_path, monkeypatch):
    """continues(blocks): with space again, the same call does only these blocks and gives the same bytes."""

    def run(blocks: list[int]) -> None:
        monkeypatch.undo()
        done, original = [], Job.quantize_block
        monkeypatch.setattr(Job, "quantize_block", lambda job, i: done.append(i) or original(job, i))
        quantize_checkpoint(source(), tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
        assert done == blocks
        assert contents(tmp_path / "out") == contents(packed("llama", "w4a16-g32", "gptq"))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    return run


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_disk_that_is_full_at_a_part_keeps_the_others(parts, filled, continues, monkeypatch):
    names = ["outer", "block-00000", "block-00001"]
    monkeypatch.setattr(checkpoint_module, "save_file", space_for(parts, NO_SPACE))
    assert filled(f"{names[parts]}.safetensors") == sorted(names[:parts])
    continues([[0, 1], [0, 1], [1]][parts])


@pytest.mark.parametrize(
    ("function", "file"),
    [
        ("join_safetensors", f"out/{WEIGHTS}"),
        ("save_manifest", "out"),
        ("sync_path", "out"),
        ("tensor_bytes", f"out/{WEIGHTS}"),
    ],
)
def test_a_disk_that_is_full_when_the_parts_are_joined_keeps_them(
    function, file, filled, continues, monkeypatch
):
    monkeypatch.setattr(checkpoint_module, function, out_of_space)
    assert len(filled(file)) == 3
    continues([])


def test_a_disk_that_is_full_when_files_are_taken_over_is_named(filled, continues, monkeypatch):
    monkeypatch.setattr("quantkit.streaming.save_generation_config", out_of_space)
    assert len(filled("out")) == 3
    continues([])


def test_a_disk_that_is_full_from_the_start_is_named(filled, continues, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "write_text", out_of_space)
    assert filled("job.json") == []
    continues([0, 1])


def test_the_systems_own_limit_is_named(filled, continues, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    reason = os.strerror(errno.EFBIG)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        assert filled("outer.safetensors", reason) == []
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        assert len(filled(f"out/{WEIGHTS}", reason)) == 3
        assert {path.suffix for path in (tmp_path / "out.partial").iterdir()} == {"", ".json", ".safetensors"}
        assert not (tmp_path / "out.partial" / "out" / WEIGHTS).exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    continues([])


def test_a_disk_that_is_too_small_is_refused_before_the_work(source, tokens, tmp_path, monkeypatch):
    out, recipe = tmp_path / "out", Recipe("w4a16-g32", "gptq")
    usage = shutil.disk_usage(tmp_path)

    def with_free(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))

    sizes = []
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.streaming.check_space", lambda out, size: sizes.append(size))
        with pytest.raises(Killed):
            quantize_checkpoint(source(), out, recipe, "cpu", tokens, break_after(2))
    staged = sum(path.stat().st_size for path in (tmp_path / "out.partial").iterdir())
    with_free(2 * sizes[0] - staged - 1)
    before = contents(tmp_path)
    with pytest.raises(
        QuantKitError, match=rf"{tmp_path}: 0\.\d MB free, but {out} needs about 0\.\d MB until"
    ):
        quantize_checkpoint(source(), out, recipe, "cpu", tokens)
    assert contents(tmp_path) == before
    with_free(2 * sizes[0] - staged)
    summary = quantize_checkpoint(source(), out, recipe, "cpu", tokens)
    assert summary.packed_bytes == sizes[0]


def test_a_source_that_goes_away_keeps_what_is_finished(source, tmp_path):
    folder = shutil.copytree(source(), tmp_path / "source")
    hide = Progress(step=lambda: (folder / WEIGHTS).rename(folder / "hidden"))
    with pytest.raises(MachineError, match=rf"{WEIGHTS}: cannot be read .*; it was there before"):
        quantize_checkpoint(folder, tmp_path / "out", Recipe("w8a16"), "cpu", progress=hide)
    assert (tmp_path / "out.partial" / "outer.safetensors").exists()


@pytest.mark.parametrize("left", [["lock"], ["lock", "job.json.tmp"], ["lock", "job.json", ".tmpAbC123"]])
def test_what_a_run_leaves_that_is_killed_at_its_start_is_no_hindrance(left, source, packed, tmp_path):
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).write_bytes(b"\xff")
    step = lambda: names.append({path.name for path in (tmp_path / "out.partial").glob(".tmp*")})
    names: list[set[str]] = []
    quantize_checkpoint(
        source(), tmp_path / "out", Recipe("w8a16", "rtn"), "cpu", progress=Progress(step=step)
    )
    assert names == [set()] * 3
    assert contents(tmp_path / "out") == contents(packed("llama", "w8a16"))


# verify


@pytest.fixture
def copy_of_packed(packed, tmp_path) -> Path:
    return shutil.copytree(packed("llama", "w8a16"), tmp_path / "copy")


def test_a_whole_checkpoint_verifies(packed):
    rules = (Rule("o_proj", "w4a16-g32-asym"), Rule("down_proj", "fp8-block"))
    assert verify(packed("llama", "w8a16")) == []
    assert verify(packed("llama", "w8a16", "rtn", rules)) == []
    assert verify(packed("llama", "fp8-static")) == []


def test_verify_finds_a_flipped_bit(copy_of_packed):
    path = copy_of_packed / WEIGHTS
    victim = "model.layers.1.mlp.up_proj.codes"
    raw = bytearray(path.read_bytes())
    raw[read_header(path)[victim].start + 5] ^= 16
    path.write_bytes(raw)
    (line,) = verify(copy_of_packed)
    assert victim in line
    assert str(path) in line
    assert "sha256 differs" in line


def changed(folder: Path, change) -> list[str]:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return verify(folder)


def test_verify_finds_a_missing_tensor(copy_of_packed):
    victim = "model.layers.0.self_attn.q_proj.scales"
    lines = changed(copy_of_packed, lambda tensors: tensors.pop(victim))
    assert lines
    assert all(victim in line and "missing" in line for line in lines)


def test_verify_finds_an_extra_tensor(copy_of_packed):
    lines = changed(copy_of_packed, lambda tensors: tensors.update(extra=torch.ones(1)))
    assert lines == ["extra: not in the manifest"]


def test_verify_finds_a_wrong_shape_and_a_wrong_dtype(copy_of_packed):
    norm, codes = "model.norm.weight", "model.layers.0.mlp.up_proj.codes"

    def change(tensors):
        tensors[norm] = tensors[norm].float()
        tensors[codes] = tensors[codes][:, :-1].contiguous()

    lines = changed(copy_of_packed, change)
    assert any(norm in line and "holds F32 [64], the manifest says BF16 [64]" in line for line in lines)
    assert any(codes in line and "[96, 63], the manifest says I8 [96, 64]" in line for line in lines)
    assert any(codes in line and "scheme w8a16 expects [96, 64]" in line for line in lines)


def test_verify_compares_the_tensors_with_the_schemes_even_where_the_manifest_agrees(copy_of_packed):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.scales"] = torch.ones(95, 1)
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.tensor([96, 65])

    changed(copy_of_packed, change)
    checkpoint_module.write_manifest(copy_of_packed)
    lines = verify(copy_of_packed)
    assert len(lines) == 2
    assert "up_proj.scales: [95, 1], scheme w8a16 expects [96, 1]" in lines[1]
    assert "gate_proj.codes: [96, 64], scheme w8a16 expects [96, 65]" in lines[0]


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "nonsense", '{"manifest_version": 1}', '{"manifest_version": 1, "tensors": {"a": 5}}'],
)
def test_a_garbled_manifest_is_named(copy_of_packed, text):
    (copy_of_packed / MANIFEST).write_text(text)
    with pytest.raises(QuantKitError, match=MANIFEST):
        verify(copy_of_packed)


def test_a_newer_manifest_is_refused(copy_of_packed):
    (copy_of_packed / MANIFEST).write_text('{"manifest_version": 2, "tensors": {}}')
    with pytest.raises(QuantKitError, match=r"manifest_version 2, this quantkit reads 1; install a newer"):
        verify(copy_of_packed)


def test_a_missing_manifest_is_named(copy_of_packed):
    (copy_of_packed / MANIFEST).unlink()
    with pytest.raises(QuantKitError, match=rf"{MANIFEST}: not found"):
        verify(copy_of_packed)
