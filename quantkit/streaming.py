"""Quantizing from directory to directory with one decoder block in memory at a time."""

import ctypes
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from quantkit import __version__
from quantkit.allocation import Allocation, allocate, check_room, read_budget
from quantkit.calibration.channels import ScaleInput, scale_input
from quantkit.calibration.data import text_source
from quantkit.calibration.pipeline import ModuleResult, config_entry, not_finite
from quantkit.card import license_of, model_card
from quantkit.checkpoint import (
    INDEX,
    CheckpointReader,
    CheckpointWriter,
    StoredTensor,
    check_out,
    check_space,
    sha256,
    staging_folder,
    write_text,
)
from quantkit.errors import MachineError, QuantKitError, out_of_memory
from quantkit.eval import samples as sampling
from quantkit.eval.report_html import report_html
from quantkit.hf import linear_called, packed_twin
from quantkit.judge import judge
from quantkit.linear import replace_module, tensor_specs
from quantkit.load import load_model
from quantkit.names import model_names
from quantkit.packing import PARTS, QuantizedTensor
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
from quantkit.report import (
    CARD,
    HTML,
    REPORT,
    TIMINGS,
    BlockTiming,
    ModuleReport,
    Report,
    Sample,
    Timings,
    Verdict,
    report_json,
)
from quantkit.scheme import Scheme
from quantkit.source import COPIED, empty_model, first_line, load_tokenizer, read_config, resolve, whole_model
from quantkit.witness import WINDOW, Witness, unseen_text

ALLOCATION = "allocation.json"  # in OUT.partial: schemes chosen, which took a while
OUTER = "outer"  # the part that holds what lies outside the decoder blocks
GUARD_BYTES = 16  # of the two int64 in the place of a packed weight


@dataclass(frozen=True)
class Summary:
    """What a run did: modules and calibration as in config.json, weights packed, their bits, bytes before and after.

    `verdict` is there if a report was asked for, `allocation` if a `target_bpw` was.
    """

    modules: dict[str, dict[str, Any]]
    calibration: dict[str, Any] | None
    packed_weights: int
    bits_per_weight: float
    source_bytes: int
    packed_bytes: int
    seconds: float
    verdict: Verdict | None = None
    allocation: Allocation | None = None


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    device: torch.device | str | None = None,
    tokens: torch.Tensor | None = None,
    progress: Progress | None = None,
    report: bool = False,
) -> Summary:
    """Quantizes a model directory (or hub name) into `out`, one decoder block in memory at a time.

    A run that was killed leaves `out`.partial; the same call continues it and gives the same bytes.

    Args:
        device: where blocks are worked on; a GPU if there is one, by default.
        tokens: int64 [samples, seq_len] to calibrate on, in the place of the recipe's calibration.
        report: judge the result, and put a model card and a report beside it (FORMAT.md names the files). A
            model that is small or was sampled from is loaded once more for it, to let it write.

    Raises:
        QuantKitError: the model or the recipe is at fault, or `out` exists.
        MachineError: disk or memory are used up; `out`.partial keeps the finished blocks.
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
    reader.tensors = model_names(reader.tensors, model)
    loader = BlockLoader(job, reader, device)
    size = loader.packed_bytes()
    check_space(out, size)

    calibration = allocation = None
    held_whole = job.needs_tokens and tokens is None and recipe.calibration.source == "self"
    if recipe.target_bpw is not None:
        read_budget(model, recipe)
    if job.needs_tokens:
        if tokens is None:
            check_context(recipe.calibration.seq_len, config)
            tokenizer = load_tokenizer(folder) if recipe.calibration.source != "self" else None
            tokens = calibration_tokens(
                recipe.calibration, tokenizer, lambda: whole_model(folder, device), progress
            )
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
    reported: list[ModuleReport] = []
    timed: list[BlockTiming] = []
    module_seconds: dict[str, float] = {}
    verdict = None

    with memory_named(out), CheckpointWriter(out, fingerprint, size) as writer:
        if recipe.target_bpw is not None and tokens is not None:
            allocation = saved_allocation(writer)
            if allocation is None:
                check_room(model, tokens, device)
                allocation = allocate(whole_model(folder, device), recipe, tokens, progress.measure)
                with writer.writing(writer.staging / ALLOCATION):
                    write_text(writer.staging / ALLOCATION, json.dumps(allocation.to_dict()))
            progress.allocation(allocation)
            job.follow(allocation.recipe(recipe))

        def write(
            name: str, module: nn.Module, prefix: str, results: Callable[[], list[ModuleResult]]
        ) -> dict[str, torch.Tensor]:
            nonlocal packed_weights, packed_code_bytes, packed_bytes
            stored = writer.read_part(name)
            if stored is None:
                stored = loader.pack(module, prefix, results())
                writer.write_part(name, *stored)
            if job.runs_on:
                # from the stored tensors, roundings and all, so that a continued run goes on as this one does
                loader.restore(module, prefix, stored[0])
            tensors, notes = stored
            packed_bytes += sum(tensor.nbytes for tensor in tensors.values())
            for note in notes:
                module_name = note.pop("name")
                if (took := note.pop("seconds", None)) is not None:
                    module_seconds[module_name] = took
                job.modules[module_name] = config_entry(note)
                N, K = tensors[f"{module_name}.weight"].tolist()
                code_bytes = sum(
                    tensors[key].nbytes for suffix in PARTS if (key := f"{module_name}.{suffix}") in tensors
                )
                packed_weights += N * K
                packed_code_bytes += code_bytes
                scales = tensors[f"{module_name}.scales"].float()
                bad = int((~(scales.isfinite() & (scales != 0))).sum())
                bits = 8 * code_bytes / (N * K)
                reported.append(ModuleReport(module_name, N, K, bits=bits, bad_scales=bad, **note))
                progress.module({"name": module_name, **note})
            progress.step()
            return tensors

        progress.start(len(job.blocks) + 1)
        loader.load_outer()
        job.rotate_outer()
        if tokens is not None and job.needs_tokens:
            job.capture(tokens)
        witness = call_witness(job, folder, tokens) if report else None
        write(OUTER, model, "", job.quantize_outer)
        loader.unload_outer()
        for index, block in enumerate(job.blocks):
            begun, new = time.monotonic(), not writer.part(f"block-{index:05d}").exists()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with loader.loaded(index) as prefix:
                job.begin(index)
                if witness:
                    witness.begin(index)
                stored = write(f"block-{index:05d}", block, prefix, partial(job.quantize_block, index))
                job.advance(index, input_scales(stored, prefix))
                if witness:
                    witness.advance(index, input_scales(stored, prefix))
            if new:
                peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
                timed.append(BlockTiming(index, time.monotonic() - begun, peak))

        held_out = None
        if witness:
            loader.load_outer()
            job.rotate_outer()
            held_out = witness.testify()
            loader.unload_outer()

        def add_report(folder_out: Path) -> None:
            nonlocal verdict
            source_bytes = sum(t.stop - t.start for t in reader.tensors.values())
            written, skipped = try_out(folder, folder_out, device, source_bytes, held_whole)
            order = {name: i for i, name in enumerate(job.plans)}
            found = Report(
                model=str(source) if folder != Path(source) else folder.resolve().name,
                on_hub=folder != Path(source),
                architecture=type(model).__name__,
                schemes={plan.scheme.label: plan.scheme.to_dict() for plan in job.plans.values()},
                recipe=recipe.to_dict(),
                calibration=calibration,
                versions={
                    "quantkit": __version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                source_bytes=source_bytes,
                packed_bytes=packed_bytes,
                modules=tuple(sorted(reported, key=lambda module: order[module.name])),
                license=license_of(folder),
                blocks=tuple(witness.blocks) if witness else (),
                held_out=held_out,
                samples=written,
                samples_skipped=skipped,
            )
            verdict = judge(found)
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            timings = Timings(time.monotonic() - started, peak, tuple(timed), module_seconds)
            write_report(folder_out, replace(found, verdict=verdict), timings)

        finish(writer, job, folder, calibration, add_report if report else None)
    return Summary(
        job.modules,
        calibration,
        packed_weights,
        8 * packed_code_bytes / packed_weights,
        sum(t.stop - t.start for t in reader.tensors.values()),
        packed_bytes,
        time.monotonic() - started,
        verdict,
        allocation,
    )


def call_witness(job: Job, folder: Path, calibration: torch.Tensor | None) -> Witness | None:
    """Text to judge the run by; None if the model has no tokenizer."""
    source = job.recipe.calibration.source if calibration is not None else "self"
    context = getattr(job.model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    try:
        tokenizer = load_tokenizer(folder)
        text = None if source == "self" else text_source(source)
        found = Witness(job, *unseen_text(tokenizer, source, text, calibration, context))
    except QuantKitError:
        return None
    job.watched = True
    return found


@contextmanager
def memory_named(out: Path) -> Iterator[None]:
    """Turns the end of the memory into one line that says how to go on."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MachineError(
            f"out of memory ({first_line(error)}); {staging_folder(out)} keeps the finished blocks, and the same "
            "command continues where more memory is free; a smaller --samples needs less, and begins anew"
        ) from error


def saved_allocation(writer: CheckpointWriter) -> Allocation | None:
    """What a killed run of the same job chose; None if it did not come so far."""
    try:
        return Allocation.from_dict(json.loads((writer.staging / ALLOCATION).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_report(folder: Path, report: Report, timings: Timings) -> None:
    """Puts a report that was judged, and the model card, into a checkpoint's folder."""
    write_text(folder / REPORT, report_json(report))
    write_text(folder / TIMINGS, report_json(timings))
    write_text(folder / CARD, model_card(report))
    write_text(folder / HTML, report_html(report, timings))


def try_out(
    source: Path, packed: Path, device: torch.device, source_bytes: int, held_whole: bool
) -> tuple[tuple[Sample, ...], str]:
    """What both models write, or why they were not asked to."""
    if skipped := sampling.why_not(source_bytes, held_whole, device):
        return (), skipped
    dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        tokenizer = load_tokenizer(source)
        return sampling.samples(
            lambda: whole_model(source, device), lambda: load_model(packed, device, dtype=dtype), tokenizer
        ), ""
    except (
        Exception
    ) as error:  # the checkpoint is made: whatever `generate` makes of an odd model costs the sample alone
        return (), first_line(error)
    finally:
        release_memory()


def packed_weight_bytes(scheme: Scheme, N: int, K: int, channel_scales: bool = False) -> int:
    """Bytes of codes, scales and zeros of a packed weight [N, K]."""
    specs = tensor_specs(scheme, N, K, channel_scales=channel_scales)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def input_scales(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The static activation scales among a part's tensors, by the names of their linears inside the block."""
    suffix = ".input_scale"
    return {
        name.removeprefix(prefix).removesuffix(suffix): tensor
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }


class BlockLoader:
    """Brings parts of an empty model to life from a checkpoint, and back to nothing."""

    def __init__(self, job: Job, reader: CheckpointReader, device: torch.device) -> None:
        self.job, self.reader, self.device = job, reader, device
        tied = getattr(job.model, "all_tied_weights_keys", {})
        self.names = [name for name in job.model.state_dict() if name not in tied]
        for target, origin in (tied | job.untied).items():
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
        for name, parameter in job.model.state_dict().items():
            stored = self.find(name) if name not in tied else None
            if stored is not None and stored.shape != parameter.shape:
                raise QuantKitError(
                    f"{stored.file}: {name} is {list(stored.shape)}, config.json makes it {list(parameter.shape)}; "
                    "they belong to different models"
                )
        self.dtypes: dict[str, torch.dtype] = {}  # as stored, of the part that is loaded
        self.reading = ThreadPoolExecutor(1)
        self.ahead: tuple[list[str], Future[dict[str, torch.Tensor]]] | None = (
            None  # names and what becomes of them
        )

    def find(self, name: str) -> StoredTensor:
        """Where a tensor's values lie: its own, or those of the tensor that it was tied to."""
        return self.reader.find(self.job.untied.get(name, name))

    def packed_bytes(self) -> int:
        """Bytes of all tensors that `pack` will give to store."""
        planned = {f"{name}.weight" for name in self.job.plans}
        kept = (self.find(name) for name in self.names if name not in planned)
        packed = 0
        for plan in self.job.all_plans():
            linear = linear_called(self.job.model, plan.name)
            N, K = linear.out_features, linear.in_features
            packed += GUARD_BYTES + packed_weight_bytes(plan.scheme, N, K, plan.channel_scales)
        return packed + sum(tensor.stop - tensor.start for tensor in kept)

    def load(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        tensors = self.ahead[1].result() if self.ahead and self.ahead[0] == names else self.read(names)
        self.ahead = None
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
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

    def block_names(self, index: int) -> list[str]:
        return [name for name in self.names if name.startswith(f"{self.job.prefix}.{index}.")]

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors as they are stored, and found to be finite."""
        origins = {name: self.job.untied.get(name, name) for name in names}
        stored = self.reader.load(dict.fromkeys(origins.values()))
        for name, tensor in stored.items():
            if bad := not_finite(tensor):
                raise QuantKitError(
                    f"{self.reader.tensors[name].file}: {name}: {bad} of {tensor.numel()} values are NaN or "
                    "infinite; mend the source checkpoint"
                )
        return {name: stored[origin] for name, origin in origins.items()}

    @contextmanager
    def loaded(self, index: int) -> Iterator[str]:
        """A block with its weights, while it lasts; on a GPU the next one's are read meanwhile."""
        prefix = f"{self.job.prefix}.{index}."
        block = self.job.blocks[index]
        self.load(block, prefix, self.block_names(index))
        if self.device.type == "cuda":
            self.ahead = (
                self.block_names(index + 1),
                self.reading.submit(self.read, self.block_names(index + 1)),
            )
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
                parts = {
                    suffix: tensor.to(current.device)
                    for suffix in PARTS
                    if (tensor := tensors.get(f"{stem}.{suffix}")) is not None
                }
                quantized = QuantizedTensor(plan.scheme, tuple(tensors[full].tolist()), **parts)
                current.copy_(quantized.dequantize(current.dtype))
                c = quantized.channel_scales
                linear = linear_called(module, stem.removeprefix(prefix))
                scale_input(linear, None if c is None else ScaleInput(c))
            else:
                current.copy_(tensors[full])


def release_memory() -> None:
    """Gives freed memory back to the system.

    glibc keeps allocations below 32 MB for later ones, in pieces that the next block does not quite fit: a
    process then grows by tens of MB a block.
    """
    with suppress(AttributeError, OSError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def finish(
    writer: CheckpointWriter,
    job: Job,
    folder: Path,
    calibration: dict[str, Any] | None,
    add_report: Callable[[Path], None] | None,
) -> None:
    """Turns the empty model into the one that will be loaded, for the order of its tensors, and closes the run."""
    model = job.model
    for name, plan in job.plans.items():
        scaled = job.modules[name].get("channel_scales", False)
        replace_module(
            model, name, packed_twin(linear_called(model, name), plan.scheme, channel_scales=scaled)
        )
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
        if add_report is not None:
            add_report(out)

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
