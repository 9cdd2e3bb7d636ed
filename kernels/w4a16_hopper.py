"""W4A16 on Hopper, in Gluon: wgmma with the weight in registers, everything by TMA, equal work for every program.

The product of `w4a16.py` and its tiles. A ring of `stages` slots in shared memory holds the tiles, scales, zeros and x
of the steps to come: how many bytes are in flight depends on no registers, and a program fills its ring with weights
before it waits for the kernel before (programmatic dependent launch), x after. A step takes its tiles out of the ring into
registers as they are, subtracts the zero, and multiplies while the next step is dequantized: two sets of registers.

Where a group is 128 columns or more and x has few rows the scale comes after the product of 128 columns, in float32;
elsewhere it is multiplied into the weight, which is rounded once to x.dtype, as in `w4a16_wide.py`. One scale a row comes last.

The work, (tiles of y) x (pairs of steps along K), is cut into `programs` equal ranges (stream-K). A range that ends inside a
tile leaves its sums in a workspace; the last of the programs that share the tile adds them in a fixed order.

Budget: 1.4 instructions a weight to decode it, 0.5 more to scale it before the product; 30 a step and warp; x is read once
by every block of rows: BLOCK_M / (BLOCK_N / 4) of the weight's bytes out of L2.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantkit.kernels import w4a16
from quantkit.kernels.int4tiles import STRIP, TILE_K
from quantkit.kernels.w4a16_wide import w4a16_wide

UNPACK_BF16 = gl.constexpr(w4a16.UNPACK_BF16.value)
UNPACK_F16 = gl.constexpr(w4a16.UNPACK_F16.value)
ADD_BF16 = gl.constexpr(w4a16.ADD_BF16.value)
ADD_F16 = gl.constexpr(w4a16.ADD_F16.value)
MUL_BF16 = gl.constexpr(w4a16.MUL_BF16.value)
MUL_F16 = gl.constexpr(w4a16.MUL_F16.value)

# Triton 3.9's names, and 3.6's
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
PRODUCER_REGISTERS = gl.constexpr(24)  # the least there is
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _ptx(instruction: gl.constexpr):
    gl.inline_asm_elementwise(instruction, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _pairs(ring, P: gl.constexpr, R: gl.constexpr, W: gl.constexpr):
    """Scales or zeros of a slot, a pair of rows (h) a word: [R, W, groups, g] of its first and of its second tile."""
    LAYOUT: gl.constexpr = _pairs_layout(P, R, W)
    t = ring.load(LAYOUT).reshape((R, W, P, 8))
    if P == 1:
        return t, t
    else:
        return gl.split(t.reshape((R, W, 2, P // 2, 8)).permute((0, 1, 3, 4, 2)))


@gluon.jit
def _words(ring, R: gl.constexpr, W: gl.constexpr):
    """Codes of a slot: [R, W, g, c, kt] of its first and of its second tile."""
    LAYOUT: gl.constexpr = _words_layout(R, W)
    return gl.split(ring.load(LAYOUT).reshape((R, W, 2, 8, 4, 4)).permute((0, 1, 3, 4, 5, 2)))


@gluon.constexpr_function
def _pairs_layout(P, R, W):
    along = [[0, 8 << i] for i in range(P.bit_length() - 1)]
    rows = [[W << i, 0] for i in range(R.bit_length() - 1)]
    warps = [[1 << i, 0] for i in range(W.bit_length() - 1)]
    return gl.DistributedLinearLayout(along + rows, [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], warps, [], [R * W, P * 8])


@gluon.constexpr_function
def _words_layout(R, W):
    """Two tiles of each strip in shared memory [strips, 8, 32] as lanes (c, g) hold them: 16 bytes (kt) each."""
    rows = [[W << i, 0, 0] for i in range(R.bit_length() - 1)]
    warps = [[1 << i, 0, 0] for i in range(W.bit_length() - 1)]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], [0, 4, 0], *rows], lanes, warps, [], [R * W, 8, 32])


@gluon.jit
def _along_rows(t, LIKE: gl.constexpr):
    """int32 [R, W, P, g, h] -> [R, W, g, 1, P, 1, h, 1], in the layout LIKE of [R, W, g, c, P, S, h, c8]."""
    t = t.permute((0, 1, 3, 2, 4))
    t = gl.convert_layout(t, gl.SliceLayout(3, gl.SliceLayout(5, gl.SliceLayout(7, LIKE))), assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(t, 3), 5), 7)


@gluon.jit
def _dequantize(
    words, scales, zeros, SCALES: gl.constexpr, ZEROS: gl.constexpr, DTYPE: gl.constexpr,
    P: gl.constexpr, R: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Words [R, W, g, c, kt], scale pairs and zero pairs [R, W, P, g] -> the left operand [R W 16, 64]."""
    BF16: gl.constexpr = DTYPE == gl.bfloat16
    q = words.reshape((R, W, 8, 4, P, 4 // P))
    UNPACK: gl.constexpr = UNPACK_BF16 if BF16 else UNPACK_F16
    o = gl.inline_asm_elementwise(UNPACK, "=r,=r,=r,=r,r", [q], (gl.int32,) * 4, is_pure=True, pack=1)
    w = gl.join(gl.join(o[0], o[2]), gl.join(o[1], o[3]))  # [R, W, g, c, P, S, h, c8], a pair (e) each
    PAIR: gl.constexpr = w.type.layout
    SIGN_AND_MAGIC: gl.constexpr = 0xC300 if BF16 else 0xE400
    if ZEROS:
        z = gl.join(zeros & 0xFF, (zeros >> 8) & 0xFF).to(gl.int32) | SIGN_AND_MAGIC
        minus = _along_rows(z | (z << 16), PAIR)
        w, minus = gl.broadcast(w, minus)
    else:
        minus = gl.full_like(w, (SIGN_AND_MAGIC + 8) * 0x10001 - 2**32)
    w = gl.inline_asm_elementwise(ADD_BF16 if BF16 else ADD_F16, "=r,r,r", [w, minus], gl.int32, is_pure=True, pack=1)
    if SCALES:
        low, high = scales & 0xFFFF, (scales >> 16) & 0xFFFF
        by = _along_rows(gl.join(low | (low << 16), high | (high << 16)), PAIR)
        w, by = gl.broadcast(w, by)
        w = gl.inline_asm_elementwise(MUL_BF16 if BF16 else MUL_F16, "=r,r,r", [w, by], gl.int32, is_pure=True, pack=1)
    low = (w & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True)
    high = ((w >> 16) & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True)
    # R W g c P S h c8 e -> rows (R, W, h, g), columns (P, S, c8, c, e)
    w = gl.join(low, high).permute((0, 1, 6, 2, 4, 5, 7, 3, 8)).reshape((R * W * 16, 64))
    return gl.convert_layout(w, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _row_scales(pairs, DTYPE: gl.constexpr, R: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr):
    """Scale pairs [R, W, 1, g] -> float32 [R W 16, 1] beside the sums."""
    low = (pairs & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True).to(gl.float32)
    high = ((pairs >> 16) & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True).to(gl.float32)
    s = gl.join(low, high).permute((0, 1, 2, 4, 3)).reshape((R * W * 16,))
    return gl.expand_dims(gl.convert_layout(s, gl.SliceLayout(1, MMA), assert_trivial=True), 1)


@gluon.jit
def _after(step, m, n, steps, tiles_m):
    """What comes after a step: its place along K, its block of x, its block of w."""
    step += 1
    over = step == steps
    step = gl.where(over, 0, step)
    m += over.to(gl.int32)
    over = m == tiles_m
    return step, gl.where(over, 0, m), n + over.to(gl.int32)


@gluon.jit
def _produce(descs, ring, work, G: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr):
    """One warp: asks for the weights of the first slots, waits for the kernel before, then keeps the ring full."""
    x_desc, tiles_desc, scales_desc, zeros_desc = descs
    x_ring, tiles_ring, scales_ring, zeros_ring, full, empty = ring
    begin, stop, steps, tiles_m, total = work
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    STRIPS: gl.constexpr = tiles_desc.block_type.shape[0]
    BYTES: gl.constexpr = (
        x_desc.block_type.nbytes
        + tiles_desc.block_type.nbytes
        + (scales_desc.block_type.nbytes if scales_desc is not None else 0)
        + (zeros_desc.block_type.nbytes if zeros_desc is not None else 0)
    )
    count = stop - begin
    tile = begin // steps
    step, m, n = begin - tile * steps, tile % tiles_m, tile // tiles_m
    x_step, x_m, x_n = step, m, n
    slot, phase = 0, 1
    for i in range(0, count):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), BYTES)
        load_tile(tiles_desc, [n * STRIPS, step * 8, 0], full.index(slot), tiles_ring.index(slot))
        group = (step * P) // (G * P // 128) if G > 0 else 0
        if scales_desc is not None:
            load_tile(scales_desc, [n * STRIPS, group * 8], full.index(slot), scales_ring.index(slot))
        if zeros_desc is not None:
            load_tile(zeros_desc, [n * STRIPS, group * 8], full.index(slot), zeros_ring.index(slot))
        if i >= STAGES:
            load_tile(x_desc, [m * BLOCK_M, step * 128], full.index(slot), x_ring.index(slot))
        step, m, n = _after(step, m, n, steps, tiles_m)
        slot += 1
        over = slot == STAGES
        slot = gl.where(over, 0, slot)
        phase ^= over.to(gl.int32)
        if (i == STAGES - 1) | ((i == count - 1) & (i < STAGES)):
            _ptx("griddepcontrol.wait; mov.u32 $0, 0;")
            for j in range(0, i + 1):
                load_tile(x_desc, [x_m * BLOCK_M, x_step * 128], full.index(j), x_ring.index(j))
                x_step, x_m, x_n = _after(x_step, x_m, x_n, steps, tiles_m)


@gluon.jit
def _consume(ring, work, rest, how: gl.constexpr):
    """All other warps: products of what is in the ring, and what follows them."""
    x_ring, tiles_ring, scales_ring, zeros_ring, full, empty = ring
    begin, stop, steps, tiles_m, total = work
    scales_ptr, bias_ptr, residual_ptr, y_desc, staging, partial_ptr, counter_ptr, M, N = rest
    G: gl.constexpr = how[0]
    ZEROS: gl.constexpr = how[1]
    SWIGLU: gl.constexpr = how[2]
    AFTER: gl.constexpr = how[3]
    STREAM: gl.constexpr = how[4]
    DTYPE: gl.constexpr = how[5]
    BLOCK_M: gl.constexpr = how[6]
    P: gl.constexpr = how[7]
    R: gl.constexpr = how[8]
    STAGES: gl.constexpr = how[9]
    W: gl.constexpr = gl.num_warps()
    BLOCK_N: gl.constexpr = R * W * 16
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    P_OF_TILE: gl.constexpr = max(1, P // 2)
    FLIGHT: gl.constexpr = max(1, min(8, 64 // (R * BLOCK_M)))
    _ptx("griddepcontrol.wait; mov.u32 $0, 0;")  # the workspace and y may be in use by the kernel before
    # `free` must not begin as another name of slot, or Triton 3.6 takes it for unchanged in the loop
    slot, phase, free = 0, 0, STAGES - 1
    for tile in range(begin // steps, (stop - 1) // steps + 1):
        s0 = gl.maximum(begin - tile * steps, 0)
        s1 = gl.minimum(stop - tile * steps, steps)
        acc = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, MMA)
        product = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, MMA)  # where the scale comes after it
        scale = gl.zeros((BLOCK_N, 1), gl.float32, MMA)
        other = gl.zeros((BLOCK_N, 64), DTYPE, OPERAND)
        for step in range(s0, s1):
            mbarrier.wait(full.index(slot), phase)
            words = _words(tiles_ring.index(slot), R, W)
            pairs, zeros = (0, 0), (0, 0)
            if G > 0:
                pairs = _pairs(scales_ring.index(slot), P, R, W)
            if ZEROS:
                zeros = _pairs(zeros_ring.index(slot), P, R, W)
            for half in gl.static_range(2):
                operand = _dequantize(
                    words[half], pairs[half], zeros[half], G > 0 and not AFTER, ZEROS, DTYPE, P_OF_TILE, R, W, MMA
                )
                x = x_ring.index(slot).slice(64 * half, 64, dim=1).permute((1, 0))
                if AFTER and half == 0:
                    product, other = warpgroup_mma_wait(0, deps=(product, other))
                    acc += product * scale
                    scale = _row_scales(pairs[0], DTYPE, R, W, MMA)
                    product = warpgroup_mma(operand, x, product, use_acc=False, is_async=True)
                    product, other = warpgroup_mma_wait(1, deps=(product, other))
                elif AFTER:
                    product = warpgroup_mma(operand, x, product, is_async=True)
                    product, other = warpgroup_mma_wait(1, deps=(product, other))
                else:
                    acc = warpgroup_mma(operand, x, acc, is_async=True)
                    # ends the product before this one: its registers are free, after a first half its slot too
                    acc, other = warpgroup_mma_wait(1, deps=(acc, other))
                other = operand
                if half == 0:
                    mbarrier.arrive(empty.index(free), pred=step > s0)
            free = slot
            slot += 1
            over = slot == STAGES
            slot = gl.where(over, 0, slot)
            phase ^= over.to(gl.int32)
        if AFTER:
            product, other = warpgroup_mma_wait(0, deps=(product, other))
            acc += product * scale
        else:
            acc, other = warpgroup_mma_wait(0, deps=(acc, other))
        mbarrier.arrive(empty.index(free))
        m0 = tile % tiles_m * BLOCK_M
        n0 = tile // tiles_m * BLOCK_N
        if G > 0:
            y = acc
        else:  # one scale a row: [strip, g, h]
            row = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
            scale_at = row // 16 * 16 + row % 8 * 2 + row // 8 % 2
            y = acc * gl.expand_dims(gl.load(scales_ptr + scale_at, mask=row < N, other=0.0).to(gl.float32), 1)
        if STREAM and s1 - s0 < steps:
            programs = gl.num_programs(0)
            pid = gl.program_id(0)
            first_sharer = (((tile * steps + 1).to(gl.int64) * programs - 1) // total).to(gl.int32)
            last_sharer = (((tile + 1) * steps).to(gl.int64) * programs - 1) // total
            last_sharer = last_sharer.to(gl.int32)
            at = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA)), 1) * BLOCK_M
            at += gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA)), 0)
            # a program shares at most the tile it begins in and the tile it ends in
            mine = (2 * pid + (s0 > 0).to(gl.int32)).to(gl.int64) * (BLOCK_N * BLOCK_M)
            gl.store(partial_ptr + mine + at, y)
            barrier()
            arrived = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
            if arrived == last_sharer - first_sharer:
                y = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, MMA)
                for i in range(first_sharer, last_sharer + 1, FLIGHT):
                    for j in gl.static_range(FLIGHT):  # loads in flight
                        sharer = i + j
                        theirs = (2 * sharer + (sharer > first_sharer).to(gl.int32)).to(gl.int64) * (BLOCK_N * BLOCK_M)
                        mask = (at >= 0) & (sharer <= last_sharer)
                        y += gl.load(partial_ptr + theirs + at, mask=mask, other=0.0, cache_modifier=".cg")
                gl.store(counter_ptr + tile, 0)
                _store(y, n0, m0, y_desc, staging, bias_ptr, residual_ptr, M, N, BLOCK_N, BLOCK_M, DTYPE, SWIGLU)
        else:
            _store(y, n0, m0, y_desc, staging, bias_ptr, residual_ptr, M, N, BLOCK_N, BLOCK_M, DTYPE, SWIGLU)
    tma.store_wait(0)


@gluon.jit
def w4a16_hopper_kernel(
    x_desc, tiles_desc, scales_desc, zeros_desc, y_desc, scales_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr,
    M, N, K,
    G: gl.constexpr, SWIGLU: gl.constexpr, AFTER: gl.constexpr, STREAM: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # A step is two tiles along K, P groups or a part of one, of R strips of each warp.
    _ptx("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
    DTYPE: gl.constexpr = x_desc.dtype
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    STRIPS: gl.constexpr = R * gl.num_warps()
    P: gl.constexpr = 128 // G if G > 0 and G < 128 else 1
    ZEROS: gl.constexpr = zeros_desc is not None
    programs = gl.num_programs(0)
    tiles_m = gl.cdiv(M, BLOCK_M)
    steps = gl.cdiv(K, 128)
    total = gl.cdiv(N, STRIPS * 16) * tiles_m.to(gl.int64) * steps
    begin = (gl.program_id(0) * total // programs).to(gl.int32)
    stop = ((gl.program_id(0) + 1) * total // programs).to(gl.int32)

    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], x_desc.layout)
    tiles_ring = gl.allocate_shared_memory(gl.int32, [STAGES, STRIPS, 8, 32], tiles_desc.layout)
    scales_ring, zeros_ring = tiles_ring, tiles_ring
    if G > 0:
        scales_ring = gl.allocate_shared_memory(gl.int32, [STAGES, STRIPS, P * 8], scales_desc.layout)
    if ZEROS:
        zeros_ring = gl.allocate_shared_memory(gl.int16, [STAGES, STRIPS, P * 8], zeros_desc.layout)
    staging = gl.allocate_shared_memory(DTYPE, y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    descs = (x_desc, tiles_desc, scales_desc, zeros_desc)
    ring = (x_ring, tiles_ring, scales_ring, zeros_ring, full, empty)
    work = (begin, stop, steps, tiles_m, total)
    rest = (scales_ptr, bias_ptr, residual_ptr, y_desc, staging, partial_ptr, counter_ptr, M, N)
    how: gl.constexpr = (G, ZEROS, SWIGLU, AFTER, STREAM, DTYPE, BLOCK_M, P, R, STAGES)
    gl.warp_specialize(
        [(_consume, (ring, work, rest, how)), (_produce, (descs, ring, work, G, P, STAGES))], [1], [PRODUCER_REGISTERS]
    )


@gluon.jit
def _store(
    y, n0, m0, y_desc, staging, bias_ptr, residual_ptr, M, N,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, DTYPE: gl.constexpr, SWIGLU: gl.constexpr,
):  # fmt: skip
    """`w4a16.store_outputs`."""
    if bias_ptr is not None:
        n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, y.type.layout))
        bias = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        y += gl.expand_dims(bias, 1)
    outputs = N
    ROWS: gl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    if SWIGLU:
        gate, up = gl.split(y.reshape((BLOCK_N // 16, 2, 8, BLOCK_M)).permute((0, 2, 3, 1)))
        y = (gate / (1 + gl.exp(-gate)) * up).reshape((ROWS, BLOCK_M))
        n0 = n0 // 2
        outputs = N // 2
    if residual_ptr is not None:
        LAYOUT: gl.constexpr = y.type.layout
        n = gl.expand_dims(n0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1)
        m = gl.expand_dims(m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT)), 0)
        mask = (m < M) & (n < outputs)
        y += gl.load(residual_ptr + (m.to(gl.int64) * outputs + n), mask=mask, other=0.0).to(gl.float32)
    _store_columns(y.to(DTYPE), n0, m0, y_desc, staging)


@gluon.jit
def _store_columns(y, n0, m0, y_desc, staging):
    """y^T [rows, columns] to y_desc, as many columns at a time as `staging` holds; TMA leaves out what is past M and N."""
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    if COLUMNS > staging.shape[0]:
        halves = gl.split(y.reshape((ROWS, 2, COLUMNS // 2)).permute((0, 2, 1)))
        _store_columns(halves[0], n0, m0, y_desc, staging)
        _store_columns(halves[1], n0, m0 + COLUMNS // 2, y_desc, staging)
    else:
        tma.store_wait(0)  # `staging` has been read
        barrier()
        staging.permute((1, 0)).store(y)
        fence_async_shared()
        barrier()
        store_tile(y_desc, [m0, n0], staging)


Config = dict[str, int]

STAGED = 32  # columns of y^T in shared memory on their way out
MAX_SUMS = 128  # float32 sums a thread
SHARED = 227 * 1024  # bytes a program may have
TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
X = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
ZEROS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)


def slot_bytes(launch: Config, group_size: int, zeros: bool) -> int:
    strips = launch["rows"] * launch["warps"]
    groups = 128 // group_size if 0 < group_size < 128 else 1
    weights = strips * (1024 + groups * 8 * (4 * (group_size > 0) + 2 * zeros))
    return launch["block_m"] * 256 + weights + 16


def blocks(launch: Config, M: int, N: int) -> int:
    return triton.cdiv(M, launch["block_m"]) * triton.cdiv(N, launch["rows"] * launch["warps"] * STRIP)


def takes(group_size: int) -> bool:
    return group_size % 128 == 0 or group_size in (32, 64)


@lru_cache(maxsize=4096)
def config(M: int, N: int, K: int, group_size: int) -> Config:
    """Launch parameters by the rows of x; `quantkit tune` finds better ones for a shape."""
    return dict(block_m=16, rows=1, warps=8, stages=8, programs=132, after=1, registers=80)


def tma_reads(x: Tensor) -> bool:
    """Whether TMA can read x [M, K]: its rows begin at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def w4a16_hopper(
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
    y_columns = N // 2 if swiglu else N
    """As `w4a16_wide`, which also takes what this kernel cannot: x at odd addresses, scales of another dtype than x."""
    if not tma_reads(x) or scales.dtype != x.dtype or not takes(group_size) or y_columns % 8:
        return w4a16_wide(x, tiles, scales, zeros, bias, residual, group_size, N, swiglu)
    from quantkit.kernels.w4a16_decode import _counters, _launch, LAUNCHES, COUNTERS
    M, K = x.shape
    chosen = launch or config(M, N, K, group_size)
    block_m, rows, warps, stages = chosen["block_m"], chosen["rows"], chosen["warps"], chosen["stages"]
    y = x.new_empty(M, N // 2 if swiglu else N)
    strips = rows * warps
    groups = 128 // group_size if 0 < group_size < 128 else 1
    all_strips = tiles.shape[0]
    x_desc = TensorDescriptor.from_tensor(x, [block_m, 128], X)
    tiles_desc = TensorDescriptor.from_tensor(tiles.view(all_strips, -1, 32), [strips, 8, 32], TILES)
    scale_words, zero_words, _ = w4a16.as_words(scales, zeros)
    scales_desc = zeros_desc = None
    if group_size:
        scales_desc = TensorDescriptor.from_tensor(scale_words.view(all_strips, -1), [strips, groups * 8], SCALES)
    if zeros is not None:
        zeros_desc = TensorDescriptor.from_tensor(zero_words.view(all_strips, -1), [strips, groups * 8], ZEROS)
    shared = blocks(chosen, M, N)
    programs = chosen["programs"] or shared
    programs = min(programs, shared * triton.cdiv(K, 128))
    stream = shared % programs != 0 or programs > shared
    partial = counters = None
    if stream:
        assert shared <= COUNTERS
        partial = x.new_empty(2 * programs * strips * STRIP * block_m, dtype=torch.float32)
        counters = _counters(x.device)[next(_launch) % LAUNCHES]
    options = dict(maxnreg=chosen["registers"]) if chosen["registers"] else {}
    y_block = [min(block_m, STAGED), strips * STRIP // (2 if swiglu else 1)]
    y_desc = TensorDescriptor.from_tensor(y, y_block, gl.NVMMASharedLayout(min(128, 2 * y_block[1]), 16, 2))
    w4a16_hopper_kernel[(programs,)](
        x_desc, tiles_desc, scales_desc, zeros_desc, y_desc, None if group_size else scales, bias, residual,
        partial, counters, M, N, K,
        G=group_size, SWIGLU=swiglu, AFTER=bool(chosen["after"]) and group_size > 0 and group_size % 128 == 0, STREAM=stream,
        R=rows, STAGES=stages, num_warps=warps, launch_pdl=True, **options,
    )  # fmt: skip
    return y
