"""8-bit codes in the order in which Hopper's tensor cores take them beside 16-bit x. Plain PyTorch, on any device.

    byte 64 t + 16 c + 4 kt + 2 e + c8  =  column 64 t + 16 kt + 8 c8 + 2 c + e             (1)

Lane c of a row reads 16 neighbouring bytes, its own operands of four wgmma.m64k16 (kt): c8 is the register and e the half
of it, as in `int4tiles.py`. A word's even bytes are one register's, its odd bytes the other's.
"""

import torch
from torch import Tensor

STEP = 128  # rows are padded to multiples of so many columns


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
