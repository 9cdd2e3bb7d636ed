"""W4A16 on Hopper, in Gluon: everything by TMA through a ring in shared memory, the weight in registers for wgmma.

The product of `w4a16.py` from its tiles, for any M. One warp of a program keeps a ring of `stages` slots full: the tiles
of 128 columns of some strips, their scales and zeros, and the same columns of x. How many bytes are under way depends
on no registers, and the first slots' weights are asked for before the wait for the kernel before (programmatic dependent
launch). Partitions of four warps, one for each 64 rows of the weight, take the tiles out as they are and dequantize them: of
several, one does so while others multiply; one alone does so while the tensor cores multiply by the 64 columns before. y leaves
through shared memory and TMA.

Up to 32 rows of x, and with groups of 128 columns or more, the scale comes after the product of 128 columns, in float32;
elsewhere it is multiplied into the weight, which is rounded once to x.dtype, as in `w4a16_wide.py`. One scale a row
comes last in either case.

The work, (tiles of y) x (steps of 128 columns), is cut into `programs` equal ranges (`stream_k.py`): a few parts of a tile where
tiles are fewer than multiprocessors; or dealt out by whole tiles, one each or several.

Budget: 1.4 instructions a weight to decode it, 0.5 to scale it before the product, 40 a step and warp. Out of L2 come
BLOCK_M / (BLOCK_N / 4) bytes of x for every byte of the weight. 2 M N K operations at 989 TFLOP/s from M of about 64 on, and
13 cycles more for each product of 64 x BLOCK_M x 16, whose left operand comes out of registers.
"""

from functools import lru_cache, partial

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
    GROUP_ROWS,
    PRODUCER_REGISTERS,
    RESERVED,
    SHARED,
    STAGED_ROWS,
    SUMS_OF_TWO,
    add_parts,
    cut,
    dealt,
    deepest,
    even_share,
    let_next_kernel_start,
    load_tile,
    next_slot,
    part_of_tile,
    parts,
    place,
    registers,
    rows_of_block,
    shares,
    step_after,
    store_transposed,
    tiles_dealt,
    tiles_of,
    wait_for_kernel_before,
    worth,
)
from quantkit.kernels.int4tiles import PAD_K, STRIP
from quantkit.kernels.stream_k import next_counters
from quantkit.kernels.w4a16_wide import w4a16_wide

UNPACK_BF16 = gl.constexpr(w4a16.UNPACK_BF16.value)
UNPACK_F16 = gl.constexpr(w4a16.UNPACK_F16.value)
ADD_BF16 = gl.constexpr(w4a16.ADD_BF16.value)
ADD_F16 = gl.constexpr(w4a16.ADD_F16.value)
MUL_BF16 = gl.constexpr(w4a16.MUL_BF16.value)
MUL_F16 = gl.constexpr(w4a16.MUL_F16.value)

STEP = PAD_K  # columns of a slot
WIDE_ROWS = 64  # rows of x up to which a program may have four partitions: their threads have registers for so many sums
TOGETHER = gl.constexpr(4)  # blocks of x that go through the weight together
MOST_CUT = 128  # rows of x of a tile in parts: sums of more leave no registers for those of other programs
MOST_AFTER = 32  # rows of x up to which the scale comes after the product

TILES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
X_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SCALES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
ZEROS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2)

# block_m, block_n, and the rate of such tiles beside the first's, where they fill an H100 equally well
LARGE = ((256, 128, 1.0), (256, 64, 0.93), (128, 128, 0.9), (128, 64, 0.85))

Config = dict[str, int]


def groups_of_step(group_size: int) -> int:
    """Groups in the columns of a slot, or 1 where they are a part of one."""
    return STEP // group_size if 0 < group_size < STEP else 1


def shared_bytes(launch: Config, group_size: int) -> int:
    """Shared memory of a program whose weight has zeros."""
    block_m, block_n = launch["block_m"], launch["block_n"]
    slot = STEP * block_m * 2 + block_n * (STEP // 2 + 3 * groups_of_step(group_size)) + 128
    return RESERVED + launch["stages"] * slot + min(STAGED_ROWS, block_m) * block_n * 2


def two_fit(launch: Config, group_size: int) -> bool:
    """Whether a multiprocessor may run two programs at once."""
    few_sums = launch["block_n"] <= 2 * GROUP_ROWS and launch["block_m"] // 2 <= SUMS_OF_TWO
    return few_sums and 2 * shared_bytes(launch, group_size) <= SHARED


def registers_of(
    launch: Config, programs: int, group_size: int, multiprocessors: int = 132
) -> tuple[int, int]:
    """`hopper.registers` of a launch that is so many programs."""
    two = programs > multiprocessors and two_fit(launch, group_size)
    return registers(launch["block_n"] // 16, launch["block_m"], two, shared_bytes(launch, group_size))


@lru_cache(maxsize=4096)
def config(M: int, N: int, K: int, group_size: int, multiprocessors: int = 132) -> Config:
    """Launch parameters that are good for an H100; `quantkit tune` finds better ones for a shape."""
    block_m = rows_of_block(M)
    shared = partial(shared_bytes, group_size=group_size)
    if block_m <= 64:
        chosen = dict(block_m=block_m, block_n=128, stages=4, programs=0)
        if tiles_of(chosen, M, N) < multiprocessors * 3 // 4:
            chosen |= dict(block_n=64, stages=6)
            two = block_m <= 16 or (block_m == 32 and K > 8192)
            chosen["programs"] = parts(tiles_of(chosen, M, N), multiprocessors * (2 if two else 1))
        return chosen
    best = 0.0
    for size, block_n, rate in LARGE:
        one = deepest(dict(block_m=size, block_n=block_n, stages=0, programs=0), shared, 6)
        tiles = tiles_of(one, M, N)
        score = rate * worth(tiles, multiprocessors)
        cut = parts(tiles, multiprocessors) > tiles and size > MOST_CUT
        if size <= block_m and one["stages"] >= 3 and not cut and score > best:
            best, chosen = score, one
    tiles = tiles_of(chosen, M, N)
    share = parts(tiles, multiprocessors) if tiles < multiprocessors else even_share(tiles, multiprocessors)
    return chosen | dict(programs=0 if share == tiles else share)


def candidates(M: int, N: int, K: int, group_size: int, multiprocessors: int = 132) -> list[Config]:
    """Launches worth timing, `config`'s first: one program a multiprocessor or two, with rings as deep as fit, or less deep."""
    found, largest = [config(M, N, K, group_size, multiprocessors)], rows_of_block(M)
    shared, steps = partial(shared_bytes, group_size=group_size), triton.cdiv(K, STEP)
    for block_m in (largest, max(8, largest // 2)):
        for block_n in (64, 128) if block_m > WIDE_ROWS else (64, 128, 256):
            for two, depths in ((False, (8, 6)), (True, (6, 4))):
                one = dict(block_m=block_m, block_n=block_n, stages=0, programs=0)
                rings = [deepest(one, shared, most, two) for most in depths]
                if rings[0]["stages"] >= 3 and (not two or two_fit(rings[0], group_size)):
                    tiles = tiles_of(one, M, N)
                    of_one = shares(tiles, steps, multiprocessors, two, block_n // GROUP_ROWS)
                    if block_m > MOST_CUT:
                        of_one = [share for share in of_one if tiles % (share or tiles) == 0]
                    found += [ring | dict(programs=share) for ring in rings for share in of_one]
    return [launch for i, launch in enumerate(found) if launch not in found[:i]]


def after(block_m: int, group_size: int) -> bool:
    """Whether the scale of a group comes after its product."""
    return block_m <= MOST_AFTER and group_size > 0 and group_size % STEP == 0


def takes(x: Tensor, scales: Tensor, group_size: int, outputs: int) -> bool:
    """Whether this kernel can: TMA moves x [M, K] and y [M, outputs], and a step is whole groups or within one."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and outputs % 8 == 0
    return aligned and scales.dtype == x.dtype and (group_size % STEP == 0 or group_size in (32, 64))


@gluon.jit
def _pairs(ring, P: gl.constexpr, W: gl.constexpr):
    """Scales or zeros of a slot, a pair of rows (h) a word: [W, groups, g] of its first and of its second tile."""
    LAYOUT: gl.constexpr = _pairs_layout(P, W)
    t = ring.load(LAYOUT).reshape((W, P, 8))
    if P == 1:
        return t, t
    else:
        return gl.split(t.reshape((W, 2, P // 2, 8)).permute((0, 2, 3, 1)))


@gluon.jit
def _words(ring, W: gl.constexpr):
    """Codes of a slot: [W, g, c, kt] of its first and of its second tile."""
    LAYOUT: gl.constexpr = _words_layout(W)
    return gl.split(ring.load(LAYOUT).reshape((W, 2, 8, 4, 4)).permute((0, 2, 3, 4, 1)))


@gluon.constexpr_function
def _zeros_apart(strips, P):
    """Slots of zeros that a slot takes: TMA writes to multiples of 128 bytes."""
    return max(1, 8 // (strips * P))


@gluon.constexpr_function
def _pairs_layout(P, W):
    along = [[0, 8 << i] for i in range(P.bit_length() - 1)]
    warps = [[1 << i, 0] for i in range(W.bit_length() - 1)]
    return gl.DistributedLinearLayout(along, [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], warps, [], [W, P * 8])


@gluon.constexpr_function
def _words_layout(W):
    """Two tiles of each strip in shared memory [strips, 8, 32] as lanes (c, g) hold them: 16 bytes (kt) each."""
    warps = [[1 << i, 0, 0] for i in range(W.bit_length() - 1)]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2], [0, 4, 0]], lanes, warps, [], [W, 8, 32])


@gluon.jit
def _along_rows(t, LIKE: gl.constexpr):
    """int32 [W, P, g, h] -> [W, g, 1, P, 1, h, 1], in the layout LIKE of [W, g, c, P, S, h, c8]."""
    t = t.permute((0, 2, 1, 3))
    t = gl.convert_layout(
        t, gl.SliceLayout(2, gl.SliceLayout(4, gl.SliceLayout(6, LIKE))), assert_trivial=True
    )
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(t, 2), 4), 6)


@gluon.jit
def _dequantize(
    words, scales, zeros, SCALES: gl.constexpr, ZEROS: gl.constexpr, DTYPE: gl.constexpr,
    P: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Words [W, g, c, kt], scale pairs and zero pairs [W, P, g] -> the left operand [16 W, 64]."""
    BF16: gl.constexpr = DTYPE == gl.bfloat16
    q = words.reshape((W, 8, 4, P, 4 // P))
    UNPACK: gl.constexpr = UNPACK_BF16 if BF16 else UNPACK_F16
    o = gl.inline_asm_elementwise(UNPACK, "=r,=r,=r,=r,r", [q], (gl.int32,) * 4, is_pure=True, pack=1)
    w = gl.join(gl.join(o[0], o[2]), gl.join(o[1], o[3]))  # [W, g, c, P, S, h, c8], a pair (e) each
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
    # W g c P S h c8 e -> rows (W, h, g), columns (P, S, c8, c, e)
    w = gl.join(low, high).permute((0, 5, 1, 3, 4, 6, 2, 7)).reshape((16 * W, 64))
    return gl.convert_layout(w, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _row_scales(pairs, DTYPE: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr):
    """Scale pairs [W, 1, g] -> float32 [16 W, 1] beside the sums."""
    low = (pairs & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True).to(gl.float32)
    high = ((pairs >> 16) & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True).to(gl.float32)
    s = gl.join(low, high).permute((0, 1, 3, 2)).reshape((16 * W,))
    return gl.expand_dims(gl.convert_layout(s, gl.SliceLayout(1, MMA), assert_trivial=True), 1)


@gluon.jit
def _produce(descs, ring, work, G: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr):
    """One warp: asks for the weights of the first slots, waits for the kernel before, then keeps the ring full."""
    x_desc, tiles_desc, scales_desc, zeros_desc = descs
    x_ring, tiles_ring, scales_ring, zeros_ring, full, empty = ring
    begin, stop, steps, grid, stride = work
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
    step = begin - tile * steps
    m, n = place(tile, grid)
    x_step, x_tile, x_m, x_n = step, tile, m, n
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
        step, tile, m, n = step_after(step, tile, m, n, steps, stride, grid)
        slot, phase = next_slot(slot, phase, STAGES)
        if (i == STAGES - 1) | ((i == count - 1) & (i < STAGES)):
            wait_for_kernel_before()
            for j in range(0, i + 1):
                load_tile(x_desc, [x_m * BLOCK_M, x_step * 128], full.index(j), x_ring.index(j))
                x_step, x_tile, x_m, x_n = step_after(x_step, x_tile, x_m, x_n, steps, stride, grid)


@gluon.jit
def _fetch(
    ring, slot, PARTS: gl.constexpr, PART: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr, P: gl.constexpr
):
    """A partition's words, scale pairs and zero pairs in a slot, each of the slot's first and second tile, and x^T."""
    W: gl.constexpr = gl.num_warps()
    words = _words(ring[1].index(slot).slice(W * PART, W, dim=0), W)
    pairs, zeros = (0, 0), (0, 0)
    if G > 0:
        pairs = _pairs(ring[2].index(slot).slice(W * PART, W, dim=0), P, W)
    if ZEROS:
        of_slot = ring[3].index(slot * _zeros_apart(W * PARTS, P))
        zeros = _pairs(of_slot.slice(W * PART, W, dim=0), P, W)
    return words, pairs, zeros, ring[0].index(slot).permute((1, 0))


@gluon.jit
def _alone(
    acc, ring, slot, phase, steps,
    G: gl.constexpr, ZEROS: gl.constexpr, AFTER: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums with some steps' products, by the only partition: an operand is made while the product before it runs."""
    full, empty = ring[4], ring[5]
    DTYPE: gl.constexpr = ring[0].dtype
    W: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = acc.type.layout
    P_OF_TILE: gl.constexpr = max(1, P // 2)
    # `free` must not begin as another name of slot, or Triton 3.6 takes it for unchanged in the loop
    free = gl.where(slot == 0, STAGES - 1, slot - 1)
    product = gl.zeros_like(acc)  # where the scale comes after it
    scale = gl.zeros((acc.shape[0], 1), gl.float32, MMA)
    other = gl.zeros((acc.shape[0], 64), DTYPE, gl.DotOperandLayout(0, MMA, 2))
    for step in range(0, steps):
        mbarrier.wait(full.index(slot), phase)
        words, pairs, zeros, x = _fetch(ring, slot, 1, 0, G, ZEROS, P)
        for half in gl.static_range(2):
            operand = _dequantize(
                words[half], pairs[half], zeros[half], G > 0 and not AFTER, ZEROS, DTYPE, P_OF_TILE, W, MMA
            )
            of_x = x.slice(64 * half, 64, dim=0)
            if AFTER and half == 0:
                product, other = warpgroup_mma_wait(0, deps=(product, other))
                acc += product * scale
                scale = _row_scales(pairs[0], DTYPE, W, MMA)
                product = warpgroup_mma(operand, of_x, product, use_acc=False, is_async=True)
                product, other = warpgroup_mma_wait(1, deps=(product, other))
            elif AFTER:
                product = warpgroup_mma(operand, of_x, product, is_async=True)
                product, other = warpgroup_mma_wait(1, deps=(product, other))
            else:
                acc = warpgroup_mma(operand, of_x, acc, is_async=True)
                # ends the product before this one: its registers are free, after a first half its slot too
                acc, other = warpgroup_mma_wait(1, deps=(acc, other))
            other = operand
            if half == 0:
                mbarrier.arrive(empty.index(free), pred=step > 0)
        free = slot
        slot, phase = next_slot(slot, phase, STAGES)
    if AFTER:
        product, other = warpgroup_mma_wait(0, deps=(product, other))
        acc += product * scale
    else:
        acc, other = warpgroup_mma_wait(0, deps=(acc, other))
    mbarrier.arrive(empty.index(free))
    return acc, slot, phase


@gluon.jit
def _among(
    acc, ring, slot, phase, steps,
    PARTS: gl.constexpr, PART: gl.constexpr, G: gl.constexpr, ZEROS: gl.constexpr, AFTER: gl.constexpr,
    P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums with some steps' products, by one of several partitions: others multiply while it makes its operands.

    Each product is waited for in the step that began it: ptxas follows several partitions no further.
    """
    full, empty = ring[4], ring[5]
    DTYPE: gl.constexpr = ring[0].dtype
    W: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = acc.type.layout
    P_OF_TILE: gl.constexpr = max(1, P // 2)
    SCALED: gl.constexpr = G > 0 and not AFTER
    for _ in range(steps):
        mbarrier.wait(full.index(slot), phase)
        words, pairs, zeros, x = _fetch(ring, slot, PARTS, PART, G, ZEROS, P)
        sums = acc
        first = _dequantize(words[0], pairs[0], zeros[0], SCALED, ZEROS, DTYPE, P_OF_TILE, W, MMA)
        sums = warpgroup_mma(first, x.slice(0, 64, dim=0), sums, use_acc=not AFTER, is_async=True)
        second = _dequantize(words[1], pairs[1], zeros[1], SCALED, ZEROS, DTYPE, P_OF_TILE, W, MMA)
        sums = warpgroup_mma(second, x.slice(64, 64, dim=0), sums, is_async=True)
        # until then the operands' registers are in use, and the slot
        sums, first, second = warpgroup_mma_wait(0, deps=(sums, first, second))
        mbarrier.arrive(empty.index(slot))
        if AFTER:
            acc += sums * _row_scales(pairs[0], DTYPE, W, MMA)
        else:
            acc = sums
        slot, phase = next_slot(slot, phase, STAGES)
    return acc, slot, phase


@gluon.jit
def _consume(
    ring, work, rest,
    G: gl.constexpr, ZEROS: gl.constexpr, SWIGLU: gl.constexpr, AFTER: gl.constexpr, STREAM: gl.constexpr,
    P: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """One of PARTS partitions: products of its 64 rows of what is in the ring, and what follows them."""
    steps = work[2]
    total, scales_ptr, bias_ptr, residual_ptr, y_desc, staging, partial_ptr, counter_ptr, M, N = rest
    W: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = W * 16
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BLOCK_M, 16])
    wait_for_kernel_before()  # the workspace and y may be in use by the kernel before
    slot, phase = 0, 0
    for i in range(0, tiles_dealt(work)):
        tile, s0, s1, m, n = part_of_tile(i, work)
        m0, n0 = m * BLOCK_M, (n * PARTS + PART) * ROWS
        y = gl.zeros((ROWS, BLOCK_M), gl.float32, MMA)
        if PARTS == 1:
            y, slot, phase = _alone(y, ring, slot, phase, s1 - s0, G, ZEROS, AFTER, P, STAGES)
        else:
            y, slot, phase = _among(y, ring, slot, phase, s1 - s0, PARTS, PART, G, ZEROS, AFTER, P, STAGES)
        if G == 0:  # one scale a row: [strip, g, h]
            row = n0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
            scale_at = row // 16 * 16 + row % 8 * 2 + row // 8 % 2
            of_row = gl.load(scales_ptr + scale_at, mask=row < N, other=0.0).to(gl.float32)
            y *= gl.expand_dims(of_row, 1)
        whole = True
        if STREAM:
            if s1 - s0 < steps:
                y, whole = add_parts(
                    y, tile, s0 == 0, steps, total, partial_ptr, counter_ptr, REGISTERS, PART, PARTS
                )
        if whole:
            store_transposed(y, n0, m0, y_desc, staging.index(PART), bias_ptr, residual_ptr, M, N, SWIGLU)
    tma.store_wait(0)


@gluon.jit
def w4a16_hopper_kernel(
    x_desc, tiles_desc, scales_desc, zeros_desc, y_desc, scales_ptr, bias_ptr, residual_ptr, partial_ptr, counter_ptr,
    M, N, K,
    G: gl.constexpr, SWIGLU: gl.constexpr, AFTER: gl.constexpr, STREAM: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    # A step is two tiles along K, P groups or a part of one, of a strip of each warp that multiplies.
    let_next_kernel_start()
    DTYPE: gl.constexpr = x_desc.dtype
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    STRIPS: gl.constexpr = tiles_desc.block_type.shape[0]
    PARTS: gl.constexpr = STRIPS // 4
    P: gl.constexpr = 128 // G if G > 0 and G < 128 else 1
    ZEROS: gl.constexpr = zeros_desc is not None
    work, total = dealt(M, N, K, BLOCK_M, STRIPS * 16, TOGETHER, STREAM)

    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, 128], x_desc.layout)
    tiles_ring = gl.allocate_shared_memory(gl.int32, [STAGES, STRIPS, 8, 32], tiles_desc.layout)
    scales_ring, zeros_ring = tiles_ring, tiles_ring
    if G > 0:
        scales_ring = gl.allocate_shared_memory(gl.int32, [STAGES, STRIPS, P * 8], scales_desc.layout)
    if ZEROS:
        APART: gl.constexpr = _zeros_apart(STRIPS, P)
        zeros_ring = gl.allocate_shared_memory(gl.int16, [STAGES * APART, STRIPS, P * 8], zeros_desc.layout)
    staging = gl.allocate_shared_memory(DTYPE, [PARTS] + y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    descs = (x_desc, tiles_desc, scales_desc, zeros_desc)
    ring = (x_ring, tiles_ring, scales_ring, zeros_ring, full, empty)
    rest = (total, scales_ptr, bias_ptr, residual_ptr, y_desc, staging, partial_ptr, counter_ptr, M, N)
    if PARTS == 1:
        gl.warp_specialize(
            [
                (_consume, (ring, work, rest, G, ZEROS, SWIGLU, AFTER, STREAM, P, STAGES, REGISTERS, 1, 0)),
                (_produce, (descs, ring, work, G, P, STAGES)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    elif PARTS == 2:
        gl.warp_specialize(
            [
                (_consume, (ring, work, rest, G, ZEROS, SWIGLU, AFTER, STREAM, P, STAGES, REGISTERS, 2, 0)),
                (_consume, (ring, work, rest, G, ZEROS, SWIGLU, AFTER, STREAM, P, STAGES, REGISTERS, 2, 1)),
                (_produce, (descs, ring, work, G, P, STAGES)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, work, rest, G, ZEROS, SWIGLU, AFTER, STREAM, P, STAGES, REGISTERS, 4, 0)),
                (_consume, (ring, work, rest, G, ZEROS, SWIGLU, AFTER, STREAM, P, STAGES, REGISTERS, 4, 1)),
                (_consume, (ring, work, rest, G, ZEROS, SWIGLU, AFTER, STREAM, P, STAGES, REGISTERS, 4, 2)),
                (_consume, (ring, work, rest, G, ZEROS, SWIGLU, AFTER, STREAM, P, STAGES, REGISTERS, 4, 3)),
                (_produce, (descs, ring, work, G, P, STAGES)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


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
    block_m, block_n = chosen["block_m"], chosen["block_n"]
    strips, partitions = block_n // STRIP, block_n // GROUP_ROWS
    y = x.new_empty(M, outputs)
    y_block = [min(block_m, STAGED_ROWS), GROUP_ROWS // (2 if swiglu else 1)]
    y_layout = gl.NVMMASharedLayout(2 * y_block[1], element_bitwidth=16, rank=2)
    scale_words, zero_words, _ = w4a16.as_words(scales, zeros)
    by_strip = tiles.shape[0], -1
    describe = TensorDescriptor.from_tensor
    of_group = [strips, groups_of_step(group_size) * 8]

    programs, stream = cut(chosen, tiles_of(chosen, M, N), K, partitions)
    partial = counters = None
    if stream:
        partial = x.new_empty(2 * programs * block_n * block_m, dtype=torch.float32)
        counters = next_counters(x.device)
    at_launch, of_consumer = registers_of(chosen, programs, group_size, multiprocessors)
    w4a16_hopper_kernel[(programs,)](
        describe(x, [block_m, STEP], X_LAYOUT),
        describe(tiles.view(*by_strip, 32), [strips, 8, 32], TILES_LAYOUT),
        describe(scale_words.view(by_strip), of_group, SCALES_LAYOUT) if group_size else None,
        None if zero_words is None else describe(zero_words.view(by_strip), of_group, ZEROS_LAYOUT),
        describe(y, y_block, y_layout),
        None if group_size else scales, bias, residual, partial, counters, M, N, K,
        G=group_size, SWIGLU=swiglu, AFTER=after(block_m, group_size), STREAM=stream, STAGES=chosen["stages"],
        REGISTERS=of_consumer,
        num_warps=4, launch_pdl=True, maxnreg=at_launch,
    )  # fmt: skip
    return y
