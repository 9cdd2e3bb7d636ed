"""Random packed weights for the tests of formats."""

from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import StoredTensor
from quantkit.packing import QuantizedTensor, pack_codes
from quantkit.scheme import Scheme, parse_scheme


def packed_weight(
    label: str | Scheme,
    N: int,
    K: int,
    seed: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    negative: bool = False,
    order: bool = False,
) -> QuantizedTensor:
    """A weight [N, K] with every code somewhere, scales of float16's numbers, and zeros from 1 on."""
    g = torch.Generator().manual_seed(seed)
    scheme = label if isinstance(label, Scheme) else parse_scheme(label)
    input_order = torch.randperm(K, generator=g).to(torch.int32) if order else None
    groups = -(-K // (scheme.group_size or K))
    scales = (torch.rand(N, groups, generator=g) * 0.02 + 0.001).to(torch.float16)
    if negative:
        scales = scales * torch.randint(0, 2, scales.shape, generator=g).mul(2).sub(1)
    if scheme.bits < 8:
        codes = torch.randint(0, 2**scheme.bits, (N, K), generator=g)
        zeros = None
        if not scheme.symmetric:
            zeros = torch.randint(1, 2**scheme.bits, scales.shape, generator=g).to(torch.uint8)
            zeros[0, 0] = 1  # not all of them the symmetric zero
        if scale_dtype == torch.bfloat16:
            scales = scales.to(torch.bfloat16)
        return QuantizedTensor(
            scheme, (N, K), pack_codes(codes, scheme.bits), scales, zeros, input_order=input_order
        )
    if scheme.weight == "int8":
        codes = torch.randint(-128, 128, (N, K), generator=g).to(torch.int8)
    else:
        codes = torch.randn(N, K, generator=g).to(torch.float8_e4m3fn)
    if block := scheme.block_size:
        scales = torch.rand(-(-N // block), -(-K // block), generator=g)
    static = torch.tensor([0.037]) if scheme.activation_scale == "static" else None
    return QuantizedTensor(scheme, (N, K), codes, scales.float(), input_scale=static, input_order=input_order)


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether all tensors are the same bit for bit, and of one scheme."""
    ours, theirs = a.tensors(), b.tensors()
    return (
        a.scheme == b.scheme
        and a.shape == b.shape
        and ours.keys() == theirs.keys()
        and all(bits(ours[name]).equal(bits(theirs[name])) for name in ours)
        and all(ours[name].dtype == theirs[name].dtype for name in ours)
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def stored(tensors: dict[str, torch.Tensor], module: str = "m") -> dict[str, Any]:
    """What a reader sees of these tensors in a file's header."""
    names = {
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    return {
        f"{module}.{suffix}": StoredTensor(
            Path("f.safetensors"), names[t.dtype], tuple(t.shape), 0, t.nbytes, f"{module}.{suffix}"
        )
        for suffix, t in tensors.items()
    }
