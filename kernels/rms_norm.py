"""RMS norm with the residual before it and the rounding to 8 bits after it, in one pass over a row.

    h[m, k] = x[m, k] + residual[m, k]                            rounded to x.dtype                (1)
    n[m, k] = h[m, k] / sqrt(mean over k of h[m, k]^2 + eps)      in float32, rounded to x.dtype    (2)
    y[m, k] = n[m, k] * weight[k]                                 rounded to x.dtype                (3)

and then (1) and (2) of `quantize_activations.py`. The order of roundings is that of transformers' LlamaRMSNorm; float32
sums and the square root come out otherwise in their last bits. A program keeps whole rows in registers: with a residual
2 x 2 bytes a value are read and 2 + 1 written in bfloat16, where separate kernels move 6, 4 and 3. At 3.0 TB/s an H100
has 66 instructions a value to spend on these 7 bytes, and some 20 are spent.
The weight is requested before the wait for the kernel before (programmatic dependent launch), x after it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.quantize_activations import capabilities, config, outputs, store_rounded

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """n of equation (2) before it is rounded, in float64, and the rounded h of (1)."""
    h = x if residual is None else x + residual
    wide = h.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt(), h


@triton.jit
def store_normed(
    h, weight, m, y_ptr, scales_ptr, input_scale_ptr, M, K, eps,
    G: tl.constexpr, FMA: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Equations (2) and (3), and the rounding, of whole rows m of h [ROWS, BLOCK_K], 0 past M and K; weight [1, BLOCK_K]."""
    dtype: tl.constexpr = h.dtype
    k = tl.arange(0, h.shape[1])
    h = h.to(tl.float32)
    mean = tl.sum(h * h, 1) / K  # [ROWS]
    n = (h * tl.rsqrt(mean + eps)[:, None]).to(dtype)
    y = (n.to(tl.float32) * weight.to(tl.float32)).to(dtype)  # [ROWS, BLOCK_K]
    if scales_ptr is None:
        inside = (m < M)[:, None] & (k < K)[None, :]
        tl.store(y_ptr + m[:, None] * K + k[None, :], y, mask=inside)
    else:
        store_rounded(y.to(tl.float32), m, 0, y_ptr, scales_ptr, input_scale_ptr, M, K, G, FMA, NATIVE_FP8)


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, h_ptr, y_ptr, scales_ptr, input_scale_ptr,
    M, K, stride_xm, eps,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    FMA: tl.constexpr, NATIVE_FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = m[:, None] * K + k[None, :]
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0)[None, :]
    if PDL:
        gdc_wait()
    h = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :], mask=inside, other=0.0)
    dtype: tl.constexpr = h.dtype
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(h_ptr + at, h, mask=inside)
    store_normed(
        h, weight, m, y_ptr, scales_ptr, input_scale_ptr, M, K, eps, G=G, FMA=FMA, NATIVE_FP8=NATIVE_FP8
    )


def rms_norm_triton(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dtype: torch.dtype | None,
    input_scale: Tensor | None,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (1) to (3) and the rounding; arguments and results as in `ops.rms_norm_quantize`, x [M, K]."""
    M, K = x.shape
    h = x.new_empty(0 if residual is None else (M, K))
    y, scales, found = outputs(x, K, dtype, input_scale, group_size)
    launch = config(M, K, True, x.element_size())
    rms_norm_kernel[(triton.cdiv(M, launch["ROWS"]),)](
        x, residual, weight, h, y, found, input_scale, M, K, x.stride(0), eps,
        G=group_size, **launch, **capabilities(x),
    )  # fmt: skip
    return y if dtype is None else y.view(dtype), scales, h
