"""W4A8 on Hopper, in Gluon: INT4 weights become int8 in registers and go from there to the tensor cores, beside int8 x.

The product of `w4a8.py` for any M, as w x^T, with the ring of `hopper.py`: a slot has 128 columns of both operands and, of
their group, the weight's scales and zeros. One or two partitions of four warps multiply, each by 64 rows of the weight.

Without zeros a code is stored as q - 8 in two's complement and read in the upper half of its byte, as 16 (q - 8): two
masks and a shift for eight weights. The 1/16 goes into x's scales, exactly. With zeros, four differences q - zero are made at a
time in a word: 128 + q - zero does not borrow from its neighbour, and its highest bit is the wrong one.

A step's columns belong to one group: its int32 sums are exact and, times the scale, are added to float32 sums. With one
scale a row everything is summed in int32.

Budget: K / 2 bytes a row of weights. Out of L2 come K bytes of each row of x for every 128 rows of the weight, which counts
more from M of 64 on. Instructions: 0.4 a weight to decode it, 0.9 with zeros, and 2 a step and element of y to add it.
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
from quantkit.kernels.interleave import STEP
from quantkit.kernels.stream_k import next_counters
from quantkit.kernels.w8_hopper import aligned

TOGETHER = gl.constexpr(16)  # blocks of x that go through the weight together
WIDEST_PRODUCT = gl.constexpr(128)  # rows of x of the widest int8 product that Triton has
X_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
Y_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
CODES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=8, rank=2)

# block_m, block_n, and the rate of such tiles beside the first's, where they fill an H100 equally well
LARGE = ((256, 128, 1.0), (128, 128, 0.85), (128, 64, 0.6), (64, 64, 0.45))
PART = 4096.0  # columns whose products cost as much as a part more of a tile

Config = dict[str, int]


def rows_layout(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """A number a row of the weight: scales or zeros."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=2)


def shared_bytes(launch: Config) -> int:
    """Shared memory of a program whose weight has zeros, and scales of 32 bits."""
    block_m, block_n = launch["block_m"], launch["block_n"]
    slot = STEP * (block_n // 2 + block_m) + 4 * block_n + max(128, block_n)
    return RESERVED + launch["stages"] * slot + min(STAGED_ROWS, block_m) * block_n * 2


def two_fit(launch: Config) -> bool:
    """Whether a multiprocessor may run two programs at once."""
    return launch["block_m"] // 2 <= SUMS_OF_TWO and 2 * shared_bytes(launch) <= SHARED


def registers_of(launch: Config, programs: int, multiprocessors: int = 132) -> tuple[int, int]:
    """`hopper.registers` of a launch that is so many programs."""
    two = programs > multiprocessors and two_fit(launch)
    return registers(launch["block_n"] // 16, launch["block_m"], two, shared_bytes(launch))


@lru_cache(maxsize=4096)
def config(M: int, N: int, K: int, multiprocessors: int = 132) -> Config:
    """Launch parameters that are good for an H100."""
    block_m = rows_of_block(M)
    if block_m <= 64:
        chosen = dict(block_m=block_m, block_n=128, stages=0, programs=0)
        if tiles_of(chosen, M, N) >= multiprocessors * 3 // 4:
            return deepest(chosen, shared_bytes, 8, two=True)
        two = block_m <= 16 and K <= 8192
        if block_m > 16 or two:
            chosen["block_n"] = 64
        chosen["programs"] = parts(tiles_of(chosen, M, N), multiprocessors * (2 if two else 1))
        return deepest(chosen, shared_bytes, 8 if two else 12, two)
    best = 0.0
    for size, block_n, rate in LARGE:
        one = deepest(dict(block_m=size, block_n=block_n, stages=0, programs=0), shared_bytes, 12)
        tiles = tiles_of(one, M, N)
        score = rate * worth(tiles, multiprocessors, PART / K)
        shared = parts(tiles, multiprocessors) > tiles
        # sums of 256 rows leave no registers for those of other programs
        if size <= block_m and not (shared and size > WIDEST_PRODUCT.value) and score > best:
            best, chosen = score, one
    tiles = tiles_of(chosen, M, N)
    share = parts(tiles, multiprocessors) if tiles < multiprocessors else even_share(tiles, multiprocessors)
    return chosen | dict(programs=0 if share == tiles else share)


def candidates(M: int, N: int, K: int, multiprocessors: int = 132) -> list[Config]:
    """Launches worth timing, `config`'s first: one program a multiprocessor or two, with rings as deep as fit."""
    found, largest = [config(M, N, K, multiprocessors)], rows_of_block(M)
    for block_m in (256, 128, 64) if M > 128 else (largest, max(8, largest // 2)):
        for block_n in (128, 64):
            for two in (False, True):
                one = dict(block_m=block_m, block_n=block_n, stages=0, programs=0)
                one = deepest(one, shared_bytes, 8 if two else 12, two)
                if two and not two_fit(one):
                    continue
                tiles, steps = tiles_of(one, M, N), triton.cdiv(K, STEP)
                of_one = shares(tiles, steps, multiprocessors, two)
                # sums of 256 rows leave no registers for those of other programs
                found += [
                    one | dict(programs=share)
                    for share in of_one
                    if block_m <= WIDEST_PRODUCT.value or tiles % (share or tiles) == 0
                ]
    return [launch for i, launch in enumerate(found) if launch not in found[:i]]


@gluon.constexpr_function
def _codes_layout(W):
    """Bytes of a partition's slot [16 W, 64] as lanes (c, g) hold them: 16 (i, kt) of two rows (h)."""
    warps = [[16 << i, 0] for i in range(W.bit_length() - 1)]
    lanes = [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]], lanes, warps, [], [16 * W, 64]
    )


@gluon.constexpr_function
def _row_layout(W):
    """A number a row [1, 16 W], where lanes (c, g) hold the rows of their codes."""
    warps = [[0, 16 << i] for i in range(W.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 8]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], warps, [], [1, 16 * W]
    )


@gluon.constexpr_function
def _apart(rows):
    """Slots of zeros that a slot takes: TMA writes to multiples of 128 bytes."""
    return max(1, 128 // rows)


TIMES_16 = gl.constexpr("""{
.reg .b32 low;
shl.b32 low, $2, 4;
and.b32 $0, low, 0xf0f0f0f0;
and.b32 $1, $2, 0xf0f0f0f0;
}""")
MINUS_ZEROS = gl.constexpr("""{
.reg .b32 low, high;
shr.u32 high, $2, 4;
lop3.b32 low, $2, 0x0f0f0f0f, 0x80808080, 0xea;
lop3.b32 high, high, 0x0f0f0f0f, 0x80808080, 0xea;
sub.u32 low, low, $3;
sub.u32 high, high, $3;
xor.b32 $0, low, 0x80808080;
xor.b32 $1, high, 0x80808080;
}""")


@gluon.jit
def _operand(codes, zeros, W: gl.constexpr, MMA: gl.constexpr):
    """Codes [16 W, 64], two a byte, and zeros [16 W, 1] or None -> the left operand [16 W, 128]."""
    if zeros is None:
        low, high = gl.inline_asm_elementwise(
            TIMES_16, "=r,=r,r", [codes], (gl.int8, gl.int8), is_pure=True, pack=4
        )
    else:
        codes, zeros = gl.broadcast(codes, zeros)
        low, high = gl.inline_asm_elementwise(
            MINUS_ZEROS, "=r,=r,r,r", [codes, zeros], (gl.int8, gl.int8), is_pure=True, pack=4
        )
    w = gl.join(low, high).reshape((W, 2, 8, 4, 4, 4, 2))  # warp h g c kt i half
    w = w.permute((0, 1, 2, 4, 6, 3, 5)).reshape((16 * W, 128))
    return gl.convert_layout(w, gl.DotOperandLayout(0, MMA, 4), assert_trivial=True)


@gluon.jit
def _row_of(ring, PART: gl.constexpr, W: gl.constexpr, LIKE: gl.constexpr):
    """A partition's numbers [16 W, 1] of a slot's [1, rows], beside what has the layout LIKE."""
    LAYOUT: gl.constexpr = _row_layout(W)
    t = ring.slice(16 * W * PART, 16 * W, dim=1).load(LAYOUT).reshape((16 * W,))
    return gl.expand_dims(gl.convert_layout(t, gl.SliceLayout(1, LIKE), assert_trivial=True), 1)


@gluon.jit
def _fetch(
    weights,
    slot,
    PART: gl.constexpr,
    G: gl.constexpr,
    ZEROS: gl.constexpr,
    W: gl.constexpr,
    MMA: gl.constexpr,
):
    """A partition's left operand in a slot, and the scales that its product is to be multiplied by."""
    w_ring, scales_ring, zeros_ring = weights
    CODES: gl.constexpr = _codes_layout(W)
    codes = w_ring.index(slot).slice(16 * W * PART, 16 * W, dim=0).load(CODES)
    zeros = None
    if ZEROS:
        zeros = _row_of(zeros_ring.index(slot * _apart(zeros_ring.shape[2])), PART, W, CODES)
    scale = 1.0
    if G > 0:
        scale = _row_of(scales_ring.index(slot), PART, W, MMA).to(gl.float32)
    return _operand(codes, zeros, W, MMA), scale


@gluon.jit
def _produce(descs, ring, work, G: gl.constexpr, STAGES: gl.constexpr):
    """One warp: asks for the weights of the first slots, waits for the kernel before, then keeps the ring full."""
    x_desc, w_desc, scales_desc, zeros_desc = descs
    x_ring, weights, full, empty = ring
    w_ring, scales_ring, zeros_ring = weights
    begin, stop, steps, grid, stride = work
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    BYTES: gl.constexpr = (
        x_desc.block_type.nbytes
        + w_desc.block_type.nbytes
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
        load_tile(w_desc, [n * BLOCK_N, step * 64], full.index(slot), w_ring.index(slot))
        group = step // (G // 128) if G > 0 else 0
        if scales_desc is not None:
            load_tile(scales_desc, [group, n * BLOCK_N], full.index(slot), scales_ring.index(slot))
        if zeros_desc is not None:
            at = slot * _apart(BLOCK_N)
            load_tile(zeros_desc, [group, n * BLOCK_N], full.index(slot), zeros_ring.index(at))
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
def _product(acc, operand, x, G: gl.constexpr):
    """A step's product, by itself or, with one scale a row, added to the sums. It is waited for: its operand's registers are free."""
    NONE: gl.constexpr = acc.type.layout
    if G > 0:
        acc = gl.zeros((acc.shape[0], acc.shape[1]), gl.int32, NONE)
    product = warpgroup_mma(operand, x.permute((1, 0)), acc, use_acc=G == 0, is_async=True)
    return warpgroup_mma_wait(0, deps=(product,))


@gluon.jit
def _added(acc, product, scale, G: gl.constexpr):
    """The sums with a step's product."""
    if G > 0:
        return acc + product.to(gl.float32) * scale
    else:
        return product


@gluon.jit
def _consume(
    ring, work, rest,
    G: gl.constexpr, ZEROS: gl.constexpr, STREAM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PARTS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """One of PARTS partitions: products of its rows of what is in the ring, and what follows them."""
    x_ring, weights, full, empty = ring
    steps = work[2]
    total, x_scales_ptr, scales_ptr, bias_ptr, y_desc, staging, partial_ptr, counter_ptr, M, N, stride_sm = (
        rest
    )
    W: gl.constexpr = gl.num_warps()
    BLOCK_N: gl.constexpr = W * 16
    SUM: gl.constexpr = gl.float32 if G > 0 else gl.int32
    HALVES: gl.constexpr = 2 if BLOCK_M > WIDEST_PRODUCT else 1
    ROWS: gl.constexpr = BLOCK_M // HALVES
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, ROWS, 32])
    wait_for_kernel_before()  # the workspace and y may be in use by the kernel before
    slot, phase = 0, 0
    for i in range(0, tiles_dealt(work)):
        tile, s0, s1, m, n = part_of_tile(i, work)
        m0, n0 = m * BLOCK_M, (n * PARTS + PART) * BLOCK_N
        acc = gl.zeros((BLOCK_N, ROWS), SUM, MMA)
        other = gl.zeros((BLOCK_N, ROWS), SUM, MMA)
        for _ in range(s0, s1):
            mbarrier.wait(full.index(slot), phase)
            operand, scale = _fetch(weights, slot, PART, G, ZEROS, W, MMA)
            x = x_ring.index(slot)
            if HALVES == 2:
                acc = _added(acc, _product(acc, operand, x.slice(0, ROWS, dim=0), G), scale, G)
                product = _product(other, operand, x.slice(ROWS, ROWS, dim=0), G)
                mbarrier.arrive(empty.index(slot))
                other = _added(other, product, scale, G)
            else:
                product = _product(acc, operand, x, G)
                mbarrier.arrive(empty.index(slot))
                acc = _added(acc, product, scale, G)
            slot, phase = next_slot(slot, phase, STAGES)
        if HALVES == 2:
            sums = gl.join(acc, other).permute((0, 2, 1)).reshape((BLOCK_N, BLOCK_M))
        else:
            sums = acc
        whole = True
        if STREAM:
            if s1 - s0 < steps:
                sums, whole = add_parts(
                    sums, tile, s0 == 0, steps, total, partial_ptr, counter_ptr, REGISTERS, PART, PARTS
                )
        if whole:
            y = _scaled(sums, n0, m0, scales_ptr, x_scales_ptr, stride_sm, M, N, G, ZEROS)
            store_transposed(y, n0, m0, y_desc, staging.index(PART), bias_ptr, None, M, N, False)
    tma.store_wait(0)


@gluon.jit
def _scaled(sums, n0, m0, scales_ptr, x_scales_ptr, stride_sm, M, N, G: gl.constexpr, ZEROS: gl.constexpr):
    """Sums [rows of w, rows of x] in float32, times the scales that are not in them yet."""
    LAYOUT: gl.constexpr = sums.type.layout
    y = sums.to(gl.float32)
    if G == 0:
        n = n0 + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, LAYOUT))
        y *= gl.expand_dims(gl.load(scales_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
    m = m0 + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    of_x = gl.load(x_scales_ptr + m * stride_sm, mask=m < M, other=0.0)
    return y * gl.expand_dims(of_x if ZEROS else of_x * 0.0625, 0)


@gluon.jit
def w4a8_hopper_kernel(
    x_desc, w_desc, scales_desc, zeros_desc, y_desc, x_scales_ptr, scales_ptr, bias_ptr, partial_ptr, counter_ptr,
    M, N, K, stride_sm,
    G: gl.constexpr, STREAM: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    let_next_kernel_start()
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    ZEROS: gl.constexpr = zeros_desc is not None
    work, total = dealt(M, N, K, BLOCK_M, BLOCK_N, TOGETHER, STREAM)

    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, 128], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, 64], w_desc.layout)
    scales_ring, zeros_ring = w_ring, w_ring
    if G > 0:
        scales_ring = gl.allocate_shared_memory(scales_desc.dtype, [STAGES, 1, BLOCK_N], scales_desc.layout)
    if ZEROS:
        APART: gl.constexpr = _apart(BLOCK_N)
        zeros_ring = gl.allocate_shared_memory(gl.int8, [STAGES * APART, 1, BLOCK_N], zeros_desc.layout)
    staging = gl.allocate_shared_memory(
        y_desc.dtype, [PARTS, y_desc.block_type.shape[0], y_desc.block_type.shape[1]], y_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    descs = (x_desc, w_desc, scales_desc, zeros_desc)
    ring = (x_ring, (w_ring, scales_ring, zeros_ring), full, empty)
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
    )
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_consume, (ring, work, rest, G, ZEROS, STREAM, BLOCK_M, STAGES, REGISTERS, 2, 0)),
                (_consume, (ring, work, rest, G, ZEROS, STREAM, BLOCK_M, STAGES, REGISTERS, 2, 1)),
                (_produce, (descs, ring, work, G, STAGES)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (ring, work, rest, G, ZEROS, STREAM, BLOCK_M, STAGES, REGISTERS, 1, 0)),
                (_produce, (descs, ring, work, G, STAGES)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )


def in_rows(t: Tensor) -> Tensor:
    """t [groups, N] with strides that TMA takes: of a single row the first could be any number."""
    return t if len(t) > 1 else t.flatten().unsqueeze(0)


def w4a8_hopper(
    x_codes: Tensor,
    x_scales: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    launch: Config | None = None,
) -> Tensor:
    """Equation (1) of `w4a8.py`; arguments as in `ops.w4a8_interleaved_rounded`, x_codes [M, K], K and N in multiples of 16.

    Returns:
        y of the dtype [M, N], within the bound of `w4a8.w4a8_triton`.
    """
    (M, K), N = x_codes.shape, len(words)
    x_codes, codes = aligned(x_codes), aligned(words).view(torch.int8)
    multiprocessors = multiprocessors_of(x_codes.device)
    chosen = launch or config(M, N, K, multiprocessors)
    block_m, block_n = chosen["block_m"], chosen["block_n"]
    partitions = block_n // GROUP_ROWS
    y = x_codes.new_empty(M, N, dtype=dtype)
    describe = TensorDescriptor.from_tensor
    scales_desc = zeros_desc = None
    if group_size:
        scales_desc = describe(aligned(in_rows(scales)), [1, block_n], rows_layout(scales.dtype))
    if zeros is not None:
        zeros_desc = describe(aligned(in_rows(zeros)).view(torch.int8), [1, block_n], rows_layout(torch.int8))
    programs, stream = cut(chosen, tiles_of(chosen, M, N), K, partitions)
    partial = counters = None
    if stream:
        sums = torch.float32 if group_size else torch.int32
        partial = x_codes.new_empty(2 * programs * block_n * block_m, dtype=sums)
        counters = next_counters(x_codes.device)
    at_launch, of_consumer = registers_of(chosen, programs, multiprocessors)
    w4a8_hopper_kernel[(programs,)](
        describe(x_codes, [block_m, STEP], X_LAYOUT),
        describe(codes, [block_n, STEP // 2], CODES_LAYOUT),
        scales_desc,
        zeros_desc,
        describe(y, [min(block_m, STAGED_ROWS), GROUP_ROWS], Y_LAYOUT),
        x_scales, None if group_size else scales, bias, partial, counters, M, N, K, x_scales.stride(0),
        G=group_size, STREAM=stream, STAGES=chosen["stages"], PARTS=partitions, REGISTERS=of_consumer,
        num_warps=4, launch_pdl=True, maxnreg=at_launch,
    )  # fmt: skip
    return y
