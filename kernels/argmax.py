"""The place of the largest number of each row, as torch.argmax has it: of several the first, and NaN before all numbers.

    y[m] = min { n : x[m, n] = max over k of x[m, k] }                                              (1)

A number becomes an integer of the same order, and with its place below it, counted from the end, one of 64 bits: the largest
of these is (1), in whatever order they are compared. Programs take `PIECE` numbers each, and one a row the largest of its
pieces.

Limit: reading x, for 64 rows of 128256 scores in bfloat16 16.4 MB, 3.8 us at an H200's 4.3 TB/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 4096
LAST = tl.constexpr(0x7FFFFFFF)
NOTHING = tl.constexpr(-(2**63))  # below every number's


@triton.jit
def largest_of_pieces_kernel(x_ptr, largest_ptr, N, stride_xm, pieces, PIECE: tl.constexpr):
    m, piece = tl.program_id(0), tl.program_id(1)
    n = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(x_ptr + m.to(tl.int64) * stride_xm + n, mask=n < N, other=0.0).to(tl.float32)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # zeros are equal
    bits ^= (bits >> 31) & LAST  # negative numbers the other way round
    bits = tl.where(x != x, LAST, bits)
    found = (bits.to(tl.int64) << 32) | (n ^ LAST).to(tl.int64)
    tl.store(largest_ptr + m.to(tl.int64) * pieces + piece, tl.max(tl.where(n < N, found, NOTHING), 0))


@triton.jit
def place_of_largest_kernel(largest_ptr, y_ptr, pieces, BLOCK: tl.constexpr):
    m, piece = tl.program_id(0), tl.arange(0, BLOCK)
    found = tl.load(largest_ptr + m.to(tl.int64) * pieces + piece, mask=piece < pieces, other=NOTHING)
    tl.store(y_ptr + m, (tl.max(found, 0) & LAST) ^ LAST)


def argmax_triton(x: Tensor) -> Tensor:
    """Equation (1).

    Args:
        x: floats of 16 or 32 bits [M, N], N from 1 to 65535 * `PIECE`.

    Returns:
        int64 [M].
    """
    M, N = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    pieces = triton.cdiv(N, PIECE)
    largest, y = (x.new_empty(size, dtype=torch.int64) for size in (M * pieces, M))
    if M:
        largest_of_pieces_kernel[(M, pieces)](x, largest, N, x.stride(0), pieces, PIECE=PIECE, num_warps=4)
        place_of_largest_kernel[(M,)](largest, y, pieces, BLOCK=triton.next_power_of_2(pieces), num_warps=1)
    return y
