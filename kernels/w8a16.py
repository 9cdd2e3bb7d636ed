"""W8A16: y = x w^T + bias, weights stored as int8 or e4m3 with one scale a row.

    y[m, n] = scales[n] * (sum over k of x[m, k] codes[n, k]) + bias[n]                              (1)

Codes are [N, K], int8 or the bits of float8_e4m3fn as uint8. Both are exact in float16, bfloat16 and float32, so only
the float32 sum and the last step round. e4m3 is decoded by its bits, which needs no hardware support:

    float16 bits = sign << 8 | (code & 0x7f) << 7, times 256                                         (2)

Bytes: K a row of weights; that is the limit up to M of about 128. Instructions: 2 to 3 a weight for int8, 4 for e4m3,
and the way through shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.block import grid, rows_and_columns, store_block


def reference(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Equation (1) in float64 on any device."""
    y = x.double() @ (codes.double() * scales.double()).T
    return y if bias is None else y + bias.double()


def config(M: int, N: int, K: int, x_dtype: torch.dtype) -> dict[str, int]:
    """Launch parameters for x [M, K] times [N, K]."""
    if x_dtype == torch.float32:  # no tensor cores at full precision: small tiles keep the registers
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if M <= 16:  # decode: narrow tiles, so that N = 4096 still fills 132 SMs
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    if M <= 64:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def decode_e4m3(code):
    """e4m3 bits as uint8 -> float16, exactly, by equation (2); the two NaN codes become +-480."""
    wide = code.to(tl.int16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def w8a16_kernel(
    x_ptr, codes_ptr, scales_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n, in_m, in_n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_k = (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :], mask=in_m[:, None] & in_k, other=0.0)
        q = tl.load(codes_ptr + n[:, None] * K + k[None, :], mask=in_n[:, None] & in_k, other=0)
        w = q if codes_ptr.dtype.element_ty == tl.int8 else decode_e4m3(q)
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
    acc *= tl.load(scales_ptr + n, mask=in_n, other=0.0)[None, :]
    store_block(acc, bias_ptr, y_ptr, m, n, in_m, in_n, N)


def w8a16_triton(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Equation (1) on the GPU that holds the tensors; arguments as in `ops.w8a16`, x [M, K] with contiguous columns.

    Returns:
        y of x.dtype [M, N], within u |y| + (K + 8) 2^-23 (|x| @ |w|) of `reference`, u the unit roundoff of x.dtype.
    """
    (M, K), N = x.shape, codes.shape[0]
    y = x.new_empty(M, N)
    launch = config(M, N, K, x.dtype)
    bits = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    w8a16_kernel[grid(M, N, launch)](x, bits, scales, bias, y, M, N, K, x.stride(0), **launch)
    return y
