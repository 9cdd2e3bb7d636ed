"""Weights on their way to L2 while the kernels before still run.

A product whose launch is a dependent one is there before the kernel before it ends, often several small ones earlier, while the
memory is idle. What it asks for then need not fit into its registers or its shared memory. Hopper's L2 holds 50 MB.
"""

import triton.language as tl

AHEAD = 16 * 2**20  # bytes of a weight that are asked for ahead, at most
LINE = tl.constexpr(128)  # bytes that one request brings

# $1: address, $2: whether it is asked for
ASK = tl.constexpr("""{
.reg .pred wanted;
setp.ne.s32 wanted, $2, 0;
@wanted prefetch.global.L2 [$1];
mov.u32 $0, 0;
}""")


def lines_ahead(programs: int, rows: int) -> int:
    """Lines of a row that each of so many programs, with tiles of so many rows, may ask for: a power of two, or 0."""
    share = AHEAD // (programs * rows * LINE.value)
    return 1 << share.bit_length() - 1 if share else 0
