"""GGUF files of Llama's, Mistral's, Qwen2's and Qwen3's kind, seen as the transformers model that they hold.

A linear in Q4_0 is quantkit's int4 in groups of 32, bit for bit; one in Q4_1 or Q8_0 is if its minima are whole
steps, or its rows have one scale each. Others are read by their weights. Embeddings that are packed become float16.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader, StoredTensor, tensor_bytes
from quantkit.errors import QuantKitError
from quantkit.formats import gguf_blocks
from quantkit.formats.affine import Linear, check_finite
from quantkit.formats.gguf_blocks import PLAIN
from quantkit.formats.gguf_file import GGUFFile, read_gguf
from quantkit.formats.gguf_names import (
    LINEARS,
    ROPE_FACTORS,
    TURNED,
    config_from,
    heads_of,
    model_name,
    turn_back,
)
from quantkit.formats.reader import Packed, PackedReader

SUFFIX = ".gguf"
DTYPE = torch.float16  # of what is dequantized: GGUF's scales are float16


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path is, or the only one in a directory without safetensors; None where there is none.

    Raises:
        QuantKitError: the directory has several.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise QuantKitError(
            f"{path}: {len(files)} GGUF files, expected one; name the file, and join split ones with llama.cpp's gguf-split"
        )
    return files[0]


class GGUFLayout:
    """The packed linears of a GGUF file, by transformers' names."""

    name = "gguf"

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []
        self.modules = {
            name.removesuffix(".weight"): Packed((t.shape[0], t.shape[1]), ("weight",))
            for name, t in tensors.items()
            if t.dtype not in PLAIN and is_linear(t.name) and len(t.shape) == 2
        }

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        raise AssertionError("GGUFReader.linear knows the types")


class GGUFReader(PackedReader):
    """The tensors of a GGUF file as transformers' model has them."""

    def __init__(self, file: GGUFFile, config: dict[str, Any]) -> None:
        self.file = file
        named = {ours: t for name, t in file.tensors.items() if (ours := model_name(name)) is not None}
        unknown = [name for name in file.tensors if model_name(name) is None and name != ROPE_FACTORS]
        if unknown:
            raise QuantKitError(
                f"{file.path}: holds {unknown[0]}, which quantkit has no name for; it is of another kind of model"
            )
        reader = CheckpointReader.__new__(CheckpointReader)
        reader.folder, reader.files = file.path, [file.path]
        reader.tensors = named
        super().__init__(reader, GGUFLayout(named), DTYPE)
        # by the names of the model; `stored` keeps types and the names in the file
        self.tensors = {
            n: replace(t, dtype=t.dtype if t.dtype in PLAIN else "F16", name=n) for n, t in named.items()
        }
        self.turned = file.metadata.get("general.architecture") in TURNED
        self.heads = config["num_attention_heads"], config["num_key_value_heads"]
        packed = [
            n
            for n, t in named.items()
            if t.dtype not in PLAIN and n.removesuffix(".weight") not in self.layout.modules
        ]
        if packed:
            kinds = ", ".join(sorted({named[n].dtype for n in packed}))
            self.notes.append(f"{', '.join(packed)}: stored as {kinds}, dequantized to float16")

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor's rows, uint8 [N, bytes], in transformers' order."""
        stored = self.stored.tensors[self.find(name).name]
        N = stored.shape[0] if len(stored.shape) > 1 else 1
        data = torch.frombuffer(bytearray(b"".join(tensor_bytes(stored))), dtype=torch.uint8).view(N, -1)
        heads = heads_of(stored.name, *self.heads) if self.turned else None
        if heads is None:
            return data
        rows = data if len(stored.shape) > 1 else data.view(stored.shape[0], -1)
        if len(rows) % (2 * heads):
            raise QuantKitError(
                f"{stored.file}: {stored.name} has {len(rows)} rows, expected {heads} heads of an even size"
            )
        return turn_back(rows, heads).reshape(N, -1)

    def load_plain(self, names: list[str]) -> dict[str, torch.Tensor]:
        loaded = {}
        for name in names:
            stored, raw = self.stored.tensors[self.find(name).name], self.raw(name)
            if stored.dtype in PLAIN:
                loaded[name] = raw.flatten().view(PLAIN[stored.dtype]).view(stored.shape)
            else:
                loaded[name] = gguf_blocks.dequantize(stored.dtype, raw).view(stored.shape).to(self.dtype)
        return loaded

    def linear(self, name: str) -> Linear:
        stored = self.stored.tensors[self.find(name).name]
        linear = gguf_blocks.linear_of(stored.dtype, self.raw(name))
        weight, quantized = linear.weight, linear.quantized
        try:
            if quantized is not None:
                check_finite(name.removesuffix(".weight"), scales=quantized.scales)
            elif weight is not None:
                check_finite(name.removesuffix(".weight"), weight=weight)
        except QuantKitError as error:
            raise QuantKitError(f"{stored.file}: {error}") from error
        return linear


def is_linear(gguf: str) -> bool:
    stem, _, kind = gguf.rpartition(".")
    return kind == "weight" and stem.rpartition(".")[2] in LINEARS


def open_gguf(path: Path) -> tuple[GGUFFile, dict[str, Any]]:
    """A GGUF file, and the config that its metadata make."""
    file = read_gguf(path)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise QuantKitError(f"{path}: has no token_embd.weight; it is no language model")
    try:
        return file, config_from(file.metadata, set(file.tensors), embedding.shape[0])
    except QuantKitError as error:
        raise QuantKitError(f"{path}: {error}") from error
