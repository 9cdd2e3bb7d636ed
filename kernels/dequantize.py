"""Dequantize to x.dtype, then multiply by the vendor's GEMM: weight-only products at large M.

    w[n, k] = (q[n, k] - zeros[n, k // G]) * scales[n, k // G]     int4                              (1)
    w[n, k] = codes[n, k] * scales[n]                              int8, e4m3                        (2)
    y = x w^T + bias                                                                                 (3)

From some M on a product is bound by the tensor cores, and the vendor's kernel keeps them busier than a fused
one does. The price is one pass over the weight: it is read packed, written and read again in 16 bits, 2.5 bytes
a weight more than a plain product for int4 and 3 for 8 bits, whatever M is. The copy lives for the length of the call: 2 N K bytes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.cpu import epilogue
from quantkit.kernels.int4tiles import PAD_K, STRIP, TILE_K
from quantkit.kernels.w4a16 import as_words, fragments, group_of, halves, ptx_level, two_bytes
from quantkit.kernels.w8a16 import decode_e4m3

BLOCK_N, BLOCK_K = 16, 256  # weights a program: enough bytes in flight, one scale a row and group
CODES_PER_WORD: tl.constexpr = tl.constexpr(8)
SYMMETRIC_ZERO: tl.constexpr = tl.constexpr(8)
TILE_WARPS, TILES = 4, 2  # strips and tiles a program, for int4 tiles


@triton.jit
def dequantize_int4_kernel(
    codes_ptr, scales_ptr, zeros_ptr, w_ptr, N, K,
    G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    words = tl.cdiv(K, CODES_PER_WORD)
    word = tl.program_id(1) * (BLOCK_K // CODES_PER_WORD) + tl.arange(0, BLOCK_K // CODES_PER_WORD)[None, :]
    inside = (n < N) & (word < words)
    packed = tl.load(codes_ptr + n * words + word, mask=inside, other=0)
    group = n * tl.cdiv(K, G) + word * CODES_PER_WORD // G  # 8 divides G, or one group is the whole row
    scale = tl.load(scales_ptr + group, mask=inside, other=0.0).to(tl.float32)
    q = (packed[:, :, None] >> (tl.arange(0, CODES_PER_WORD) * 4)[None, None, :]) & 0xF
    if zeros_ptr is None:
        q -= SYMMETRIC_ZERO
    else:
        q -= tl.load(zeros_ptr + group, mask=inside, other=0).to(tl.int32)[:, :, None]
    w = (q * scale[:, :, None]).to(w_ptr.dtype.element_ty).reshape(BLOCK_N, BLOCK_K)
    tl.store(w_ptr + n * K + k, w, mask=(n < N) & (k < K))


@triton.jit
def dequantize_tiles_kernel(
    tiles_ptr, scales_ptr, zeros_ptr, w_ptr, N, K,
    G: tl.constexpr, SCALE_DTYPE: tl.constexpr, W: tl.constexpr, C: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = 1 if G == 0 else (1 if G % (C * 64) == 0 else (C if G % 64 == 0 else C * 2))
    S: tl.constexpr = C * 4 // P
    units = tl.cdiv(K, 128) * 2 // C
    groups = tl.cdiv(units * C * 64, G) if G > 0 else 1
    unit = tl.program_id(0)
    c = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None]
    strip = (tl.program_id(1) * W + tl.arange(0, W))[None, None, :, None, None]
    inside = strip < tl.cdiv(N, 16)
    tile = tl.arange(0, C)[None, None, None, None, :, None]
    kt = tl.arange(0, 4)[None, None, None, None, None, :]
    at = (strip[:, :, :, :, :, None].to(tl.int64) * units + unit) * (C * 128) + tile * 128
    at += g[:, :, :, :, :, None] * 16 + c[:, :, :, :, :, None] * 4 + kt
    q = tl.load(tiles_ptr + at, mask=inside[:, :, :, :, :, None] & (tile >= 0), other=0)  # c g W R=1 C kt
    part = tl.arange(0, P)[None, None, None, None, :]
    group = group_of(unit, part, G, C, P)
    row_at = (strip * groups + group) * 8 + g + 0 * c
    scales = halves(tl.load(scales_ptr + row_at, mask=inside, other=0), SCALE_DTYPE)
    zeros = None
    if zeros_ptr is not None:
        zeros = two_bytes(tl.load(zeros_ptr + row_at, mask=inside, other=0))
    w = fragments(q.reshape(4, 8, W, 1, P, S), zeros, scales, w_ptr.dtype.element_ty, ASM)
    w = w.permute(3, 2, 6, 1, 4, 5, 7, 0, 8).reshape(W * 16, C * 64)
    n = (tl.program_id(1) * (W * 16) + tl.arange(0, W * 16)).to(tl.int64)[:, None]
    k = unit * (C * 64) + tl.arange(0, C * 64)[None, :]
    tl.store(w_ptr + n * K + k, w, mask=(n < N) & (k < K))


@triton.jit
def dequantize_rows_kernel(
    codes_ptr, scales_ptr, w_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (n < N) & (k < K)
    code = tl.load(codes_ptr + n * K + k, mask=inside, other=0)
    value = code.to(tl.float32) if codes_ptr.dtype.element_ty == tl.int8 else decode_e4m3(code).to(tl.float32)
    scale = tl.load(scales_ptr + n, mask=n < N, other=0.0)
    tl.store(w_ptr + n * K + k, (value * scale).to(w_ptr.dtype.element_ty), mask=inside)


def w4a16_vendor(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """Equations (1) and (3); arguments as in `ops.w4a16`, x [M, K].

    Returns:
        y of x.dtype [M, N], within u |y| + (u + (K + 8) 2^-23) (|x| @ |w|) of `w4a16.reference`, u the unit
        roundoff of x.dtype: beside the sum, each weight is rounded once.
    """
    N, K = codes.shape[0], x.shape[1]
    w = x.new_empty(N, K)
    grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))
    dequantize_int4_kernel[grid](
        codes, scales, zeros, w, N, K, G=group_size or K, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4
    )
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def w4a16_tiles_vendor(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    N: int,
    swiglu: bool,
) -> Tensor:
    """Equations (1) and (3) from `int4tiles.py`; arguments as in `ops.w4a16_tiles`, x [M, K]; as `w4a16_vendor`."""
    K = x.shape[1]
    w = x.new_empty(N, K)
    # PTX multiplies in x.dtype: the product is rounded once only where the scale has that dtype
    asm = ptx_level(x) if scales.dtype == x.dtype else 0
    grid = (-(-K // PAD_K) * PAD_K // (TILES * TILE_K), triton.cdiv(N, TILE_WARPS * STRIP))
    scale_words, zero_words, scale_dtype = as_words(scales, zeros)
    dequantize_tiles_kernel[grid](
        tiles, scale_words, zero_words, w, N, K,
        G=group_size, SCALE_DTYPE=scale_dtype,
        W=TILE_WARPS, C=TILES, ASM=asm, num_warps=TILE_WARPS,
    )  # fmt: skip
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    return epilogue(y, residual, swiglu)


def w8a16_vendor(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Equations (2) and (3); arguments as in `ops.w8a16`, x [M, K]; the bound of `w4a16_vendor`."""
    N, K = codes.shape[0], x.shape[1]
    w = x.new_empty(N, K)
    bits = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))
    dequantize_rows_kernel[grid](bits, scales, w, N, K, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))
