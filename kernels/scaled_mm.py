"""FP8 x FP8 through torch._scaled_mm: y = (x_q codes^T) * x_scale * scales^T + bias, at large M.

The vendor's kernel scales rows and columns in its epilogue; use_fast_accum is the accumulation mode of `w8a8.py`. It wants bfloat16 out and K, N in multiples of 16.
Bytes and operations are those of `w8a8.py`, which runs what this one does not take.
"""

import torch
from torch import Tensor


def w8a8_scaled_mm(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """Arguments as in `ops.w8a8_rounded`, x_codes float8_e4m3fn [M, K], the dtype bfloat16.

    Returns:
        bfloat16 [M, N], see `w8a8.w8a8_rounded` for the bound.
    """
    return torch._scaled_mm(
        x_codes,
        codes.t(),
        scale_a=x_scales.expand(len(x_codes), 1).contiguous(),
        scale_b=scales.t().contiguous(),
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=dtype,
        use_fast_accum=fast,
    )
