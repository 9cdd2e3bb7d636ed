"""HQQ checkpoints in safetensors, as hqq and transformers save them: read.

A linear M with weight [N, K], nbits b, is cut into groups along its rows (axis 1) or its columns (axis 0):

    M.W_q                codes [K N / group_size, group_size] or [group_size, K N / group_size], packed from the top down:
                         the first 8 / b-th of the rows in the highest bits of a byte, and so on; 3 bits in ten of a word
    M.scale, M.zero      floating, one a group
    M.shape, M.nbits, M.group_size, M.axis, M.packing, M.view_as_float    numbers, the packing in letters
    w = (code - zero) * scale

Zeros are mostly no whole numbers, so that most such linears are readable by their weights alone.
"""

from typing import Any

import torch

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.affine import Affine, Linear, check_finite
from quantkit.formats.reader import Packed, modules_with, need

FIELDS = {  # bits, fields in a word, the word's dtype
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
}
NUMBERS = ("shape", "nbits", "axis", "packing", "view_as_float")
IGNORED = (
    "offload_meta encoded_state_dict stores_quant_config channel_wise optimize round_zero unpack_view_dtype "
    "compute_dtype quant_scale quant_zero"
).split()
INTEGERS = ("BOOL", "U8", "I8", "I16", "I32", "I64")
FLOATS = ("F16", "BF16", "F32")


class HQQ:
    """An HQQ checkpoint's linears."""

    name = "hqq"

    def __init__(self, config: dict[str, Any], tensors: dict[str, StoredTensor], read: Any) -> None:
        """`read` loads tensors by their names: shapes and bits are stored as such."""
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []
        names = modules_with("W_q", tensors)
        for name in names:
            for number in NUMBERS:
                if f"{name}.{number}" not in tensors:
                    raise QuantKitError(
                        f"{name}.{number}: missing, expected beside {name}.W_q (HQQ); save the model again with hqq 0.2.1 or "
                        "newer"
                    )
            for full in [f"{name}.{number}" for number in (*NUMBERS, "group_size")]:
                if full in tensors:
                    need(tensors, full, INTEGERS, len(tensors[full].shape), "HQQ, a whole number")
                    if 0 in tensors[full].shape:
                        raise QuantKitError(f"{full}: is empty, expected a number; copy the checkpoint again")
        wanted = [f"{name}.{number}" for name in names for number in (*NUMBERS, "group_size")]
        values = read([n for n in wanted if n in tensors and tensors[n].stop - tensors[n].start <= 1024])
        self.numbers = {n: [int(v) for v in value.flatten()] for n, value in values.items()}
        self.modules = {name: self.packed_of(name, tensors) for name in names}

    def packed_of(self, name: str, tensors: dict[str, StoredTensor]) -> Packed:
        shape = self.numbers.get(f"{name}.shape", [])
        packing, axis = self.packing(name), self.numbers.get(f"{name}.axis", [])
        if len(shape) != 2 or min(shape) < 1 or packing not in FIELDS or axis not in ([0], [1]):
            raise QuantKitError(
                f"{name}: HQQ with shape {shape}, packing {packing!r}, axis {axis}; expected two numbers, one of "
                f"{', '.join(FIELDS)}, and 0 or 1"
            )
        N, K = shape
        bits, fields, word = FIELDS[packing]
        if self.numbers.get(f"{name}.nbits") != [bits]:
            raise QuantKitError(
                f"{name}.nbits: {self.numbers.get(f'{name}.nbits')}, expected {bits} as packing {packing} has it; copy the "
                "checkpoint again"
            )
        size = self.numbers.get(f"{name}.group_size", [K])[0]
        if size < 1 or N * K % size:
            raise QuantKitError(f"{name}.group_size: {size}, expected a divisor of the {N * K} weights")
        stored = need(tensors, f"{name}.W_q", ("U8", "I32", *FLOATS), 2, "HQQ")
        groups = N * K // size
        rows = size if axis == [0] else groups
        needed = -(-rows // fields) * (N * K // rows) * word.itemsize
        if stored.stop - stored.start != needed:
            raise QuantKitError(
                f"{stored.file}: {name}.W_q has {stored.stop - stored.start} bytes, expected {needed} for [{N}, {K}] in "
                f"{packing}; the file is damaged"
            )
        per_group = (1, groups) if axis == [0] else (groups, 1)
        need(tensors, f"{name}.scale", FLOATS, per_group, "HQQ")
        need(tensors, f"{name}.zero", FLOATS, per_group, "HQQ")
        beside = [s for s in (*NUMBERS, "group_size", *IGNORED) if f"{name}.{s}" in tensors]
        return Packed((N, K), ("W_q", "scale", "zero", *beside))

    def packing(self, name: str) -> str:
        letters = self.numbers.get(f"{name}.packing", [])
        return "".join(chr(c) for c in letters if 0 <= c < 128)

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        check_finite(name, scale=tensors["scale"], zero=tensors["zero"])
        N, K = self.modules[name].shape
        bits, fields, word = FIELDS[self.packing(name)]
        axis, size = self.numbers[f"{name}.axis"][0], self.numbers.get(f"{name}.group_size", [K])[0]
        rows = size if axis == 0 else N * K // size
        words = tensors["W_q"].contiguous().view(word).view(-1, N * K // rows).to(torch.int32)
        parts = [words >> bits * (fields - 1 - i) & 2**bits - 1 for i in range(fields)]
        codes = torch.cat(parts)[:rows].to(torch.uint8)
        if axis == 0 or K % size:
            weight = (codes.float() - tensors["zero"].float()) * tensors["scale"].float()
            reason = f"groups of {size} along axis {axis}, which are no runs of a row's columns"
            return Linear(None, reason, weight.view(N, K))
        scale, zero = (tensors[part].view(N, K // size) for part in ("scale", "zero"))
        return Affine(bits, codes.view(N, K), scale, zero.float(), size).linear()
