"""8-bit weights on Hopper, in Gluon: W8A8, block FP8 and W8A16 through a ring in shared memory that TMA fills.

The products of `w8a8.py`, `fp8_block.py` and `w8a16.py`, for any M, as w x^T: the rows of the weight are the 64 rows of
wgmma, the rows of x its 8 to 256 columns. One warp keeps a ring of `stages` slots full, 128 columns of both operands each
(`hopper.py`); the others multiply.

x in 8 bits: both operands go from shared memory straight to the tensor cores. int8 sums are exact, in int32. Hopper keeps
about 14 bits of a sum of e4m3 products, so each step's product is added to float32 sums in registers, unless FAST. Each
warpgroup is a partition of its own, 64 rows of a tile: one adds while the other multiplies.

Scales of blocks (BLOCKS), x's and the weight's, both of 128 columns, multiply a step's product as it is added. From M = 65
on x is the left operand there (X_LEFT): its scales are then one a row of sums, and the weight's one for all of them.

x in 16 bits: the weight's bytes go through registers, where they become numbers of x's dtype (exactly), and from there to
the tensor cores. `interleave.py` has put them in the order in which a lane reads its own operands.

Budget: K bytes a row of weights. No instruction touches an 8-bit operand; one addition a product of 128 columns where
sums are promoted, 128 cycles of a warpgroup's 512 on the tensor cores. To bfloat16, int8 takes 1.75 instructions a weight and e4m3 2.5, of the 7 that the memory leaves time
for. Out of L2 come (1 / BLOCK_N + 1 / BLOCK_M) / 2 bytes an operation: with 128 x 256 tiles 11.6 TB/s at the tensor cores'
1979 TFLOP/s, twice what there is unless neighbouring programs ask for the same lines at once.
"""

from functools import lru_cache, partial

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
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantkit.kernels.dispatch import multiprocessors_of
from quantkit.kernels.hopper import (
    GROUP_ROWS,
    PRODUCER_REGISTERS,
    RESERVED,
    SHARED,
    STAGED_ROWS,
    SUMS_OF_TWO,
    add_parts,
    barrier,
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
    store_tile,
    store_transposed,
    tiles_dealt,
    tiles_of,
    wait_for_kernel_before,
    worth,
)
from quantkit.kernels.interleave import STEP
from quantkit.kernels.stream_k import next_counters

# columns: of the widest int8 product that Triton has, and of an e4m3 one with room for its sums in registers
WIDEST_PRODUCT = gl.constexpr(128)
TOGETHER = gl.constexpr(16)  # blocks of x that go through the weight together
FLOATS_TOGETHER = gl.constexpr(4)  # the same of 16-bit x
WHOLE_SLOT_ROWS = 128  # a slot of 16-bit x of more rows has 64 columns: five of them fit then
X_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
WORDS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2)
CODES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)

# columns and rows of a tile, and the rate of such tiles beside the first's, where they fill an H100 equally well
LARGE = ((256, 128, 1.0), (128, 128, 0.8), (128, 64, 0.6), (64, 64, 0.45))
PART = 1.0  # what a part more of a tile costs: o at M = 256 took 60 us in four parts of tiles of 256 columns

Config = dict[str, int]


def x_is_left(M: int, blocks: bool) -> bool:
    """Whether x is the left operand: its scales of blocks then take two registers instead of one a column."""
    return blocks and M > 64


def slot_columns(launch: Config, x_bytes: int) -> int:
    """Columns of a slot."""
    return STEP // 2 if x_bytes == 2 and launch["block_m"] > WHOLE_SLOT_ROWS else STEP


def staged(launch: Config, x_left: bool) -> tuple[int, int]:
    """Rows and columns of y that are in shared memory on their way out."""
    if x_left:
        return launch["block_m"], GROUP_ROWS
    return min(STAGED_ROWS, launch["block_m"]), launch["block_n"]


def shared_bytes(launch: Config, x_bytes: int = 1, x_left: bool = False) -> int:
    """Shared memory of a program."""
    slot = slot_columns(launch, x_bytes) * (launch["block_n"] + launch["block_m"] * x_bytes)
    rows, columns = staged(launch, x_left)
    return RESERVED + launch["stages"] * slot + 2 * rows * columns


def two_fit(launch: Config, x_bytes: int = 1, x_left: bool = False) -> bool:
    """Whether a multiprocessor may run two programs at once."""
    columns = launch["block_n"] if x_left else launch["block_m"]
    return columns // 2 <= SUMS_OF_TWO and 2 * shared_bytes(launch, x_bytes, x_left) <= SHARED


def registers_of(
    launch: Config, programs: int, x_bytes: int, x_left: bool, multiprocessors: int = 132
) -> tuple[int, int]:
    """`hopper.registers` of a launch that is so many programs."""
    two = programs > multiprocessors and two_fit(launch, x_bytes, x_left)
    warps = launch["block_m" if x_left else "block_n"] // 16
    return registers(warps, launch["block_m"], two, shared_bytes(launch, x_bytes, x_left))


@lru_cache(maxsize=4096)
def config(
    M: int, N: int, K: int, x_bytes: int = 1, blocks: bool = False, multiprocessors: int = 132
) -> Config:
    """Launch parameters that are good for an H100; `blocks`: scales of blocks come with every product."""
    block_m, x_left = rows_of_block(M), x_is_left(M, blocks)
    shared = partial(shared_bytes, x_bytes=x_bytes, x_left=x_left)
    if block_m <= 64:
        chosen = dict(block_m=block_m, block_n=128, stages=0, programs=0)
        if tiles_of(chosen, M, N) >= multiprocessors * 3 // 4:
            return deepest(chosen, shared, 4, two=True)
        chosen["block_n"] = 64
        # a step's scales of blocks take a while to come, of which many steps one after the other make a lot
        two = block_m <= 16 if K <= 8192 else blocks and block_m > 8
        chosen["programs"] = parts(tiles_of(chosen, M, N), multiprocessors * (2 if two else 1))
        return deepest(chosen, shared, 6 if two else 10, two)
    best = 0.0
    for columns, rows, rate in LARGE:
        m, n = (rows, columns) if x_left else (columns, rows)
        one = deepest(dict(block_m=m, block_n=n, stages=0, programs=0), shared, 8)
        score = rate * worth(tiles_of(one, M, N), multiprocessors, PART)
        if m <= block_m and score > best:
            best, chosen = score, one
    tiles = tiles_of(chosen, M, N)
    share = parts(tiles, multiprocessors) if tiles < multiprocessors else even_share(tiles, multiprocessors)
    return chosen | dict(programs=0 if share == tiles else share)


def candidates(
    M: int, N: int, K: int, x_bytes: int = 1, blocks: bool = False, multiprocessors: int = 132
) -> list[Config]:
    """Launches worth timing, `config`'s first: one program a multiprocessor or two, with rings as deep as fit."""
    found = [config(M, N, K, x_bytes, blocks, multiprocessors)]
    x_left, largest = x_is_left(M, blocks), rows_of_block(M)
    shared = partial(shared_bytes, x_bytes=x_bytes, x_left=x_left)
    for columns in (256, 128, 64) if x_left or M > 128 else (largest, max(8, largest // 2)):
        for rows in (128, 64):
            for two in (False, True):
                m, n = (rows, columns) if x_left else (columns, rows)
                one = dict(block_m=m, block_n=n, stages=0, programs=0)
                one = deepest(one, shared, 6 if two else 10, two)
                if one["stages"] < 3 or (two and not two_fit(one, x_bytes, x_left)):
                    continue
                tiles, steps = tiles_of(one, M, N), triton.cdiv(K, STEP)
                found += [one | dict(programs=share) for share in shares(tiles, steps, multiprocessors, two)]
    return [launch for i, launch in enumerate(found) if launch not in found[:i]]


@gluon.constexpr_function
def _bytes_layout(W):
    """Words of interleaved bytes [16 W, 16] as lanes (c, g) hold them: 16 bytes (kt) of two rows (h)."""
    warps = [[16 << i, 0] for i in range(W.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, warps, [], [16 * W, 16])


# a word holds bytes (e, c8) = 00 01 10 11: the pair of c8 = 0 is in its even bytes, that of 1 in its odd ones
_PAIRS = """{
.reg .b32 low, odd, top, magic;
mov.b32 magic, 0x43004300;
shr.u32 odd, $2, 8;
lop3.b32 low, $2, 0x007f007f, magic, 0xea;
lop3.b32 top, $2, 0x00800080, magic, 0xea;
sub.rn.bf16x2 $0, low, top;
lop3.b32 low, odd, 0x007f007f, magic, 0xea;
lop3.b32 top, odd, 0x00800080, magic, 0xea;
sub.rn.bf16x2 $1, low, top;
}"""
# 128 + (q & 127) - (128 or, for a negative code, 256)
INT8_TO_BF16 = gl.constexpr(_PAIRS)
# the same with 1024 + (q & 127) - (1024 or 1152)
INT8_TO_F16 = gl.constexpr(_PAIRS.replace("0x43004300", "0x64006400").replace("bf16x2", "f16x2"))
# the exponent and mantissa of e4m3 as bfloat16's lowest exponent bits and highest mantissa bits, times 2^120
E4M3_TO_BF16 = gl.constexpr("""{
.reg .b32 sign, rest, odd, by, none;
mov.b32 by, 0x7b807b80;
mov.b32 none, 0x80008000;
shl.b32 sign, $2, 8;
shl.b32 rest, $2, 4;
and.b32 rest, rest, 0x07f007f0;
lop3.b32 rest, sign, 0x80008000, rest, 0xea;
fma.rn.bf16x2 $0, rest, by, none;
shr.u32 odd, $2, 4;
and.b32 odd, odd, 0x07f007f0;
lop3.b32 odd, $2, 0x80008000, odd, 0xea;
fma.rn.bf16x2 $1, odd, by, none;
}""")
# the same for float16's exponent of five bits, times 2^8
E4M3_TO_F16 = gl.constexpr("""{
.reg .b32 sign, rest, odd, by;
mov.b32 by, 0x5c005c00;
shl.b32 sign, $2, 8;
shl.b32 rest, $2, 7;
and.b32 rest, rest, 0x3f803f80;
lop3.b32 rest, sign, 0x80008000, rest, 0xea;
mul.rn.f16x2 $0, rest, by;
shr.u32 odd, $2, 1;
and.b32 odd, odd, 0x3f803f80;
lop3.b32 odd, $2, 0x80008000, odd, 0xea;
mul.rn.f16x2 $1, odd, by;
}""")


@gluon.jit
def _words(ring, W: gl.constexpr):
    """Interleaved bytes of 64 columns: words [warp, h, g, c, kt]."""
    LAYOUT: gl.constexpr = _bytes_layout(W)
    return ring.load(LAYOUT).reshape((W, 2, 8, 4, 4))


@gluon.jit
def _operand(words, INT8: gl.constexpr, DTYPE: gl.constexpr, W: gl.constexpr, MMA: gl.constexpr):
    """Words [warp, h, g, c, kt] -> the left operand [16 W, 64]."""
    OF_INT8: gl.constexpr = INT8_TO_BF16 if DTYPE == gl.bfloat16 else INT8_TO_F16
    OF_E4M3: gl.constexpr = E4M3_TO_BF16 if DTYPE == gl.bfloat16 else E4M3_TO_F16
    ASM: gl.constexpr = OF_INT8 if INT8 else OF_E4M3
    even, odd = gl.inline_asm_elementwise(ASM, "=r,=r,r", [words], (gl.int32,) * 2, is_pure=True, pack=1)
    pairs = gl.join(even, odd)  # warp h g c kt c8
    low = (pairs & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True)
    high = ((pairs >> 16) & 0xFFFF).to(gl.uint16).to(DTYPE, bitcast=True)
    w = gl.join(low, high).permute((0, 1, 2, 4, 5, 3, 6)).reshape((16 * W, 64))
    return gl.convert_layout(w, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _produce(descs, ring, work, STAGES: gl.constexpr):
    """One warp: asks for the weights of the first slots, waits for the kernel before, then keeps the ring full."""
    x_desc, w_desc = descs
    x_ring, w_ring, full, empty = ring
    begin, stop, steps, grid, stride = work
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    X_COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    W_COLUMNS: gl.constexpr = w_desc.block_type.shape[1]
    SLOTS: gl.constexpr = 128 // X_COLUMNS  # of a step
    BYTES: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
    count = (stop - begin) * SLOTS
    tile = begin // steps
    step = (begin - tile * steps) * SLOTS
    m, n = place(tile, grid)
    x_step, x_tile, x_m, x_n = step, tile, m, n
    slot, phase = 0, 1
    for i in range(0, count):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), BYTES)
        load_tile(w_desc, [n * BLOCK_N, step * W_COLUMNS], full.index(slot), w_ring.index(slot))
        if i >= STAGES:
            load_tile(x_desc, [m * BLOCK_M, step * X_COLUMNS], full.index(slot), x_ring.index(slot))
        step, tile, m, n = step_after(step, tile, m, n, steps * SLOTS, stride, grid)
        slot, phase = next_slot(slot, phase, STAGES)
        if (i == STAGES - 1) | ((i == count - 1) & (i < STAGES)):
            wait_for_kernel_before()
            for j in range(0, i + 1):
                load_tile(x_desc, [x_m * BLOCK_M, x_step * X_COLUMNS], full.index(j), x_ring.index(j))
                x_step, x_tile, x_m, x_n = step_after(x_step, x_tile, x_m, x_n, steps * SLOTS, stride, grid)


@gluon.jit
def _of_columns(scales_ptr, first, stride, M, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scales of COLUMNS rows of x from `first` on, [1, COLUMNS], beside sums in this layout."""
    m = first + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    return gl.expand_dims(gl.load(scales_ptr + m * stride, mask=m < M, other=0.0), 0)


@gluon.jit
def _block_scales(
    scales,
    step,
    m0,
    n0,
    M,
    N,
    X_LEFT: gl.constexpr,
    COLUMNS: gl.constexpr,
    HALVES: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Scales of a step: of the tile's rows of x, and of the weight's block, or the two blocks of two halves."""
    x_scales_ptr, stride_sm, stride_sk, scales_ptr, steps = scales
    x_scales_ptr += step * stride_sk
    of_w = gl.load(scales_ptr + n0 // 128 * steps + step)
    if X_LEFT:
        m = m0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        of_x = gl.expand_dims(gl.load(x_scales_ptr + m * stride_sm, mask=m < M, other=0.0), 1)
        second = of_w
        if HALVES == 2:
            second = gl.load(scales_ptr + gl.minimum(n0 // 128 + 1, (N - 1) // 128) * steps + step)
        return of_x, of_w, second
    else:
        return _of_columns(x_scales_ptr, m0, stride_sm, M, COLUMNS, LAYOUT), of_w, of_w


@gluon.jit
def _add(acc, left, right, of_x, of_w, BLOCKS: gl.constexpr):
    """acc + the product of a step, by itself: Hopper keeps 14 bits of a sum of e4m3 products."""
    product = warpgroup_mma(left, right, gl.zeros_like(acc), use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=(product,))
    if BLOCKS:
        return acc + product * (of_x * of_w)
    else:
        return acc + product


@gluon.jit
def _consume(
    ring, work, others,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, X_LEFT: gl.constexpr, INT8: gl.constexpr, FLOATS: gl.constexpr,
    BLOCKS: gl.constexpr, FAST: gl.constexpr, STREAM: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """A partition of the warps: products of its rows of the left operand in the ring, and what follows them."""
    left_ring, right_ring, full, empty = ring
    steps = work[2]
    (
        total,
        x_scales_ptr,
        scales_ptr,
        bias_ptr,
        y_desc,
        all_staging,
        partial_ptr,
        counter_ptr,
        M,
        N,
        stride_sm,
        stride_sk,
    ) = others
    staging = all_staging.index(GROUP)
    W: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = W * 16
    SUM: gl.constexpr = gl.int32 if INT8 and not FLOATS else gl.float32
    HALVES: gl.constexpr = 2 if COLUMNS > WIDEST_PRODUCT and not FLOATS else 1
    HALF: gl.constexpr = COLUMNS // HALVES
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, HALF, 16 if FLOATS else 32])
    SLOTS: gl.constexpr = 128 // right_ring.shape[2]  # of a step
    scales = (x_scales_ptr, stride_sm, stride_sk, scales_ptr, steps)
    wait_for_kernel_before()  # the workspace and y may be in use by the kernel before
    # `free` must not begin as another name of slot, or Triton 3.6 takes it for unchanged in the loop
    slot, phase, free = 0, 0, STAGES - 1
    for i in range(0, tiles_dealt(work)):
        tile, s0, s1, m, n = part_of_tile(i, work)
        if X_LEFT:
            m0, n0 = (m * GROUPS + GROUP) * ROWS, n * COLUMNS
        else:
            m0, n0 = m * COLUMNS, (n * GROUPS + GROUP) * ROWS
        acc = gl.zeros((ROWS, HALF), SUM, MMA)
        other = gl.zeros((ROWS, HALF), SUM, MMA)
        if FLOATS:
            held = gl.zeros((ROWS, 64), right_ring.dtype, gl.DotOperandLayout(0, MMA, 2))
        coming = (0.0, 0.0, 0.0)
        if BLOCKS and not X_LEFT:  # asked for a step before they are used
            coming = _block_scales(scales, s0, m0, n0, M, N, X_LEFT, COLUMNS, HALVES, MMA)
        for step in range(s0, s1):
            mbarrier.wait(full.index(slot), phase)
            left = left_ring.index(slot).slice(GROUP * ROWS, ROWS, dim=0)
            right = right_ring.index(slot)
            if FLOATS:
                words = _words(left.slice(0, 16, dim=1), W)
                if SLOTS == 1:
                    rest = _words(left.slice(16, 16, dim=1), W)
                # an operand is made where no product reads the registers that it had in the step before
                first = _operand(words, INT8, right_ring.dtype, W, MMA)
                acc = warpgroup_mma(first, right.slice(0, 64, dim=1).permute((1, 0)), acc, is_async=True)
                acc, held = warpgroup_mma_wait(1, deps=(acc, held))  # ends the step before: its slot is free
                mbarrier.arrive(empty.index(free), pred=step > s0)
                if SLOTS == 2:
                    free = slot
                    slot, phase = next_slot(slot, phase, STAGES)
                    mbarrier.wait(full.index(slot), phase)
                    rest = _words(left_ring.index(slot), W)
                second = _operand(rest, INT8, right_ring.dtype, W, MMA)
                right = right_ring.index(slot).slice((2 - SLOTS) * 64, 64, dim=1)
                acc = warpgroup_mma(second, right.permute((1, 0)), acc, is_async=True)
                acc, first = warpgroup_mma_wait(1, deps=(acc, first))
                if SLOTS == 2:
                    mbarrier.arrive(empty.index(free))
                held = second
            elif INT8 or FAST:
                acc = warpgroup_mma(left, right.slice(0, HALF, dim=0).permute((1, 0)), acc, is_async=True)
                if HALVES == 2:
                    right = right.slice(HALF, HALF, dim=0)
                    other = warpgroup_mma(left, right.permute((1, 0)), other, is_async=True)
                # ends the products of the step before: its slot is free
                acc, other = warpgroup_mma_wait(HALVES, deps=(acc, other))
                mbarrier.arrive(empty.index(free), pred=step > s0)
            else:
                of_x, of_w, of_w_other = coming
                if X_LEFT:  # their way is shorter than a product of so many columns
                    of_x, of_w, of_w_other = _block_scales(
                        scales, step, m0, n0, M, N, X_LEFT, COLUMNS, HALVES, MMA
                    )
                elif BLOCKS:
                    after = gl.minimum(step + 1, steps - 1)
                    coming = _block_scales(scales, after, m0, n0, M, N, X_LEFT, COLUMNS, HALVES, MMA)
                acc = _add(acc, left, right.slice(0, HALF, dim=0).permute((1, 0)), of_x, of_w, BLOCKS)
                if HALVES == 2:
                    if BLOCKS:  # a branch, over which ptxas does not begin the second product: it would spill
                        acc = gl.inline_asm_elementwise(
                            "mov.b32 $0, $1;", "=r,r", [acc], dtype=gl.float32, is_pure=False, pack=1
                        )
                        mbarrier.wait(full.index(slot), phase)
                    right = right.slice(HALF, HALF, dim=0)
                    other = _add(other, left, right.permute((1, 0)), of_x, of_w_other, BLOCKS)
                mbarrier.arrive(empty.index(slot))
            free = slot
            slot, phase = next_slot(slot, phase, STAGES)
        if FLOATS or INT8 or FAST:
            if FLOATS:
                acc, held = warpgroup_mma_wait(0, deps=(acc, held))
            else:
                acc, other = warpgroup_mma_wait(0, deps=(acc, other))
            mbarrier.arrive(empty.index(free))
        if HALVES == 2:
            sums = gl.join(acc, other).permute((0, 2, 1)).reshape((ROWS, COLUMNS))
        else:
            sums = acc
        whole = True
        if STREAM:
            if s1 - s0 < steps:
                sums, whole = add_parts(
                    sums, tile, s0 == 0, steps, total, partial_ptr, counter_ptr, REGISTERS, GROUP, GROUPS
                )
        if whole:
            if X_LEFT:
                _store(sums.to(gl.float32), n0, m0, y_desc, staging, bias_ptr, N)
            else:
                y = _scaled(sums, n0, m0, scales_ptr, x_scales_ptr, stride_sm, M, N, BLOCKS)
                store_transposed(y, n0, m0, y_desc, staging, bias_ptr, None, M, N, False)
    tma.store_wait(0)


@gluon.jit
def _store(y, n0, m0, y_desc, staging, bias_ptr, N):
    """y [rows, columns] by TMA in the columns that `staging` holds. TMA leaves out what is past M and N."""
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    if COLUMNS > staging.shape[1]:
        halves = gl.split(y.reshape((ROWS, 2, COLUMNS // 2)).permute((0, 2, 1)))
        _store(halves[0], n0, m0, y_desc, staging, bias_ptr, N)
        _store(halves[1], n0 + COLUMNS // 2, m0, y_desc, staging, bias_ptr, N)
    else:
        if bias_ptr is not None:
            n = n0 + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, y.type.layout))
            y += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 0)
        tma.store_wait(0)  # `staging` has been read
        barrier()
        staging.store(y.to(y_desc.dtype))
        fence_async_shared()
        barrier()
        store_tile(y_desc, [m0, n0], staging)


@gluon.jit
def _scaled(sums, n0, m0, scales_ptr, x_scales_ptr, stride_sm, M, N, BLOCKS: gl.constexpr):
    """Sums [rows of w, rows of x] in float32, times the scales that are not in them yet."""
    LAYOUT: gl.constexpr = sums.type.layout
    y = sums.to(gl.float32)
    if not BLOCKS:
        n = n0 + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, LAYOUT))
        y *= gl.expand_dims(gl.load(scales_ptr + n, mask=n < N, other=0.0), 1)
        if x_scales_ptr is not None:
            y *= _of_columns(x_scales_ptr, m0, stride_sm, M, sums.shape[1], LAYOUT)
    return y


@gluon.jit
def w8_hopper_kernel(
    x_desc, w_desc, y_desc, x_scales_ptr, scales_ptr, bias_ptr, partial_ptr, counter_ptr,
    M, N, K, stride_sm, stride_sk,
    X_LEFT: gl.constexpr, INT8: gl.constexpr, BLOCKS: gl.constexpr, FAST: gl.constexpr, STREAM: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    let_next_kernel_start()
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    FLOATS: gl.constexpr = x_desc.dtype.primitive_bitwidth == 16
    work, total = dealt(M, N, K, BLOCK_M, BLOCK_N, FLOATS_TOGETHER if FLOATS else TOGETHER, STREAM)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    ROWS: gl.constexpr = BLOCK_M if X_LEFT else BLOCK_N
    COLUMNS: gl.constexpr = BLOCK_N if X_LEFT else BLOCK_M
    # x in 16 bits: ptxas does not follow two partitions, and waits after every instruction of the tensor cores
    GROUPS: gl.constexpr = 1 if FLOATS else ROWS // 64
    staging = gl.allocate_shared_memory(y_desc.dtype, [GROUPS] + y_desc.block_type.shape, y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    ring = (x_ring, w_ring, full, empty)
    sides = (w_ring, x_ring, full, empty)
    if X_LEFT:
        sides = ring
    rest = (
        total,
        x_scales_ptr,
        scales_ptr,
        bias_ptr,
        y_desc,
        staging,
        partial_ptr,
        counter_ptr,
        M,
        N,
        stride_sm,
        stride_sk,
    )
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (sides, work, rest, 0, 2, X_LEFT, INT8, FLOATS, BLOCKS, FAST, STREAM, COLUMNS, STAGES, REGISTERS)),
                (_consume, (sides, work, rest, 1, 2, X_LEFT, INT8, FLOATS, BLOCKS, FAST, STREAM, COLUMNS, STAGES, REGISTERS)),
                (_produce, ((x_desc, w_desc), ring, work, STAGES)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (sides, work, rest, 0, 1, X_LEFT, INT8, FLOATS, BLOCKS, FAST, STREAM, COLUMNS, STAGES, REGISTERS)),
                (_produce, ((x_desc, w_desc), ring, work, STAGES)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip


def aligned(t: Tensor) -> Tensor:
    """t [n, m], or a copy of it whose rows begin at multiples of 16 bytes, which is where TMA reads."""
    fits = t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def product(
    x: Tensor,
    x_scales: Tensor | None,
    w: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    int8: bool,
    fast: bool,
    launch: Config | None,
) -> Tensor:
    """x times the weight, scaled: y of a dtype [M, N].

    Args:
        x: int8 or float8_e4m3fn, or 16-bit floats, [M, K].
        x_scales: float32 [M, 1] or [1, 1], or of blocks [M, ceil(K/128)]; None for floats.
        w: of the dtype of x [N, K], or interleaved, int32 [N, 32 ceil(K/128)].
        scales: float32 [N, 1], or of blocks [ceil(N/128), ceil(K/128)].
        int8: what the weight's bytes are; else e4m3.
        fast: leave a whole sum of e4m3 products to the tensor cores.
    """
    (M, K), N = x.shape, len(w)
    x_bytes, blocks = x.element_size(), scales.shape != (N, 1)
    floats, x_left = x_bytes == 2, x_is_left(M, blocks)
    multiprocessors = multiprocessors_of(x.device)
    chosen = launch or config(M, N, K, x_bytes, blocks, multiprocessors)
    block_m, block_n = chosen["block_m"], chosen["block_n"]
    y = x.new_empty(M, N, dtype=dtype)
    describe = TensorDescriptor.from_tensor
    columns = slot_columns(chosen, x_bytes)
    w_columns = columns // 4 if floats else columns
    group = block_n if floats else GROUP_ROWS  # rows of the left operand of a partition
    rows, y_columns = staged(chosen, x_left)
    y_block = [group, y_columns] if x_left else [rows, group]
    strides = (0, 0) if x_scales is None or len(x_scales) != M else x_scales.stride()
    programs, stream = cut(chosen, tiles_of(chosen, M, N), K, 2)
    partial = counters = None
    if stream:
        sums = torch.int32 if x.dtype == torch.int8 else torch.float32
        partial = x.new_empty(2 * programs * block_n * block_m, dtype=sums)
        counters = next_counters(x.device)
    at_launch, of_consumer = registers_of(chosen, programs, x_bytes, x_left, multiprocessors)
    w8_hopper_kernel[(programs,)](
        describe(x, [block_m, columns], X_LAYOUT if floats else CODES_LAYOUT),
        describe(w, [block_n, w_columns], WORDS_LAYOUT if floats else CODES_LAYOUT),
        describe(y, y_block, gl.NVMMASharedLayout(128, element_bitwidth=16, rank=2)),
        x_scales, scales, bias, partial, counters, M, N, K,
        *strides,
        X_LEFT=x_left, INT8=int8, BLOCKS=blocks, FAST=fast, STREAM=stream, STAGES=chosen["stages"],
        REGISTERS=of_consumer,
        num_warps=group // 16, launch_pdl=True, maxnreg=at_launch,
    )  # fmt: skip
    return y


def w8a8_hopper(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool = False,
    launch: Config | None = None,
) -> Tensor:
    """Equation (1) of `w8a8.py`; arguments as in `ops.w8a8_rounded`, x_codes [M, K], K in multiples of 16, N of 8.

    Returns:
        y of the dtype [M, N], within the bound of `w8a8.w8a8_rounded`.
    """
    int8 = codes.dtype == torch.int8
    return product(aligned(x_codes), x_scales, aligned(codes), scales, bias, dtype, int8, fast, launch)


def fp8_block_hopper(
    x_codes: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    launch: Config | None = None,
) -> Tensor:
    """Equation (1) of `fp8_block.py`; arguments as in `ops.fp8_block_rounded`, x_codes [M, K], K and N as above.

    Returns:
        y of the dtype [M, N], within the bound of `w8a8.w8a8_rounded`.
    """
    by_block = (
        x_scales.T.contiguous().T
    )  # the rows of a block side by side, as `quantize_activations` has them
    return product(aligned(x_codes), by_block, aligned(codes), scales, bias, dtype, False, False, launch)


def w8a16_hopper(
    x: Tensor, words: Tensor, scales: Tensor, bias: Tensor | None, int8: bool, launch: Config | None = None
) -> Tensor:
    """Equation (1) of `w8a16.py`; arguments as in `ops.w8a16_interleaved`, K and N in multiples of 8.

    Returns:
        y of x.dtype [M, N], within the bound of `w8a16.w8a16_triton`.
    """
    return product(aligned(x), None, aligned(words), scales, bias, x.dtype, int8, False, launch)
