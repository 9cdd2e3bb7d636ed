"""A layer's keys and values in pages, as they are or in 8 or 4 bits: the format, its definition in torch, and its size.

    kind   codes of a token and head            stand for                      scales
    bf16   D numbers of the model's dtype       themselves                     none
    int8   D bytes                              c s                            s: float32, one a token and head
    fp8    D bytes, e4m3                        c s                            s: float32, one a token and head
    int4   D / 2 bytes, two codes each          ((2 c - 15) s + m) H           s, m: bfloat16; keys one pair a group,
                                                                               values one a token and head

"bf16" stands for bfloat16, float16 or float32, whatever the model's is. Pages are head-major, [pages, kv_heads, page_size,
...], so that the tokens of a head and page lie side by side. A token's slot is page * page_size + its place in the page.

int4 rounds what a Hadamard matrix H (Sylvester's, H H = I) has rotated, which spreads channels that are large in all
tokens: (q H) . (k H) = q . k, and a sum of rows of V H is rotated back once. The word j of a row, 16 bits, has the codes
of the columns j, D/4 + j, D/2 + j and 3 D/4 + j from bit 1 on, the highest bit of the last wrapped around to bit 0. A
quarter of the columns so comes out of all words as operands of the tensor cores, pair by pair, by one mask that also
doubles the code: its bits alone are the float16 2 c 2^-24. A group is a quarter of the columns, or 32.

Perplexity on lm-27m (17.36 with bfloat16, 24 windows of 512): int8 -0.00 %, fp8 +0.06 %, int4 +0.90 %. Why pairs: KL in units
of 10^-3 over 16 windows, of keys in groups of 32 and of values alone, 8.4 and 5.1 with s and m, 11.1 and 6.3 with s alone and 16
values around zero; codes -8 to 7 of a symmetric scale lose more yet (+1.4 and +1.0 % instead of +0.6 and +0.1 %). One pair a
token for keys costs twice what groups do (+1.3 %).

Scales of 8 bits are float32: they never overflow, and 4 bytes are the least that cp.async copies. Pairs of bfloat16 are
such words too and have float32's range; codes are found with the rounded pair, so that its 8 bits lose nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantKitError
from quantkit.kernels.cpu import FP8, TOP, quotient

KINDS = ("bf16", "int8", "fp8", "int4")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PAGE_SIZES = (16, 32, 64, 128, 256)
HEAD_DIMS = (16, 32, 64, 128, 256)
STORED_AS = {"int8": torch.int8, "fp8": torch.uint8, "int4": torch.uint8}  # what codes are held as
PLANES = 4  # codes a word of int4, and quarters of the columns
# Smallest scale. Attention multiplies probabilities by scales and divides by them again: float32 has room for this one
# beside probabilities of 2^-80.
FLOOR = 2.0**-40


def groups_of(head_dim: int) -> int:
    """Pairs of scale and middle of a token's int4 keys: a quarter of the columns each, or 32 where that is more."""
    return min(PLANES, max(1, head_dim // 32))


@cache
def hadamard(n: int) -> Tensor:
    """Sylvester's matrix of order n, a power of two, over sqrt(n): float32 [n, n], symmetric and its own inverse."""
    H = torch.ones(1, 1)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H / math.sqrt(n)


def rotate(x: Tensor) -> Tensor:
    """x H over the last dimension: float32, or float64 for float64 x."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide @ hadamard(x.shape[-1]).to(wide)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes 0 to 15 [..., D] -> uint8 [..., D / 2] in the order that the head of this file describes."""
    shifts = 4 * torch.arange(PLANES, device=codes.device).unsqueeze(1)
    word = (codes.int().unflatten(-1, (PLANES, -1)) << shifts).sum(-2)
    word = word << 1 & 0xFFFF | word >> 15
    return torch.stack([word & 0xFF, word >> 8], -1).flatten(-2).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: uint8 [..., D / 2] -> codes, int32 [..., D]."""
    low, high = packed.int().unflatten(-1, (-1, 2)).unbind(-1)
    word = low | high << 8
    word = word >> 1 | (word & 1) << 15
    shifts = 4 * torch.arange(PLANES, device=packed.device).unsqueeze(1)
    return (word.unsqueeze(-2) >> shifts & 0xF).flatten(-2)


def quantize(x: Tensor, kind: str, groups: int = 1) -> tuple[Tensor, Tensor | None]:
    """Rounds keys or values as pages of a kind hold them.

    Args:
        x: float [..., D]; for int4 rotated already, see `rotate`.
        groups: of int4, 1 for values, `groups_of(D)` for keys.

    Returns:
        codes: [..., D], int4 [..., D / 2], in the dtype of the pages.
        scales: float32 [...], int4 bfloat16 [..., groups, 2], None for bf16.
    """
    if kind == "bf16":
        return x, None
    if kind == "int4":
        wide = x.float().unflatten(-1, (groups, -1))
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        middle = ((low + high) * 0.5).bfloat16().float()
        scale = quotient(torch.maximum(high - middle, middle - low), 15).clamp(min=FLOOR).bfloat16().float()
        codes = ((wide - middle) / scale * 0.5 + 7.5).round().clamp(0, 15)
        return pack_int4(codes.flatten(-2)), torch.cat([scale, middle], -1).bfloat16()
    dtype = torch.int8 if kind == "int8" else FP8
    scale = quotient(x.float().abs().amax(-1), TOP[dtype]).clamp(min=FLOOR)
    scaled = (x.float() / scale.unsqueeze(-1)).clamp(-TOP[dtype], TOP[dtype])
    codes = scaled.round().to(dtype) if kind == "int8" else scaled.to(dtype).view(torch.uint8)
    return codes, scale


def dequantize(codes: Tensor, scales: Tensor | None, kind: str) -> Tensor:
    """The inverse of `quantize`, float32 [..., D] (of bf16 the codes themselves); int4 is left rotated."""
    if scales is None:
        return codes
    if kind == "int4":
        scale, middle = scales.float().unbind(-1)  # [..., groups]
        odd = (2 * unpack_int4(codes) - 15).float().unflatten(-1, (scale.shape[-1], -1))
        return (odd * scale.unsqueeze(-1) + middle.unsqueeze(-1)).flatten(-2)
    values = codes.float() if kind == "int8" else codes.view(FP8).float()
    return values * scales.unsqueeze(-1)


def check_layout(kind: str, page_size: int, head_dim: int, dtype: torch.dtype) -> None:
    """Raises a QuantKitError for what no pages have."""
    for name, found, known in (
        ("kind", kind, KINDS),
        ("page_size", page_size, PAGE_SIZES),
        ("head_dim", head_dim, HEAD_DIMS),
        ("dtype", dtype, FLOATS),
    ):
        if found not in known:
            listed = ", ".join(str(one).removeprefix("torch.") for one in known)  # type: ignore[attr-defined]
            raise QuantKitError(f"kv_pages: {name} is {found}, expected one of {listed}; choose one of them")


@dataclass(frozen=True)
class KVPages:
    """The keys and values of one layer, of all sequences.

    Attributes:
        keys, values: [pages, kv_heads, page_size, head_dim] in the model's dtype, int8, or uint8 for fp8; uint8
            [pages, kv_heads, page_size, head_dim / 2] for int4.
        key_scales: float32 [pages, kv_heads, page_size]; bfloat16 [pages, kv_heads, page_size, groups, 2] for int4; None for
            bf16.
        value_scales: the same with one group.
        kind: one of `KINDS`.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    kind: str

    @classmethod
    def allocate(
        cls,
        kind: str,
        pages: int,
        kv_heads: int,
        head_dim: int,
        *,
        page_size: int = 64,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> "KVPages":
        """Pages whose content is not defined.

        Args:
            dtype: of the model, which is that of "bf16" pages.

        Raises:
            QuantKitError: there is no such kind, page_size, head_dim or dtype.
        """
        check_layout(kind, page_size, head_dim, dtype)
        rows = (pages, kv_heads, page_size)
        columns = head_dim // 2 if kind == "int4" else head_dim

        def scales(groups: int) -> Tensor | None:
            if kind == "bf16":
                return None
            if kind == "int4":
                return torch.empty(*rows, groups, 2, dtype=torch.bfloat16, device=device)
            return torch.empty(rows, dtype=torch.float32, device=device)

        keys, values = (
            torch.empty(*rows, columns, dtype=STORED_AS.get(kind, dtype), device=device) for _ in range(2)
        )
        return cls(keys, values, scales(groups_of(head_dim)), scales(1), kind)

    def __iter__(self) -> Iterator[Any]:
        """The arguments of the ops in their order: `torch.ops.quantkit.decode_attention(q, *pages, table, lengths, scale)`."""
        yield from (self.keys, self.values, self.key_scales, self.value_scales, self.kind)

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[3] * (2 if self.kind == "int4" else 1)

    @property
    def nbytes(self) -> int:
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def bytes_per_token(self) -> int:
        """Keys, values and scales of all heads of this layer."""
        return self.nbytes // (len(self.keys) * self.page_size)

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Rounds k and v and writes them to their slots: the definition of what `rope_write.py` writes.

        Args:
            k, v: float [T, kv_heads, head_dim], k after RoPE; not rotated.
            slots: int64 [T]; -1: the token is not written.
        """
        if not len(slots):
            return
        # No shape depends on the slots, so that a CUDA graph can have this: a token without a slot is written as the first one
        # that has one, and where none has, slot 0 as it is.
        there = slots >= 0
        token = torch.where(there, torch.arange(len(slots), device=slots.device), there.int().argmax())
        slots = slots[token].clamp(min=0)
        page, place = slots // self.page_size, slots % self.page_size
        for x, codes, scales, groups in (
            (k[token], self.keys, self.key_scales, groups_of(self.head_dim)),
            (v[token], self.values, self.value_scales, 1),
        ):
            rounded, found = quantize(rotate(x) if self.kind == "int4" else x, self.kind, groups)
            codes[page, :, place] = torch.where(there.any(), rounded, codes[page, :, place])
            if scales is not None and found is not None:
                scales[page, :, place] = torch.where(there.any(), found, scales[page, :, place])

    def gather(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the pages of a table [..., n], as `dequantize` returns them: [..., kv_heads, n * page_size, D].

        int4 is left rotated.
        """

        def tokens(codes: Tensor, scales: Tensor | None) -> Tensor:
            found = dequantize(codes[table], None if scales is None else scales[table], self.kind)
            return found.movedim(-3, -4).flatten(-3, -2)

        return tokens(self.keys, self.key_scales), tokens(self.values, self.value_scales)
