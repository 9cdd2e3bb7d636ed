"""From one packed format to another, one decoder block in memory at a time: the same codes, or a refusal.

A linear is read as quantkit's own `QuantizedTensor` where that holds its numbers, and written in the other format
where that holds them. Where either does not, it is rounded anew, but only if that was asked for.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantkit import __version__
from quantkit.block_loader import GUARD, release_memory
from quantkit.checkpoint import (
    INDEX,
    CheckpointWriter,
    StoredTensor,
    check_out,
    check_space,
    size_of,
    sync,
    tensor_bytes,
    write_text,
)
from quantkit.errors import QuantKitError
from quantkit.foreign import check_requantize, entry_of, round_anew, skeleton_of
from quantkit.formats import Source, gguf_blocks, open_source
from quantkit.formats.affine import Linear, check_finite
from quantkit.formats.gguf_file import ALIGNMENT, header_bytes
from quantkit.formats.gguf_names import (
    ROPE_FACTORS,
    TURNED,
    gguf_name,
    heads_of,
    metadata_of,
    rope_factors,
    turn,
)
from quantkit.formats.gguf_tokenizer import tokenizer_metadata
from quantkit.formats.writers import GGUF, WRITERS
from quantkit.hf import QuantKitConfig
from quantkit.models import linears
from quantkit.packing import QuantizedTensor
from quantkit.quantize import Progress
from quantkit.scheme import Scheme, parse_scheme
from quantkit.source import COPIED
from quantkit.streaming import OUTER, memory_named, natural_key, save_generation_config

GGUF_FILE = "model.gguf"
# Names that models have on the hub where transformers renames them as it loads.
ON_HUB = {
    "mixtral": (
        (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
        (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
        (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
        (r"\.mlp\.gate\.", r".block_sparse_moe.gate."),
    )
}


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        source_format, target: of SRC and OUT.
        modules: of each linear `scheme` (quantkit's, or a type of GGUF), `exact`, whether its numbers are the same, and where
            not the relative `error`, |new - old| / |old|, and the `reason`.
        notes: what else the user should know.
        source_bytes, packed_bytes: of all tensors.
    """

    source_format: str
    target: str
    modules: dict[str, dict[str, Any]]
    notes: list[str]
    source_bytes: int
    packed_bytes: int

    @property
    def rounded(self) -> list[str]:
        """The linears that were rounded anew."""
        return [name for name, entry in self.modules.items() if not entry["exact"]]


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    requantize: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the model of a packed checkpoint in another format.

    Args:
        source: a directory, a GGUF file or a name on the hub, packed in any format that quantkit reads.
        out: the directory to make.
        to: quantkit, gptq, gptq_v2, awq, compressed-tensors, fp8 or gguf.
        requantize: a scheme (for gguf q4_0, q8_0 or q4_k) for the linears that either format cannot hold as they are;
            None: they are refused.

    Raises:
        QuantKitError: a linear cannot be held and nothing is said of rounding it anew, or the input is bad; OUT is not made.
        MachineError: disk or memory are used up; the same command continues.
    """
    return Run(source, Path(out), to, requantize, progress or Progress()).convert()


@dataclass
class Kept:
    """What a part's file does not say: the tensors' place in OUT, and the linears."""

    order: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    types: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # of GGUF: type and shape


class Run:
    """One checkpoint on its way from its files to OUT."""

    writer: CheckpointWriter

    def __init__(
        self, source: str | Path, out: Path, to: str, requantize: str | None, progress: Progress
    ) -> None:
        """Refuses what can be refused before the work."""
        if to not in WRITERS:
            raise QuantKitError(f"--to {to}: expected one of {', '.join(WRITERS)}")
        self.out, self.to, self.progress = out, to, progress
        self.target = WRITERS[to]
        self.requantize = self.read_requantize(requantize)
        check_out(out)
        self.source: Source = open_source(source)
        if self.source.format == to:
            raise QuantKitError(f"{source}: is of format {to} already; copy it")
        self.skeleton = skeleton_of(self.source)
        self.reader = self.skeleton.reader
        stored = {name: self.reader.find(name) for name in self.skeleton.names}
        self.files = {name: tensor.name for name, tensor in stored.items() if not tensor.index}
        self.notes = list(self.source.notes)
        self.kept = Kept()
        self.metadata: dict[str, Any] = {}
        if to == GGUF:
            self.check_gguf()
        self.source_bytes = self.reader.stored_bytes
        check_space(out, self.source_bytes)

    def read_requantize(self, text: str | None) -> Scheme | str | None:
        """The scheme, or the type of GGUF, that weights are to be rounded to."""
        if text is None:
            return None
        if self.to == GGUF:
            if text.lower() not in gguf_blocks.WRITTEN:
                raise QuantKitError(
                    f"--requantize {text}: with --to gguf expected one of {', '.join(gguf_blocks.WRITTEN)}"
                )
            return text.upper()
        scheme = parse_scheme(text)
        check_requantize(scheme)
        return scheme

    def check_gguf(self) -> None:
        """Refuses models that GGUF has no names or metadata for; keeps the metadata."""
        config = self.source.config
        self.metadata = metadata_of(config, self.source.folder.resolve().name, "F16")
        for name in self.skeleton.names:
            gguf_name(name)
        tokenizer, note = tokenizer_metadata(self.source.folder, config)
        self.metadata |= tokenizer
        self.notes += [note] if note else []

    def convert(self) -> Conversion:
        parts = self.parts()
        with (
            memory_named(self.out),
            CheckpointWriter(self.out, self.identity(), self.source_bytes) as self.writer,
        ):
            self.progress.start(len(parts))
            for part, names in parts.items():
                self.convert_part(part, names)
            if self.to == GGUF:
                self.writer.publish(self.fill_gguf)
            else:
                sizes = (meta.numel() for name, meta in self.kept.order.items() if not self.is_guard(name))
                self.writer.finish(
                    self.kept.order, sum(sizes), self.add_files, manifest=self.to == "quantkit"
                )
        packed = sum(meta.nbytes for meta in self.kept.order.values())
        return Conversion(
            self.source.format, self.to, self.kept.modules, self.notes, self.source_bytes, packed
        )

    def is_guard(self, name: str) -> bool:
        meta = self.kept.order[name]
        return name.removesuffix(".weight") in self.kept.modules and meta.nbytes == size_of(GUARD)

    def parts(self) -> dict[str, list[str]]:
        """The model's tensors by the parts in which they are converted: what is outside the blocks, and each block."""
        found: dict[str, list[str]] = {OUTER: []}
        for name in sorted(self.skeleton.names, key=natural_key):
            inner = name.removeprefix(f"{self.skeleton.prefix}.")
            index = inner.partition(".")[0] if inner != name else ""
            found.setdefault(f"block-{int(index):05d}" if index else OUTER, []).append(name)
        return found

    def identity(self) -> dict[str, Any]:
        """What makes the bytes of OUT, by which a run knows what a killed one left of the same job."""
        files = [file for file in (self.source.folder / "config.json", *self.reader.files) if file.is_file()]
        asked = self.requantize.label if isinstance(self.requantize, Scheme) else self.requantize
        return {
            "quantkit": __version__,
            "convert": self.to,
            "requantize": asked,
            "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        }

    def convert_part(self, part: str, names: list[str]) -> None:
        """Converts and stores one part, unless a killed run did, and keeps what there is to say of it."""
        stored = self.writer.read_part(part)
        if stored is None:
            stored = self.converted(names)
            self.writer.write_part(part, *stored)
        tensors, notes = stored
        self.kept.order |= {name: tensor.to("meta") for name, tensor in tensors.items()}
        for note in notes:
            if "type" in note:
                self.kept.types[note["tensor"]] = note["type"], note["shape"]
            if "module" in note:
                self.kept.modules[note["module"]] = note["entry"]
                if "of" in note:
                    self.kept.schemes[note["module"]] = Scheme(**note["of"])
                self.progress.module({"name": note["module"], **note["entry"]})
        del stored, tensors
        release_memory()
        self.progress.step()

    def converted(self, names: list[str]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """The tensors of a part in the target format, by their names in it, and notes on them."""
        packed = self.skeleton.packed(names)
        tensors: dict[str, torch.Tensor] = {}
        notes: list[dict[str, Any]] = []
        for name, tensor in self.reader.load_plain([n for n in names if n not in packed]).items():
            module, _, suffix = name.rpartition(".")
            check_finite(f"{self.reader.find(name).file}: {module}", **{suffix: tensor})
            if self.to == GGUF:
                notes.append(self.put_gguf(tensors, name, *plain_gguf(tensor)))
            else:
                tensors[self.out_name(name)] = tensor
        for name in packed:
            module = self.out_name(name).removesuffix(".weight")
            linear = self.reader.linear(name)
            if self.to == GGUF:
                kind, raw, entry = self.gguf_linear(module, linear)
                shape = list(self.skeleton.model.get_parameter(name).shape)
                note = self.put_gguf(tensors, name, kind, raw, shape)
                notes.append({**note, "module": module, "entry": entry})
                continue
            quantized, entry = self.held(module, linear)
            tensors |= {f"{module}.{suffix}": t for suffix, t in self.target.tensors(quantized).items()}
            entry |= entry_of(quantized, self.source.format if entry["exact"] else "rtn")
            notes.append({"module": module, "entry": entry, "of": quantized.scheme.to_dict()})
        return tensors, notes

    def out_name(self, name: str) -> str:
        """The name of a tensor in OUT: the model's in quantkit's format, else that in the source's files, or on the hub."""
        if self.to == "quantkit":
            return name
        if self.source.format != "quantkit":
            return self.files.get(name, name)
        for pattern, theirs in ON_HUB.get(self.source.config.model_type, ()):
            name = re.sub(pattern, theirs, name)
        return name

    def held(self, module: str, linear: Linear) -> tuple[QuantizedTensor, dict[str, Any]]:
        """A linear as the target format holds it, and whether that is what the source held."""
        reason = linear.reason or self.target.misfit(linear.quantized) if linear.quantized else linear.reason
        if not reason and linear.quantized is not None:
            return linear.quantized, {"exact": True}
        if not isinstance(self.requantize, Scheme):
            raise QuantKitError(self.refusal(module, reason, "w4a16-g128"))
        weight = linear.dequantize()
        quantized = round_anew(weight, self.requantize, self.target.half_scales)
        if why := self.target.misfit(quantized):
            raise QuantKitError(
                f"{module}: rounded to {quantized.scheme.label} it has {why}; name another scheme"
            )
        return quantized, {
            "exact": False,
            "error": distance(quantized.dequantize(), weight),
            "reason": reason,
        }

    def refusal(self, module: str, reason: str, example: str) -> str:
        return (
            f"{module}: {reason}; {self.source.format} to {self.to} cannot be the same numbers here: --requantize {example} "
            "rounds such linears anew, or name another format"
        )

    def gguf_linear(self, module: str, linear: Linear) -> tuple[str, torch.Tensor, dict[str, Any]]:
        """Type and bytes of a linear, and whether these are the numbers that the source held."""
        reason = linear.reason or gguf_blocks.misfit(linear.quantized) if linear.quantized else linear.reason
        if not reason and linear.quantized is not None:
            kind, raw = gguf_blocks.encode(linear.quantized)
            return kind, raw, {"exact": True, "scheme": kind}
        if not isinstance(self.requantize, str):
            raise QuantKitError(self.refusal(module, reason, "q4_k"))
        weight, kind = linear.dequantize(), self.requantize
        if weight.shape[1] % gguf_blocks.TYPES[kind].block:
            kind = "Q8_0"
        if weight.shape[1] % gguf_blocks.TYPES[kind].block:
            raise QuantKitError(
                f"{module}: {weight.shape[1]} columns, which are no whole blocks of 32; GGUF cannot hold it"
            )
        raw = gguf_blocks.quantize(kind, weight)
        error = distance(gguf_blocks.dequantize(kind, raw), weight)
        return kind, raw, {"exact": False, "scheme": kind, "error": error, "reason": reason}

    def put_gguf(
        self, tensors: dict[str, torch.Tensor], name: str, kind: str, raw: torch.Tensor, shape: list[int]
    ) -> dict[str, Any]:
        """Adds a tensor by its rows' bytes, q and k turned; the note on it."""
        named = gguf_name(name)
        config = self.source.config
        heads = heads_of(named, config.num_attention_heads, config.num_key_value_heads)
        if heads is not None and self.metadata["general.architecture"] in TURNED:
            raw = turn(raw.view(shape[0], -1), heads).view(raw.shape)
        tensors[named] = raw
        return {"tensor": named, "type": kind, "shape": shape}

    def fill_gguf(self, folder: Path, sources: dict[str, StoredTensor]) -> None:
        """Writes the one file of a GGUF model from the parts."""
        kinds = Counter(entry["scheme"] for entry in self.kept.modules.values())
        # of several that are as frequent the first in the model's order: the bytes do not depend on the run
        ((most, _),) = kinds.most_common(1)
        metadata = metadata_of(self.source.config, self.source.folder.resolve().name, most)
        described = [(name, tuple(shape), kind) for name, (kind, shape) in self.kept.types.items()]
        factors = rope_factors(self.source.config)
        if factors is not None:
            described.append((ROPE_FACTORS, tuple(factors.shape), "F32"))
        path = folder / GGUF_FILE
        with self.writer.writing(path), path.open("wb") as file:
            file.write(header_bytes(self.metadata | metadata, described))
            for name, _, _ in described:
                chunks: Iterator[bytes] | list[bytes]
                if name == ROPE_FACTORS and factors is not None:
                    chunks = [factors.numpy().tobytes()]
                else:
                    chunks = tensor_bytes(sources[name])
                written = 0
                for chunk in chunks:
                    written += file.write(chunk)
                file.write(bytes(-written % ALIGNMENT))
            sync(file)

    def unpacked(self) -> list[str]:
        """The linears of OUT that are not packed, and what else is a matrix: routers, which others make linears of."""
        model = self.skeleton.model
        tables = {
            self.out_name(f"{n}.weight") for n, m in model.named_modules() if isinstance(m, nn.Embedding)
        }
        matrices = [n for n, meta in self.kept.order.items() if n.endswith(".weight") and meta.dim() == 2]
        names = [self.out_name(f"{name}.weight") for name in linears(model)]
        names += [name for name in matrices if name not in tables]
        modules = dict.fromkeys(name.removesuffix(".weight") for name in names)  # each once, in order
        return [name for name in modules if name not in self.kept.modules]

    def add_files(self, out: Path) -> None:
        """Puts what belongs beside the tensors into the folder that will be OUT."""
        config, folder = self.skeleton.model.config, self.source.folder
        kept = self.kept
        if self.target.config is None:
            entries = {name: in_config(entry) for name, entry in kept.modules.items()}
            schemes = {scheme.label: scheme.to_dict() for scheme in kept.schemes.values()}
            config.quantization_config = QuantKitConfig(schemes, entries)
            config.architectures = [type(self.skeleton.model).__name__]
            config.save_pretrained(out)
            save_generation_config(self.skeleton.model, folder, out)
        else:
            ordered = any(entry.get("input_order") for entry in kept.modules.values())
            described = self.target.config(kept.schemes, self.unpacked(), ordered)
            content = self.source.content or config.to_dict()
            content = {**content, "quantization_config": described}
            write_text(out / "config.json", json.dumps(content, indent=2) + "\n")
            if (folder / "generation_config.json").is_file():
                shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
        for pattern in COPIED:
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and file.name != INDEX:
                    shutil.copyfile(file, out / file.name)


def in_config(entry: dict[str, Any]) -> dict[str, Any]:
    """A linear's entry in quantkit's config.json."""
    keys = ["scheme", "method", "channel_scales", "input_order"]
    fields = {key: entry[key] for key in keys if key in entry}
    return fields if entry["exact"] else {**fields, "error": entry["error"], "error_of": "weight"}


def plain_gguf(tensor: torch.Tensor) -> tuple[str, torch.Tensor, list[int]]:
    """Type, bytes and shape of a tensor that is not packed: llama.cpp wants vectors in float32."""
    kinds = {dtype: kind for kind, dtype in gguf_blocks.PLAIN.items()}
    if tensor.dim() == 1 or tensor.dtype not in kinds:
        tensor = tensor.float()
    raw = tensor.contiguous().view(torch.uint8)
    return kinds[tensor.dtype], raw, list(tensor.shape)


def distance(new: torch.Tensor, old: torch.Tensor) -> float:
    """|new - old| / |old|; 0 where both are 0."""
    size = float(old.norm())
    return float((new - old).norm()) / size if size else float(new.norm())
