"""A packed checkpoint seen as the plain one that it stands for: every packed linear is one tensor `M.weight` [N, K].

What reads plain checkpoints block by block reads packed ones through it, with the linears dequantized; `linear`
gives their codes. Each format's file says which tensors a linear is made of, from config and headers alone.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from quantkit.checkpoint import CheckpointReader, StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.affine import Linear

PLAIN_DTYPE = "BF16"  # as which a packed weight counts among plain tensors


@dataclass(frozen=True)
class Packed:
    """A packed linear [N, K] in a source, and the suffixes of the tensors that it is made of."""

    shape: tuple[int, int]
    suffixes: tuple[str, ...]


class Layout(Protocol):
    """One checkpoint in one format.

    Attributes:
        name: of the format.
        modules: every packed linear, by its name in the files.
        dropped: suffixes of tensors that are left out, and why: said to the user.
        notes: what else the user should know, a line each.
    """

    name: str
    modules: dict[str, Packed]
    dropped: dict[str, str]
    notes: list[str]

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        """A packed linear from its tensors by their suffixes."""


class PackedReader(CheckpointReader):
    """The tensors of a packed directory by the names of the plain one.

    Attributes:
        layout: of the packed linears.
        stored: all tensors of the files, as they are there.
        dtype: of the weights that packed linears are dequantized to.
        notes: what the user should know, a line each.
    """

    def __init__(self, reader: CheckpointReader, layout: Layout, dtype: torch.dtype) -> None:
        self.folder, self.files, self.layout, self.dtype = reader.folder, reader.files, layout, dtype
        self.stored = reader
        parts = {f"{name}.{s}" for name, packed in layout.modules.items() for s in packed.suffixes}
        dropped = {n: s for n in reader.tensors if (s := suffix_among(n, layout.dropped))}
        self.notes = [f"{s}: {layout.dropped[s]}" for s in sorted(set(dropped.values()))] + layout.notes
        plain = {n: t for n, t in reader.tensors.items() if n not in parts and n not in dropped}
        for name in layout.modules:
            if (beside := plain.get(f"{name}.weight")) is not None:
                raise QuantKitError(
                    f"{beside.file}: holds {name}.weight, but {name} is packed ({layout.name}) as well, expected one of the two; "
                    "remove the one that is not meant"
                )
        self.tensors = plain | {
            f"{n}.weight": self.stand_in(n, packed) for n, packed in layout.modules.items()
        }

    @property
    def stored_bytes(self) -> int:
        """Of all tensors in the files."""
        return sum(tensor.stop - tensor.start for tensor in self.stored.tensors.values())

    def stand_in(self, name: str, packed: Packed) -> StoredTensor:
        """The plain weight that a packed linear stands for; its bytes are those of its codes."""
        codes = self.stored.tensors[f"{name}.{packed.suffixes[0]}"]
        return replace(codes, dtype=PLAIN_DTYPE, shape=packed.shape, name=f"{name}.weight")

    def module_of(self, name: str) -> str | None:
        """The packed linear, by its name in the files, whose weight a tensor is; None for a plain tensor."""
        module, _, suffix = self.find(name).name.rpartition(".")
        return module if suffix == "weight" and module in self.layout.modules else None

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by name; packed weights dequantized, in the model's dtype."""
        wanted = list(names)
        packed = {name for name in wanted if self.module_of(name) is not None}
        loaded = self.load_plain([name for name in wanted if name not in packed])
        return loaded | {name: self.linear(name).dequantize(self.dtype) for name in wanted if name in packed}

    def load_plain(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors that belong to no packed linear."""
        return super().load(names)

    def linear(self, name: str) -> Linear:
        """The packed linear whose weight has this name."""
        module = self.module_of(name)
        assert module is not None, f"{name} is no packed weight"
        parts = {s: f"{module}.{s}" for s in self.layout.modules[module].suffixes}
        loaded = self.stored.load(parts.values())
        try:
            return self.layout.linear(module, {s: loaded[full] for s, full in parts.items()})
        except QuantKitError as error:
            raise QuantKitError(f"{self.tensors[name].file}: {error}") from error


def suffix_among(name: str, suffixes: Iterable[str]) -> str | None:
    """The one that a name ends with."""
    return next((suffix for suffix in suffixes if name.endswith(suffix)), None)


def modules_with(suffix: str, tensors: dict[str, StoredTensor]) -> list[str]:
    """Names of the modules that have a tensor of this suffix."""
    return [name.removesuffix(f".{suffix}") for name in tensors if name.endswith(f".{suffix}")]


def layers_in(names: Iterable[str]) -> int:
    """Of how many layers these tensors are at most: a layer's number is the first in their names."""
    return len({found[1] for name in names if (found := re.search(r"\.(\d+)\.", name))})


def need(
    tensors: dict[str, StoredTensor],
    name: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...] | int,
    why: str,
) -> StoredTensor:
    """A stored tensor that must be there, in one of the dtypes and of the shape, or of so many dimensions.

    Raises:
        QuantKitError: it is not; `why` says what asks for it.
    """
    stored = tensors.get(name)
    expected = f"{' or '.join(dtypes)} " + (
        f"of {shape} dimensions" if isinstance(shape, int) else f"{list(shape)}"
    )
    if stored is None:
        raise QuantKitError(f"{name}: missing, expected {expected} ({why}); copy the checkpoint again")
    fits = len(stored.shape) == shape if isinstance(shape, int) else stored.shape == shape
    if stored.dtype not in dtypes or not fits:
        raise QuantKitError(
            f"{stored.file}: {name} is {stored.dtype} {list(stored.shape)}, expected {expected} ({why}); the config "
            "belongs to another checkpoint, or the file is damaged"
        )
    return stored


def whole(config: dict[str, Any], key: str, allowed: Iterable[int], default: int | None = None) -> int:
    """A whole number of the quantization config.

    Raises:
        QuantKitError: it is absent, or not one of the allowed.
    """
    found, allowed = config.get(key, default), list(allowed)
    if isinstance(found, bool) or not isinstance(found, int) or found not in allowed:
        raise QuantKitError(
            f"config.json: quantization_config has {key} {found!r}, expected one of {', '.join(map(str, allowed))}"
        )
    return found
