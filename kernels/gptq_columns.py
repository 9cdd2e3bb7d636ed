"""The inner loop of GPTQ (arXiv:2210.17323, Algorithm 1): the columns of one block, each rounded and made up for.

    for j in columns of the block:
        code_j  = round(w_j / scale + zero) within the codes        value_j = (code_j - zero) * scale
        error_j = (w_j - value_j) / U_jj
        w_i    -= error_j * U_ji      for every i >= j: w_j becomes value_j

Rows of the weight do not meet, so a program holds a tile of all columns of the block and a few rows, transposed
[C, BLOCK_N], in registers and reads nothing twice: C BLOCK_N 4 bytes in, 5 out. Each of the C steps picks its column
by a masked sum and updates the tile, about 4 instructions a value: 128 steps on 128 x 32 values are 2.1 M
instructions a program, some 20 us. Eager PyTorch takes about ten launches a column, which is 50 times as long.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.quantize_activations import encode_e4m3, encode_int8, round_e4m3, round_whole

BLOCK_N = 32


@triton.jit
def gptq_columns_kernel(
    columns,  # float32 [C, N], changed
    U,  # float32 [C, C], rows `stride` apart
    scales,  # float32 [groups, N]
    zeros,  # float32 [groups, N], or anything
    groups,  # int64 [C]
    codes,  # uint8 [C, N]
    errors,  # float32 [C, N]
    N,
    C,
    stride,
    zero,  # float, where zeros is not read
    HAS_ZEROS: tl.constexpr,
    KIND: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    inside = n < N
    tile = tl.load(
        columns + c.to(tl.int64)[:, None] * N + n[None, :], (c < C)[:, None] & inside[None, :], other=0.0
    )
    for j in range(C):
        w = tl.sum(tl.where(c[:, None] == j, tile, 0.0), 0)
        group = tl.load(groups + j)
        scale = tl.load(scales + group * N + n, inside, other=1.0)
        if HAS_ZEROS:
            z = tl.load(zeros + group * N + n, inside, other=0.0)
        else:
            z = tl.zeros([BLOCK_N], tl.float32) + zero
        if KIND == "fp8":
            v = w / scale
            code = encode_e4m3(v)
            magnitude = round_e4m3(v)
            value = tl.where(v < 0, -magnitude, magnitude) * scale
        elif KIND == "int8":
            signed = encode_int8(w / scale)
            code = signed.to(tl.uint8, bitcast=True)
            value = signed.to(tl.float32) * scale
        else:
            q = round_whole(tl.minimum(tl.maximum(w / scale + z, 0.0), TOP))
            code = q.to(tl.uint8)
            value = (q - z) * scale
        row = tl.load(U + j * stride + c, c < C, other=0.0)
        error = (w - value) / tl.load(U + j * stride + j)
        tile -= row[:, None] * error[None, :]  # U is upper triangular: columns before j stay as they are
        tl.store(codes + j * N + n, code, inside)
        tl.store(errors + j * N + n, error, inside)


def round_columns(
    columns: Tensor,
    U: Tensor,
    scales: Tensor,
    zeros: Tensor | float,
    groups: Tensor,
    errors: Tensor,
    kind: str,
    top: int,
) -> Tensor:
    """As `quantkit.calibration.gptq.round_columns`, the reference, on a GPU.

    Args:
        columns: float32 [C, N], contiguous; overwritten.
        U: upper triangular, float32 [C, C]; its last stride is 1.
        scales, zeros: of each group and row, float32 [groups, N]; or one zero for all.
        groups: int64 [C], each column's group.
        errors: float32 [C, N], contiguous; filled.
        kind: what a code is: int2, int3, int4, int8 or fp8.
        top: the largest code.

    Returns:
        codes uint8 [C, N]; int8 and e4m3 ones as their bits.
    """
    C, N = columns.shape
    assert U.stride(1) == 1, "a row of U is read at a time"
    assert columns.is_contiguous()
    assert errors.is_contiguous()
    codes = torch.empty(C, N, dtype=torch.uint8, device=columns.device)
    has_zeros = isinstance(zeros, Tensor)
    with torch.cuda.device(columns.device):
        gptq_columns_kernel[(triton.cdiv(N, BLOCK_N),)](
            columns,
            U,
            scales,
            zeros if has_zeros else scales,
            groups,
            codes,
            errors,
            N,
            C,
            U.stride(0),
            0.0 if has_zeros else zeros,
            has_zeros,
            kind,
            float(top),
            triton.next_power_of_2(max(C, 16)),
            BLOCK_N,
            num_warps=4,
        )
    return codes
