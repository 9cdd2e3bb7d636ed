"""What the Gluon kernels for Hopper share: a program's range of steps, its ring's warp, and how steps are dealt out.

Such a kernel cuts (tiles of y) x (steps along K) into equal ranges, one a program (`stream_k.py`), or deals whole tiles out
side by side. One warp keeps a ring of slots in shared memory full by TMA, the others multiply what is in it. The first
slots' weights are asked for before the wait for the kernel before (programmatic dependent launch), its x after it.
"""

from collections.abc import Callable

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from quantkit.kernels.dispatch import ALL_REGISTERS
from quantkit.kernels.interleave import STEP
from quantkit.kernels.stream_k import COUNTERS

# Triton 3.9's names, and 3.6's
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

BLOCKS_M = (8, 16, 32, 64, 128, 256)
PRODUCER_REGISTERS = gl.constexpr(24)  # the least there is
REGISTERS_OF_TWO = 80  # a thread, at launch
REGISTERS_OF_FEW = 128  # at most, of a tile of so few rows of x: a norm's program, which takes 16384, fits beside two partitions
FEW_ROWS = 64
SUMS_OF_TWO = 32  # float32 sums a thread, where two programs are to fit on a multiprocessor
SHARED = 227 * 1024  # bytes of a multiprocessor's shared memory
GROUP_ROWS = 64  # of the tensor cores' left operand, of a warpgroup
RESERVED = 1024  # bytes of it that every program has besides, and its barriers
STAGED_ROWS = 32  # of y, in shared memory on their way out


def rows_of_block(M: int) -> int:
    """Rows of x of a tile of y: the fewest that hold all M, or the most there are."""
    return next((size for size in BLOCKS_M if size >= M), BLOCKS_M[-1])


def even_share(tiles: int, multiprocessors: int) -> int:
    """Programs that fill a GPU and have equally many whole tiles each; 0, one tile each, where there is no such number."""
    if tiles > multiprocessors:
        for programs in range(multiprocessors, multiprocessors * 4 // 5, -1):
            if tiles % programs == 0:
                return programs
    return 0


def parts(tiles: int, at_once: int) -> int:
    """Programs that share each tile equally, as many as run at once."""
    return tiles * max(1, at_once // tiles)


def worth(tiles: int, multiprocessors: int, part: float = 0.1) -> float:
    """Share of the multiprocessors' time that tiles fill, in waves; less for tiles that are cut in parts.

    A tile takes a share of `part` more of its time for each part after the first.
    """
    if tiles < multiprocessors:
        cut = multiprocessors // tiles
        return tiles * cut / multiprocessors / (1 + part * (cut - 1))
    return tiles / (triton.cdiv(tiles, multiprocessors) * multiprocessors)


def tiles_of(launch: dict[str, int], M: int, N: int) -> int:
    """Tiles of y, of block_m rows and block_n columns."""
    return triton.cdiv(M, launch["block_m"]) * triton.cdiv(N, launch["block_n"])


def deepest(
    launch: dict[str, int], shared: Callable[[dict[str, int]], int], most: int, two: bool = False
) -> dict[str, int]:
    """The launch with as many slots as a multiprocessor's memory has for one program, or for two.

    Args:
        shared: bytes of shared memory of a launch.
        most: slots.
    """
    room = SHARED // 2 if two else SHARED
    fits = (stages for stages in range(2, most + 1) if shared(launch | dict(stages=stages)) <= room)
    return launch | dict(stages=max(fits, default=0))


def shares(tiles: int, steps: int, multiprocessors: int, two: bool, partitions: int = 2) -> list[int]:
    """Numbers of programs worth timing for tiles of so many steps, 0 for one a tile; two: a multiprocessor runs two."""
    at_once = multiprocessors * (2 if two else 1)
    found = []
    for share in (parts(tiles, at_once), even_share(tiles, at_once), 0, at_once):
        programs = share or tiles
        alone = two and programs <= multiprocessors
        idle = programs > tiles * steps
        uncounted = tiles % programs != 0 and partitions * tiles > COUNTERS
        if not (alone or idle or uncounted):
            found.append(0 if programs == tiles else programs)
    return found


def cut(launch: dict[str, int], tiles: int, K: int, partitions: int) -> tuple[int, bool]:
    """Programs of a launch, and whether they share tiles: with more of them than there are counters each program has one tile."""
    programs = min(launch["programs"] or tiles, tiles * triton.cdiv(K, STEP))
    stream = tiles % programs != 0
    return (tiles, False) if stream and tiles * partitions > COUNTERS else (programs, stream)


def registers(warps: int, rows: int, two: bool, shared: int) -> tuple[int, int]:
    """Registers of a thread at launch, and then, when the ring's warp has given up its own, of one that multiplies.

    Args:
        warps: that multiply; the ring's warp takes the place of four.
        rows: of x, of a tile. Few leave room for programs of the kernel after, which so are there when this one ends.
        two: whether a multiprocessor runs two programs at once.
        shared: bytes of a program's shared memory. Where two would fit, only their registers keep them apart: a multiprocessor
            that is done early would get two of them, and another one none.
    """
    threads = 32 * (warps + 4)
    launch = min(255, ALL_REGISTERS // threads // 8 * 8)
    if rows <= FEW_ROWS and 2 * shared > SHARED:
        launch = min(launch, REGISTERS_OF_FEW)
    if two:
        launch = REGISTERS_OF_TWO
    left = launch * threads - PRODUCER_REGISTERS.value * 128
    return launch, min(240, left // (32 * warps) // 8 * 8)


@gluon.jit
def ptx(instruction: gl.constexpr):
    gl.inline_asm_elementwise(instruction, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_kernel_before():
    ptx("griddepcontrol.wait; mov.u32 $0, 0;")


@gluon.jit
def let_next_kernel_start():
    ptx("griddepcontrol.launch_dependents; mov.u32 $0, 0;")


@gluon.jit
def place(tile, grid):
    """A tile's block of x and of the weight.

    grid: blocks of x, blocks of the weight, and how many of x go through all of the weight together: those stay in L2 meanwhile,
    and programs that run at one time ask it for few lines.
    """
    blocks_m, blocks_n, together = grid
    m, n = tile * 0, tile
    if blocks_m > 1:  # a launch of one block of x does not wait for divisions
        first = tile // (together * blocks_n) * together
        left = tile - first * blocks_n
        blocks = gl.maximum(gl.minimum(blocks_m - first, together), 1)  # past the last tile too
        m, n = first + left % blocks, left // blocks
    return m, n


@gluon.jit
def dealt(
    M, N, K, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, TOGETHER: gl.constexpr, STREAM: gl.constexpr
):
    """What a program has to do, and the steps of all.

    Its first step and the one past its last, counted through its tiles, whose steps are `steps` each; the grid of `place`; and how far
    apart its tiles are.
    """
    programs = gl.num_programs(0)
    tiles_m, steps, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(K, 128), gl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    total = tiles.to(gl.int64) * steps
    if STREAM:  # neighbouring tiles, the first and the last perhaps in parts
        begin = (gl.program_id(0) * total // programs).to(gl.int32)
        stop = ((gl.program_id(0) + 1) * total // programs).to(gl.int32)
        stride = 1
    else:  # whole tiles; those at work at one time are neighbours, so that L2 holds what they share
        begin = gl.program_id(0) * steps
        stop = begin + (tiles - gl.program_id(0) + programs - 1) // programs * steps
        stride = programs
    return (begin, stop, steps, (tiles_m, tiles_n, TOGETHER), stride), total


@gluon.jit
def tiles_dealt(work):
    """How many tiles a program has, the first and the last perhaps in part."""
    begin, stop, steps = work[0], work[1], work[2]
    return (stop - 1) // steps + 1 - begin // steps


@gluon.jit
def part_of_tile(i, work):
    """A program's tile i, the steps along K of it that are the program's, from and to, and its place."""
    begin, stop, steps, grid, stride = work
    tile = begin // steps + i * stride
    s0 = gl.maximum(begin - (begin // steps + i) * steps, 0)
    s1 = gl.minimum(stop - (begin // steps + i) * steps, steps)
    m, n = place(tile, grid)
    return tile, s0, s1, m, n


@gluon.jit
def step_after(step, tile, m, n, steps, stride, grid):
    """The step that comes after one along K, its tile, and the tile's place."""
    step += 1
    over = step == steps
    if over:
        tile += stride
        m, n = place(tile, grid)
    return gl.where(over, 0, step), tile, m, n


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The slot that comes after one, and the phase of its barriers."""
    slot += 1
    over = slot == STAGES
    return gl.where(over, 0, slot), phase ^ over.to(gl.int32)


@gluon.jit
def store_transposed(y, n0, m0, y_desc, staging, bias_ptr, residual_ptr, M, N, SWIGLU: gl.constexpr):
    """Bias, SwiGLU and residual (as `w4a16.store_outputs`) for y^T [rows, columns], and y by TMA in the columns that `staging` holds.

    TMA leaves out what is past M and N.
    """
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    if COLUMNS > staging.shape[0]:
        halves = gl.split(y.reshape((ROWS, 2, COLUMNS // 2)).permute((0, 2, 1)))
        store_transposed(halves[0], n0, m0, y_desc, staging, bias_ptr, residual_ptr, M, N, SWIGLU)
        store_transposed(
            halves[1], n0, m0 + COLUMNS // 2, y_desc, staging, bias_ptr, residual_ptr, M, N, SWIGLU
        )
    else:
        LAYOUT: gl.constexpr = y.type.layout
        if bias_ptr is not None:
            n = n0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
            y += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
        if SWIGLU:
            gate, up = gl.split(y.reshape((ROWS // 16, 2, 8, COLUMNS)).permute((0, 2, 3, 1)))
            out = (gate / (1 + gl.exp(-gate)) * up).reshape((ROWS // 2, COLUMNS))
            first, outputs = n0 // 2, N // 2
        else:
            out = y
            first, outputs = n0, N
        if residual_ptr is not None:
            OUT: gl.constexpr = out.type.layout
            n = gl.expand_dims(first + gl.arange(0, out.shape[0], layout=gl.SliceLayout(1, OUT)), 1)
            m = gl.expand_dims(m0 + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, OUT)), 0)
            at = residual_ptr + (m.to(gl.int64) * outputs + n)
            out += gl.load(at, mask=(m < M) & (n < outputs), other=0.0).to(gl.float32)
        tma.store_wait(0)  # `staging` has been read
        barrier()
        staging.permute((1, 0)).store(out.to(y_desc.dtype))
        fence_async_shared()
        barrier()
        store_tile(y_desc, [m0, first], staging)


@gluon.jit
def add_parts(
    sums, tile, from_start, steps, total, partial_ptr, counter_ptr,
    REGISTERS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Leaves this program's part of a shared tile in the workspace (`stream_k.py`).

    Args:
        from_start: whether the part begins where the tile does.
        steps, total: of a tile, and of all.
        REGISTERS: of a thread, some of which hold parts on their way.
        GROUP, GROUPS: the partition that these sums are of, and how many there are.

    Returns:
        The sums of all parts, added in the order of the programs, and whether this was the last part to come: only then
        are they whole.
    """
    LAYOUT: gl.constexpr = sums.type.layout
    ROWS: gl.constexpr = sums.shape[0]
    COLUMNS: gl.constexpr = sums.shape[1]
    FLOATS: gl.constexpr = 64 if REGISTERS > 128 else 32  # a thread, beside its sums
    FLIGHT: gl.constexpr = max(1, min(8, FLOATS * 32 * gl.num_warps() // (ROWS * COLUMNS)))
    programs = gl.num_programs(0)
    first_sharer = (((tile * steps + 1).to(gl.int64) * programs - 1) // total).to(gl.int32)
    last_sharer = (((tile + 1) * steps).to(gl.int64) * programs - 1) // total
    last_sharer = last_sharer.to(gl.int32)
    at = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)), 1) * COLUMNS
    at += gl.expand_dims(gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    # a program shares at most the tile it begins in and the tile it ends in
    mine = (2 * gl.program_id(0) + (1 - from_start.to(gl.int32))) * GROUPS + GROUP
    gl.store(partial_ptr + mine.to(gl.int64) * (ROWS * COLUMNS) + at, sums)
    barrier()
    arrived = gl.atomic_add(counter_ptr + tile * GROUPS + GROUP, 1, sem="acq_rel")
    last = arrived == last_sharer - first_sharer
    if last:
        sums = gl.zeros_like(sums)
        for flight in range(first_sharer, last_sharer + 1, FLIGHT):
            for j in gl.static_range(FLIGHT):  # loads in flight
                sharer = flight + j
                theirs = (2 * sharer + (sharer > first_sharer).to(gl.int32)) * GROUPS + GROUP
                mask = (at >= 0) & (sharer <= last_sharer)
                part = partial_ptr + theirs.to(gl.int64) * (ROWS * COLUMNS) + at
                sums += gl.load(part, mask=mask, other=0, cache_modifier=".cg")
        gl.store(counter_ptr + tile * GROUPS + GROUP, 0)
    return sums, last
