"""SwiGLU with the rounding to 8 bits after it, in one pass over a row of gates and ups.

    a[m, f] = gate[m, f] / (1 + exp(-gate[m, f]))       in float32, rounded to x.dtype             (1)
    y[m, f] = a[m, f] * up[m, f]                        rounded to x.dtype                         (2)

and then (1) and (2) of `quantize_activations.py`. x [M, 2 F] has the gates first and the ups second; the order of roundings
is that of transformers' LlamaMLP. A program keeps whole rows in registers where they share a scale: 2 x 2 bytes a value are
read and 1 is written in bfloat16, where separate kernels move 4, 6 and 3. At 3.0 TB/s an H100 has 47 instructions a value to
spend on these 5 bytes, and some 25 are spent, two of them of the unit for exp and 1 / x that has an eighth of the rate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.quantize_activations import capabilities, config, outputs, store_rounded

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def reference(gate: Tensor) -> Tensor:
    """a of equation (1) before it is rounded, in float64."""
    wide = gate.double()
    return wide / (1 + (-wide).exp())


@triton.jit
def swiglu_kernel(
    x_ptr, y_ptr, scales_ptr, input_scale_ptr,
    M, F, stride_xm,
    G: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    FMA: tl.constexpr, NATIVE_FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f0 = tl.program_id(1) * BLOCK_K
    f = f0 + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (f < F)[None, :]
    gate_ptr = x_ptr + m[:, None] * stride_xm + f[None, :]
    if PDL:
        gdc_wait()
    gate = tl.load(gate_ptr, mask=inside, other=0.0)
    up = tl.load(gate_ptr + F, mask=inside, other=0.0)
    dtype: tl.constexpr = gate.dtype
    gate = gate.to(tl.float32)
    a = (gate / (1.0 + tl.exp(-gate))).to(dtype)
    y = (a.to(tl.float32) * up.to(tl.float32)).to(dtype)  # [ROWS, BLOCK_K]
    if scales_ptr is None:
        tl.store(y_ptr + m[:, None] * F + f[None, :], y, mask=inside)
    else:
        store_rounded(y.to(tl.float32), m, f0, y_ptr, scales_ptr, input_scale_ptr, M, F, G, FMA, NATIVE_FP8)


def swiglu_triton(
    x: Tensor, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """Equations (1), (2) and the rounding; arguments and results as in `ops.swiglu_quantize`, x [M, 2 F]."""
    M, F = x.shape[0], x.shape[1] // 2
    y, scales, found = outputs(x, F, dtype, input_scale, group_size)
    whole_rows = dtype is not None and input_scale is None and group_size == 0
    launch = config(M, F, whole_rows, x.element_size())
    grid = (triton.cdiv(M, launch["ROWS"]), triton.cdiv(F, launch["BLOCK_K"]))
    swiglu_kernel[grid](
        x, y, found, input_scale, M, F, x.stride(0), G=group_size, **launch, **capabilities(x)
    )
    return y if dtype is None else y.view(dtype), scales
