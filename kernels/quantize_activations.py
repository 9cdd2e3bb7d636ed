"""Rounding of activations to int8 or e4m3 on a GPU, bit for bit as `cpu.quantize_activations` does.

    scale[m, g] = max(max over group g of |x[m, k]| / top, SCALE_FLOOR)     top = 127 or 448       (1)
    code[m, k]  = round_half_even(x[m, k] / scale[m, g]) within +-top                              (2)

Codes are int8 [M, K], or e4m3 bits as uint8 [M, K] (Triton has the type only from sm_89 on). The kernel reads x once
for (1) and, mostly from cache, again for (2): 2 K + K bytes a row in bfloat16. About 20 instructions a value, of which
the exact division is half; both are small beside the product that follows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.cpu import FP8, SCALE_FLOOR, TOP
from quantkit.kernels.cpu import quantize_activations as reference

__all__ = ["encode_e4m3", "quantize_activations", "reference"]

E4M3_TOP: tl.constexpr = tl.constexpr(TOP[FP8])
INT8_TOP: tl.constexpr = tl.constexpr(TOP[torch.int8])
FLOOR: tl.constexpr = tl.constexpr(SCALE_FLOOR)


def config(K: int, group_size: int) -> dict[str, int]:
    """Launch parameters: a program takes one row, BLOCK_K columns at a time; a multiple of the group."""
    if group_size:
        return {"BLOCK_K": group_size * 8, "num_warps": 4}
    return {"BLOCK_K": min(4096, max(128, triton.next_power_of_2(K))), "num_warps": 4}


@triton.jit
def round_e4m3(v):
    """float32 -> the float32 of e4m3 that is nearest to |v|, half to even and at most 448.

    Adding and subtracting a power of two 20 binades up leaves three bits of mantissa, as does the smallest normal
    exponent, -6, for all smaller values.
    """
    bits = v.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) & 0xFF, 127 - 6)
    magic = ((tl.minimum(exponent, 127 + 8) + 20) << 23).to(tl.float32, bitcast=True)
    magnitude = tl.minimum(tl.abs(v), E4M3_TOP)
    return (magnitude + magic) - magic


@triton.jit
def encode_e4m3(v):
    """float32 -> e4m3 bits as uint8, rounded half to even and saturating at 448; NaN stays NaN.

    The rounded magnitude / 256 is a float16 whose bits 7 to 14 are the code.
    """
    bits = v.to(tl.int32, bitcast=True)
    half = (round_e4m3(v) * (1.0 / 256)).to(tl.float16).to(tl.int16, bitcast=True)
    code = tl.where(v == v, half >> 7, 0x7F) | ((bits >> 24) & 0x80).to(tl.int16)
    return code.to(tl.uint8)


@triton.jit
def round_whole(v):
    """float32 -> the nearest whole number, half to even, for |v| up to 2^22: adding 1.5 * 2^23 leaves no bits after the point."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def encode_int8(v):
    """float32 -> int8, rounded half to even within +-127."""
    return round_whole(tl.minimum(tl.maximum(v, -INT8_TOP), INT8_TOP)).to(tl.int8)


@triton.jit
def largest(x):
    """max |x| over the last axis; a NaN wins, because the bits of |x| are ordered as integers."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, -1)


@triton.jit
def scale_of(largest_bits, TOP_CODE: tl.constexpr):
    scale = tl.div_rn(largest_bits.to(tl.float32, bitcast=True), TOP_CODE)
    return tl.where(scale < FLOOR, FLOOR, scale)


@triton.jit
def quantize_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, input_scale_ptr,
    K, stride_xm,
    TO_INT8: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    top: tl.constexpr = INT8_TOP if TO_INT8 else E4M3_TOP
    columns = tl.arange(0, BLOCK_K)
    if input_scale_ptr is None:
        bits = 0
        for k0 in range(0, K, BLOCK_K):
            k = k0 + columns
            bits = tl.maximum(bits, largest(tl.load(x_ptr + m * stride_xm + k, mask=k < K, other=0.0)))
        scale = scale_of(bits, top)
        tl.store(scales_ptr + m, scale)
    else:
        scale = tl.load(input_scale_ptr)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + columns
        v = tl.div_rn(tl.load(x_ptr + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32), scale)
        tl.store(codes_ptr + m * K + k, encode_int8(v) if TO_INT8 else encode_e4m3(v), mask=k < K)


@triton.jit
def quantize_groups_kernel(
    x_ptr, codes_ptr, scales_ptr,
    K, stride_xm,
    G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * (BLOCK_K // G) + tl.arange(0, BLOCK_K // G)
    k = group[:, None] * G + tl.arange(0, G)[None, :]  # [BLOCK_K / G, G]
    x = tl.load(x_ptr + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)
    scale = scale_of(largest(x), E4M3_TOP)  # [BLOCK_K / G]
    groups = tl.cdiv(K, G)
    tl.store(scales_ptr + m * groups + group, scale, mask=group < groups)
    tl.store(codes_ptr + m * K + k, encode_e4m3(tl.div_rn(x, scale[:, None])), mask=k < K)


def quantize_activations(
    x: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Round activations to 8 bits on the GPU that holds them.

    Args:
        x: float [M, K], columns contiguous.
        dtype: int8 or float8_e4m3fn.
        input_scale: static scale, float32 [1]; None: scales are found from x.
        group_size: 128 (e4m3 only) or 0 for one scale a row.

    Returns:
        codes: int8, or e4m3 bits as uint8, [M, K].
        scales: float32 [M, ceil(K / group_size)], [M, 1] for group_size 0, [1, 1] for a static scale.
    """
    M, K = x.shape
    launch = config(K, group_size)
    codes = x.new_empty(M, K, dtype=torch.int8 if dtype == torch.int8 else torch.uint8)
    if group_size:
        scales = x.new_empty(M, triton.cdiv(K, group_size), dtype=torch.float32)
        grid = (M, triton.cdiv(K, launch["BLOCK_K"]))
        quantize_groups_kernel[grid](x, codes, scales, K, x.stride(0), G=group_size, **launch)
        return codes, scales
    scales = x.new_empty(M, 1, dtype=torch.float32) if input_scale is None else input_scale.view(1, 1)
    quantize_rows_kernel[(M,)](
        x, codes, scales, input_scale, K, x.stride(0), TO_INT8=dtype == torch.int8, **launch
    )
    return codes, scales
