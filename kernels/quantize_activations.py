"""Rounding of activations to int8 or e4m3 on a GPU, bit for bit as `cpu.quantize_activations` does.

    scale[m, g] = max(max over group g of |x[m, k]| / top, SCALE_FLOOR)     top = 127 or 448       (1)
    code[m, k]  = round_half_even(x[m, k] / scale[m, g]) within +-top                              (2)

Codes are int8 [M, K], or e4m3 bits as uint8 [M, K] (Triton has the type only from sm_89 on). x is read once and kept in
registers from (1) to (2), 2 K + K bytes a row in bfloat16; only rows that do not fit are read twice. At 3.0 TB/s an H100
has 28 instructions a value to spend, and some 14 are spent: 3 on the division, 2 on the maximum, 1 to 2 on the code.
`rms_norm.py` and `swiglu.py` round what they compute by the same functions.

The division (`divide`) is a product and two fused multiply-adds. They are not the rounded quotient for every pair of
float32 numbers, but give its code for every pair of bfloat16 or of float16 numbers x and max |x|: all of them were tried,
and the tests try all significands. float32 x and static scales are divided by division's own instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.cpu import FP8, SCALE_FLOOR, TOP
from quantkit.kernels.cpu import quantize_activations as reference
from quantkit.kernels.dispatch import MAX_ROW, MULTIPROCESSORS, native_fp8, target_of
from quantkit.kernels.w4a16 import LAST_FIRST, ptx_level

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["encode_e4m3", "quantize_activations", "reference"]

E4M3_TOP: tl.constexpr = tl.constexpr(TOP[FP8])
INT8_TOP: tl.constexpr = tl.constexpr(TOP[torch.int8])
FLOOR: tl.constexpr = tl.constexpr(SCALE_FLOOR)
# 1.5 * 2^23: adding it leaves no bits after the point, and the whole number in the lowest bits.
WHOLE: tl.constexpr = tl.constexpr(12582912.0)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))

LANES = 32
# The interpreter of Triton 3.6 rounds a fused multiply-add twice.
FUSED_IN_THE_INTERPRETER = LAST_FIRST.value


def config(M: int, K: int, whole_rows: bool, itemsize: int = 2) -> dict[str, int]:
    """Launch parameters: a program takes ROWS x BLOCK_K values, all columns of its rows if it must see whole rows.

    A lane has 8 values where there are few programs, which are then over soonest, and 64 bytes where there are many.
    """
    block = max(128, triton.next_power_of_2(K))
    if not whole_rows:
        block = min(block, 1024 if M * K <= MULTIPROCESSORS * 8192 else 4096)
    rows = max(1, 1024 // block) if M >= 8 * MULTIPROCESSORS else 1
    programs = triton.cdiv(M, rows) * triton.cdiv(K, block)
    values_of_lane = 8 if programs <= 2 * MULTIPROCESSORS else 64 // itemsize
    warps = min(16, max(1, rows * block // (LANES * values_of_lane)))
    return {"ROWS": rows, "BLOCK_K": block, "num_warps": warps}


def capabilities(x: Tensor) -> dict[str, bool]:
    """What the kernels may use for x: compile-time flags, and the launch option that belongs to them."""
    pdl = ptx_level(x) >= 90
    flags = {
        "FMA": x.element_size() == 2 and (x.is_cuda or FUSED_IN_THE_INTERPRETER),
        "NATIVE_FP8": native_fp8(target_of(x.device)),
        "PDL": pdl,
    }
    return flags | ({"launch_pdl": True} if pdl else {})


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
    """float32 -> the nearest whole number, half to even, for |v| up to 2^22."""
    return (v + WHOLE) - WHOLE


@triton.jit
def encode_whole(v):
    """float32 within +-127.5 -> int8, rounded half to even."""
    return (v + WHOLE).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def encode_int8(v):
    """float32 -> int8, rounded half to even within +-127."""
    return encode_whole(tl.minimum(tl.maximum(v, -INT8_TOP), INT8_TOP))


@triton.jit
def encode(v, TO_INT8: tl.constexpr, SATURATE: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """float32 -> int8, or e4m3 bits as uint8. A NaN is a NaN of e4m3 and any int8, whose scale is NaN."""
    if TO_INT8:
        return encode_int8(v) if SATURATE else encode_whole(v)
    else:
        # the instruction too rounds half to even and saturates
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if NATIVE_FP8 else encode_e4m3(v)


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
def divide(x, scale, FMA: tl.constexpr):
    """x / scale for x [..., n] within top * scale, scale [...]: with FMA a quotient that has the right code.

    A product with 1 / scale, and Markstein's correction of it by what is left of x; the signs keep a -0.
    """
    if FMA:
        reciprocal = tl.broadcast_to(tl.expand_dims(tl.div_rn(1.0, scale), -1), x.shape)
        # x / inf is 0 or NaN already, and 0 * inf would make all of it NaN
        finite = tl.broadcast_to(tl.expand_dims(tl.where(scale < INFINITY, scale, 0.0), -1), x.shape)
        quotient = x * reciprocal
        excess = tl.fma(quotient, finite, -x)
        return tl.fma(excess, -reciprocal, quotient)
    else:
        return tl.div_rn(x, tl.expand_dims(scale, -1))


@triton.jit
def store_rounded(
    y, m, k0, codes_ptr, scales_ptr, input_scale_ptr, M, K,
    G: tl.constexpr, FMA: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Equations (1) and (2) for y, float32 [ROWS, BLOCK_K], columns k0 and on of the rows m; 0 past M and K.

    Without a static scale a block has whole groups, or whole rows for G = 0.
    """
    ROWS: tl.constexpr = y.shape[0]
    BLOCK_K: tl.constexpr = y.shape[1]
    to_int8: tl.constexpr = codes_ptr.dtype.element_ty == tl.int8
    top: tl.constexpr = INT8_TOP if to_int8 else E4M3_TOP
    static: tl.constexpr = input_scale_ptr is not None
    if static:
        scale = tl.load(input_scale_ptr)
        if scales_ptr is not None:
            tl.store(scales_ptr, scale, mask=tl.program_id(0) + tl.program_id(1) == 0)
        v = tl.div_rn(y, scale)
    elif G > 0:
        grouped = y.reshape(ROWS, BLOCK_K // G, G)
        scale = scale_of(largest(grouped), top)  # [ROWS, BLOCK_K / G]
        g = k0 // G + tl.arange(0, BLOCK_K // G)
        groups = tl.cdiv(K, G)
        in_groups = (m < M)[:, None] & (g < groups)[None, :]
        tl.store(scales_ptr + g[None, :] * M + m[:, None], scale, mask=in_groups)
        v = divide(grouped, scale, FMA).reshape(ROWS, BLOCK_K)
    else:
        scale = scale_of(largest(y), top)  # [ROWS]
        tl.store(scales_ptr + m, scale, mask=m < M)
        v = divide(y, scale, FMA)
    k = k0 + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]
    # 8 codes a lane as 8 values of 16 bits are loaded: 16 would pass through shared memory where h is stored too
    at = tl.max_contiguous(codes_ptr + m[:, None] * K + k[None, :], (1, 8))
    tl.store(at, encode(v, to_int8, static, NATIVE_FP8), mask=inside)


@triton.jit
def quantize_kernel(
    x_ptr, codes_ptr, scales_ptr, input_scale_ptr,
    M, K, stride_xm,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    FMA: tl.constexpr, NATIVE_FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :], mask=inside, other=0.0).to(tl.float32)
    store_rounded(x, m, k0, codes_ptr, scales_ptr, input_scale_ptr, M, K, G, FMA, NATIVE_FP8)


@triton.jit
def quantize_long_rows_kernel(
    x_ptr, codes_ptr, scales_ptr,
    K, stride_xm,
    BLOCK_K: tl.constexpr, FMA: tl.constexpr, NATIVE_FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    to_int8: tl.constexpr = codes_ptr.dtype.element_ty == tl.int8
    columns = tl.arange(0, BLOCK_K)
    bits = tl.zeros((BLOCK_K,), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + columns
        x = tl.load(x_ptr + m * stride_xm + k, mask=k < K, other=0.0)
        bits = tl.maximum(bits, x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = scale_of(tl.max(bits, 0), INT8_TOP if to_int8 else E4M3_TOP)
    tl.store(scales_ptr + m, scale)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + columns
        x = tl.load(x_ptr + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)
        code = encode(divide(x, scale, FMA), to_int8, False, NATIVE_FP8)
        tl.store(codes_ptr + m * K + k, code, mask=k < K)


def outputs(
    x: Tensor, K: int, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a kernel that ends in `store_rounded` fills: codes (e4m3 as uint8), scales, and what it takes for scales.

    Nothing is rounded for dtype None: a result of x.dtype, and no scales.
    """
    M = len(x)
    if dtype is None:
        return x.new_empty(M, K), x.new_empty(0, dtype=torch.float32), None
    codes = x.new_empty(M, K, dtype=torch.int8 if dtype == torch.int8 else torch.uint8)
    shape = (triton.cdiv(K, group_size or K), M) if input_scale is None else (1, 1)
    scales = x.new_empty(shape, dtype=torch.float32).T  # the rows of a group side by side
    return codes, scales, scales


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
        scales: float32 [M, ceil(K / group_size)], the rows of a group side by side, [M, 1] for group_size 0, [1, 1] for a
            static scale.
    """
    M, K = x.shape
    whole_rows = input_scale is None and group_size == 0
    codes, scales, found = outputs(x, K, dtype, input_scale, group_size)
    if input_scale is not None:  # which is there to be returned
        found, scales = None, input_scale.view(1, 1)
    if whole_rows and K > (MAX_ROW if x.element_size() == 2 else MAX_ROW // 4):
        quantize_long_rows_kernel[(M,)](
            x, codes, scales, K, x.stride(0), BLOCK_K=4096, num_warps=8, **capabilities(x)
        )
        return codes, scales
    launch = config(M, K, whole_rows, x.element_size())
    grid = (triton.cdiv(M, launch["ROWS"]), triton.cdiv(K, launch["BLOCK_K"]))
    quantize_kernel[grid](
        x, codes, found, input_scale, M, K, x.stride(0), G=group_size, **launch, **capabilities(x)
    )
    return codes, scales
