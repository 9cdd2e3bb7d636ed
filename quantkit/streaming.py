"""Quantizing from directory to directory with one decoder block in memory at a time."""

import ctypes
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from quantkit import __version__
from quantkit.allocation import Allocation, allocate, check_room, read_budget
from quantkit.calibration.pipeline import ModuleResult, capture, not_finite
from quantkit.checkpoint import INDEX, CheckpointReader, CheckpointWriter, sha256, write_text
from quantkit.errors import QuantKitError
from quantkit.hf import linear_called, packed_twin
from quantkit.linear import replace_module
from quantkit.packing import QuantizedTensor
from quantkit.quantize import (
    Job,
    Progress,
    calibration_tokens,
    check_context,
    check_tokens,
    default_device,
    describe_calibration,
)
from quantkit.recipe import Recipe
from quantkit.source import COPIED, empty_model, load_tokenizer, read_config, resolve, whole_model

ALLOCATION = "allocation.json"  # in OUT.partial: schemes chosen, which took a while
OUTER = "outer"  # the part that holds what lies outside the decoder blocks


@dataclass(frozen=True)
class Summary:
    """What a run did: modules and calibration as in config.json, weights packed, their bits, bytes before and after,
    and the schemes that a `target_bpw` led to."""

    modules: dict[str, dict[str, Any]]
    calibration: dict[str, Any] | None
    packed_weights: int
    bits_per_weight: float
    source_bytes: int
    packed_bytes: int
    seconds: float
    allocation: Allocation | None = None


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    device: torch.device | str | None = None,
    tokens: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Quantizes a model directory (or hub name) into `out`, one decoder block in memory at a time.

    A run that was killed leaves `out`.partial; the same call continues it and gives the same bytes.

    Args:
        device: where blocks are worked on; a GPU if there is one, by default.
        tokens: int64 [samples, seq_len] to calibrate on, in the place of the recipe's calibration.

    Raises:
        QuantKitError: the model or the recipe is at fault, or `out` exists.
    """
    started = time.monotonic()
    progress = progress or Progress()
    device = torch.device(device) if device is not None else default_device()
    out = Path(out)
    check_out(out)
    folder = resolve(source)
    config = read_config(folder)
    reader = CheckpointReader(folder)
    model = empty_model(config)
    job = Job(model, recipe, device)
    loader = BlockLoader(job, reader, device)

    calibration = allocation = None
    if recipe.target_bpw is not None:
        read_budget(model, recipe)
    if job.needs_tokens:
        if tokens is None:
            check_context(recipe.calibration.seq_len, config)
            tokenizer = load_tokenizer(folder) if recipe.calibration.source != "self" else None
            tokens = calibration_tokens(recipe.calibration, tokenizer, lambda: whole_model(folder, device))
        check_tokens(tokens, model)
        calibration = describe_calibration(recipe.calibration, tokens)
    files = [folder / "config.json", *reader.files]
    fingerprint = {
        "quantkit": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "recipe": recipe.to_dict(),
        "calibration": calibration,
    }
    packed_weights = packed_code_bytes = packed_bytes = 0

    with CheckpointWriter(out, fingerprint) as writer:
        if recipe.target_bpw is not None and tokens is not None:
            allocation = saved_allocation(writer)
            if allocation is None:
                check_room(model, tokens, device)
                allocation = allocate(whole_model(folder, device), recipe, tokens, progress.measure)
                write_text(writer.staging / ALLOCATION, json.dumps(allocation.to_dict()))
            progress.allocation(allocation)
            job.follow(allocation.recipe(recipe))

        def write(
            name: str, module: nn.Module, prefix: str, results: Callable[[], list[ModuleResult]]
        ) -> None:
            nonlocal packed_weights, packed_code_bytes, packed_bytes
            stored = writer.read_part(name)
            if stored is None:
                stored = loader.pack(module, prefix, results())
                writer.write_part(name, *stored)
            if job.activations is not None:
                # from the stored tensors, roundings and all, so that a continued run goes on as this one does
                loader.restore(module, prefix, stored[0])
            tensors, notes = stored
            packed_bytes += sum(tensor.nbytes for tensor in tensors.values())
            for note in notes:
                module_name = note.pop("name")
                job.modules[module_name] = note
                packed_weights += int(tensors[f"{module_name}.weight"].prod())
                packed_code_bytes += sum(
                    tensors[key].nbytes
                    for suffix in ("codes", "scales", "zeros", "input_scale")
                    if (key := f"{module_name}.{suffix}") in tensors
                )
                progress.module({"name": module_name, **note})
            progress.step()

        progress.start(len(job.blocks) + 1)
        loader.load_outer()
        if tokens is not None and job.needs_tokens:
            job.activations = capture(model, job.blocks, tokens, device)
        write(OUTER, model, "", job.quantize_outer)
        loader.unload_outer()
        for index, block in enumerate(job.blocks):
            with loader.loaded(index) as prefix:
                write(f"block-{index:05d}", block, prefix, partial(job.quantize_block, index))
                job.advance(index)
        finish(writer, job, folder, calibration)
    return Summary(
        job.modules,
        calibration,
        packed_weights,
        8 * packed_code_bytes / packed_weights,
        sum(t.stop - t.start for t in reader.tensors.values()),
        packed_bytes,
        time.monotonic() - started,
        allocation,
    )


def saved_allocation(writer: CheckpointWriter) -> Allocation | None:
    """What a killed run of the same job chose; None if it did not come so far."""
    try:
        return Allocation.from_dict(json.loads((writer.staging / ALLOCATION).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_out(out: Path) -> None:
    """Refuses, before the work, a directory that cannot be made."""
    if out.exists():
        raise QuantKitError(f"{out}: exists already; remove it or name another directory")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        fault = "not writable" if parent.is_dir() else "not a directory"
        raise QuantKitError(f"{parent}: {fault}, so {out} cannot be made; name another place")


class BlockLoader:
    """Brings parts of an empty model to life from a checkpoint, and back to nothing."""

    def __init__(self, job: Job, reader: CheckpointReader, device: torch.device) -> None:
        self.job, self.reader, self.device = job, reader, device
        tied = getattr(job.model, "all_tied_weights_keys", {})
        self.names = [name for name in job.model.state_dict() if name not in tied]
        for target, origin in tied.items():
            both = target in reader.tensors and origin in reader.tensors
            if both and sha256(reader.tensors[target]) != sha256(reader.tensors[origin]):
                raise QuantKitError(
                    f"{reader.folder / 'config.json'}: ties {target} to {origin}, but the files hold two different "
                    "tensors; set tie_word_embeddings to false"
                )
        unknown = {n for n in reader.tensors if n.startswith(f"{job.prefix}.")} - set(self.names)
        unknown = {
            name for name in unknown if not name.endswith("rotary_emb.inv_freq")
        }  # of old Llama exports
        if unknown:
            raise QuantKitError(
                f"{reader.tensors[min(unknown)].file}: holds {min(unknown)}, which the model of config.json does not "
                "have; they belong to different models"
            )
        self.dtypes: dict[str, torch.dtype] = {}  # as stored, of the part that is loaded

    def load(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        tensors = self.reader.load(names)
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        shapes = {name: parameter.shape for name, parameter in module.state_dict().items()}
        for name, tensor in tensors.items():
            if bad := not_finite(tensor):
                raise QuantKitError(
                    f"{self.reader.tensors[name].file}: {name}: {bad} of {tensor.numel()} values are NaN or "
                    "infinite; mend the source checkpoint"
                )
            if tensor.shape != shapes[name.removeprefix(prefix)]:
                raise QuantKitError(
                    f"{self.reader.tensors[name].file}: {name} is {list(tensor.shape)}, "
                    f"config.json makes it {list(shapes[name.removeprefix(prefix)])}; they belong to different models"
                )
        # half precision is slow on a CPU, and adds its own rounding to the statistics
        upcast = self.device.type == "cpu" and self.job.needs_tokens
        ready = {
            name.removeprefix(prefix): tensor.to(
                self.device, torch.float32 if upcast and tensor.is_floating_point() else None
            )
            for name, tensor in tensors.items()
        }
        module.load_state_dict(ready, strict=False, assign=True)

    def load_outer(self) -> None:
        """What lies outside the decoder blocks: embeddings, last norm, LM head."""
        self.outer = [name for name in self.names if not name.startswith(f"{self.job.prefix}.")]
        self.load(self.job.model, "", self.outer)
        self.job.model.tie_weights()
        for module in self.job.model.modules():  # rotary frequencies and the like
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def unload_outer(self) -> None:
        for module in self.job.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        self.job.model.tie_weights()

    @contextmanager
    def loaded(self, index: int) -> Iterator[str]:
        prefix = f"{self.job.prefix}.{index}."
        block = self.job.blocks[index]
        self.load(block, prefix, [name for name in self.names if name.startswith(prefix)])
        try:
            yield prefix
        finally:
            block.to("meta")
            release_memory()

    def pack(
        self, module: nn.Module, prefix: str, results: list[ModuleResult]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """The tensors to store for a loaded part: packed weights in the place of the planned ones."""
        state = module.state_dict()
        packed = {f"{result.plan.name}.weight" for result in results}
        tensors = {
            name: state[name.removeprefix(prefix)].to("cpu", dtype)
            for name, dtype in self.dtypes.items()
            if name not in packed
        }
        for result in results:
            name = result.plan.name
            tensors[f"{name}.weight"] = torch.tensor(result.quantized.shape)
            for suffix, tensor in result.quantized.tensors().items():
                tensors[f"{name}.{suffix}"] = tensor.cpu()
        return tensors, [{"name": result.plan.name, **result.to_dict()} for result in results]

    def restore(self, module: nn.Module, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        """Makes a loaded part what it was after `pack`, from the stored tensors."""
        state = module.state_dict()
        for name, current in state.items():
            full = prefix + name
            if full not in tensors:
                continue
            plan = self.job.plans.get(full.removesuffix(".weight"))
            if plan is not None and full.endswith(".weight"):
                stem = full.removesuffix(".weight")
                parts = {s: tensors.get(f"{stem}.{s}") for s in ("codes", "scales", "zeros", "input_scale")}
                quantized = QuantizedTensor(plan.scheme, tuple(tensors[full].tolist()), **parts)  # type: ignore[arg-type]
                current.copy_(quantized.dequantize(current.dtype))
            else:
                current.copy_(tensors[full])


def release_memory() -> None:
    """Gives freed memory back to the system.

    glibc keeps allocations below 32 MB for later ones, in pieces that the next block does not quite fit: a
    process then grows by tens of MB a block.
    """
    with suppress(AttributeError, OSError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def finish(writer: CheckpointWriter, job: Job, folder: Path, calibration: dict[str, Any] | None) -> None:
    """Turns the empty model into the one that will be loaded, for the order of its tensors, and closes the run."""
    model = job.model
    for name, plan in job.plans.items():
        replace_module(model, name, packed_twin(linear_called(model, name), plan.scheme))
    tied = getattr(model, "all_tied_weights_keys", {})
    state = model.state_dict()
    order = {name: state[name] for name in sorted(state, key=natural_key) if name not in tied}
    model.config.quantization_config = job.config(calibration)
    model.config.architectures = [type(model).__name__]

    def add_files(out: Path) -> None:
        model.config.save_pretrained(out)
        save_generation_config(model, folder, out)
        for pattern in COPIED:
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and file.name != INDEX:
                    shutil.copyfile(file, out / file.name)

    writer.finish(order, sum(parameter.numel() for parameter in model.parameters()), add_files)


def natural_key(name: str) -> list[tuple[int, str, int]]:
    """Sorts names of tensors as transformers does before it fills shards: numbers by value, and before words."""
    key = []
    for part in name.split("."):
        word = part.rstrip("0123456789")
        digits = part[len(word) :]
        key.append((1 if word else 0, word, int(digits) if digits else -1))
    return key


def save_generation_config(model: PreTrainedModel, folder: Path, out: Path) -> None:
    """As `save_pretrained` of the loaded model would write it; a file that transformers refuses is copied."""
    name = "generation_config.json"
    if not (folder / name).exists():
        model.generation_config.save_pretrained(out)
        return
    try:
        GenerationConfig.from_pretrained(folder).save_pretrained(out)
    except (ValueError, OSError):
        shutil.copyfile(folder / name, out / name)
