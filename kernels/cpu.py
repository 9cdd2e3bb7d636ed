"""The four products on a CPU, in plain PyTorch: weights are dequantized a call at a time, activations rounded as on a GPU.

Also the definition of activation rounding, which `quantize_activations.py` repeats bit for bit in Triton:

    scale = max(max |x| / top, SCALE_FLOOR)          top = 127 (int8) or 448 (e4m3)
    code  = round_half_even(x / scale) within +-top

Everything here takes x [M, K] with M >= 1 and returns y [M, N] in x.dtype; `ops.py` has checked the shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
TOP = {torch.int8: 127.0, FP8: 448.0}  # the largest code
SCALE_FLOOR = 2.0**-100  # a row of zeros gets this scale, so that 0 / scale is 0 and not NaN
BLOCK = 128
CODES_PER_WORD = 8
SYMMETRIC_ZERO = 8


def quantize_activations(
    x: Tensor, dtype: torch.dtype, input_scale: Tensor | None = None, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Round activations to 8 bits.

    Args:
        x: float [M, K].
        dtype: int8 or float8_e4m3fn.
        input_scale: static scale, float32 [1]; None: scales are found from x.
        group_size: columns that share a scale; 0: the whole row. The last group may be shorter.

    Returns:
        codes: dtype [M, K].
        scales: float32 [M, ceil(K / group_size)], [M, 1] for group_size 0, [1, 1] for a static scale.
    """
    M, K = x.shape
    top = TOP[dtype]
    wide = x.float()
    if input_scale is not None:
        scales = input_scale.float().reshape(1, 1)
        scaled = wide / scales
    else:
        group = group_size or K
        groups = F.pad(wide, (0, -K % group)).view(M, -1, group)
        scales = (groups.abs().amax(-1) / top).clamp(min=SCALE_FLOOR)
        scaled = (groups / scales.unsqueeze(-1)).flatten(1)[:, :K]
    scaled = scaled.clamp(-top, top)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def unpack_int4(codes: Tensor, K: int) -> Tensor:
    """int32 [N, ceil(K/8)] -> codes 0..15, uint8 [N, K]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return (codes.unsqueeze(-1) >> shifts & 0xF).to(torch.uint8).flatten(1)[:, :K]


def dequantize_int4(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int, dtype: torch.dtype
) -> Tensor:
    """(q - zero) * scale as dtype [N, K]; the product is float32 (float64 for dtype float64), rounded once."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    group = group_size or K
    N, padded = codes.shape[0], scales.shape[1] * group
    q = F.pad(unpack_int4(codes, K), (0, padded - K)).view(N, -1, group).to(exact)
    zero = SYMMETRIC_ZERO if zeros is None else zeros.to(exact).unsqueeze(-1)
    return ((q - zero) * scales.to(exact).unsqueeze(-1)).view(N, padded)[:, :K].to(dtype)


def expand_blocks(scales: Tensor, N: int, K: int) -> Tensor:
    """[ceil(N/128), ceil(K/128)] -> [N, K]."""
    return scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def w4a16_dequantize(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """y = x @ dequantize(codes)^T + bias in x.dtype."""
    w = dequantize_int4(codes, scales, zeros, group_size, x.shape[1], x.dtype)
    return F.linear(x, w, _as(bias, x.dtype))


def w8a16_dequantize(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """y = x @ (codes * scales)^T + bias in x.dtype."""
    w = (codes.float() * scales).to(x.dtype)
    return F.linear(x, w, _as(bias, x.dtype))


def w8a8_dequantize(
    x: Tensor, codes: Tensor, scales: Tensor, input_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y = (x_codes @ codes^T) * x_scale * scales + bias, codes multiplied in float32."""
    x_codes, x_scales = quantize_activations(x, codes.dtype, input_scale)
    y = F.linear(x_codes.float(), codes.float()) * x_scales * scales.T
    return (y if bias is None else y + bias).to(x.dtype)


def fp8_block_dequantize(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """y = x_rounded @ (codes * tile scales)^T + bias in float32."""
    x_codes, x_scales = quantize_activations(x, FP8, group_size=BLOCK)
    (N, K) = codes.shape
    rounded = x_codes.float() * x_scales.repeat_interleave(BLOCK, 1)[:, :K]
    return F.linear(rounded, codes.float() * expand_blocks(scales, N, K), _as(bias, torch.float32)).to(
        x.dtype
    )
