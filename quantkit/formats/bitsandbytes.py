"""bitsandbytes checkpoints (NF4, FP4, LLM.int8): read, by their weights alone.

4 bits, the weight cut into blocks of `blocksize` in the order of its rows:

    M.weight             uint8 [N K / 2, 1]    two codes a byte, the first in the high bits
    M.weight.quant_map   float32 [16]          the value of each code
    M.weight.absmax      float32 [blocks], or uint8 where it is quantized itself:
    M.weight.nested_absmax, M.weight.nested_quant_map
    M.weight.quant_state.bitsandbytes__nf4     JSON in bytes: shape, blocksize, nested_blocksize, nested_offset
    w = quant_map[code] * absmax,   absmax = nested_quant_map[code] * nested_absmax + nested_offset

8 bits: M.weight int8 [N, K], M.SCB float32 [N], w = code * SCB / 127. The values of 4-bit codes are no steps of a
grid, and the quotient is none of the numbers in the file: quantkit's format holds neither.
"""

import json
from typing import Any

import torch

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.affine import Linear, check_finite
from quantkit.formats.reader import Packed, modules_with, need

KINDS = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
LARGEST_BLOCK = 4096  # which bitsandbytes makes
LARGEST_STATE = 1 << 16  # bytes; the real ones have about two hundred


class BitsAndBytes:
    """A bitsandbytes checkpoint's linears."""

    name = "bitsandbytes"

    def __init__(self, config: dict[str, Any], tensors: dict[str, StoredTensor], read: Any) -> None:
        """`read` loads tensors by their names: the shapes are stored as such."""
        self.dropped: dict[str, str] = {}
        self.notes: list[str] = []
        states = {n: k for k in KINDS for n in modules_with(STATE + k, tensors)}
        names = [f"{name}.{STATE}{kind}" for name, kind in states.items()]
        for full in names:
            if tensors[full].stop - tensors[full].start > LARGEST_STATE:
                raise QuantKitError(f"{full}: too large for a description; copy the checkpoint again")
        loaded = read(names)
        self.states = {name: state_of(full, loaded[full]) for name, full in zip(states, names, strict=True)}
        self.modules = {
            name: packed_of(name, kind, self.states[name], tensors) for name, kind in states.items()
        }
        for name in modules_with("SCB", tensors):
            N, K = need(tensors, f"{name}.weight", ("I8",), 2, "LLM.int8").shape
            need(tensors, f"{name}.SCB", ("F32",), (N,), "LLM.int8")
            beside = ("weight_format",) if f"{name}.weight_format" in tensors else ()
            self.modules[name] = Packed((N, K), ("weight", "SCB", *beside))

    def linear(self, name: str, tensors: dict[str, torch.Tensor]) -> Linear:
        check_finite(name, **{suffix.rpartition(".")[2]: t for suffix, t in tensors.items()})
        if "SCB" in tensors:
            weight = tensors["weight"].float() * tensors["SCB"][:, None] * (1 / 127)
            return Linear(None, "LLM.int8's scales are divided by 127 as they are read", weight)
        state, (N, K) = self.states[name], self.modules[name].shape
        absmax = tensors["weight.absmax"]
        if absmax.dtype == torch.uint8:
            values = tensors["weight.nested_quant_map"][absmax.long()]
            outer = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])
            absmax = values * outer[: len(values)] + state["nested_offset"]
        packed = tensors["weight"].flatten()
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: N * K].long()
        scales = absmax.float().repeat_interleave(state["blocksize"])[: N * K]
        weight = tensors["weight.quant_map"].float()[codes] * scales
        return Linear(None, "4-bit codes whose values are no steps of a grid", weight.view(N, K))


def state_of(name: str, stored: torch.Tensor) -> dict[str, Any]:
    """The description of one 4-bit weight."""
    try:
        state = json.loads(bytes(stored.tolist()))
        shape = [int(size) for size in state["shape"]]
        read: dict[str, Any] = {
            "shape": shape,
            "blocksize": int(state["blocksize"]),
            "nested_blocksize": int(state.get("nested_blocksize") or 0),
            "nested_offset": float(state.get("nested_offset") or 0),
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise QuantKitError(f"{name}: cannot be read ({error!r}); copy the checkpoint again") from error
    if len(shape) != 2 or min(shape) < 1 or read["blocksize"] < 1:
        raise QuantKitError(
            f"{name}: shape {shape}, blocksize {read['blocksize']}; expected positive numbers"
        )
    for key in ("blocksize", "nested_blocksize"):  # a scale is repeated so often
        if read[key] > LARGEST_BLOCK:
            raise QuantKitError(
                f"{name}: {key} {read[key]}, expected at most {LARGEST_BLOCK}; copy the checkpoint again"
            )
    return read


def packed_of(name: str, kind: str, state: dict[str, Any], tensors: dict[str, StoredTensor]) -> Packed:
    """A 4-bit module's shape and tensors."""
    N, K = state["shape"]
    blocks, why = -(-N * K // state["blocksize"]), f"{kind}, [{N}, {K}], blocksize {state['blocksize']}"
    need(tensors, f"{name}.weight", ("U8",), (-(-N * K // 2), 1), why)
    need(tensors, f"{name}.weight.quant_map", ("F32",), (16,), why)
    absmax = need(tensors, f"{name}.weight.absmax", ("F32", "U8"), (blocks,), why)
    suffixes = ["weight", "weight.quant_map", "weight.absmax", STATE + kind]
    if absmax.dtype == "U8":
        if state["nested_blocksize"] < 1:
            raise QuantKitError(f"{name}.{STATE}{kind}: no nested_blocksize, but absmax is quantized")
        outer = -(-blocks // state["nested_blocksize"])
        need(tensors, f"{name}.weight.nested_absmax", ("F32",), (outer,), why)
        need(tensors, f"{name}.weight.nested_quant_map", ("F32",), (256,), why)
        suffixes += NESTED
    return Packed((N, K), tuple(suffixes))
