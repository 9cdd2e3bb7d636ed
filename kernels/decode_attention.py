"""Attention of one query a sequence over keys and values in pages, unquantized or in 8 or 4 bits: split-KV flash decoding.

    s[t] = scale * (q . k[t]), or soft_cap * tanh(scale * (q . k[t]) / soft_cap)                    (1)
    y    = sum over t of p[t] v[t] / sum over t of p[t],   p[t] = exp(s[t] - max s)                 (2)

over the tokens t = first to length - 1 of a sequence, first = max(0, length - window) with a window. Pages are those of
`kv_pages.py`, operands those of `kv_operands.py`.

Limit: the bytes of keys and values, for 8 heads of 128 and 4096 tokens 16.8 MB in bfloat16, 8.6 in 8 bits, 4.9 in int4: 3.9,
2.0 and 1.1 us at an H200's 4.3 TB/s. A multiprocessor then has 110, 55 and 31 issue slots a token and head.
Compiled for sm_90 (D = 128, four queries a head, by Triton 3.6 and 3.9) the loop takes 16 to 18 of them in bfloat16, 26 in int8,
21 in fp8 and 20 in int4, and loads 16 bytes a lane by cp.async, two to three steps ahead.

- The product is transposed, k q^T and v^T p: keys are the operand of 64 rows and queries that of 8 columns, so that the
  4 queries of a head pad to 8 and not to 16, which halves products, exponentials and sums.
- Warps share the scores by tokens and the sums by columns of V: no sum is held twice, and a step's only exchanges are the
  maxima and p.
- What a token's scale multiplies is folded: K's into the scores; V's s[t] into the probability as exp2(.. + log2 s[t]), so
  that what float16 holds is at most 1 whatever the scales are, and out again where probabilities are summed. q is divided
  by a power of two before it becomes float16.
- Tiles of all sequences, one sequence after another, are cut into equal shares for as many programs as fit on the GPU at a
  time; a share may end one sequence and begin the next. A plan says which, made from the lengths on the device once for all
  layers: a captured launch adapts to them. It is read, and the first page looked up, before the wait for the kernel before.
- A second kernel adds the parts of a sequence, in their order: results are the same in every run. It is there
  when the last part is written, and takes less time than a counter and the last program did (H200, 16 parts: 2.7 us).
- Rows of V past the last token, and before a window's first one, are zeros: what lies there may be NaN, and 0 times it
  too. Rows of K are what they are: their scores are replaced.
- What runs once is kept short: between two launches the weights of a layer go through L2, and instructions then come
  from memory, at 8 cycles each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.dispatch import multiprocessors_of, target_of
from quantkit.kernels.kv_operands import (
    COUNTS,
    E4M3_STEP,
    INT4_MIDDLE,
    INT4_STEP,
    NATIVE_FP8,
    ODD_STEP,
    columns_of,
    key_pair_of,
    operands,
    pair_of,
    rotate_planes,
    signs,
    sum_of_query,
    sums_of_planes,
    sums_of_values,
    times_signs,
)
from quantkit.kernels.kv_pages import KVPages
from quantkit.kernels.w4a16 import TRITON, ptx_level

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = 1.4426950408889634
NOTHING = tl.constexpr(-1e30)  # below every score; minus infinity less itself would be NaN
IDLE = tl.constexpr(0xF149F2CA)  # `packed` NOTHING and 0
LG2 = tl.constexpr("lg2.approx.ftz.f32 $0, $1;")
RCP = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
FEW_TOKENS, MANY_TOKENS = 8192, 32768
FEW_SEQUENCES, MANY_SEQUENCES = 8, 32  # fewer than, at least
MANY_PARTS, FEW_PARTS = 32, 4  # that are added at a time, by four warps and one
PLAN_ROWS, PLAN_WIDTH = 32, 8
# Newer Triton (seen in 3.9) leaves Hopper's products of 16 bits running, and the loads of a stage one more buffer.
BUFFER_MORE = int(TRITON > (3, 6))
CANDIDATES = tl.constexpr(2)  # sizes of units that are tried before programs get tiles of two sequences


def config(kind: str, head_dim: int, batch: int, max_length: int, target: str) -> dict[str, int]:
    """Launch parameters: tokens of a step, warps, stages of loads, programs a multiprocessor.

    Programs are as many as fit at a time by registers and shared memory: one more is a second wave, and where one fewer is asked
    for some multiprocessors get two while others, which the kernel before still has, get none. Chosen on an H200, see README.md.
    """
    bytes_of_row = {"bf16": 2 * head_dim, "int4": head_dim // 2}.get(kind, head_dim)
    launch = {"tokens": 64, "warps": 4, "stages": 3}
    if target.startswith("gfx"):  # registers hold what is loaded ahead
        return launch | {"tokens": 32, "stages": 1 if bytes_of_row >= 256 else 2, "per_sm": 2}
    small = target in ("sm_89", "sm_120")  # less shared memory
    if bytes_of_row >= 512:
        return launch | {"tokens": 32, "warps": 2 if small else 4, "stages": 2, "per_sm": 1}
    few, many = batch < FEW_SEQUENCES, batch >= MANY_SEQUENCES
    if kind == "int4":
        if few and max_length <= FEW_TOKENS:
            return launch | {"tokens": 128, "stages": 2, "per_sm": 2}
        return launch | {"warps": 2, "per_sm": 4}
    if small:
        return launch | {"stages": 2, "per_sm": 2}
    if kind == "bf16":
        # four programs a multiprocessor are one for each of 64 sequences' heads, with no parts to add
        if many:
            launch |= {"tokens": 32, "per_sm": 4}
        elif batch * max_length >= MANY_TOKENS:
            launch |= {"tokens": 128, "per_sm": 1}
        else:
            launch |= {"stages": 4, "per_sm": 1} if few else {"per_sm": 3}
        return launch | {"stages": launch["stages"] - BUFFER_MORE} if target == "sm_90" else launch
    if batch * max_length >= MANY_TOKENS and not many:
        return launch | {"tokens": 128, "per_sm": 2}
    return launch | ({"per_sm": 4} if many else {"stages": 4, "per_sm": 3})


@triton.jit
def log2_of(x, ASM: tl.constexpr):
    if ASM:  # one instruction, good to 2^-22, instead of twenty
        return tl.inline_asm_elementwise(LG2, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(RCP, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def pages_of(table_ptr, t, first, last, PAGE: tl.constexpr, WINDOW: tl.constexpr, inside=None):
    """Pages of tokens t, of those past the last or before a window's first one the page of that one."""
    t = tl.minimum(t, last)
    if WINDOW:
        t = tl.maximum(t, first)
    if inside is None:
        return tl.load(table_ptr + t.to(tl.uint32) // PAGE)
    else:
        return tl.load(table_ptr + t.to(tl.uint32) // PAGE, mask=inside, other=0)


@triton.jit
def power_of_two(largest):
    """The power of two at or below a positive float32, 2^-100 for less."""
    bits = tl.maximum(largest, 7.888609052210118e-31).to(tl.int32, bitcast=True)
    return (bits & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def plan_kernel(
    lengths_ptr, plan_ptr, B, max_length, programs, window,
    BP: tl.constexpr, T: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of a plan, see `decode_plan_triton`.

    Every program gets `size` tiles, of the tiles of all sequences one after another. Where units of a size that is hardly larger
    give no program tiles of two sequences, they are taken: then each sequence begins a unit.
    """
    b = tl.arange(0, BP)
    lengths = tl.minimum(tl.load(lengths_ptr + b, mask=b < B, other=0), max_length)
    firsts = tl.maximum(lengths - window, 0) // T if WINDOW else tl.zeros((BP,), tl.int32)
    stops = tl.cdiv(lengths, T)
    tiles = tl.where(b < B, tl.maximum(stops - firsts, 1), 0)  # what has no token has a row of y
    even = tl.cdiv(tl.sum(tiles, 0), programs)
    sizes = even + tl.arange(0, CANDIDATES)  # of units that are not shared
    units = tl.sum(tl.cdiv(tiles[None, :], sizes[:, None]), 1)
    apart = tl.min(tl.where(units <= programs, sizes, even + CANDIDATES), 0)
    shared = apart == even + CANDIDATES
    size = tl.where(shared, even, apart)
    room = tl.where(shared, tiles, tl.cdiv(tiles, size) * size)
    ends = tl.cumsum(room, 0)
    starts = ends - room

    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = unit * size
    past = tl.minimum(at + size, tl.sum(room, 0))
    of_first = tl.sum((ends[None, :] <= at[:, None]).to(tl.int32), 1)
    of_last = tl.sum((ends[None, :] < past[:, None]).to(tl.int32), 1)
    mine = b[None, :] == of_first[:, None]
    begin = at + tl.sum(tl.where(mine, (firsts - starts)[None, :], 0), 1)
    row = plan_ptr + unit * WIDTH
    inside = unit < programs
    tl.store(row, of_first, mask=inside)
    tl.store(row + 1, begin, mask=inside)
    tl.store(row + 2, past - at, mask=inside)
    tl.store(row + 3, tl.where(past > at, of_last - of_first + 1, 0), mask=inside)
    if tl.program_id(0) == 0:
        of_b = plan_ptr + (programs + b) * WIDTH
        first_unit = starts // size
        tl.store(of_b, lengths, mask=b < B)
        tl.store(of_b + 1, firsts, mask=b < B)
        tl.store(of_b + 2, firsts + tiles, mask=b < B)
        tl.store(of_b + 3, first_unit, mask=b < B)
        tl.store(of_b + 4, (starts + tiles - 1) // size - first_unit + 1, mask=b < B)
        tl.store(of_b + 5, (starts != first_unit * size).to(tl.int32), mask=b < B)


@triton.jit
def load_query(
    ptr,
    r,
    inside,
    KIND: tl.constexpr,
    D: tl.constexpr,
    PLANES: tl.constexpr,
    C: tl.constexpr,
    ASM: tl.constexpr,
):
    """Queries of the rows r as planes [C, len(r)] and the factor that scores then lack.

    ptr: to column 0 of each row, [len(r)]. What pads a plane is zero.
    """
    j = tl.arange(0, C)
    mask = inside[None, :] & (j < D // PLANES)[:, None]
    planes = ()
    largest = tl.zeros((r.shape[0],), tl.float32)
    for i in tl.static_range(PLANES):
        q = tl.load(ptr[None, :] + columns_of(i, j, D, PLANES)[:, None], mask=mask, other=0.0)
        planes = planes + (q,)
        largest = tl.maximum(largest, tl.max(tl.abs(q.to(tl.float32)), 0))
    if KIND == "bf16":
        scaled = planes
        factor = tl.full((r.shape[0],), 1.0, tl.float32)
    else:
        factor = power_of_two(largest)
        scaled = ()
        for i in tl.static_range(PLANES):
            x = planes[i].to(tl.float32) / factor[None, :]
            if KIND == "int4" and i % 2 == 1:
                x *= 1.0 / ODD_STEP
            scaled = scaled + (x.to(tl.float16),)
        if KIND == "fp8" and ASM < NATIVE_FP8:
            factor *= E4M3_STEP
    return scaled, factor


@triton.jit
def finish(
    o, total, y_ptr, r, inside, D: tl.constexpr, PLANES: tl.constexpr, ROTATE: tl.constexpr, ASM: tl.constexpr
):
    """y = o / total, rotated back, for planes o [C, len(r)]; y_ptr: to column 0 of each row, [len(r)]."""
    C: tl.constexpr = o[0].shape[0]
    j = tl.arange(0, C)
    exists = (j < D // PLANES)[:, None]
    share = (1.0 / tl.where(total > 0.0, total, 1.0))[None, :]  # an idle row has no token
    y = ()
    for i in tl.static_range(PLANES):
        y = y + (tl.where(exists, o[i] * share, 0.0),)
    if ROTATE:
        y = rotate_planes(y, D, False, ASM)
    for i in tl.static_range(PLANES):
        at = y_ptr[None, :] + columns_of(i, j, D, PLANES)[:, None]
        tl.store(at, y[i].to(y_ptr.dtype.element_ty), mask=exists & inside[None, :])


@triton.jit
def packed(low, high):
    """Two float32 as an int64."""
    bits = high.to(tl.int32, bitcast=True).to(tl.int64) << 32
    return bits | low.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def unpacked(pair):
    low, high = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def add_parts_kernel(
    partial_ptr, stats_ptr, plan_ptr, y_ptr, programs, KV_HEADS,
    GROUP: tl.constexpr, D: tl.constexpr, PLANES: tl.constexpr, C: tl.constexpr, WIDTH_OF_PLAN: tl.constexpr,
    ROTATE: tl.constexpr, AT_ONCE: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row of y from its parts, if it has more than one: brought to one maximum, added, divided, and rotated back.

    Before it waits for the parts it looks up how many there are: the kernel of the parts started it after it saw the plan.
    """
    WIDTH: tl.constexpr = PLANES * C
    R: tl.constexpr = 2 if ROTATE else 1  # planes of two rows are the columns of a product, at least eight
    if PDL:
        gdc_launch_dependents()
    head, b = tl.program_id(0), tl.program_id(1)
    plan_ptr += (programs + b) * WIDTH_OF_PLAN
    first = tl.load(plan_ptr + 3)
    count = tl.load(plan_ptr + 4)
    late = tl.load(plan_ptr + 5)  # the first part is the second one of its program
    a = tl.arange(0, AT_ONCE)
    place = tl.arange(0, WIDTH)
    slots = 2 * (first + a)
    top = NOTHING
    total = 0.0
    o = tl.zeros((WIDTH,), tl.float32)
    if PDL:
        # one that waits is enough for the kernel after to begin no earlier
        if (count != 1) | (head + b == 0):
            gdc_wait()
    if count == 1:
        return
    for n in range(0, count, AT_ONCE):
        there = n + a < count
        slot = slots + 2 * n + tl.where(n + a == 0, late, 0)
        row = (slot * KV_HEADS + head // GROUP) * GROUP + head % GROUP
        parts = tl.load(
            partial_ptr + (row * WIDTH)[:, None] + place[None, :],
            mask=there[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        tops, totals = unpacked(tl.load(stats_ptr + row, mask=there, other=IDLE, cache_modifier=".cg"))
        next_top = tl.maximum(top, tl.max(tops, 0))
        share = tl.exp2(tops - next_top)
        alpha = tl.exp2(top - next_top)
        top = next_top
        total = total * alpha + tl.sum(totals * share, 0)
        o = o * alpha + tl.sum(parts * share[:, None], 0)
    o *= 1.0 / tl.where(total > 0.0, total, 1.0)  # an idle row has no token
    y_ptr += (tl.cast(b, tl.int64) * (KV_HEADS * GROUP) + head) * D
    if ROTATE:
        planes = tl.broadcast_to(o[None, :], (R, WIDTH)).reshape(R * PLANES, C).trans()
        planes = times_signs(signs(C, D // PLANES), planes, False, ASM)
        ac, bd = planes.reshape(C, R, 2, 2).split()
        first_plane, third = ac.split()
        second, fourth = bd.split()
        y = sums_of_planes(first_plane, second, third, fourth, D)
        j, first_row = tl.arange(0, C)[:, None], tl.arange(0, R)[None, :] == 0
        for i in tl.static_range(PLANES):
            at = y_ptr + columns_of(i, j, D, PLANES) + tl.zeros((C, R), tl.int32)
            tl.store(at, y[i].to(y_ptr.dtype.element_ty), mask=first_row & (j < D // PLANES))
    else:
        at = y_ptr + columns_of(place // C, place % C, D, PLANES)
        tl.store(at, o.to(y_ptr.dtype.element_ty), mask=place % C < D // PLANES)


@triton.jit
def decode_attention_kernel(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr, plan_ptr, y_ptr,
    partial_ptr, stats_ptr,
    KV_HEADS, max_pages, window, scale, soft_cap,
    KIND: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, WIDTH_OF_PLAN: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 4 if KIND == "int4" else (1 if KIND == "bf16" else 2)
    WORDS: tl.constexpr = D // PLANES  # of a row of codes
    C: tl.constexpr = 16 if WORDS < 16 else WORDS
    GROUPS: tl.constexpr = 4 if D >= 128 else (2 if D == 64 else 1)  # kv_pages.groups_of
    UNIT: tl.constexpr = INT4_STEP if ASM else 1.0
    if PDL:
        gdc_launch_dependents()
    h = tl.program_id(1)
    unit = tl.program_id(0)
    b = tl.load(plan_ptr + unit * WIDTH_OF_PLAN)
    begin = tl.load(plan_ptr + unit * WIDTH_OF_PLAN + 1)
    left = tl.load(plan_ptr + unit * WIDTH_OF_PLAN + 2)
    sequences = tl.load(plan_ptr + unit * WIDTH_OF_PLAN + 3)
    plan_ptr += (tl.num_programs(0) + b) * WIDTH_OF_PLAN  # of this sequence
    r = tl.arange(0, R)
    inside = r < GROUP
    j = tl.arange(0, C)
    tokens = tl.arange(0, T)
    column = j % WORDS if C > WORDS else j
    place = tokens & (PAGE - 1)  # in a page, less where the tile begins
    k_place = (place * WORDS)[:, None] + column[None, :]
    v_place = (place * WORDS)[None, :] + column[:, None]
    in_page = tokens * 0 if PAGE < T else 0  # one page a tile, or one a token
    for i_sequence in tl.range(0, sequences, num_stages=1):
        length = tl.load(plan_ptr)
        first_tile = tl.load(plan_ptr + 1)
        stop = tl.load(plan_ptr + 2)
        plan_ptr += WIDTH_OF_PLAN
        if i_sequence > 0:
            begin = first_tile
        last = length - 1
        first = tl.maximum(length - window, 0) if WINDOW else 0
        pages_ptr = table_ptr + b.to(tl.int64) * max_pages
        t0 = begin * T + (tokens if PAGE < T else 0)
        page = pages_of(pages_ptr, t0, first, last, PAGE, WINDOW, in_page < length)
        if PDL:  # what was read so far is older than the kernel before
            if i_sequence == 0:
                gdc_wait()
        row_of_q = (b.to(tl.int64) * KV_HEADS + h) * GROUP + r  # of [B, H]
        planes, factor = load_query(q_ptr + row_of_q * D, r, inside, KIND, D, PLANES, C, ASM)
        scaled = factor * scale  # to units of log2, or of the cap
        acc, sum_of_q = (), ()
        for _ in tl.static_range(PLANES):
            acc = acc + (tl.zeros((C, R), tl.float32),)
        if KIND == "int4":  # of each group, beside its middle
            for i in tl.static_range(PLANES):
                sum_of_q = sum_of_q + (sum_of_query(planes[i], i, ASM)[None, :],)
            scaled *= UNIT  # scores are smaller by it until then
        m = tl.full((R,), NOTHING, tl.float32)
        total = tl.zeros((T, R), tl.float32)
        middles = tl.zeros((T, R), tl.float32)
        whole = (begin == first_tile) & (stop - begin <= left)
        end = tl.minimum(begin + left, stop)
        left -= end - begin
        for tile in tl.range(begin, tl.minimum(end, tl.cdiv(length, T)), num_stages=STAGES):
            t = tile * T + tokens
            seen = (t <= last) & (t >= first) if WINDOW else t <= last
            base = (page.to(tl.int64) * KV_HEADS + h) * PAGE
            if PAGE >= T:  # what differs from step to step is one number
                base += tile * T & (PAGE - 1)
                k_at, v_at = keys_ptr + base * WORDS + k_place, values_ptr + base * WORDS + v_place
            else:
                k_at = (keys_ptr + base * WORDS)[:, None] + k_place
                v_at = (values_ptr + base * WORDS)[None, :] + v_place
            k = tl.load(k_at)
            v = tl.load(v_at, mask=seen[None, :], other=0)
            ks = operands(k, KIND, ASM)
            s = tl.dot(ks[0], planes[0])  # [T, R]
            if KIND == "int4":
                scales_at = key_scales_ptr + base * GROUPS + place * GROUPS
                step, middle = key_pair_of(tl.load(scales_at))
                s = s * step[:, None] + middle[:, None] * sum_of_q[0]
                for i in tl.static_range(1, PLANES):
                    if i * GROUPS % PLANES == 0:  # the next group begins
                        step, middle = key_pair_of(tl.load(scales_at + i * GROUPS // PLANES))
                    s = tl.dot(ks[i], planes[i]) * step[:, None] + (middle[:, None] * sum_of_q[i] + s)
                spread, v_middle = pair_of(tl.load(value_scales_ptr + base + place, mask=seen, other=0x3F80))
            elif KIND != "bf16":
                step = tl.load(key_scales_ptr + base + place)
                s = tl.dot(ks[1], planes[1], s) * step[:, None]
                spread = tl.load(value_scales_ptr + base + place, mask=seen, other=1.0)
            s *= scaled[None, :]
            if SOFT_CAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                s = soft_cap * (1.0 - 2.0 / (tl.exp2(s) + 1.0))
            if KIND != "bf16":
                s += log2_of(spread, ASM)[:, None]
            s = tl.where(seen[:, None], s, float("-inf"))
            m_next = tl.maximum(m, tl.max(s, 0))
            alpha = tl.exp2(m - m_next)
            m = m_next
            p = tl.exp2(s - m[None, :])
            weight = p if KIND == "bf16" else p * reciprocal(spread, ASM)[:, None]
            total = total * alpha[None, :] + weight
            p = p.to(planes[0].dtype)
            if KIND == "int4":
                middles = (
                    middles * alpha[None, :] + weight * v_middle[:, None] - INT4_MIDDLE * p.to(tl.float32)
                )
            vs = operands(v, KIND, ASM)
            summed = ()
            for i in tl.static_range(PLANES):  # [C, R]
                if KIND == "int4":  # see `sums_of_values`
                    summed = summed + (tl.fma(acc[i], alpha[None, :], tl.dot(vs[i], p)),)
                else:
                    summed = summed + (tl.dot(vs[i], p, acc[i] * alpha[None, :]),)
            acc = summed
            page = pages_of(pages_ptr, tile * T + T + (tokens if PAGE < T else 0), first, last, PAGE, WINDOW)

        sums = tl.sum(total, 0)  # [R]
        o = ()
        for i in tl.static_range(PLANES):
            o = o + (sums_of_values(acc[i], tl.sum(middles, 0)[None, :], i, KIND, ASM),)
        if whole:
            finish(o, sums, y_ptr + row_of_q * D, r, inside, D, PLANES, KIND == "int4", ASM)
        else:
            slot = 2 * unit + tl.minimum(i_sequence, 1)
            mine = (slot * KV_HEADS + h) * GROUP + r
            for i in tl.static_range(PLANES):
                at = partial_ptr + ((mine * (PLANES * C))[None, :] + (i * C + j)[:, None])
                tl.store(at, o[i], mask=inside[None, :])
            tl.store(stats_ptr + mine, packed(m, sums), mask=inside)
        b += 1


def cut(q: Tensor, pages: KVPages, max_length: int) -> tuple[dict[str, int], int]:
    """How work is cut: launch parameters, and programs of a kv head: as many as fit on the GPU at a time, no more than tiles."""
    launch = config(pages.kind, pages.head_dim, len(q), max_length, target_of(q.device))
    sms = multiprocessors_of(q.device)
    tiles = len(q) * triton.cdiv(max_length, launch["tokens"])
    return launch, max(1, min(sms * launch["per_sm"] // pages.kv_heads, tiles))


def plan_rows(q: Tensor, pages: KVPages, max_length: int) -> int:
    return cut(q, pages, max_length)[1] + len(q)


def decode_plan_triton(q: Tensor, pages: KVPages, lengths: Tensor, window: int, max_length: int) -> Tensor:
    """How `decode_attention_triton` cuts sequences of these lengths: the same in all layers of one window.

    Returns:
        int32 [n + B, 8], of whose columns some are unused. A row of each program: its first sequence, its first tile of that,
        tiles in all, sequences (0: an idle program). A row of each sequence: its length, first and past the last tile, the
        program that begins it, how many have tiles of it, and whether the first of these has tiles of others before.
    """
    B = len(lengths)
    launch, programs = cut(q, pages, max_length)
    plan = torch.empty(programs + B, PLAN_WIDTH, dtype=torch.int32, device=q.device)
    plan_kernel[(triton.cdiv(programs, PLAN_ROWS),)](
        lengths, plan, B, max_length, programs, window,
        BP=triton.next_power_of_2(B), T=launch["tokens"], WINDOW=window > 0, ROWS=PLAN_ROWS, WIDTH=PLAN_WIDTH, num_warps=4,
    )  # fmt: skip
    return plan


def as_words(pages: KVPages) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors of pages as the kernels load them: codes as 16-bit words, pairs of int4 as 32-bit words."""
    if pages.kind == "bf16":
        return pages.keys, pages.values, None, None
    words = torch.int32 if pages.kind == "int4" else torch.float32
    assert pages.key_scales is not None
    assert pages.value_scales is not None
    scales = pages.key_scales.view(words), pages.value_scales.view(words)
    return pages.keys.view(torch.int16), pages.values.view(torch.int16), *scales


def score_scale(scale: float, soft_cap: float) -> tuple[float, float]:
    """Factors of q . k and of the capped score that make scores units of log2.

    With a cap the first makes the argument of the exponential in tanh: 2 log2(e) / soft_cap.
    """
    return (2 * scale / soft_cap * LOG2_E, soft_cap * LOG2_E) if soft_cap else (scale * LOG2_E, 0.0)


def decode_attention_triton(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    max_length: int,
    plan: Tensor | None = None,
) -> Tensor:
    """Equations (1) and (2); arguments and result as in `attention_ops.decode_attention`.

    Nothing here waits for the device, whose lengths only the kernels see: the launches can be captured.
    """
    B, H, D = q.shape
    kv_heads = pages.kv_heads
    launch, programs = cut(q, pages, max_length)
    asm = ptx_level(q)
    early = asm >= 90 and plan is not None  # a plan made here is read after all of its kernel
    if plan is None:
        plan = decode_plan_triton(q, pages, lengths, window, max_length)
    group = H // kv_heads
    y = torch.empty_like(q)
    planes = COUNTS[pages.kind]
    C = max(16, D // planes)  # what pads a plane included
    partial = q.new_empty(
        2 * programs * H * planes * C, dtype=torch.float32
    )  # of a program's first and last sequence
    stats = q.new_empty(2 * programs * H, dtype=torch.int64)  # maximum and sum of a part
    factor, cap = score_scale(scale, soft_cap)
    of_both = {"D": D, "GROUP": group, "WIDTH_OF_PLAN": PLAN_WIDTH, "ASM": asm, "PDL": early}
    options = {"launch_pdl": True} if early else {}
    decode_attention_kernel[(programs, kv_heads)](
        q, *as_words(pages), page_table, plan, y, partial, stats,
        kv_heads, page_table.stride(0), window, factor, cap,
        KIND=pages.kind, PAGE=pages.page_size, WINDOW=window > 0, SOFT_CAP=soft_cap > 0, R=max(8, triton.next_power_of_2(group)),
        T=launch["tokens"], STAGES=launch["stages"], num_warps=launch["warps"], num_stages=1, **of_both, **options,
    )  # fmt: skip
    if max_length > launch["tokens"]:
        few = programs <= FEW_PARTS * B  # on average; then all sequences' programs find a place at a time
        add_parts_kernel[(H, B)](
            partial, stats, plan, y, programs, kv_heads,
            PLANES=planes, C=C, ROTATE=pages.kind == "int4", AT_ONCE=FEW_PARTS if few else MANY_PARTS,
            num_warps=1 if few else 4, num_stages=1, **of_both, **options,
        )  # fmt: skip
    return y
