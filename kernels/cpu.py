"""The products on a CPU, in plain PyTorch: weights are dequantized a few rows at a time, activations rounded as on a GPU.

Also the definition of activation rounding, which `quantize_activations.py` repeats bit for bit in Triton:

    scale = max(max |x| / top, SCALE_FLOOR)          top = 127 (int8) or 448 (e4m3)
    code  = round_half_even(x / scale) within +-top

Codes of fewer than 8 bits and of e4m3 are decoded by a table, one entry a byte (12 bits for codes of 3), to float32, scaled
there, and rounded once to the type that is multiplied. Everything here takes x [M, K] with M >= 1 and returns y [M, N] in x.dtype; `ops.py` has
checked the shapes. What was measured is in README.md.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.int4tiles import unpack_tiles
from quantkit.kernels.interleave import deinterleave, deinterleave_int4

FP8 = torch.float8_e4m3fn
TOP = {torch.int8: 127.0, FP8: torch.finfo(FP8).max}  # the largest code; 448 for e4m3
SCALE_FLOOR = 2.0**-100  # a row of zeros gets this scale, so that 0 / scale is 0 and not NaN
BLOCK = 128
CODES_PER_WORD = 8  # of 4 bits
SYMMETRIC_ZERO = 8  # of 4 bits
CHUNK = (
    2**20
)  # weights dequantized at a time: the allocator reuses the 4 MiB, and the product finds them in cache


def quotient(x: Tensor, number: float) -> Tensor:
    """x / number. PyTorch itself multiplies by the reciprocal on a GPU, which may give the float beside the quotient."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


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
        scales: float32 [M, ceil(K / group_size)], the rows of a group side by side, as products read them; [M, 1] for
            group_size 0, [1, 1] for a static scale.
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
        scales = quotient(groups.abs().amax(-1), top).clamp(min=SCALE_FLOOR)
        scaled = (groups / scales.unsqueeze(-1)).flatten(1)[:, :K]
        scales = scales.T.contiguous().T
    scaled = scaled.clamp(-top, top)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def _rounded(
    y: Tensor, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """`quantize_activations`, or y itself and no scales where dtype is None; the scales are a new tensor."""
    if dtype is None:
        return y, y.new_empty(0, dtype=torch.float32)
    codes, scales = quantize_activations(y, dtype, input_scale, group_size)
    return codes, scales if input_scale is None else scales.clone()


def rms_norm_torch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    dtype: torch.dtype | None,
    input_scale: Tensor | None,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `ops.rms_norm_quantize`, rounded in the order of transformers' LlamaRMSNorm; on any device."""
    h = x if residual is None else x + residual
    wide = h.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y, scales = _rounded(weight * normed.to(x.dtype), dtype, input_scale, group_size)
    return y, scales, x.new_empty(0) if residual is None else h


def swiglu_torch(
    x: Tensor, dtype: torch.dtype | None, input_scale: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor]:
    """The definition of `ops.swiglu_quantize`, rounded in the order of transformers' LlamaMLP; on any device."""
    gate, up = x.chunk(2, dim=-1)
    return _rounded(F.silu(gate) * up, dtype, input_scale, group_size)


def expand_blocks(scales: Tensor, N: int, K: int) -> Tensor:
    """[ceil(N/128), ceil(K/128)] -> [N, K]."""
    return scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]


@cache
def _int4_table(zero: int) -> Tensor:
    """float32 [256, 2]: the two codes of a byte, low half first, minus `zero`."""
    byte = torch.arange(256)
    return torch.stack([byte & 0xF, byte >> 4], 1).float() - zero


@cache
def _fours_table(bits: int, zero: int) -> Tensor:
    """int8 [2^(4 bits), 4]: four codes of 2 or 3 bits, lowest bits first, minus `zero`."""
    index = torch.arange(2 ** (4 * bits)).unsqueeze(1)
    return ((index >> bits * torch.arange(4) & 2**bits - 1) - zero).to(torch.int8)


@cache
def _fp8_table() -> Tensor:
    """float32 [256, 1]: the value of every e4m3 code, NaN included."""
    return torch.arange(256, dtype=torch.uint8).view(FP8).float().unsqueeze(1)


def _bytes(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8).to(torch.int32)


def _lookup(indices: Tensor, table: Tensor) -> Tensor:
    """Every one of the indices, int32 [n, ...], replaced by its row of the table: float32 [n, indices * table.shape[1]].

    index_select over a one-dimensional table costs 0.4 ns an entry, a tenth of what `.to(float32)` of e4m3 does: a row passes
    as one number of 4 or 8 bytes.
    """
    entries = table.view({4: torch.int32, 8: torch.int64}[table[0].nbytes]).flatten()
    found = entries.index_select(0, indices.flatten()).view(table.dtype)
    return found.float().view(len(indices), -1)


def _scale_groups(q: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int) -> Tensor:
    """(q - zeros) * scales as float32 [n, K]; q [n, >= K] is overwritten, scales and zeros are [n, ceil(K/group_size)]."""
    columns = scales.shape[1] * group_size
    if q.shape[1] != columns:  # the last group, or the last word of codes, is not full
        q = F.pad(q[:, :K], (0, columns - K))
    groups = q.view(len(q), -1, group_size)
    if zeros is not None:
        groups.sub_(zeros.float().unsqueeze(-1))
    return groups.mul_(scales.float().unsqueeze(-1)).view(len(q), columns)[:, :K]


def int4_values(codes: Tensor) -> Tensor:
    """Packed 4-bit codes, two a byte, [n, ...] -> q - 8 as float32 [n, codes of a row]."""
    return _lookup(_bytes(codes), _int4_table(SYMMETRIC_ZERO))


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int, bits: int
) -> Tensor:
    """(q - zero) * scale as float32 [N, K], from the neutral layout of 2 to 4 bits: see `ops.w4a16` and `ops.wna16`."""
    zero = 2 ** (bits - 1) if zeros is None else 0
    indices = _bytes(codes)
    if bits == 3:  # 12 bits each
        low, middle, high = indices.unflatten(1, (-1, 3)).unbind(2)
        indices = torch.stack([low | (middle & 0xF) << 8, middle >> 4 | high << 4], 2).flatten(1)
    q = _lookup(indices, _int4_table(zero) if bits == 4 else _fours_table(bits, zero))
    return _scale_groups(q, scales, zeros, group_size or K, K)


def _decode_8bit(codes: Tensor) -> Tensor:
    """int8 or e4m3 [n, K] -> float32 [n, K], a new tensor."""
    return codes.float() if codes.dtype == torch.int8 else _lookup(_bytes(codes), _fp8_table())


def linear(
    x: Tensor, N: int, bias: Tensor | None, weight: Callable[[slice], Tensor], step: int | None = None
) -> Tensor:
    """x @ w^T + bias in x.dtype, where weight(rows) makes rows of w, float32 [n, K]; `step` rows at a time.

    bfloat16 x is multiplied in bfloat16, the others in float32: PyTorch's float16 product is the slower one on a CPU.
    """
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    wide = x.to(dtype)
    y = x.new_empty(len(x), N)
    step = step or max(1, CHUNK // x.shape[1])
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        part = None if bias is None else bias[rows].to(dtype)
        y[:, rows] = F.linear(wide, weight(rows).to(dtype), part)
    return y


def w4a16_dequantize(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    """As `wna16_dequantize`, for codes of 4 bits."""
    return wna16_dequantize(x, codes, scales, zeros, bias, group_size, 4)


def wna16_dequantize(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    bits: int,
) -> Tensor:
    """y = x @ dequantize(codes)^T + bias; the weight is rounded once to x.dtype."""

    def weight(rows: slice) -> Tensor:
        part = None if zeros is None else zeros[rows]
        return dequantize(codes[rows], scales[rows], part, group_size, x.shape[1], bits)

    return linear(x, len(codes), bias, weight)


def w4a8_cpu(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """y = (x_codes @ dequantize(codes)^T) * x_scale + bias in float32."""
    y = w4a16_dequantize(x_codes.float(), codes, scales, zeros, None, group_size).mul_(x_scales)
    return (y if bias is None else y + bias).to(dtype)


def w4a8_interleaved_cpu(
    x_codes: Tensor,
    x_scales: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`w4a8_cpu` of the neutral layout, which is made anew: what works anywhere, fast nowhere."""
    weight = deinterleave_int4(words, scales, zeros, x_codes.shape[1])
    return w4a8_cpu(x_codes, x_scales, *weight, bias, group_size, dtype)


def epilogue(y: Tensor, residual: Tensor | None, swiglu: bool) -> Tensor:
    """What follows y = x w^T + bias [..., N]: SwiGLU over gates and ups in turns of 8 columns, then the residual."""
    if swiglu:
        gate, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
        y = (F.silu(gate) * up).flatten(-2)
    return y if residual is None else y + residual


def w4a16_tiles_dequantize(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    N: int,
    swiglu: bool,
) -> Tensor:
    """The same for the tiles of a GPU, which no model on a CPU holds: a definition to compare with."""
    codes, scales, zeros = unpack_tiles(tiles, scales, zeros, group_size, N, x.shape[1])
    return epilogue(w4a16_dequantize(x, codes, scales, zeros, bias, group_size), residual, swiglu)


def w8a16_dequantize(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """y = x @ (codes * scales)^T + bias; the weight is rounded once to x.dtype."""
    return linear(x, len(codes), bias, lambda rows: _decode_8bit(codes[rows]).mul_(scales[rows]))


def w8a16_interleaved_dequantize(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, int8: bool
) -> Tensor:
    """`w8a16_dequantize` of the neutral layout, which is made anew: what works anywhere, fast nowhere."""
    codes = deinterleave(words, x.shape[1], torch.int8 if int8 else FP8)
    return w8a16_dequantize(x, codes, scales, bias)


def w8a16_int8pack(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """y = (x @ codes^T) * scales + bias by PyTorch's int8 kernel, for a few rows of bfloat16 x.

    The kernel loads 32 bytes of x and 16 of codes at a time from addresses that must be multiples of that.
    """
    x = x.contiguous()
    if codes.data_ptr() % 16:
        return w8a16_dequantize(x, codes, scales, bias)
    if x.data_ptr() % 32:
        x = x.clone()
    y = torch.ops.aten._weight_int8pack_mm(x, codes, scales.flatten().to(x.dtype))
    return y if bias is None else y.add_(bias)


def w8a8_cpu(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """y = (x_codes @ codes^T) * x_scale * scales + bias: int8 in exact int32 sums, e4m3 in float32, fast or not."""
    if codes.dtype == torch.int8:
        y = torch._int_mm(x_codes, codes.t()).float() * x_scales * scales.t()
        return (y if bias is None else y + bias).to(dtype)
    rounded = _decode_8bit(x_codes) * x_scales
    return linear(rounded, len(codes), bias, lambda rows: _decode_8bit(codes[rows]).mul_(scales[rows])).to(
        dtype
    )


def fp8_block_cpu(
    x_codes: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y = x_rounded @ (codes * tile scales)^T + bias in float32."""
    N, K = codes.shape
    rounded = _scale_groups(_decode_8bit(x_codes), x_scales, None, BLOCK, K)
    of_row = scales.repeat_interleave(BLOCK, 0)[:N]  # [N, ceil(K/128)]
    return linear(
        rounded, N, bias, lambda rows: _scale_groups(_decode_8bit(codes[rows]), of_row[rows], None, BLOCK, K)
    ).to(dtype)
