"""W4A16: y = x w^T + bias, weights stored as 4-bit codes with one scale (and zero) per group of a row.

    w[n, k] = (q[n, k] - zeros[n, k // G]) * scales[n, k // G]                                       (1)
    y[m, n] = sum over groups g of scales[n, g] * (sum over k in g of x[m, k] (q - zero)) + bias[n]  (2)

Codes are in the neutral layout: int32 [N, ceil(K/8)], eight codes a word, the first in the lowest bits. q - zero is a
small integer, exact in x.dtype, so the tensor cores multiply exact operands and only (2) rounds, in float32.
Bytes: K/2 + 2 K/G a row of weights; that is the limit up to M of about 64. Instructions: about 10 a weight (shift,
mask, subtract, convert, and the way through shared memory), three times what the memory would allow on Hopper.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CODES_PER_WORD: tl.constexpr = tl.constexpr(8)
SYMMETRIC_ZERO: tl.constexpr = tl.constexpr(8)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int) -> Tensor:
    """Equation (1): float64 [N, K], on any device."""
    k = torch.arange(K, device=codes.device)
    q = codes[:, k // 8] >> (k % 8 * 4) & 0xF
    group = k // group_size if group_size else k * 0
    return (q - (8 if zeros is None else zeros.int()[:, group])).double() * scales.double()[:, group]


def reference(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """x w^T + bias in float64, on any device."""
    y = x.double() @ dequantize(codes, scales, zeros, group_size, x.shape[1]).T
    return y if bias is None else y + bias.double()


def config(M: int, N: int, K: int, group_size: int, x_dtype: torch.dtype) -> dict[str, int]:
    """Launch parameters. BLOCK_K divides the group, so that a tile of a row has one scale and one zero."""
    block_k = next(size for size in (128, 64, 32) if group_size % size == 0)
    if x_dtype == torch.float32:  # no tensor cores at full precision: small tiles keep the registers
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": min(block_k, 32), "num_warps": 4, "num_stages": 2}
    # decode: narrow tiles, so that N = 4096 still fills 132 SMs; dispatch sends larger M to the vendor's GEMM
    return {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": block_k, "num_warps": 2, "num_stages": 4}


@triton.jit
def w4a16_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_m, in_n = m < M, n < N
    words = tl.cdiv(K, CODES_PER_WORD)
    groups = tl.cdiv(K, G) if G > 0 else 1
    shifts = tl.arange(0, CODES_PER_WORD) * 4
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + m[:, None] * stride_xm + k[None, :], mask=in_m[:, None] & (k < K)[None, :], other=0.0
        )
        word = k0 // CODES_PER_WORD + tl.arange(0, BLOCK_K // CODES_PER_WORD)
        packed = tl.load(
            codes_ptr + n[:, None] * words + word[None, :],
            mask=in_n[:, None] & (word < words)[None, :],
            other=0,
        )
        q = (packed[:, :, None] >> shifts[None, None, :]) & 0xF
        group = n * groups + (k0 // G if G > 0 else 0)
        scale = tl.load(scales_ptr + group, mask=in_n, other=0.0).to(tl.float32)
        if zeros_ptr is None:
            q -= SYMMETRIC_ZERO
        else:
            q -= tl.load(zeros_ptr + group, mask=in_n, other=0).to(tl.int32)[:, None, None]
        w = q.reshape(BLOCK_N, BLOCK_K).to(x.dtype)
        acc += tl.dot(x, tl.trans(w), input_precision="ieee") * scale[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    mask = in_m[:, None] & in_n[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


def w4a16_triton(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """Equation (2) on the GPU that holds the tensors; arguments as in `ops.w4a16`, x [M, K] with contiguous columns.

    Returns:
        y of x.dtype [M, N], within u |y| + (K + 8) 2^-23 (|x| @ |w|) of `reference`, u the unit roundoff of x.dtype.
    """
    (M, K), N = x.shape, codes.shape[0]
    y = x.new_empty(M, N)
    launch = config(M, N, K, group_size, x.dtype)
    grid = (triton.cdiv(M, launch["BLOCK_M"]), triton.cdiv(N, launch["BLOCK_N"]))
    w4a16_kernel[grid](x, codes, scales, zeros, bias, y, M, N, K, x.stride(0), G=group_size, **launch)
    return y
