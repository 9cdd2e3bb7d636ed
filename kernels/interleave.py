"""Codes in the order in which Hopper's tensor cores take them from registers. Plain PyTorch, on any device.

8-bit codes beside 16-bit x:

    byte 64 t + 16 c + 4 kt + 2 e + c8  =  column 64 t + 16 kt + 8 c8 + 2 c + e             (1)

Lane c of a row reads 16 neighbouring bytes, its own operands of four wgmma.m64k16 (kt): c8 is the register and e the half
of it, as in `int4tiles.py`. A word's even bytes are one register's, its odd bytes the other's.

4-bit codes beside int8 x:

    byte 64 t + 16 c + 4 kt + i, half  =  column 128 t + 32 kt + 16 half + 4 c + i                                 (2)

Lane c of a row reads 16 neighbouring bytes, four columns (i) for each half, the low and the high one of a byte, of four
wgmma.m64k32 (kt). Without zeros a code is q - 8 in two's complement, q with its highest bit turned.
"""

import torch
from torch import Tensor

STEP = 128  # rows are padded to multiples of so many columns
TOP_BITS = 0x88888888 - 2**32  # of eight codes
INT4_MAX_K = (2**31 - 1) // (127 * 128)  # of sums of x times 16 (q - 8)


def not_interleavable(N: int, K: int, x_dtype: torch.dtype) -> str | None:
    """Why a weight is better left in the neutral layout on sm_90; None: interleave it."""
    if x_dtype not in (torch.float16, torch.bfloat16):
        return f"needs x in float16 or bfloat16, not {x_dtype}"
    if N % 8 or K % 8:
        return f"needs N and K in multiples of 8, not {N} and {K}"
    return None


def interleave(codes: Tensor) -> Tensor:
    """int8 or float8_e4m3fn codes [N, K] -> their bytes by equation (1), int32 [N, 32 ceil(K / 128)]; zeros past K."""
    N, K = codes.shape
    steps = -(-K // STEP)
    padded = codes.new_zeros(N, steps * STEP, dtype=torch.uint8)
    padded[:, :K] = codes.view(torch.uint8)
    natural = padded.view(N, 2 * steps, 4, 2, 4, 2)  # kt c8 c e
    return natural.permute(0, 1, 4, 2, 5, 3).reshape(N, steps * STEP).view(torch.int32)


def deinterleave(words: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `interleave`: codes of a dtype [N, K]."""
    N = len(words)
    ordered = words.view(torch.uint8).view(N, -1, 4, 4, 2, 2)  # c kt e c8
    return ordered.permute(0, 1, 3, 5, 2, 4).reshape(N, -1)[:, :K].contiguous().view(dtype)


def not_interleavable_int4(N: int, K: int, group_size: int, x_dtype: torch.dtype) -> str | None:
    """Why 4-bit codes beside int8 x are better left in the neutral layout on sm_90; None: interleave them."""
    if x_dtype not in (torch.float16, torch.bfloat16):
        return f"needs x in float16 or bfloat16, not {x_dtype}"
    if N % 16 or K % 16:
        return f"needs N and K in multiples of 16, not {N} and {K}"
    if group_size % STEP:
        return f"needs a group_size that is a multiple of {STEP}, or 0, not {group_size}"
    if group_size == 0 and K > INT4_MAX_K:
        return f"sums a row in int32, up to K = {INT4_MAX_K}, not {K}"
    return None


def _turned(t: Tensor) -> Tensor:
    return t.T.clone(memory_format=torch.contiguous_format)


def interleave_int4(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, K: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The neutral layout of `ops.w4a16` [N, K] -> words by equation (2), int32 [N, 16 ceil(K / 128)], scales and zeros [groups, N]."""
    N, words = codes.shape
    padded = codes.new_zeros(N, 16 * -(-K // STEP))
    padded[:, :words] = codes
    if zeros is None:
        padded ^= TOP_BITS
    natural = padded.view(torch.int16).view(N, -1, 4, 2, 4).int() & 0xFFFF  # kt half c, four codes (i) each
    natural = (natural | natural << 8) & 0x00FF00FF
    low, high = ((natural | natural << 4) & 0x0F0F0F0F).unbind(3)  # a byte each
    words_of_lanes = (low | high << 4).transpose(2, 3).reshape(N, -1)
    return words_of_lanes, _turned(scales), None if zeros is None else _turned(zeros)


def deinterleave_int4(
    words: Tensor, scales: Tensor, zeros: Tensor | None, K: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `interleave_int4`."""
    N = len(words)
    low_and_high = torch.stack([words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F], -1).view(N, -1, 4, 4, 2)
    natural = low_and_high.permute(0, 1, 3, 4, 2)  # kt half c
    natural = (natural | natural >> 4) & 0x00FF00FF
    natural = ((natural | natural >> 8) & 0xFFFF).reshape(N, -1, 2)
    codes = natural[..., 0] | natural[..., 1] << 16
    if zeros is None:
        codes ^= TOP_BITS
    codes = codes[:, : -(-K // 8)].contiguous()
    return codes, _turned(scales), None if zeros is None else _turned(zeros)
