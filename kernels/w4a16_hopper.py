"""W4A16 on Hopper, in Gluon: everything by TMA through a ring in shared memory, the weight in registers for wgmma.

The product of `w4a16.py` from its tiles, for any M. One warp of a program keeps a ring of `stages` slots full: the tiles
of 128 columns of some strips, their scales and zeros, and the same columns of x. How many bytes are under way depends
on no registers, and the first slots' weights are asked for before the wait for the kernel before (programmatic dependent
launch). The other warps take the tiles out as they are, dequantize 64 columns while the tensor cores multiply by
the 64 before, which are in other registers, and let y leave through shared memory and TMA.

Up to 32 rows of x, and with groups of 128 columns or more, the scale comes after the product of 128 columns, in float32;
elsewhere it is multiplied into the weight, which is rounded once to x.dtype, as in `w4a16_wide.py`. One scale a row
comes last in either case.

The work, (tiles of y) x (steps of 128 columns), is cut into `programs` equal ranges (`stream_k.py`): one tile each, a few
parts of a tile where tiles are fewer than multiprocessors, or several whole tiles.

Budget: 1.4 instructions a weight to decode it, 0.5 to scale it before the product, 40 a step and warp. Out of L2 come
BLOCK_M / (BLOCK_N / 4) bytes of x for every byte of the weight. 2 M N K operations at 989 TFLOP/s from M of about 64 on.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantkit.kernels import w4a16
from quantkit.kernels.dispatch import multiprocessors_of
from quantkit.kernels.hopper import (
    BLOCKS_M,
    PRODUCER_REGISTERS,
    REGISTERS_OF_TWO,
    RESERVED,
    SHARED,
    STAGED_ROWS,
    SUMS_OF_TWO,
    add_parts,
    even_share,
    let_next_kernel_start,
    load_tile,
    next_step,
    parts,
    rows_of_block,
    store_transposed,
    wait_for_kernel_before,
    worth,
)
from quantkit.kernels.int4tiles import PAD_K, STRIP
from quantkit.kernels.stream_k import COUNTERS, next_counters
from quantkit.kernels.w4a16_wide import w4a16_wide

UNPACK_BF16 = gl.constexpr(w4a16.UNPACK_BF16.value)
UNPACK_F16 = gl.constexpr(w4a16.UNPACK_F16.value)
ADD_BF16 = gl.constexpr(w4a16.ADD_BF16.value)
ADD_F16 = gl.constexpr(w4a16.ADD_F16.value)
MUL_BF16 = gl.constexpr(w4a16.MUL_BF16.value)
MUL_F16 = gl.constexpr(w4a16.MUL_F16.value)

STEP = PAD_K  # columns of a slot
MOST_AFTER = 32  # rows of x up to which the scale comes after the product
MAX_SUMS = 128  # float32 sums a thread

TILES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
X_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SCALES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
ZEROS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)

# block_m, warps, stages, and the rate of such tiles beside the first's, where they fill an H100 equally well
LARGE = ((256, 8, 3, 1.0), (256, 4, 3, 0.93), (128, 8, 5, 0.9), (128, 4, 6, 0.85))

Config = dict[str, int]


def blocks(launch: Config, M: int, N: int) -> int:
    """Tiles of y."""
    return triton.cdiv(M, launch["block_m"]) * triton.cdiv(N, launch["rows"] * launch["warps"] * STRIP)


def shared_bytes(launch: Config, group_size: int) -> int:
    """Shared memory of a program whose weight has zeros."""
    rows = launch["rows"] * launch["warps"] * STRIP
    slot = STEP * launch["block_m"] * 2 + rows * (STEP // 2 + 3 * groups_of_step(group_size))
    return RESERVED + launch["stages"] * slot + min(STAGED_ROWS, launch["block_m"]) * rows * 2


def groups_of_step(group_size: int) -> int:
    """Groups in the columns of a slot, or 1 where they are a part of one."""
    return STEP // group_size if 0 < group_size < STEP else 1


def two_fit(launch: Config, group_size: int) -> bool:
    """Whether a multiprocessor may run two programs at once."""
    few_sums = launch["rows"] == 1 and launch["block_m"] // 2 <= SUMS_OF_TWO
    return few_sums and 2 * shared_bytes(launch, group_size) <= SHARED


@lru_cache(maxsize=4096)
def config(M: int, N: int, K: int, group_size: int, multiprocessors: int = 132) -> Config:
    """Launch parameters that are good for an H100; `quantkit tune` finds better ones for a shape."""
    block_m = rows_of_block(M)

    def launch(block_m: int, warps: int, stages: int) -> Config:
        return dict(block_m=block_m, rows=1, warps=warps, stages=stages, programs=0)

    if block_m <= 64:
        chosen = launch(block_m, 8, 4)
        if blocks(chosen, M, N) < multiprocessors * 3 // 4:
            chosen = launch(block_m, 4, 6)
            two = block_m <= 16 or (block_m == 32 and K > 8192)
            chosen["programs"] = parts(blocks(chosen, M, N), multiprocessors * (2 if two else 1))
        return chosen
    best = 0.0
    for size, warps, stages, factor in LARGE:
        one = launch(size, warps, stages)
        score = factor * worth(blocks(one, M, N), multiprocessors)
        if size <= block_m and shared_bytes(one, group_size) <= SHARED and score > best:
            best, chosen = score, one
    tiles = blocks(chosen, M, N)
    share = parts(tiles, multiprocessors) if tiles < multiprocessors else even_share(tiles, multiprocessors)
    return chosen | dict(programs=0 if share == tiles else share)


def candidates(M: int, N: int, K: int, group_size: int, multiprocessors: int = 132) -> list[Config]:
    """Launches worth timing, `config`'s first."""
    found = [config(M, N, K, group_size, multiprocessors)]
    largest = rows_of_block(M)
    for block_m in (largest, largest // 2):
        for rows, warps in ((1, 4), (1, 8), (2, 8)):
            if block_m not in BLOCKS_M or rows * block_m // 2 > MAX_SUMS:
                continue
            one = dict(block_m=block_m, rows=rows, warps=warps, stages=0, programs=0)
            tiles = blocks(one, M, N)
            twice = two_fit(one | dict(stages=4), group_size)
            shares = [parts(tiles, multiprocessors), even_share(tiles, multiprocessors)]
            shares += [0, multiprocessors] + [parts(tiles, 2 * multiprocessors)] * twice
            for programs in dict.fromkeys(0 if share == tiles else share for share in shares):
                two = twice and (programs or tiles) > multiprocessors
                room = SHARED // 2 if two else SHARED
                depths = (6, 4) if two else (8, 6, 5, 4, 3)
                deep = [d for d in depths if shared_bytes(one | dict(stages=d), group_size) <= room]
                found += [one | dict(stages=d, programs=programs) for d in deep[:2]]
    return [launch for i, launch in enumerate(found) if launch not in found[:i]]


def after(block_m: int, group_size: int) -> bool:
    """Whether the scale of a group comes after its product."""
    return block_m <= MOST_AFTER and group_size > 0 and group_size % STEP == 0


def takes(x: Tensor, scales: Tensor, group_size: int, outputs: int) -> bool:
    """Whether this kernel can: TMA moves x [M, K] and y [M, outputs], and a step is whole groups or within one."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and outputs % 8 == 0
    return aligned and scales.dtype == x.dtype and (group_size % STEP == 0 or group_size in (32, 64))


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
def _zeros_apart(strips, P):
    """Slots of zeros that a slot takes: TMA writes to multiples of 128 bytes."""
    return max(1, 8 // (strips * P))


@gluon.constexpr_function
def _pairs_layout(P, R, W):
    along = [[0, 8 << i] for i in range(P.bit_length() - 1)]
    rows = [[W << i, 0] for i in range(R.bit_length() - 1)]
    warps = [[1 << i, 0] for i in range(W.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        along + rows, [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], warps, [], [R * W, P * 8]
    )


@gluon.constexpr_function
def _words_layout(R, W):
    """Two tiles of each strip in shared memory [strips, 8, 32] as lanes (c, g) hold them: 16 bytes (kt) each."""
    rows = [[W << i, 0, 0] for i in range(R.bit_length() - 1)]
    warps = [[1 << i, 0, 0] for i in range(W.bit_length() - 1)]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 4, 0], *rows], lanes, warps, [], [R * W, 8, 32]
    )


@gluon.jit
def _along_rows(t, LIKE: gl.constexpr):
    """int32 [R, W, P, g, h] -> [R, W, g, 1, P, 1, h, 1], in the layout LIKE of [R, W, g, c, P, S, h, c8]."""
    t = t.permute((0, 1, 3, 2, 4))
    t = gl.convert_layout(
        t, gl.SliceLayout(3, gl.SliceLayout(5, gl.SliceLayout(7, LIKE))), assert_trivial=True
    )
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
    w = gl.inline_asm_elementwise(
        ADD_BF16 if BF16 else ADD_F16, "=r,r,r", [w, minus], gl.int32, is_pure=True, pack=1
    )
    if SCALES:
        low, high = scales & 0xFFFF, (scales >> 16) & 0xFFFF
        by = _along_rows(gl.join(low | (low << 16), high | (high << 16)), PAIR)
        w, by = gl.broadcast(w, by)
        w = gl.inline_asm_elementwise(
            MUL_BF16 if BF16 else MUL_F16, "=r,r,r", [w, by], gl.int32, is_pure=True, pack=1
        )
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
def _produce(descs, ring, work, G: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr):
    """One warp: asks for the weights of the first slots, waits for the kernel before, then keeps the ring full."""
    x_desc, tiles_desc, scales_desc, zeros_desc = descs
    x_ring, tiles_ring, scales_ring, zeros_ring, full, empty = ring
    begin, stop, steps, tiles_m = work
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
            load_tile(
                zeros_desc,
                [n * STRIPS, group * 8],
                full.index(slot),
                zeros_ring.index(slot * _zeros_apart(STRIPS, P)),
            )
        if i >= STAGES:
            load_tile(x_desc, [m * BLOCK_M, step * 128], full.index(slot), x_ring.index(slot))
        step, m, n = next_step(step, m, n, steps, tiles_m)
        slot += 1
        over = slot == STAGES
        slot = gl.where(over, 0, slot)
        phase ^= over.to(gl.int32)
        if (i == STAGES - 1) | ((i == count - 1) & (i < STAGES)):
            wait_for_kernel_before()
            for j in range(0, i + 1):
                load_tile(x_desc, [x_m * BLOCK_M, x_step * 128], full.index(j), x_ring.index(j))
                x_step, x_m, x_n = next_step(x_step, x_m, x_n, steps, tiles_m)


@gluon.jit
def _consume(
    ring, work, rest,
    G: gl.constexpr, ZEROS: gl.constexpr, SWIGLU: gl.constexpr, AFTER: gl.constexpr, STREAM: gl.constexpr,
    DTYPE: gl.constexpr, BLOCK_M: gl.constexpr, P: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All other warps: products of what is in the ring, and what follows them."""
    x_ring, tiles_ring, scales_ring, zeros_ring, full, empty = ring
    begin, stop, steps, tiles_m = work
    total, scales_ptr, bias_ptr, residual_ptr, y_desc, staging, partial_ptr, counter_ptr, M, N = rest
    W: gl.constexpr = gl.num_warps()
    BLOCK_N: gl.constexpr = R * W * 16
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    P_OF_TILE: gl.constexpr = max(1, P // 2)
    wait_for_kernel_before()  # the workspace and y may be in use by the kernel before
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
                zeros = _pairs(zeros_ring.index(slot * _zeros_apart(R * W, P)), P, R, W)
            for half in gl.static_range(2):
                operand = _dequantize(
                    words[half],
                    pairs[half],
                    zeros[half],
                    G > 0 and not AFTER,
                    ZEROS,
                    DTYPE,
                    P_OF_TILE,
                    R,
                    W,
                    MMA,
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
            y = acc * gl.expand_dims(
                gl.load(scales_ptr + scale_at, mask=row < N, other=0.0).to(gl.float32), 1
            )
        if STREAM and s1 - s0 < steps:
            y, whole = add_parts(y, tile, s0 == 0, steps, total, partial_ptr, counter_ptr, 0, 1)
            if whole:
                store_transposed(y, n0, m0, y_desc, staging, bias_ptr, residual_ptr, M, N, SWIGLU)
        else:
            store_transposed(y, n0, m0, y_desc, staging, bias_ptr, residual_ptr, M, N, SWIGLU)
    tma.store_wait(0)


@gluon.jit
def w4a16_hopper_kernel(
    x_desc, tiles_desc, scales_desc, zeros_desc, y_desc, scales_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr,
    M, N, K,
    G: gl.constexpr, SWIGLU: gl.constexpr, AFTER: gl.constexpr, STREAM: gl.constexpr,
    R: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # A step is two tiles along K, P groups or a part of one, of R strips of each warp.
    let_next_kernel_start()
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
        APART: gl.constexpr = _zeros_apart(STRIPS, P)
        zeros_ring = gl.allocate_shared_memory(gl.int16, [STAGES * APART, STRIPS, P * 8], zeros_desc.layout)
    staging = gl.allocate_shared_memory(DTYPE, y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    descs = (x_desc, tiles_desc, scales_desc, zeros_desc)
    ring = (x_ring, tiles_ring, scales_ring, zeros_ring, full, empty)
    work = (begin, stop, steps, tiles_m)
    rest = (total, scales_ptr, bias_ptr, residual_ptr, y_desc, staging, partial_ptr, counter_ptr, M, N)
    gl.warp_specialize(
        [
            (
                _consume,
                (ring, work, rest, G, ZEROS, SWIGLU, AFTER, STREAM, DTYPE, BLOCK_M, P, R, STAGES),
            ),
            (_produce, (descs, ring, work, G, P, STAGES)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


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
    """As `w4a16_wide`, which runs instead where this kernel cannot; see `takes`."""
    (M, K), outputs = x.shape, N // 2 if swiglu else N
    if not takes(x, scales, group_size, outputs):
        return w4a16_wide(x, tiles, scales, zeros, bias, residual, group_size, N, swiglu)
    multiprocessors = multiprocessors_of(x.device)
    chosen = launch or config(M, N, K, group_size, multiprocessors)
    block_m, rows, warps = chosen["block_m"], chosen["rows"], chosen["warps"]
    strips, groups = rows * warps, groups_of_step(group_size)
    y = x.new_empty(M, outputs)
    y_block = [min(block_m, STAGED_ROWS), strips * STRIP // (2 if swiglu else 1)]
    y_layout = gl.NVMMASharedLayout(min(128, 2 * y_block[1]), element_bitwidth=16, rank=2)
    scale_words, zero_words, _ = w4a16.as_words(scales, zeros)
    by_strip = tiles.shape[0], -1
    describe = TensorDescriptor.from_tensor
    of_group = [strips, groups * 8]

    shared = blocks(chosen, M, N)
    programs = min(chosen["programs"] or shared, shared * triton.cdiv(K, STEP))
    stream = shared % programs != 0
    if stream and shared > COUNTERS:
        programs, stream = shared, False
    partial = counters = None
    if stream:
        partial = x.new_empty(2 * programs * strips * STRIP * block_m, dtype=torch.float32)
        counters = next_counters(x.device)
    two = programs > multiprocessors and two_fit(chosen, group_size)
    w4a16_hopper_kernel[(programs,)](
        describe(x, [block_m, STEP], X_LAYOUT),
        describe(tiles.view(*by_strip, 32), [strips, 8, 32], TILES_LAYOUT),
        describe(scale_words.view(by_strip), of_group, SCALES_LAYOUT) if group_size else None,
        None if zero_words is None else describe(zero_words.view(by_strip), of_group, ZEROS_LAYOUT),
        describe(y, y_block, y_layout),
        None if group_size else scales, bias, residual, partial, counters, M, N, K,
        G=group_size, SWIGLU=swiglu, AFTER=after(block_m, group_size), STREAM=stream, R=rows, STAGES=chosen["stages"],
        num_warps=warps, launch_pdl=True, **(dict(maxnreg=REGISTERS_OF_TWO) if two else {}),
    )  # fmt: skip
    return y
