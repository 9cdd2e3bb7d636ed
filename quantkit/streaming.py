"""Quantizing from directory to directory with one decoder block in memory at a time."""

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from quantkit import __version__
from quantkit.allocation import Allocation, allocate, check_room, read_budget
from quantkit.block_loader import BlockLoader
from quantkit.calibration.pipeline import ModuleResult, config_entry, to_host
from quantkit.card import license_of, model_card
from quantkit.checkpoint import (
    INDEX,
    CheckpointWriter,
    check_out,
    check_space,
    staging_folder,
    write_text,
)
from quantkit.errors import MachineError, QuantKitError, out_of_memory
from quantkit.eval import samples as sampling
from quantkit.eval.report_html import report_html
from quantkit.formats import PLAIN, open_original
from quantkit.hf import linear_called, packed_twin
from quantkit.judge import judge
from quantkit.linear import replace_module
from quantkit.names import model_names
from quantkit.packing import PARTS
from quantkit.peers import Peers
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
    HeldOut,
    ModuleReport,
    Report,
    Timings,
    Verdict,
    report_json,
)
from quantkit.source import COPIED, empty_model, first_line, load_tokenizer, whole_model
from quantkit.witness import Witness, call_witness

ALLOCATION = "allocation.json"  # in OUT.partial: schemes chosen, which took a while
T = TypeVar("T")
Stored = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]  # of a part: tensors, and notes on its linears
LOCKED = 1 << 28  # bytes of a tensor: larger ones do not go by way of locked memory, which stays locked
OUTER = "outer"  # the part that holds what lies outside the decoder blocks


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
    peers: Peers | None = None,
) -> Summary:
    """Quantizes a model directory (or hub name) into `out`, one decoder block in memory at a time.

    A run that was killed leaves `out`.partial; the same call continues it and gives the same bytes. So does a call with
    another number of processes, whose blocks have other roundings in the sums of their statistics.

    Args:
        device: where blocks are worked on; a GPU if there is one, by default.
        tokens: int64 [samples, seq_len] to calibrate on, in the place of the recipe's calibration.
        report: judge the result, and put a model card and a report beside it (FORMAT.md names the files). A
            model that is small or was sampled from is loaded once more for it, to let it write.
        peers: the processes that do it together (`quantkit.peers.join`), each with this call; the first one writes.

    Raises:
        QuantKitError: the model or the recipe is at fault, or `out` exists.
        MachineError: disk or memory are used up; `out`.partial keeps the finished blocks.
    """
    device = torch.device(device) if device is not None else default_device()
    return Run(source, Path(out), recipe, device, progress or Progress(), report, peers).quantize(tokens)


class Run:
    """One model on its way from its folder to OUT; `quantize` has the order of things.

    Attributes:
        recipe: as it was asked for; that of the job has the schemes which a `target_bpw` led to.
        tokens: int64 [samples, seq_len] to calibrate on, if there are any; `calibration` describes them.
        held_whole: the whole model was in memory, for its calibration tokens to be sampled.
        reported, timed, seconds: of the linears packed so far, the blocks, the linears again, for the report.
        packed_bytes: of the tensors stored so far. Of the linears among them the bytes of codes, scales and zeros are
            `code_bytes`, for `weights` weights.
    """

    writer: CheckpointWriter

    def __init__(
        self,
        source: str | Path,
        out: Path,
        recipe: Recipe,
        device: torch.device,
        progress: Progress,
        report: bool,
        peers: Peers | None = None,
    ) -> None:
        """Refuses what can be refused before the work."""
        self.peers = peers
        self.first = peers is None or peers.first  # of the processes: it writes, and judges
        self.started = time.monotonic()
        self.source, self.out, self.recipe, self.device = source, out, recipe, device
        self.progress, self.report = progress, report and self.first
        check_out(out)
        original = open_original(source)
        self.folder, self.original = original.folder, original.path
        self.reader = original.reader
        self.model = empty_model(original.config)
        if original.format != PLAIN:
            note = f"{source} is packed ({original.format}): its linears are dequantized, and quantized anew"
            self.progress.note(note)
        for note in original.notes:
            self.progress.note(note)
        self.job = Job(self.model, recipe, device, peers)
        self.reader.tensors = model_names(self.reader.tensors, self.model)
        self.source_bytes = sum(tensor.stop - tensor.start for tensor in self.reader.tensors.values())
        self.loader = BlockLoader(self.job, self.reader, device)
        self.size = self.loader.packed_bytes()
        check_space(out, self.size)
        if recipe.target_bpw is not None:
            read_budget(self.model, recipe)

        self.tokens: torch.Tensor | None = None
        self.calibration: dict[str, Any] | None = None
        self.held_whole = False
        self.allocation: Allocation | None = None
        self.witness: Witness | None = None
        self.held_out: HeldOut | None = None
        self.verdict: Verdict | None = None
        self.reported: list[ModuleReport] = []
        self.timed: list[BlockTiming] = []
        self.seconds: dict[str, float] = {}
        self.weights = self.code_bytes = self.packed_bytes = 0
        self.writing = ThreadPoolExecutor(1)
        self.at_work: Future[None] | None = None  # on the part before

    def quantize(self, tokens: torch.Tensor | None) -> Summary:
        """The whole run, from the given tokens, if any, to OUT."""
        self.find_tokens(tokens)
        with memory_named(self.out), self.opened_writer():
            self.choose_schemes()
            if self.first:
                kinds = self.loader.packed_kinds()
                self.writer.expect({name: kinds[name] for name in sorted(kinds, key=natural_key)})
            self.progress.start(len(self.job.blocks) + 1)
            self.quantize_outer()
            for index in range(len(self.job.blocks)):
                self.quantize_block(index)
            self.hear_witness()
            self.from_first(self.written, "the last block")
            if self.first:
                self.finish()
        return Summary(
            self.job.modules,
            self.calibration,
            self.weights,
            8 * self.code_bytes / self.weights,
            self.source_bytes,
            self.packed_bytes,
            time.monotonic() - self.started,
            self.verdict,
            self.allocation,
        )

    @contextmanager
    def opened_writer(self) -> Iterator[None]:
        """The writer, on the first process alone, once all have been found to work at the same thing."""
        if self.peers is not None:
            tensors = sorted((name, t.dtype, t.shape) for name, t in self.reader.tensors.items())
            job = {**self.identity(), "source": tensors, "report": None}
            text = json.dumps(job, sort_keys=True, default=str)
            self.peers.agree(sha256(text.encode()).hexdigest()[:16], "model, recipe, tokens and versions")
        with (
            CheckpointWriter(self.out, self.identity(), self.size) if self.first else nullcontext() as writer
        ):
            if writer is not None:
                self.writer = writer
            try:
                yield
            finally:
                if self.at_work is not None:  # whatever ends the run, the folder is not left to a thread
                    wait([self.at_work])

    def from_first(self, call: Callable[[], T], doing: str) -> T:
        """What a call gives on the first process, which alone makes it."""
        return call() if self.peers is None else self.peers.from_first(call, doing)

    def find_tokens(self, tokens: torch.Tensor | None) -> None:
        """The tokens to calibrate on, given or by the recipe."""
        if self.job.needs_tokens:
            spec = self.recipe.calibration
            if tokens is None:
                check_context(spec.seq_len, self.model.config)
                self.held_whole = spec.source == "self"
                tokenizer = None if self.held_whole else load_tokenizer(self.folder)
                tokens = calibration_tokens(
                    spec, tokenizer, lambda: whole_model(self.original, self.device), self.progress
                )
            check_tokens(tokens, self.model)
            if self.peers is not None:
                found = tokens
                tokens = self.from_first(lambda: found, "calibration tokens")
                if len(tokens) < self.peers.count:
                    raise QuantKitError(
                        f"{len(tokens)} calibration sequences for {self.peers.count} processes, expected one each or more; "
                        "use more samples, or fewer processes"
                    )
            self.calibration = describe_calibration(spec, tokens)
        self.tokens = tokens

    def identity(self) -> dict[str, Any]:
        """What makes the bytes of OUT, by which a run knows what a killed one left of the same job."""
        files = [f for f in (self.folder / "config.json", *self.reader.files) if f.is_file()]
        return {
            "quantkit": __version__,
            "torch": torch.__version__,
            "device": self.device.type,
            "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
            "recipe": self.recipe.to_dict(),
            "calibration": self.calibration,
        }

    def choose_schemes(self) -> None:
        """Measures the model where there is a `target_bpw`, unless a killed run did, and plans anew."""
        if self.recipe.target_bpw is None or self.tokens is None:
            return
        saved = staging_folder(self.out) / ALLOCATION
        self.allocation = self.from_first(lambda: read_allocation(saved), "schemes")
        if self.allocation is None:
            check_room(self.model, self.tokens, self.device)
            found = allocate(
                whole_model(self.original, self.device), self.recipe, self.tokens, self.progress.measure
            )
            self.allocation = self.from_first(lambda: found, "schemes")
            if self.first:
                with self.writer.writing(saved):
                    write_text(saved, json.dumps(self.allocation.to_dict()))
        self.progress.allocation(self.allocation)
        self.job.follow(self.allocation.recipe(self.recipe))

    @contextmanager
    def outer_loaded(self) -> Iterator[None]:
        """What lies outside the decoder blocks with its weights, while it lasts."""
        self.loader.load_outer()
        self.job.rotate_outer()
        yield
        self.loader.unload_outer()

    def quantize_outer(self) -> None:
        """Also takes what is read on the way, calibration and held-out text, up to the first block."""
        with self.outer_loaded():
            self.loader.read_ahead(0)
            self.store(OUTER, self.model, "", self.job.quantize_outer)  # first: it is long in being written
            if self.tokens is not None and self.job.needs_tokens:
                self.job.capture(self.tokens)
            if self.report:
                self.witness = call_witness(self.job, self.folder, self.tokens)

    def quantize_block(self, index: int) -> None:
        block, part = self.job.blocks[index], f"block-{index:05d}"
        with self.timing(index, part), self.loader.loaded(index) as prefix:
            self.job.begin(index)
            if self.witness:
                self.witness.begin(index)
            tensors = self.store(part, block, prefix, partial(self.job.quantize_block, index))
            self.job.advance(index, input_scales(tensors, prefix))
            if self.witness:
                self.witness.advance(index, input_scales(tensors, prefix))

    @contextmanager
    def timing(self, index: int, part: str) -> Iterator[None]:
        """Notes what a block takes, unless a killed run packed it."""
        begun, new = time.monotonic(), self.first and not self.writer.part(part).exists()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if new:
            peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
            self.timed.append(BlockTiming(index, time.monotonic() - begun, peak))

    def store(
        self, part: str, module: nn.Module, prefix: str, results: Callable[[], list[ModuleResult]]
    ) -> dict[str, torch.Tensor]:
        """Packs and stores a loaded part, or takes what a killed run stored; the tensors in its file."""
        stored = self.from_first(lambda: self.writer.read_part(part), part)
        found = stored is not None
        if stored is None:
            stored = self.loader.pack(module, prefix, results())
        self.from_first(self.written, "the part before")
        if self.first and not found:
            self.write(part, *stored)
        tensors, notes = stored
        if self.job.runs_on and part != OUTER:
            # from the stored tensors, roundings and all, so that a continued run goes on as this one does
            self.loader.restore(module, prefix, tensors, packed=found)
        self.packed_bytes += sum(tensor.nbytes for tensor in tensors.values())
        for note in notes:
            self.enter(note, tensors)
        if self.at_work is None:
            self.progress.step()
        return tensors

    def write(self, part: str, tensors: dict[str, torch.Tensor], notes: list[dict[str, Any]]) -> None:
        """Stores a part while the next one is worked on; `written` then says that it is done."""
        ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

        def work() -> None:
            self.writer.write_part(part, on_host(tensors, ready, self.device), notes)

        self.at_work = self.writing.submit(work)

    def written(self) -> None:
        """Waits for the part that is being stored, if one is, and raises what that raised."""
        if self.at_work is not None:
            self.at_work.result()
            self.at_work = None
            self.progress.step()

    def enter(self, note: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Enters a packed linear in the figures, from what is stored of it."""
        note = dict(note)  # the caller's is being stored
        name = note.pop("name")
        if (took := note.pop("seconds", None)) is not None:
            self.seconds[name] = took
        self.job.modules[name] = config_entry(note)
        N, K = tensors[f"{name}.weight"].tolist()
        code_bytes = sum(tensors[key].nbytes for suffix in PARTS if (key := f"{name}.{suffix}") in tensors)
        self.weights += N * K
        self.code_bytes += code_bytes
        scales = tensors[f"{name}.scales"].float()
        bad = int((~(scales.isfinite() & (scales != 0))).sum())
        bits = 8 * code_bytes / (N * K)
        self.reported.append(ModuleReport(name, N, K, bits=bits, bad_scales=bad, **note))
        self.progress.module({"name": name, **note})

    def hear_witness(self) -> None:
        if self.witness:
            with self.outer_loaded():
                self.held_out = self.witness.testify()

    def finish(self) -> None:
        """Turns the empty model into the one that will be loaded, for the order of its tensors, and shows OUT."""
        model, job = self.model, self.job
        for name, plan in job.plans.items():
            scaled = job.modules[name].get("channel_scales", False)
            replace_module(
                model, name, packed_twin(linear_called(model, name), plan.scheme, channel_scales=scaled)
            )
        tied = getattr(model, "all_tied_weights_keys", {})
        state = model.state_dict()
        order = [name for name in sorted(state, key=natural_key) if name not in tied]
        model.config.quantization_config = job.config(self.calibration)
        model.config.architectures = [type(model).__name__]
        self.writer.finish(order, sum(parameter.numel() for parameter in model.parameters()), self.add_files)

    def add_files(self, out: Path) -> None:
        """Puts what belongs beside the tensors into the folder that will be OUT."""
        self.model.config.save_pretrained(out)
        save_generation_config(self.model, self.folder, out)
        for pattern in COPIED:
            for file in sorted(self.folder.glob(pattern)):
                if file.is_file() and file.name != INDEX:
                    shutil.copyfile(file, out / file.name)
        if self.report:
            report = self.judged(out)
            self.verdict = report.verdict
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            timings = Timings(time.monotonic() - self.started, peak, tuple(self.timed), self.seconds)
            write_report(out, report, timings)

    def judged(self, packed: Path) -> Report:
        """The report on the run, with its verdict; `packed` can be loaded already."""
        written, skipped = sampling.try_out(
            self.folder, self.original, packed, self.device, self.source_bytes, self.held_whole
        )
        order = {name: i for i, name in enumerate(self.job.plans)}
        on_hub = self.folder != Path(self.source)
        report = Report(
            model=str(self.source) if on_hub else self.folder.resolve().name,
            on_hub=on_hub,
            architecture=type(self.model).__name__,
            schemes={plan.scheme.label: plan.scheme.to_dict() for plan in self.job.plans.values()},
            recipe=self.recipe.to_dict(),
            calibration=self.calibration,
            versions={
                "quantkit": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            device=torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else self.device.type,
            source_bytes=self.source_bytes,
            packed_bytes=self.packed_bytes,
            modules=tuple(sorted(self.reported, key=lambda module: order[module.name])),
            license=license_of(self.folder),
            blocks=tuple(self.witness.blocks) if self.witness else (),
            held_out=self.held_out,
            samples=written,
            samples_skipped=skipped,
        )
        return replace(report, verdict=judge(report))


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


def on_host(
    tensors: dict[str, torch.Tensor], ready: torch.cuda.Event | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors on the CPU. Those of a GPU are there once it is `ready`, and are copied beside what it goes on with."""
    if ready is None:
        return tensors
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        ready.wait()
        host = {
            name: to_host(tensor) if tensor.nbytes <= LOCKED else tensor.cpu()
            for name, tensor in tensors.items()
        }
    stream.synchronize()
    return host


def read_allocation(file: Path) -> Allocation | None:
    """What a killed run of the same job chose; None if it did not come so far."""
    try:
        return Allocation.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_report(folder: Path, report: Report, timings: Timings) -> None:
    """Puts a report that was judged, and the model card, into a checkpoint's folder."""
    write_text(folder / REPORT, report_json(report))
    write_text(folder / TIMINGS, report_json(timings))
    write_text(folder / CARD, model_card(report))
    write_text(folder / HTML, report_html(report, timings))


def input_scales(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The static activation scales among a part's tensors, by the names of their linears inside the block."""
    suffix = ".input_scale"
    return {
        name.removeprefix(prefix).removesuffix(suffix): tensor
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }


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
