"""FP8 block: e4m3 weights with one scale a 128 x 128 tile, activations in e4m3 with one scale a row and 128 columns.

    y[m, n] = sum over blocks b of x_scale[m, b] * scales[n // 128, b]
              * (sum over k in b of x_codes[m, k] codes[n, k]) + bias[n]                             (1)

This is the format of DeepSeek-V3. Every block of 128 columns has its own sum, scaled in float32, so the 14-bit sums of
Hopper's FP8 tensor cores are promoted by construction. GPUs without FP8 tensor cores for e4m3fn (before sm_89, gfx942)
decode both operands to float16, in which every product is exact.
Bytes: K a row of weights and K a row of x. Instructions: one multiply-add a block and element of y.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.block import grid, rows_and_columns, store_block
from quantkit.kernels.cpu import BLOCK, expand_blocks
from quantkit.kernels.dispatch import native_fp8, target_of
from quantkit.kernels.w8a16 import decode_e4m3

TILE: tl.constexpr = tl.constexpr(BLOCK)


def reference(
    x_codes: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """Equation (1) in float64 from rounded activations: x_codes [M, K], x_scales [M, ceil(K/128)]."""
    N, K = codes.shape
    x = x_codes.double() * x_scales.double().repeat_interleave(BLOCK, 1)[:, :K]
    y = x @ (codes.double() * expand_blocks(scales.double(), N, K)).T
    return y if bias is None else y + bias.double()


def config(M: int, N: int, K: int) -> dict[str, int]:
    """Launch parameters for x [M, K] times [N, K]. BLOCK_N divides 128, so that a tile of weights has one scale."""
    if M <= 16:  # decode: narrow tiles, so that N = 4096 still fills 132 SMs
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 4}
    if M <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}


@triton.jit
def fp8_block_kernel(
    x_ptr, codes_ptr, x_scales_ptr, scales_ptr, bias_ptr, y_ptr,
    M, N, K, stride_sm, stride_sb,
    NATIVE_FP8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m, n, in_m, in_n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    blocks = tl.cdiv(K, TILE)
    tile_row = (tl.program_id(1) * BLOCK_N // TILE).to(tl.int64) * blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(0, blocks):
        k = block * TILE + tl.arange(0, TILE)
        in_k = (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=in_m[:, None] & in_k, other=0)
        w = tl.load(codes_ptr + n[:, None] * K + k[None, :], mask=in_n[:, None] & in_k, other=0)
        x_scale = tl.load(x_scales_ptr + m * stride_sm + block * stride_sb, mask=in_m, other=0.0)
        if NATIVE_FP8:
            part = tl.dot(x.to(tl.float8e4nv, bitcast=True), tl.trans(w.to(tl.float8e4nv, bitcast=True)))
        else:
            part = tl.dot(decode_e4m3(x), tl.trans(decode_e4m3(w)))
        acc += part * (x_scale * tl.load(scales_ptr + tile_row + block))[:, None]
    store_block(acc, bias_ptr, y_ptr, m, n, in_m, in_n, N)


def fp8_block_rounded(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    native: bool,
) -> Tensor:
    """Equation (1) for activations that are already rounded.

    Args:
        x_codes: float8_e4m3fn, or its bits as uint8, [M, K].
        x_scales: float32 [M, ceil(K/128)].
        codes: float8_e4m3fn [N, K].
        scales: float32 [ceil(N/128), ceil(K/128)].
        bias: float [N] or None.
        dtype: of the result.
        native: multiply e4m3 on FP8 tensor cores.

    Returns:
        y [M, N], within the bound of `w8a8.w8a8_rounded`.
    """
    (M, K), N = x_codes.shape, codes.shape[0]
    y = x_codes.new_empty(M, N, dtype=dtype)
    launch = config(M, N, K)
    bits = torch.uint8  # Triton has e4m3 only from sm_89 on
    fp8_block_kernel[grid(M, N, launch)](
        x_codes.view(bits),
        codes.view(bits),
        x_scales,
        scales,
        bias,
        y,
        M,
        N,
        K,
        *x_scales.stride(),
        NATIVE_FP8=native,
        **launch,
    )
    return y


def fp8_block_triton(
    x_codes: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`fp8_block_rounded` on the GPU that holds the tensors; arguments as in `ops.fp8_block_rounded`, x_codes [M, K]."""
    native = native_fp8(target_of(codes.device))
    return fp8_block_rounded(x_codes, x_scales, codes, scales, bias, dtype, native)
