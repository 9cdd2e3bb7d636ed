"""FP8 x FP8 through torch._scaled_mm: y = (x_q codes^T) * x_scale * scales^T + bias, at large M.

The vendor's kernel scales rows and columns in its epilogue and promotes the tensor cores' 14-bit sums to
float32 as it goes (use_fast_accum=False, the accurate mode). It wants bfloat16 out and K, N in multiples of 16.
Bytes and operations are those of `w8a8.py`, which runs what this one does not take.
"""

import torch
from torch import Tensor

from quantkit.kernels.quantize_activations import quantize_activations


def w8a8_scaled_mm(
    x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Arguments as in `ops.w8a8`, x bfloat16 [M, K], codes float8_e4m3fn.

    Returns:
        bfloat16 [M, N], see `w8a8.w8a8_triton` for the bound.
    """
    x_codes, x_scales = quantize_activations(x, torch.float8_e4m3fn, input_scale)
    return torch._scaled_mm(
        x_codes.view(torch.float8_e4m3fn),
        codes.t(),
        scale_a=x_scales.reshape(-1, 1).expand(len(x), 1).contiguous(),
        scale_b=scales.t().contiguous(),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
