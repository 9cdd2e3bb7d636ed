"""Causal attention of several queries a sequence over keys and values in pages: flash attention, for prefill in chunks.

Equations (1) and (2) of `decode_attention.py` for every query, at position p, over the tokens t = max(0, p + 1 - window) to p.
Codes become operands as there, planes of columns in float16; a program takes a block of a sequence's queries with all heads
of a kv head, so that what is loaded and decoded serves both. Blocks are found from `q_starts` on the device, last ones first:
they are the longest.

Limit: 4 D operations a query head, query and token on the tensor cores; the decoding of codes is shared by 64 to 128 rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.decode_attention import (
    NOTHING,
    as_words,
    finish,
    load_query,
    log2_of,
    pages_of,
    reciprocal,
    score_scale,
)
from quantkit.kernels.dispatch import target_of
from quantkit.kernels.kv_operands import (
    INT4_MIDDLE,
    INT4_STEP,
    key_pair_of,
    operands,
    pair_of,
    sum_of_query,
    sums_of_values,
)
from quantkit.kernels.kv_pages import KVPages
from quantkit.kernels.w4a16 import ptx_level

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def config(kind: str, head_dim: int, group: int, target: str) -> dict[str, int]:
    """Launch parameters: queries of a block, which times heads are the rows of a product, tokens a step, stages, warps."""
    wide = target in ("sm_90", "sm_100")  # products of 64 rows and more without registers for their operands
    few = (
        head_dim == 256
        or kind == "int4"
        or target.startswith("gfx")
        or (target == "sm_100" and kind != "bf16")
    )
    rows = 64 if few else 128
    heads = triton.next_power_of_2(group)
    roomy = kind == "bf16" and head_dim < 256
    stages = 3 if roomy and wide else 2
    tokens = 64 if kind == "bf16" and wide else 32 if kind == "bf16" or target == "sm_90" else 16
    return {
        "queries": max(1, rows // heads),
        "heads": heads,
        "tokens": tokens,
        "stages": stages,
        "warps": rows // 16,
    }


@triton.jit
def block_of(block, starts_ptr, B, BP: tl.constexpr, QUERIES: tl.constexpr):
    """Sequence of a block of queries (B: there is no such block), and which of its blocks it is."""
    b = tl.arange(0, BP)
    starts = tl.load(starts_ptr + b, mask=b < B, other=0)
    stops = tl.load(starts_ptr + b + 1, mask=b < B, other=0)
    counts = tl.cdiv(stops - starts, QUERIES)
    before = tl.cumsum(counts, 0) <= block
    return tl.sum(before.to(tl.int32), 0), block - tl.sum(tl.where(before, counts, 0), 0)


@triton.jit
def prefill_attention_kernel(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr, lengths_ptr, starts_ptr, y_ptr,
    B, KV_HEADS, max_pages, window, scale, soft_cap,
    KIND: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, BP: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 4 if KIND == "int4" else (1 if KIND == "bf16" else 2)
    WORDS: tl.constexpr = D // PLANES
    C: tl.constexpr = 16 if WORDS < 16 else WORDS
    GROUPS: tl.constexpr = 4 if D >= 128 else (2 if D == 64 else 1)  # kv_pages.groups_of
    UNIT: tl.constexpr = INT4_STEP if ASM else 1.0
    M: tl.constexpr = QUERIES * HEADS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.program_id(1)
    b, block = block_of(tl.num_programs(0) - 1 - tl.program_id(0), starts_ptr, B, BP, QUERIES)
    if b >= B:
        return
    start = tl.load(starts_ptr + b)
    queries = tl.load(starts_ptr + b + 1) - start
    length = tl.minimum(tl.load(lengths_ptr + b), max_pages * PAGE)
    last = length - 1

    r = tl.arange(0, M)
    query = block * QUERIES + r // HEADS
    position = length - queries + query  # [M]
    inside = (query < queries) & (r % HEADS < GROUP)
    row_of_q = ((start + query).to(tl.int64) * KV_HEADS + h) * GROUP + r % HEADS
    planes, factor = load_query(q_ptr + row_of_q * D, r, inside, KIND, D, PLANES, C, ASM)
    scaled = factor * scale
    q, sum_of_q, acc = (), (), ()
    for i in tl.static_range(PLANES):
        q = q + (planes[i].trans(),)
        acc = acc + (tl.zeros((M, C), tl.float32),)
    if KIND == "int4":
        for i in tl.static_range(PLANES):
            sum_of_q = sum_of_q + (sum_of_query(planes[i], i, ASM)[:, None],)
        scaled *= UNIT  # scores are smaller by it until then
    m = tl.full((M,), NOTHING, tl.float32)
    total = tl.zeros((M,), tl.float32)
    middles = tl.zeros((M,), tl.float32)
    j = tl.arange(0, C)
    column = j % WORDS if C > WORDS else j
    table_ptr += b.to(tl.int64) * max_pages
    lowest = length - queries + block * QUERIES
    first = tl.maximum(lowest + 1 - window, 0) if WINDOW else 0
    highest = tl.minimum(lowest + QUERIES - 1, last)
    begin = first // T
    tokens = tl.arange(0, T)
    page = pages_of(table_ptr, begin * T + tokens, first, last, PAGE, WINDOW, tokens * 0 < length)
    for tile in tl.range(begin, tl.cdiv(highest + 1, T), num_stages=STAGES):
        t = tile * T + tokens
        t_read = tl.minimum(t, last)
        if WINDOW:
            t_read = tl.maximum(t_read, first)
        row = (page.to(tl.int64) * KV_HEADS + h) * PAGE + (t_read & (PAGE - 1))  # [T]
        k = tl.load(keys_ptr + (row * WORDS)[:, None] + column[None, :])
        v = tl.load(values_ptr + (row * WORDS)[:, None] + column[None, :])
        ks = operands(k, KIND, ASM)
        s = tl.dot(q[0], ks[0].trans())  # [M, T]
        if KIND == "int4":
            step, middle = key_pair_of(tl.load(key_scales_ptr + row * GROUPS))
            s = s * step[None, :] + sum_of_q[0] * middle[None, :]
            for i in tl.static_range(1, PLANES):
                if i * GROUPS % PLANES == 0:  # the next group begins
                    step, middle = key_pair_of(tl.load(key_scales_ptr + row * GROUPS + i * GROUPS // PLANES))
                s = tl.dot(q[i], ks[i].trans()) * step[None, :] + (sum_of_q[i] * middle[None, :] + s)
            spread, v_middle = pair_of(tl.load(value_scales_ptr + row))
        elif KIND != "bf16":
            s = tl.dot(q[1], ks[1].trans(), s) * tl.load(key_scales_ptr + row)[None, :]
            spread = tl.load(value_scales_ptr + row)
        s *= scaled[:, None]
        if SOFT_CAP:
            s = soft_cap * (1.0 - 2.0 / (tl.exp2(s) + 1.0))
        if KIND != "bf16":
            s += log2_of(spread, ASM)[None, :]
        seen = t[None, :] <= position[:, None]
        if WINDOW:
            seen = seen & (t[None, :] > position[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_next)
        m = m_next
        p = tl.exp2(s - m[:, None])
        weight = p if KIND == "bf16" else p * reciprocal(spread, ASM)[None, :]
        total = total * alpha + tl.sum(weight, 1)
        p = p.to(q[0].dtype)
        if KIND == "int4":
            middles = middles * alpha + tl.sum(weight * v_middle[None, :] - INT4_MIDDLE * p.to(tl.float32), 1)
        vs = operands(v, KIND, ASM)
        summed = ()
        for i in tl.static_range(PLANES):  # [M, C]
            if KIND == "int4":  # see `sums_of_values`
                summed = summed + (tl.fma(acc[i], alpha[:, None], tl.dot(p, vs[i])),)
            else:
                summed = summed + (tl.dot(p, vs[i], acc[i] * alpha[:, None]),)
        acc = summed
        page = pages_of(table_ptr, t + T, first, last, PAGE, WINDOW)
    o = ()
    for i in tl.static_range(PLANES):
        o = o + (sums_of_values(acc[i], middles[:, None], i, KIND, ASM).trans(),)
    finish(o, total, y_ptr + row_of_q * D, r, inside, D, PLANES, KIND == "int4", ASM)


def prefill_attention_triton(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    lengths: Tensor,
    q_starts: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor:
    """Arguments and result as in `attention_ops.prefill_attention`; nothing here waits for the device."""
    T, H, D = q.shape
    B, kv_heads = len(lengths), pages.kv_heads
    group = H // kv_heads
    launch = config(pages.kind, D, group, target_of(q.device))
    y = torch.empty_like(q)
    factor, cap = score_scale(scale, soft_cap)
    asm = ptx_level(q)
    options = {"launch_pdl": True} if asm >= 90 else {}
    grid = (triton.cdiv(T, launch["queries"]) + B, kv_heads)
    prefill_attention_kernel[grid](
        q, *as_words(pages), page_table, lengths, q_starts, y,
        B, kv_heads, page_table.stride(0), window, factor, cap,
        KIND=pages.kind, D=D, GROUP=group, PAGE=pages.page_size, BP=triton.next_power_of_2(B),
        WINDOW=window > 0, SOFT_CAP=soft_cap > 0, QUERIES=launch["queries"], HEADS=launch["heads"], T=launch["tokens"],
        STAGES=launch["stages"], ASM=asm, PDL=asm >= 90,
        num_warps=launch["warps"], num_stages=1, **options,
    )  # fmt: skip
    return y
