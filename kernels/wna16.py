"""W3A16 and W2A16: y = x w^T + bias, weights stored as 3- or 2-bit codes with one scale (and zero) per group of a row.

    w[n, k] = (q[n, k] - zeros[n, k // G]) * scales[n, k // G]                                       (1)
    y[m, n] = sum over groups g of scales[n, g] * (sum over k in g of x[m, k] (q - zero)) + bias[n]  (2)

A row of codes is one long number, the first code in its lowest bits, cut into 32-bit words. Eight codes are B bytes of it,
B the bits of a code: 24 bits for B = 3, which one word or two neighbouring ones hold, so no code has to be put together
by itself. q - zero is exact in every type of x; sums and scales are float32.

Bytes: B K / 8 a row of weights, and 2 to 4 for a group. Instructions: 4 a weight (shift, mask, zero, conversion), and the
way through shared memory. One kernel for every M; it is not tuned.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.block import grid, rows_and_columns, store_block

MIN_BLOCK_K = 32  # a block of columns has one scale: group sizes are multiples of this


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int, bits: int
) -> Tensor:
    """Equation (1) from the neutral layout: float64 [N, K], on any device."""
    k = torch.arange(K, device=codes.device)
    word, shift = k * bits // 32, k * bits % 32
    words = F.pad(codes, (0, 1)).long() & 0xFFFFFFFF
    q = (words[:, word] | words[:, word + 1] << 32) >> shift & 2**bits - 1
    group = k // group_size if group_size else k * 0
    zero = 2 ** (bits - 1) if zeros is None else zeros.int()[:, group]
    return (q - zero).double() * scales.double()[:, group]


def reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    bits: int,
) -> Tensor:
    """x w^T + bias in float64 from the neutral layout, on any device."""
    y = x.double() @ dequantize(codes, scales, zeros, group_size, x.shape[1], bits).T
    return y if bias is None else y + bias.double()


def config(M: int, group_size: int, x_dtype: torch.dtype) -> dict[str, int]:
    """Launch parameters for x [M, K]. BLOCK_K divides the group size."""
    block_k = 64 if group_size % 64 == 0 else MIN_BLOCK_K
    if x_dtype == torch.float32:  # no tensor cores at full precision: small tiles keep the registers
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": MIN_BLOCK_K, "num_warps": 4, "num_stages": 2}
    if M <= 16:  # decode: narrow tiles, so that N = 4096 still fills 132 SMs
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 4}
    if M <= 64:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}


@triton.jit
def words_of(K, BITS: tl.constexpr):
    """Words of a row of codes: whole runs of 32 codes for 3 bits, of one word for 2 and 4."""
    return tl.cdiv(K, 32) * 3 if BITS == 3 else tl.cdiv(K, 32 // BITS)


@triton.jit
def load_codes(row_ptr, in_rows, k0, words, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes k0 ... k0 + BLOCK_K of some rows: int32 [rows, BLOCK_K]; 0 in rows outside and past the last word.

    row_ptr: the first word of every row [rows, 1]; in_rows: bool [rows, 1]; k0: a multiple of 8.
    """
    bit = (k0 + 8 * tl.arange(0, BLOCK_K // 8)[None, :]) * BITS  # where eight codes begin
    word, shift = bit // 32, bit % 32
    eight = tl.load(row_ptr + word, mask=in_rows & (word < words), other=0).to(tl.uint32, bitcast=True)
    eight = eight >> shift
    if BITS == 3:
        next_word = tl.load(row_ptr + word + 1, mask=in_rows & (word + 1 < words), other=0)
        eight |= (next_word.to(tl.uint32, bitcast=True) << 1) << (31 - shift)  # none of it for shift 0
    q = (eight[:, :, None] >> (BITS * tl.arange(0, 8))[None, None, :]) & ((1 << BITS) - 1)
    return q.to(tl.int32).reshape(row_ptr.shape[0], BLOCK_K)


@triton.jit
def centre(q, zeros_ptr, at, in_n, BITS: tl.constexpr):
    """q - zero for one group of every row; without zeros the middle of the codes is the zero."""
    if zeros_ptr is None:
        return q - (1 << (BITS - 1))
    else:
        return q - tl.load(zeros_ptr + at, mask=in_n, other=0).to(tl.int32)[:, None]


@triton.jit
def wna16_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    M, N, K, stride_xm,
    G: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n, in_m, in_n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    words = words_of(K, BITS)
    groups = tl.cdiv(K, G) if G > 0 else 1
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        # x is 0 past K, so it does not matter what w is there
        x = tl.load(
            x_ptr + m[:, None] * stride_xm + k[None, :], mask=in_m[:, None] & (k < K)[None, :], other=0.0
        )
        q = load_codes(codes_ptr + (n * words)[:, None], in_n[:, None], k0, words, BITS, BLOCK_K)
        at = n * groups + (k0 // G if G > 0 else 0)
        w = centre(q, zeros_ptr, at, in_n, BITS).to(x.dtype)
        scale = tl.load(scales_ptr + at, mask=in_n, other=0.0).to(tl.float32)
        acc += tl.dot(x, tl.trans(w), input_precision="ieee") * scale[None, :]
    store_block(acc, bias_ptr, y_ptr, m, n, in_m, in_n, N)


def wna16_triton(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    bits: int,
) -> Tensor:
    """Equation (2) on the GPU that holds the tensors; arguments as in `ops.wna16`, x [M, K] with contiguous columns.

    Returns:
        y of x.dtype [M, N], within u |y| + (K + 8) 2^-23 (|x| @ |w|) of `reference`, u the unit roundoff of x.dtype.
    """
    (M, K), N = x.shape, codes.shape[0]
    y = x.new_empty(M, N)
    launch = config(M, group_size, x.dtype)
    wna16_kernel[grid(M, N, launch)](
        x, codes, scales, zeros, bias, y, M, N, K, x.stride(0), G=group_size, BITS=bits, **launch
    )
    return y
