"""W4A8: 4-bit weights with one scale (and zero) per group of a row, times activations in int8 with one scale a row.

    y[m, n] = x_scale[m] * sum over groups g of scales[n, g]
              * (sum over k in g of x_codes[m, k] (q[n, k] - zeros[n, g])) + bias[n]                 (1)

x is rounded first by `quantize_activations`. q - zero is a number of -15..15, so both operands fit int8: a group is summed
exactly in int32, at most 128 * 127 * 15 < 2^24 and hence exact in float32 too, then scaled and added in float32.
On sm_90 `w4a8_hopper.py` does this, from its own order of the weight; here is the definition, and a kernel for other GPUs
and what that one does not take, one for every M and not tuned.
Bytes: K / 2 a row of weights, and K a row of x. Instructions: 4 a weight to unpack, one multiply-add a block of columns
and element of y.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels import w4a16
from quantkit.kernels.block import grid, rows_and_columns, store_block
from quantkit.kernels.wna16 import centre, load_codes, words_of


def reference(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """Equation (1) in float64 from activations that are already rounded: x_codes [M, K], x_scales [M, 1]."""
    w = w4a16.dequantize(codes, scales, zeros, group_size, x_codes.shape[1])
    y = (x_codes.double() @ w.T) * x_scales.double()
    return y if bias is None else y + bias.double()


def config(M: int, group_size: int) -> dict[str, int]:
    """Launch parameters for x [M, K]. BLOCK_K divides the group size."""
    block_k = next(size for size in (128, 64, 32) if group_size % size == 0)
    if M <= 16:  # decode: narrow tiles, so that N = 4096 still fills 132 SMs
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}
    if M <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": min(block_k, 64), "num_warps": 8, "num_stages": 3}


@triton.jit
def w4a8_kernel(
    x_ptr, codes_ptr, x_scales_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    M, N, K,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n, in_m, in_n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    words = words_of(K, 4)
    groups = tl.cdiv(K, G) if G > 0 else 1
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        # x is 0 past K, so it does not matter what w is there
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=in_m[:, None] & (k < K)[None, :], other=0)
        q = load_codes(codes_ptr + (n * words)[:, None], in_n[:, None], k0, words, 4, BLOCK_K)
        at = n * groups + (k0 // G if G > 0 else 0)
        w = centre(q, zeros_ptr, at, in_n, 4).to(tl.int8)
        scale = tl.load(scales_ptr + at, mask=in_n, other=0.0).to(tl.float32)
        acc += tl.dot(x, tl.trans(w), out_dtype=tl.int32).to(tl.float32) * scale[None, :]
    y = acc * tl.load(x_scales_ptr + m, mask=in_m, other=0.0)[:, None]
    store_block(y, bias_ptr, y_ptr, m, n, in_m, in_n, N)


def w4a8_triton(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Equation (1) on the GPU that holds the tensors; arguments as in `ops.w4a8_rounded`, x_codes [M, K].

    Returns:
        y [M, N], within u |y| + (K + 8) 2^-23 (|x| @ |w|) of `reference`, u the unit roundoff of dtype.
    """
    (M, K), N = x_codes.shape, codes.shape[0]
    y = x_codes.new_empty(M, N, dtype=dtype)
    launch = config(M, group_size)
    w4a8_kernel[grid(M, N, launch)](
        x_codes, codes, x_scales, scales, zeros, bias, y, M, N, K, G=group_size, **launch
    )
    return y
