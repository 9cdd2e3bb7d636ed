"""W4A16 for more rows of x than `w4a16_decode.py` takes: bound by the tensor cores from M of about 64 on.

A program holds y^T [BLOCK_N, BLOCK_M]. Its warps load their tiles straight into registers, a step ahead, and subtract
the zero and multiply by the scale there, so each weight is rounded once to x.dtype; x comes through shared memory,
pipelined. On Hopper the weight stays in registers as the left operand of wgmma.

Budget: 2 M N K operations; for each weight of a program's tile 2.9 instructions, once for BLOCK_M rows of x.
The sums pass through a move that does nothing: without a use in the loop Triton lets one product run into the next
step, which overwrites the registers that the tensor cores still read (seen as wrong results at BLOCK_M = 128).
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.dispatch import target_of
from quantkit.kernels.int4tiles import PAD_K, STRIP, TILE_K
from quantkit.kernels.w4a16 import (
    MOVE,
    as_words,
    fragments,
    group_of,
    halves,
    load_rows,
    load_tiles,
    ptx_level,
    store_outputs,
    two_bytes,
)

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCKS_M = (32, 64, 128, 256)
FEW_M = 8  # rows of x up to which this kernel is not worth tuning
MAX_SUMS = 128  # float32 a thread: half of its registers
MAX_X_BYTES = 200 * 2**10  # of x in shared memory, which has 227 KiB on Hopper
MOST_CANDIDATES = 24

Config = dict[str, int]


@lru_cache(maxsize=4096)
def config(M: int, N: int, K: int, group_size: int, target: str = "sm_90") -> Config:
    """Launch parameters by the rows of x, within the least shared memory and registers of the targets."""
    if not target.startswith("sm_"):
        return dict(block_m=32, rows=1, warps=4, tiles=1, stages=1)
    if M <= 32:
        return dict(block_m=32, rows=1, warps=8, tiles=2, stages=3)
    return dict(block_m=64, rows=1, warps=4, tiles=2, stages=3)


def candidates(M: int, N: int, K: int, group_size: int, multiprocessors: int = 132) -> list[Config]:
    """Launches worth timing, `config`'s first. Few rows of x are the decode kernel's: there it is the only one."""
    default = config(M, N, K, group_size)
    if M <= FEW_M:
        return [default]
    largest = min(BLOCKS_M[-1], max(BLOCKS_M[0], triton.next_power_of_2(M)))
    blocks = [block_m for block_m in reversed(BLOCKS_M) if largest // 4 <= block_m <= largest]
    found = [
        dict(block_m=block_m, rows=rows, warps=warps, tiles=tiles, stages=stages)
        for tiles, stages in ((2, 3), (1, 4), (2, 4), (1, 3))
        for block_m in blocks
        for rows in (1, 2)
        for warps in (4, 8)
        if rows * STRIP * block_m // 32 <= MAX_SUMS  # BLOCK_N * block_m sums over 32 lanes a warp
        and stages * tiles * TILE_K * block_m * 2 <= MAX_X_BYTES
    ]
    return [default, *(one for one in found if one != default)][:MOST_CANDIDATES]


@triton.jit
def load_weights(
    q_ptr, scales_ptr, zeros_ptr, row_at, exists, unit, units, stride_strip,
    G: tl.constexpr, SCALE_DTYPE: tl.constexpr, W: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Tiles (undefined where there are none: their scales are zero), scales and, if there are any, zeros of one step: [c, g, W, R, C, kt], [c, g, W, R, P] and the same."""
    unit = tl.full((1, 1, 1, 1, 1), unit, tl.int32)
    inside = exists & (unit < units)
    r = tl.arange(0, R)[None, None, None, :, None, None]
    tile = tl.arange(0, C)[None, None, None, None, :, None]
    at = unit[:, :, :, :, :, None] * (C * 128) + r * (W * stride_strip) + tile * 128
    q = load_tiles(q_ptr + at, inside[:, :, :, :, :, None] & (tile >= 0), "")
    part = tl.arange(0, P)[None, None, None, None, :]
    group = group_of(unit, part, G, C, P)
    s = load_rows(scales_ptr + row_at + group * 8, inside)
    if zeros_ptr is None:
        return q, s
    else:
        return q, s, load_rows(zeros_ptr + row_at + group * 8, inside)


@triton.jit
def w4a16_wide_kernel(
    x_ptr, tiles_ptr, scales_ptr, zeros_ptr, bias_ptr, residual_ptr, y_ptr, M, N, K, stride_xm,
    G: tl.constexpr, SCALE_DTYPE: tl.constexpr, SWIGLU: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # A step is C tiles along K and P groups (or a part of one) of R strips of each of W warps.
    P: tl.constexpr = 1 if G == 0 else (1 if G % (C * 64) == 0 else (C if G % 64 == 0 else C * 2))
    S: tl.constexpr = C * 4 // P
    BLOCK_N: tl.constexpr = W * R * 16
    if PDL:
        gdc_launch_dependents()
    block = tl.program_id(1)
    units = tl.cdiv(K, 128) * 2 // C
    groups = tl.cdiv(units * C * 64, G) if G > 0 else 1
    stride_strip = units * (C * 128)
    c = tl.arange(0, 4)
    g = tl.arange(0, 8)
    kt = tl.arange(0, 4)
    r = tl.arange(0, R)[None, None, None, :, None]
    strip = (block * (W * R) + tl.arange(0, W))[None, None, :, None, None]
    exists = (strip + r * W < tl.cdiv(N, 16)) | EVEN_N
    lane_word = (
        g[None, :, None, None, None, None] * 16
        + c[:, None, None, None, None, None] * 4
        + kt[None, None, None, None, None, :]
    )
    q_ptr = tiles_ptr + (strip[:, :, :, :, :, None].to(tl.int64) * stride_strip + lane_word)
    row_at = (strip + r * W) * (groups * 8) + g[None, :, None, None, None] + 0 * c[:, None, None, None, None]
    if ASM:  # as in w4a16_decode.py
        row_at = tl.inline_asm_elementwise(MOVE, "=r,r", [row_at], tl.int32, is_pure=True, pack=1)
    held = load_weights(
        q_ptr, scales_ptr, zeros_ptr, row_at, exists, 0, units, stride_strip, G, SCALE_DTYPE, W, R, C, P
    )
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, C * 64)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if PDL:
        gdc_wait()
    for unit in tl.range(0, units, num_stages=STAGES):
        columns = unit * (C * 64) + k
        mask = (m < M)[:, None]
        if not EVEN_K:
            mask = mask & (columns < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * stride_xm + columns[None, :], mask=mask, other=0.0)
        ahead = load_weights(
            q_ptr, scales_ptr, zeros_ptr, row_at, exists, unit + 1, units, stride_strip,
            G, SCALE_DTYPE, W, R, C, P,
        )  # fmt: skip
        zeros = None
        if zeros_ptr is not None:
            zeros = two_bytes(held[2])
        w = fragments(held[0].reshape(4, 8, W, R, P, S), zeros, halves(held[1], SCALE_DTYPE), x.dtype, ASM)
        w = w.permute(3, 2, 6, 1, 4, 5, 7, 0, 8).reshape(BLOCK_N, C * 64)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        if ASM:
            acc = tl.inline_asm_elementwise(MOVE, "=r,r", [acc], tl.float32, is_pure=False, pack=1)
        held = ahead
    store_outputs(acc, block * BLOCK_N, m, y_ptr, bias_ptr, residual_ptr, M, N, BLOCK_N, SWIGLU)


def w4a16_wide(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    N: int,
    swiglu: bool,
    launch: Config | None = None,
) -> Tensor:
    """y = x w^T with w rounded to x.dtype; arguments as in `ops.w4a16_tiles`, x [M, K] with contiguous columns.

    launch: as `config` returns it, and its default.

    Returns:
        y of x.dtype [M, N], [M, N/2] with swiglu, within u |y| + (u + (K + 8) 2^-23) (|x| @ |w|) of the reference,
        u the unit roundoff of x.dtype; 3 u where the scales have another dtype than x.
    """
    M, K = x.shape
    chosen = launch or config(M, N, K, group_size, target_of(x.device))
    block_m, rows, warps = chosen["block_m"], chosen["rows"], chosen["warps"]
    y = x.new_empty(M, N // 2 if swiglu else N)
    grid = (triton.cdiv(M, block_m), triton.cdiv(N, rows * warps * STRIP))
    asm = ptx_level(x)
    pdl = asm >= 90
    options = dict(launch_pdl=True) if pdl else {}
    scale_words, zero_words, scale_dtype = as_words(scales, zeros)
    w4a16_wide_kernel[grid](
        x, tiles, scale_words, zero_words, bias, residual,
        y, M, N, K, x.stride(0),
        G=group_size, SCALE_DTYPE=scale_dtype, SWIGLU=swiglu,
        EVEN_N=tiles.shape[0] % (rows * warps) == 0, EVEN_K=K % PAD_K == 0, BLOCK_M=block_m, C=chosen["tiles"], R=rows, W=warps, STAGES=chosen["stages"],
        ASM=asm, PDL=pdl, num_warps=warps, num_stages=1, **options,
    )  # fmt: skip
    return y
