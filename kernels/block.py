"""A program's block of y [BLOCK_M, BLOCK_N], as the portable kernels place and store it.

`w8a16.py`, `w8a8.py`, `fp8_block.py`, `w4a8.py` and `wna16.py` differ in what they sum; where a block lies, and how its
sums become y, is the same.
"""

import triton
import triton.language as tl


def grid(M: int, N: int, launch: dict[str, int]) -> tuple[int, int]:
    """One program a block of y [M, N]."""
    return triton.cdiv(M, launch["BLOCK_M"]), triton.cdiv(N, launch["BLOCK_N"])


@triton.jit
def rows_and_columns(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows m and columns n of this program's block, int64, and whether y has them."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    return m, n, m < M, n < N


@triton.jit
def store_block(y, bias_ptr, y_ptr, m, n, in_m, in_n, N):
    """Adds the bias, if there is one, to y float32 [BLOCK_M, BLOCK_N] and stores it in the dtype of y_ptr [M, N]."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    mask = in_m[:, None] & in_n[None, :]
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
