"""W8A8: both operands in 8 bits, int8 or e4m3, one scale a row of x (or one for all) and one a row of weights.

    y[m, n] = x_scale[m] * scales[n] * (sum over k of x_codes[m, k] codes[n, k]) + bias[n]           (1)

x is rounded first by `quantize_activations`. int8 products are summed exactly in int32. e4m3 products go to FP8 tensor
cores where a GPU has them (sm_89 and newer); elsewhere both operands are decoded to float16, in which every product
is exact, and summed in float32. Hopper's FP8 tensor cores keep about 14 bits of a running sum. Two accumulation modes:
accurate, the default, adds their sums to float32 registers after every 128 columns (`max_num_imprecise_acc`), as
DeepGEMM does; fast leaves the whole sum to them (use_fast_accum of cuBLAS). Other tensor cores keep float32 in both.
Bytes: K a row of weights and K a row of x; no instruction touches a weight on its way to the tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.block import grid, rows_and_columns, store_block
from quantkit.kernels.dispatch import native_fp8, target_of
from quantkit.kernels.w8a16 import decode_e4m3

PROMOTE_EVERY = 128  # columns; BLOCK_K of the FP8 path must not be smaller
NEVER = 2**30


def reference(
    x_codes: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None
) -> Tensor:
    """Equation (1) in float64 from activations that are already rounded: x_codes [M, K], x_scales [M, 1] or [1, 1]."""
    y = (x_codes.double() @ codes.double().T) * x_scales.double() * scales.double().T
    return y if bias is None else y + bias.double()


def config(M: int, N: int, K: int) -> dict[str, int]:
    """Launch parameters for x [M, K] times [N, K]."""
    if M <= 16:  # decode: narrow tiles, so that N = 4096 still fills 132 SMs
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    if M <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}


@triton.jit
def w8a8_kernel(
    x_ptr, codes_ptr, x_scales_ptr, scales_ptr, bias_ptr, y_ptr,
    M, N, K, stride_sm,
    NATIVE_FP8: tl.constexpr, PROMOTE_EVERY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n, in_m, in_n = rows_and_columns(M, N, BLOCK_M, BLOCK_N)
    is_int8: tl.constexpr = codes_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if is_int8 else tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_k = (k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=in_m[:, None] & in_k, other=0)
        w = tl.load(codes_ptr + n[:, None] * K + k[None, :], mask=in_n[:, None] & in_k, other=0)
        if is_int8:
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
        elif NATIVE_FP8:
            x, w = x.to(tl.float8e4nv, bitcast=True), w.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=PROMOTE_EVERY)
        else:
            acc = tl.dot(decode_e4m3(x), tl.trans(decode_e4m3(w)), acc)
    x_scale = tl.load(x_scales_ptr + m * stride_sm, mask=in_m, other=0.0)
    scale = tl.load(scales_ptr + n, mask=in_n, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None] * scale[None, :]
    store_block(y, bias_ptr, y_ptr, m, n, in_m, in_n, N)


def w8a8_rounded(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    native: bool,
    fast: bool = False,
) -> Tensor:
    """Equation (1) for activations that are already rounded.

    Args:
        x_codes: int8 or float8_e4m3fn, or its bits as uint8, [M, K].
        x_scales: float32 [M, 1], or [1, 1] for all rows.
        codes: int8, or float8_e4m3fn, [N, K].
        scales: float32 [N, 1].
        bias: float [N] or None.
        dtype: of the result.
        native: multiply e4m3 on FP8 tensor cores.
        fast: leave a whole sum to those.

    Returns:
        y [M, N], within u |y| + (K + 8) 2^-23 (|x| @ |w|) of `reference`, u the unit roundoff of dtype; on Hopper's
        FP8 tensor cores a sum of 128 products is good to about 2^-13 of its largest partial sum, and in the fast mode one
        of all K.
    """
    (M, K), N = x_codes.shape, codes.shape[0]
    y = x_codes.new_empty(M, N, dtype=dtype)
    launch = config(M, N, K)
    bits = torch.int8 if codes.dtype == torch.int8 else torch.uint8  # Triton has e4m3 only from sm_89 on
    stride_sm = 1 if len(x_scales) == M else 0
    w8a8_kernel[grid(M, N, launch)](
        x_codes.view(bits),
        codes.view(bits),
        x_scales,
        scales,
        bias,
        y,
        M,
        N,
        K,
        stride_sm,
        NATIVE_FP8=native,
        PROMOTE_EVERY=NEVER if fast else PROMOTE_EVERY,
        **launch,
    )
    return y


def w8a8_triton(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """`w8a8_rounded` on the GPU that holds the tensors; arguments as in `ops.w8a8_rounded`, x_codes [M, K]."""
    native = native_fp8(target_of(codes.device))
    return w8a8_rounded(x_codes, x_scales, codes, scales, bias, dtype, native, fast)
