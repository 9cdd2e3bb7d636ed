"""W4A16 for a few rows of x (M <= 16): bound by the bytes of the weight, K/2 + 2 K/G a row.

A warp owns R strips of 16 rows and some of the groups of K. It loads its tiles straight into registers (16 bytes a
lane, no shared memory, no barrier), `depth` groups ahead or all that there are (WHOLE), and multiplies with
mma.m16n8k16, x padded to 8 or 16 rows; each group's product is scaled and added in float32. The warps of a program are a
batch of products: `warps_n` of them share x, `warps_k` share strips, and their sums meet in shared memory at the end.

With `programs` > 0 the work is cut into that many equal ranges of (strips, groups), whatever the tiles (`stream_k.py`).

Budget on Hopper: 3.5 instructions a weight at 4.3 TB/s; the loop has 2.0 (M <= 8, R = 4) to 2.5 (M = 16, R = 2).
The weight is requested before the wait for the kernel before (programmatic dependent launch), x after it.

A rank's part of a sum may be given to the other ranks by the program that has it, `all_reduce_norm.py` has the protocol: 2 bytes an
output and rank more.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.all_reduce_norm import Mailbox, give_outputs
from quantkit.kernels.dispatch import ALL_REGISTERS, MULTIPROCESSORS, multiprocessors_of, target_of
from quantkit.kernels.dispatch import DECODE_MAX_M as MAX_M
from quantkit.kernels.int4tiles import PAD_K, STRIP, TILE_K
from quantkit.kernels.stream_k import COUNTERS, next_counters
from quantkit.kernels.w4a16 import (
    LAST_FIRST,
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

Config = dict[str, int]
MOST_REGISTERS = 168  # of a thread of a launch without a cap
LEAST_GIVEN = 2**25  # bytes of the weight of a product that gives: 17 MB lost 0.9 us, 59 MB gained them


def blocks(launch: Config, N: int) -> int:
    """Blocks of rows of w: what the programs share."""
    return -(-N // (STRIP * launch["rows"] * launch["warps_n"]))


def steps(launch: Config, K: int, group_size: int) -> int:
    """Steps along K of one block: the least that a program can do."""
    padded = -(-K // PAD_K) * PAD_K
    units = padded // (TILE_K if group_size % PAD_K else 2 * TILE_K)
    return -(-units // (launch["warps_k"] * launch["depth"]))


@lru_cache(maxsize=4096)
def config(
    M: int, N: int, K: int, group_size: int, target: str = "sm_90", multiprocessors: int = MULTIPROCESSORS
) -> Config:
    """Launch parameters that are good for an H200 and fit the others; `quantkit tune` finds better ones for a shape."""
    strips = -(-N // STRIP)
    if not target.startswith("sm_"):  # the operands pass through shared memory: little of everything
        return dict(rows=1, warps_n=1, warps_k=4, depth=1, stages=1, programs=0, max_registers=0)
    whole = group_size % PAD_K == 0  # a smaller group has half as many columns a unit
    if M <= 8:
        chosen = dict(rows=4 if whole else 2, depth=1 if whole else 2, programs=0, max_registers=128)
        chosen |= dict(warps_n=1, warps_k=4, stages=1)
        if M == 1 and strips < 1024:
            chosen |= of_a_row(strips, K, whole, multiprocessors)
        elif strips < 1024:
            chosen |= dict(stages=2, programs=528)
        elif M == 1 and whole and strips <= 8 * 2 * multiprocessors:
            chosen |= dict(warps_n=2)  # one wave of half as many programs
    elif strips < 1600:
        programs = 384 if K > 8192 else min(384, strips)
        chosen = dict(rows=2, warps_n=2, warps_k=2, depth=2 if whole else 1, stages=2, programs=programs)
        chosen |= dict(max_registers=168)
    else:
        programs = 0 if strips <= 8 * 264 else 264  # whole tiles where they are one wave
        chosen = dict(rows=2, warps_n=4, warps_k=2, depth=1, stages=3, programs=programs, max_registers=128)
    return chosen | dict(programs=min(chosen["programs"], blocks(chosen, N) * steps(chosen, K, group_size)))


def of_a_row(strips: int, K: int, whole: bool, multiprocessors: int) -> Config:
    """For one row of x and too few strips for four a warp.

    Measured in the decode step, where memory idles during a norm or attention: what pays is one wave of programs that ask
    for much before they wait for the kernel before (README.md).
    """
    if not whole:
        return dict(rows=1, depth=8, max_registers=168) if K <= 8192 else dict(rows=2, depth=2, programs=512)
    pairs, places = -(-strips // 2), 16 * multiprocessors  # of warps of 128 registers
    if 0.9 * places <= 8 * pairs <= places:
        return dict(rows=2, warps_k=8, depth=2)
    if 2048 < K <= 4096 and 8 * strips <= places:
        return dict(rows=1, warps_k=8, depth=4)  # all columns at once
    if K > 4096 and 0.9 * places <= 16 * pairs <= places:
        return dict(rows=2, warps_k=16, depth=1)
    if K <= 8192:
        return dict(rows=1, warps_k=8, depth=2, max_registers=80)
    return dict(rows=2, depth=2, programs=512)


def register_cap(launch: Config, group_size: int, zeros: bool, swiglu: bool) -> int:
    """Registers that ptxas may give a thread; 0: as many as it likes, which are fewer where it need not use them up.

    With zeros of small groups it spills SwiGLU's kernel at a cap of 128, and holds it in 128 without one.
    """
    spilled = swiglu and zeros and group_size % TILE_K != 0 and launch["max_registers"] == 128
    return 0 if spilled else launch["max_registers"]


def launch_of(x: Tensor, N: int, group_size: int) -> Config:
    """`config` of rows x [M, K] on their device."""
    M, K = x.shape
    return config(M, N, K, group_size, target_of(x.device), multiprocessors_of(x.device))


def giving_pays(launch: Config, N: int, K: int, multiprocessors: int) -> bool:
    """Whether a product of one row is to give it to the other ranks itself, rather than the norm that follows.

    That norm is launched once all programs have begun and what was before them is over: they have to be there at once, as
    far as registers say, and to take longer than that launch and the next, of which the memory is idle (README.md).
    """
    threads = 32 * launch["warps_n"] * launch["warps_k"]
    places = multiprocessors * (ALL_REGISTERS // (threads * (launch["max_registers"] or MOST_REGISTERS)))
    return (launch["programs"] or blocks(launch, N)) <= places and N * K // 2 >= LEAST_GIVEN


def candidates(
    M: int, N: int, K: int, group_size: int, multiprocessors: int = MULTIPROCESSORS
) -> list[Config]:
    """Launches worth timing, `config`'s first: those that were good for some shape on an H200."""

    def launch(rows: int, warps_n: int, warps_k: int, depth: int, stages: int, programs: int, registers: int):
        return dict(
            rows=rows, warps_n=warps_n, warps_k=warps_k, depth=depth, stages=stages, programs=programs,
            max_registers=registers,
        )  # fmt: skip

    two, three, four = (of * multiprocessors for of in (2, 3, 4))  # as many programs as run at once
    if M <= 8:
        found = [launch(4, 1, 4, 1, stages, programs, 128) for stages in (1, 2) for programs in (0, four)]
        found += [launch(1, 1, 4, depth, 1, 0, 168) for depth in (8, 4)]
        found += [launch(1, 1, 8, depth, 1, 0, registers) for depth in (2, 4) for registers in (0, 80)]
        split = launch(2, 1, 8, 1, 1, 0, 128)
        found += [dict(split, programs=parts * blocks(split, N)) for parts in (2, 4)]
        found += [launch(1, 1, 8, 4, 1, 0, 128), launch(4, 2, 4, 1, 1, 0, 128)]
        found += [launch(2, 1, warps_k, 16 // warps_k, 1, 0, 128) for warps_k in (8, 16)]
        found += [launch(2, 1, 4, depth, 1, four, 128) for depth in (1, 2)]
        found += [launch(2, 2, 2, 2, 1, four, 128)]
    else:
        found = [launch(2, 4, 2, 1, 3, programs, 128) for programs in (0, two)]
        found += [
            launch(2, 2, 2, depth, 3, programs, registers)
            for depth in (1, 2)
            for programs, registers in ((four, 128), (three, 168))
        ]
        for depth in (2, 4):
            for stages in (2, 3):
                split = launch(2, 4, 1, depth, stages, three, 168)
                found += [split, dict(split, programs=8 * blocks(split, N))]
        found += [launch(1, 4, 1, 4, 2, programs, 168) for programs in (two, three)]
        found += [launch(2, 8, 1, 1, 3, two, 128), launch(4, 1, 4, 1, 3, 0, 168)]
    distinct = [config(M, N, K, group_size, multiprocessors=multiprocessors)]
    for one in found:
        # more programs than steps of work would leave some with nothing to do
        if one["programs"] <= blocks(one, N) * steps(one, K, group_size) and one not in distinct:
            distinct.append(one)
    return distinct


@triton.jit
def load_unit(ptr, inside, unit, stride_strip, R: tl.constexpr, C: tl.constexpr):
    """C tiles of each of R strips: int32 [c, g, W, R, C, kt]. Undefined where not inside, where the scales are zero."""
    r = tl.arange(0, R)[None, None, None, :, None, None]
    tile = tl.arange(0, C)[None, None, None, None, :, None]
    at = unit[None, None, :, None, None, None] * (C * 128) + r * stride_strip + tile * 128
    return load_tiles(ptr + at, inside[:, :, :, :, :, None] & (tile >= 0), "evict_first")


@triton.jit
def load_x(ptr, k, K, C: tl.constexpr, W: tl.constexpr, MH: tl.constexpr, EVEN_K: tl.constexpr):
    """x of each warp's columns k... in the order of the tensor cores, straight from memory: [W, C * 64, MH * 8]."""
    k8 = tl.arange(0, C * 8)[None, None, :, None, None] * 8
    at = k[None, :, None, None, None] + k8  # dims m, W, eights of columns, MH, column of eight
    at = tl.max_contiguous(ptr + at, (1, 1, 1, 1, 2))  # 4 bytes a lane, as the instruction wants them
    column = k[None, :, None, None, None] + k8 + tl.arange(0, 8)[None, None, None, None, :]
    mask = (column < K) | EVEN_K
    if LAST_FIRST:
        at = tl.max_contiguous(at.permute(2, 3, 1, 0, 4), (1, 1, 1, 1, 2))
        x = tl.load(at, mask=mask.permute(2, 3, 1, 0, 4), other=0.0).permute(3, 2, 0, 1, 4)
    else:
        x = tl.load(at, mask=mask, other=0.0)
    return x.permute(1, 2, 4, 3, 0).reshape(W, C * 64, MH * 8)


@triton.jit
def load_x_shared(x_ptr, stride_xm, k, M, K, C: tl.constexpr, MH: tl.constexpr, EVEN_K: tl.constexpr):
    """The same for columns that several warps share; Triton stages it in shared memory: [len(k), C * 64, MH * 8]."""
    m = tl.arange(0, MH * 8)[None, :, None]
    columns = k[:, None, None] + tl.arange(0, C * 64)[None, None, :]
    mask = m < M
    if not EVEN_K:
        mask = mask & (columns < K)
    return tl.load(x_ptr + m * stride_xm + columns, mask=mask, other=0.0).permute(0, 2, 1)


@triton.jit
def product_of(
    q, s, zeros, x,
    SCALE_DTYPE: tl.constexpr, W: tl.constexpr, R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, MH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A unit's tiles q, as `load_unit` has them, with their scales s and zeros, times x [slices, columns, MH * 8]: float32."""
    SLICES: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = MH * 8
    # a[P R W, 16 rows, K of the group], b[P R W, K of the group, columns]
    a = fragments(q.reshape(4, 8, W, R, P, S), zeros, None, x.dtype, ASM)
    a = a.permute(4, 3, 2, 6, 1, 5, 7, 0, 8).reshape(P * R * W, 16, S * 16)
    b = x.reshape(1, SLICES, P, S * 16, COLUMNS).permute(2, 0, 1, 3, 4)
    b = tl.broadcast_to(b, (P, R * W // SLICES, SLICES, S * 16, COLUMNS))
    product = tl.dot(a, b.reshape(P * R * W, S * 16, COLUMNS), input_precision="ieee")
    scale = halves(s, SCALE_DTYPE).to(tl.float32).permute(4, 3, 2, 5, 1, 0)  # P R W h g c
    scale = scale.reshape(P * R * W, 16, 1, 4, 1)
    scale = tl.broadcast_to(scale, (P * R * W, 16, MH, 4, 2)).reshape(P * R * W, 16, COLUMNS)
    return product * scale


@triton.jit
def sum_last(y):
    """Sum over the last dimension, 1, 2, 4 or 8 long, in a fixed order: it is brought into one thread and added."""
    LENGTH: tl.constexpr = y.shape[-1]
    if LENGTH == 1:
        return tl.sum(y, axis=len(y.shape) - 1)
    else:
        a, b = tl.split(y.reshape(y.shape[:-1] + [LENGTH // 2, 2]))
        return sum_last(a + b)


@triton.jit(do_not_specialize=("rank", "rows"))
def w4a16_decode_kernel(
    x_ptr, tiles_ptr, scales_ptr, zeros_ptr, bias_ptr, residual_ptr, y_ptr, partial_ptr, counter_ptr, peers_ptr, calls_ptr,
    M, N, K, stride_xm, rank, rows,
    G: tl.constexpr, SCALE_DTYPE: tl.constexpr, SWIGLU: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, C: tl.constexpr, MH: tl.constexpr, R: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr, STREAM: tl.constexpr, RANKS: tl.constexpr, WHOLE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # A unit is C tiles along K and P groups (or a part of one); a step is D units of each of WK warps.
    W: tl.constexpr = WN * WK
    BLOCK_N: tl.constexpr = WN * R * 16
    COLUMNS: tl.constexpr = MH * 8
    P: tl.constexpr = 2 if G > 0 and G % 64 != 0 else 1
    S: tl.constexpr = C * 4 // P
    if PDL and RANKS == 0:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    units = tl.cdiv(K, 128) * 2 // C
    groups = tl.cdiv(units * C * 64, G) if G > 0 else 1
    strips = tl.cdiv(N, 16)
    steps = tl.cdiv(units, WK * D)
    if STREAM:
        programs = tl.num_programs(0)
        total = tl.cdiv(N, BLOCK_N).to(tl.int64) * steps
        begin = (pid * total // programs).to(tl.int32)
        stop = ((pid + 1) * total // programs).to(tl.int32)
        first, last = begin // steps, (stop - 1) // steps
    else:
        first, last = pid, pid
    w = tl.arange(0, W)
    c = tl.arange(0, 4)
    g = tl.arange(0, 8)
    kt = tl.arange(0, 4)
    m_of_lane = tl.arange(0, MH)[None, None, None, :, None] * 8 + tl.arange(0, 8)[:, None, None, None, None]
    m_of_lane = tl.minimum(m_of_lane, M - 1)  # rows past M repeat the last; nothing of them is stored
    x_lane_ptr = x_ptr + (m_of_lane * stride_xm + tl.arange(0, 8)[None, None, None, None, :])
    stride_strip = units * (C * 128)
    for tile in range(first, last + 1):
        if STREAM:
            s0 = tl.maximum(begin - tile * steps, 0)
            s1 = tl.minimum(stop - tile * steps, steps)
        else:
            s0, s1 = 0, steps
        unit = w % WK + s0 * (WK * D)
        shared_unit = tl.arange(0, WK) + s0 * (WK * D)
        end = tl.minimum(units, s1 * (WK * D))
        strip = tile * (WN * R) + w // WK * R  # [W]
        lane_word = (
            g[None, :, None, None, None, None] * 16
            + c[:, None, None, None, None, None] * 4
            + kt[None, None, None, None, None, :]
        )
        q_ptr = tiles_ptr + (strip[None, None, :, None, None, None].to(tl.int64) * stride_strip + lane_word)
        row_at = (strip[None, None, :, None, None] * groups) * 8 + g[None, :, None, None, None]
        row_at += 0 * c[:, None, None, None, None] + tl.arange(0, R)[None, None, None, :, None] * (groups * 8)
        if ASM:  # hides that lanes read neighbours, or Triton would give a lane several rows, not its own
            row_at = tl.inline_asm_elementwise(MOVE, "=r,r", [row_at], tl.int32, is_pure=True, pack=1)
        part = tl.arange(0, P)[None, None, None, None, :]
        exists = strip[None, None, :, None, None] + tl.arange(0, R)[None, None, None, :, None] < strips
        qs, ss, zs = (), (), ()
        for d in tl.static_range(D):
            ahead = unit + d * WK
            group = group_of(ahead[None, None, :, None, None], part, G, C, P)
            inside = (ahead < end)[None, None, :, None, None]
            if not EVEN_N:
                inside = inside & exists
            qs = qs + (load_unit(q_ptr, inside, ahead, stride_strip, R, C),)
            ss = ss + (load_rows(scales_ptr + row_at + group * 8, inside),)
            if zeros_ptr is not None:
                zs = zs + (load_rows(zeros_ptr + row_at + group * 8, inside),)
        acc = tl.zeros((P * R * W, 16, COLUMNS), tl.float32)
        if PDL:
            gdc_wait()
            if RANKS > 0:  # the norm that does not wait for us begins once all before us is over
                gdc_launch_dependents()
        if WHOLE:
            for d in tl.static_range(D):
                x = load_x(x_lane_ptr, unit * (C * 64), K, C, W, MH, EVEN_K)
                zeros = None
                if zeros_ptr is not None:
                    zeros = two_bytes(zs[d])
                acc += product_of(qs[d], ss[d], zeros, x, SCALE_DTYPE, W, R, P, S, MH, ASM)
                unit += WK
        else:
            for _ in tl.range(s0, s1, num_stages=STAGES):
                for _d in tl.static_range(D):
                    if STAGES > 1:
                        x = load_x_shared(x_ptr, stride_xm, shared_unit * (C * 64), M, K, C, MH, EVEN_K)
                    else:
                        x = load_x(x_lane_ptr, unit * (C * 64), K, C, W, MH, EVEN_K)
                    ahead = unit + D * WK
                    group = group_of(ahead[None, None, :, None, None], part, G, C, P)
                    inside = (ahead < end)[None, None, :, None, None]
                    if not EVEN_N:
                        inside = inside & exists
                    q = load_unit(q_ptr, inside, ahead, stride_strip, R, C)
                    s = load_rows(scales_ptr + row_at + group * 8, inside)
                    zeros = None
                    if zeros_ptr is not None:
                        zeros = two_bytes(zs[0])
                        zs = zs[1:] + (load_rows(zeros_ptr + row_at + group * 8, inside),)
                    acc += product_of(qs[0], ss[0], zeros, x, SCALE_DTYPE, W, R, P, S, MH, ASM)
                    qs = qs[1:] + (q,)
                    ss = ss[1:] + (s,)
                    unit += WK
                    shared_unit += WK
        y = acc.reshape(P, R, WN, WK, 16, COLUMNS).permute(2, 1, 4, 5, 0, 3)
        y = sum_last(y.reshape(BLOCK_N, COLUMNS, P * WK))
        m = tl.arange(0, COLUMNS)
        if STREAM and s1 - s0 < steps:
            first_sharer = (((tile * steps + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)
            last_sharer = (((tile + 1) * steps).to(tl.int64) * programs - 1) // total
            last_sharer = last_sharer.to(tl.int32)
            at = tl.arange(0, BLOCK_N)[:, None] * COLUMNS + m[None, :]
            # a program shares at most the tile it begins in and the tile it ends in
            mine = (2 * pid + (s0 > 0).to(tl.int32)).to(tl.int64) * (BLOCK_N * COLUMNS)
            tl.store(partial_ptr + mine + at, y, mask=m[None, :] < M)
            tl.debug_barrier()
            arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
            if arrived == last_sharer - first_sharer:
                y = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
                for i0 in range(first_sharer, last_sharer + 1, 8):
                    for j in tl.static_range(8):  # eight loads in flight
                        i = tl.full((1, 1), i0 + j, tl.int32)
                        theirs = (2 * i + (i > first_sharer).to(tl.int32)).to(tl.int64) * (BLOCK_N * COLUMNS)
                        mask = (m[None, :] < M) & (i <= last_sharer)
                        y += tl.load(partial_ptr + theirs + at, mask=mask, other=0.0, cache_modifier=".cg")
                tl.store(counter_ptr + tile, 0)
                store_outputs(y, tile * BLOCK_N, m, y_ptr, bias_ptr, residual_ptr, M, N, BLOCK_N, SWIGLU)
                if RANKS > 0:
                    give_outputs(y, tile * BLOCK_N, m, y_ptr, peers_ptr, calls_ptr, M, N, rank, rows, RANKS)
        else:
            store_outputs(y, tile * BLOCK_N, m, y_ptr, bias_ptr, residual_ptr, M, N, BLOCK_N, SWIGLU)
            if RANKS > 0:
                give_outputs(y, tile * BLOCK_N, m, y_ptr, peers_ptr, calls_ptr, M, N, rank, rows, RANKS)


def w4a16_decode(
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
    mailbox: Mailbox | None = None,
) -> Tensor:
    """Equation (2) of `w4a16.py`; arguments as in `ops.w4a16_tiles`, x [M, K] with contiguous columns, M <= MAX_M.

    launch: as `config` returns it, and its default.
    mailbox: y is a rank's part of a sum and is given to all ranks; the norm that adds it (`all_reduce_norm`, given) is to be
        launched next. Then there is no bias, residual or swiglu.

    Returns:
        y of x.dtype [M, N], [M, N/2] with swiglu, within u |y| + (K + 8) 2^-23 (|x| @ |w|) of the reference, u the
        unit roundoff of x.dtype.
    """
    (M, K), strips = x.shape, tiles.shape[0]
    if M > MAX_M:
        raise ValueError(f"w4a16_decode: x has {M} rows, expected at most {MAX_M}; use w4a16_wide")
    chosen = launch or launch_of(x, N, group_size)
    if mailbox is not None and M > 8:
        raise ValueError(
            f"w4a16_decode: x has {M} rows, expected at most 8 where they are given to all ranks"
        )
    rows, warps_n, warps_k = chosen["rows"], chosen["warps_n"], chosen["warps_k"]
    while rows > strips:
        rows //= 2
    block_n, columns = warps_n * rows * STRIP, 8 if M <= 8 else 16
    y = x.new_empty(M, N // 2 if swiglu else N)
    tiles_of_unit = 1 if group_size % PAD_K else 2
    shared = blocks(chosen | dict(rows=rows), N)
    # a program without a step would be counted, but not waited for
    programs = min(chosen["programs"], shared * steps(chosen, K, group_size))
    stream = programs > 0 and shared <= COUNTERS
    partial = counters = None
    if stream:
        partial = x.new_empty(2 * programs * block_n * columns, dtype=torch.float32)
        counters = next_counters(x.device)
    whole = not stream and chosen["stages"] == 1 and steps(chosen, K, group_size) == 1
    whole_steps = K % (TILE_K * tiles_of_unit * warps_k * chosen["depth"]) == 0
    asm = ptx_level(x)
    pdl = asm >= 90
    options: dict[str, int] = dict(launch_pdl=True) if pdl else {}
    if asm and (cap := register_cap(chosen, group_size, zeros is not None, swiglu)):
        options["maxnreg"] = cap
    scale_words, zero_words, scale_dtype = as_words(scales, zeros)
    w4a16_decode_kernel[(programs if stream else shared,)](
        x, tiles, scale_words, zero_words, bias, residual,
        y, partial, counters, *(None, None) if mailbox is None else (mailbox.peers, mailbox.calls),
        M, N, K, x.stride(0), *(0, 0) if mailbox is None else (mailbox.rank, mailbox.rows),
        G=group_size, SCALE_DTYPE=scale_dtype, SWIGLU=swiglu,
        EVEN_N=strips % (warps_n * rows) == 0, EVEN_K=whole_steps, C=tiles_of_unit, MH=columns // 8, R=rows, WN=warps_n, WK=warps_k,
        D=chosen["depth"], STAGES=chosen["stages"], STREAM=stream,
        RANKS=0 if mailbox is None else len(mailbox.peers), WHOLE=whole, ASM=asm, PDL=pdl,
        num_warps=warps_n * warps_k, num_stages=1, **options,
    )  # fmt: skip
    return y
