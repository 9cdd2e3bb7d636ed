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

from quantkit.kernels.w4a16 import CODES_PER_WORD, SYMMETRIC_ZERO
from quantkit.kernels.w8a16 import decode_e4m3

BLOCK_N, BLOCK_K = 16, 256  # weights a program: enough bytes in flight, one scale a row and group


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


def w8a16_vendor(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Equations (2) and (3); arguments as in `ops.w8a16`, x [M, K]; the bound of `w4a16_vendor`."""
    N, K = codes.shape[0], x.shape[1]
    w = x.new_empty(N, K)
    bits = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(K, BLOCK_K))
    dequantize_rows_kernel[grid](bits, scales, w, N, K, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))
