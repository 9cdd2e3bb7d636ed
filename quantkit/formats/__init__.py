"""Checkpoints of other tools, one format a file: `open_source` finds the format of a directory and reads it.

`reader.py` shows a packed checkpoint as the plain one that it stands for, `affine.py` decides whether quantkit's own
layout holds a linear's numbers, `writers.py` lists what can be written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from quantkit.checkpoint import CheckpointReader, read_json
from quantkit.errors import QuantKitError
from quantkit.formats.awq import AWQ
from quantkit.formats.bitsandbytes import BitsAndBytes
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.fp8 import FP8
from quantkit.formats.gguf import GGUFReader, gguf_of, open_gguf
from quantkit.formats.gguf_file import read_gguf
from quantkit.formats.gptq import GPTQ
from quantkit.formats.hqq import HQQ
from quantkit.formats.native import Native
from quantkit.formats.reader import Layout, PackedReader
from quantkit.source import auto_config, first_line, resolve

QUANTIZATION = ("quantization_config", "compression_config")  # in config.json, the second of early versions
PLAIN = "plain"  # the format of a model that is not quantized
Open = Callable[[dict[str, Any], CheckpointReader], Layout]
LAYOUTS: dict[str, Open] = {
    "quantkit": lambda config, reader: Native(config, reader.tensors, reader.load),
    "gptq": lambda config, reader: GPTQ(config, reader.tensors),
    "awq": lambda config, reader: AWQ(config, reader.tensors),
    "compressed-tensors": lambda config, reader: CompressedTensors(config, reader.tensors, reader.load),
    "fp8": lambda config, reader: FP8(config, reader.tensors),
    "bitsandbytes": lambda config, reader: BitsAndBytes(config, reader.tensors, reader.load),
    "hqq": lambda config, reader: HQQ(config, reader.tensors, reader.load),
}


@dataclass(frozen=True)
class Source:
    """A model on disk, in whatever format.

    Attributes:
        folder: where tokenizer and the like are.
        format: a key of `LAYOUTS`, "gptq_v2", "gguf" or "plain".
        config: without its quantization_config.
        content: config.json as it is, without quantization_config; {} where a GGUF has none beside it.
        reader: a `PackedReader`, but for plain models.
    """

    folder: Path
    format: str
    config: PretrainedConfig
    content: dict[str, Any]
    reader: CheckpointReader

    @property
    def notes(self) -> list[str]:
        """What the user should know of it, a line each."""
        return self.reader.notes if isinstance(self.reader, PackedReader) else []

    @property
    def path(self) -> Path:
        """What opens it again."""
        return self.reader.files[0] if self.format == "gguf" else self.folder


def open_source(model: str | Path) -> Source:
    """A model directory, a GGUF file, or a name on the hub, in any format that quantkit reads.

    Raises:
        QuantKitError: there is no such model, its format is not known, or its files do not fit its config.
    """
    path = Path(model)
    file = gguf_of(path) if path.exists() else None
    if file is not None:
        return open_gguf_source(path, file)
    folder = resolve(model)
    content = read_json(folder / "config.json")
    found = [content.pop(key, None) for key in QUANTIZATION]
    quantization = next((value for value in found if value), None)
    if quantization is not None and not isinstance(quantization, dict):
        raise QuantKitError(
            f"{folder / 'config.json'}: quantization_config is {quantization!r}, expected an object"
        )
    config = auto_config(folder)
    if quantization is None:
        return Source(folder, PLAIN, config, content, CheckpointReader(folder))
    for key in QUANTIZATION:
        config.__dict__.pop(key, None)
    layout, reader = open_layout(folder, quantization)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    return Source(folder, layout.name, config, content, PackedReader(reader, layout, dtype))


def open_original(model: str | Path) -> Source:
    """The model that is to be quantized: plain, or packed by another tool, whose linears are then dequantized.

    Raises:
        QuantKitError: as `open_source`, or quantkit has packed it.
    """
    source = open_source(model)
    if source.format == "quantkit":
        raise QuantKitError(f"{source.folder}: is quantized already (quantkit); quantize the original model")
    return source


def open_layout(folder: Path, quantization: dict[str, Any]) -> tuple[Layout, CheckpointReader]:
    """The packed linears of a directory, by its quantization_config."""
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"  # of early versions
    if not isinstance(method, str) or method not in LAYOUTS:
        raise QuantKitError(
            f"{folder / 'config.json'}: quant_method {method!r}, expected one of {', '.join(LAYOUTS)}; quantize the original "
            "model"
        )
    reader = CheckpointReader(folder)
    try:
        layout = LAYOUTS[method](quantization, reader)
    except QuantKitError as error:
        message = str(error)
        raise QuantKitError(message if str(folder) in message else f"{folder}/{message}") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise QuantKitError(
            f"{folder / 'config.json'}: quantization_config cannot be read: {first_line(error)}; copy it again"
        ) from error
    if not layout.modules:
        raise QuantKitError(
            f"{folder}: config.json says {method}, but the safetensors hold no linear packed so; the files don't belong to it"
        )
    return layout, reader


def open_gguf_source(path: Path, file: Path) -> Source:
    """A GGUF file; a config.json beside it is preferred to its metadata."""
    folder = path if path.is_dir() else path.parent
    described = folder / "config.json"
    if described.is_file():
        content = read_json(described)
        config = auto_config(folder)
        for key in QUANTIZATION:
            content.pop(key, None)
            config.__dict__.pop(key, None)
        values = {
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
        }
        return Source(folder, "gguf", config, content, GGUFReader(read_gguf(file), values))
    opened, values = open_gguf(file)
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:  # config classes check their fields, each with errors of its own
        raise QuantKitError(f"{file}: transformers refuses its config: {first_line(error)}") from error
    config.name_or_path = str(file)
    return Source(folder, "gguf", config, {}, GGUFReader(opened, values))
