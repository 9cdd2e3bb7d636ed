"""What lies between the product of q, k and v and attention: head norms, RoPE, rounding of keys and values, the write to pages.

    n = x / sqrt(mean x^2 + eps) in float32, rounded, times the head norm's weight           where a model has one  (1)
    r = n * cos + rotate_half(n) * sin, both products and the sum rounded to the model's dtype      q and k         (2)
    codes, scales = round(r), of v round(v); int4 of what H has rotated, and q H in the model's dtype               (3)

Rounded in the order of transformers' apply_rotary_pos_emb and Qwen3RMSNorm, so that q, and keys and values up to int8 and fp8,
are right to the bit but for the sum in (1). (3) is `kv_pages.quantize`; products with H differ in the last bits of float32.

A program takes up to 16 heads of a token, all of q, of k or of v. 2 D bytes are read and 2 D (q) or about D / 4 to 2 D written for each:
20 KB a token of 32 and 8 heads of 128; what counts in decode is one launch and its latency, not bytes.
int4 works on four planes of a quarter of the columns, in which codes lie in words (`kv_operands.py`): the half that RoPE adds is
the plane after the next, and H is a product of 16 rows within each plane and sums of planes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit.kernels.kv_operands import rotate_planes
from quantkit.kernels.kv_pages import FLOOR as SMALLEST_SCALE
from quantkit.kernels.kv_pages import KVPages
from quantkit.kernels.quantize_activations import E4M3_TOP, INT8_TOP, capabilities, encode, round_whole
from quantkit.kernels.w4a16 import ptx_level

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FLOOR: tl.constexpr = tl.constexpr(SMALLEST_SCALE)
HEADS = 16  # of a program: the rows of a product


@triton.jit
def head_norm(x, root, q_norm_ptr, k_norm_ptr, column, j, of_q, of_k, is_v):
    """Equation (1) for columns of heads of q or k; x itself for those of v. of_q, of_k: how many j have a column."""
    weight = tl.load(q_norm_ptr + column, mask=j < of_q, other=0.0).to(tl.float32)
    weight += tl.load(k_norm_ptr + column, mask=j < of_k, other=0.0).to(tl.float32)
    n = (x.to(tl.float32) * root).to(x.dtype).to(tl.float32)
    return tl.where(is_v, x, (n * weight[None, :]).to(x.dtype))


@triton.jit
def bits_of(x):
    """The bits of bfloat16 of a float32 that is one, as an int32."""
    return (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF


@triton.jit
def nearest_bf16(x):
    """float32 -> the nearest bfloat16, half to even, as a float32; by its bits, as Triton 3.9's interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def pair_of_range(low, high):
    """Scale and middle, float32 of bfloat16 precision, of values between low and high: `kv_pages.quantize`."""
    middle = nearest_bf16((low + high) * 0.5)
    scale = tl.div_rn(tl.maximum(high - middle, middle - low), 15.0)
    return nearest_bf16(tl.where(scale < FLOOR, FLOOR, scale)), middle


@triton.jit
def rope_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, q_norm_ptr, k_norm_ptr, q_ptr,
    keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
    H, KV_HEADS, stride_t, stride_cos, stride_sin, eps,
    KIND: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, R: tl.constexpr,
    NATIVE_FP8: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 4 if KIND == "int4" else 1
    N: tl.constexpr = D // PLANES  # columns of a plane, padded to what a product takes
    C: tl.constexpr = 16 if N < 16 else N
    GROUPS: tl.constexpr = 4 if D >= 128 else (2 if D == 64 else 1)  # kv_pages.groups_of
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    of_q = tl.cdiv(H, R)
    of_k = tl.cdiv(KV_HEADS, R)
    is_q = block < of_q
    is_v = block >= of_q + of_k
    is_k = (block >= of_q) & (block < of_q + of_k)
    block -= tl.where(is_q, 0, of_q) + tl.where(is_v, of_k, 0)
    head = block * R + tl.arange(0, R)
    heads = tl.where(is_q, H, KV_HEADS)
    before = tl.where(is_q, 0, H) + tl.where(is_v, KV_HEADS, 0)
    row_ptr = qkv_ptr + t * stride_t + (before + head)[:, None] * D
    in_heads = (head < heads)[:, None]
    j = tl.arange(0, C)
    inside = in_heads & (j < N)[None, :]
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    x, other = (), ()
    for i in tl.static_range(PLANES):
        column = i * N + j
        x = x + (tl.load(row_ptr + column[None, :], mask=inside, other=0.0),)
        if PLANES == 1:
            half = tl.where(column < D // 2, column + D // 2, column - D // 2)
            other = other + (tl.load(row_ptr + half[None, :], mask=inside, other=0.0),)
    if q_norm_ptr is not None:
        square = tl.zeros((R,), tl.float32)
        for i in tl.static_range(PLANES):
            square += tl.sum(x[i].to(tl.float32) * x[i].to(tl.float32), 1)
        root = tl.rsqrt(square / D + eps)[:, None]
        columns_q, columns_k = tl.where(is_q, N, 0), tl.where(is_k, N, 0)
        normed, others = (), ()
        for i in tl.static_range(PLANES):
            column = i * N + j
            normed = normed + (
                head_norm(x[i], root, q_norm_ptr, k_norm_ptr, column, j, columns_q, columns_k, is_v),
            )
            if PLANES == 1:
                half = tl.where(column < D // 2, column + D // 2, column - D // 2)
                others = others + (
                    head_norm(other[i], root, q_norm_ptr, k_norm_ptr, half, j, columns_q, columns_k, is_v),
                )
        x = normed
        other = others
    turned = ()
    for i in tl.static_range(PLANES):
        column = i * N + j
        cos = tl.load(cos_ptr + t * stride_cos + column, mask=j < N, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + t * stride_sin + column, mask=j < N, other=0.0).to(tl.float32)[None, :]
        beside = (other[0] if PLANES == 1 else x[(i + 2) % PLANES]).to(tl.float32)
        beside = tl.where((column < D // 2)[None, :], -beside, beside)
        along = (x[i].to(tl.float32) * cos).to(dtype).to(tl.float32)
        r = (along + (beside * sin).to(dtype).to(tl.float32)).to(dtype)
        turned = turned + (tl.where(is_v, x[i], r),)
    slot = tl.load(slots_ptr + t)
    # heads that are written, as keys and as values
    of_k = tl.where(is_k & (slot >= 0), heads, 0)
    of_v = tl.where(is_v & (slot >= 0), heads, 0)
    page, place = slot // PAGE, slot % PAGE
    row = (page * KV_HEADS + head) * PAGE + place  # [R], of pages seen as rows
    if KIND == "int4":
        transposed = ()
        for i in tl.static_range(PLANES):
            transposed = transposed + (turned[i].trans(),)
        y = rotate_planes(transposed, D, True, ASM)  # [C, R]
        exists = (j < N)[:, None] & (head < heads)[None, :]
        if is_q:
            for i in tl.static_range(PLANES):
                tl.store(
                    q_ptr + (t * H + head)[None, :] * D + (i * N + j)[:, None], y[i].to(dtype), mask=exists
                )
        else:
            lows, highs = (), ()
            for i in tl.static_range(PLANES):
                lows = lows + (tl.min(tl.where((j < N)[:, None], y[i], float("inf")), 0),)
                highs = highs + (tl.max(tl.where((j < N)[:, None], y[i], float("-inf")), 0),)
            low_of_all = tl.minimum(tl.minimum(lows[0], lows[1]), tl.minimum(lows[2], lows[3]))
            high_of_all = tl.maximum(tl.maximum(highs[0], highs[1]), tl.maximum(highs[2], highs[3]))
            word = tl.zeros((C, R), tl.int32)
            for i in tl.static_range(PLANES):
                if GROUPS == 4:
                    low, high = lows[i], highs[i]
                elif GROUPS == 2:
                    low = tl.minimum(lows[i // 2 * 2], lows[i // 2 * 2 + 1])
                    high = tl.maximum(highs[i // 2 * 2], highs[i // 2 * 2 + 1])
                else:
                    low, high = low_of_all, high_of_all
                low = tl.where(is_v, low_of_all, low)
                high = tl.where(is_v, high_of_all, high)
                scale, middle = pair_of_range(low, high)
                quotient = tl.div_rn(y[i] - middle[None, :], tl.broadcast_to(scale[None, :], (C, R)))
                code = tl.minimum(tl.maximum(round_whole(quotient * 0.5 + 7.5), 0.0), 15.0)
                word |= code.to(tl.int32) << (4 * i)
                pair = bits_of(scale) | (bits_of(middle) << 16)
                if i * GROUPS % PLANES == 0:
                    tl.store(key_scales_ptr + row * GROUPS + i * GROUPS // PLANES, pair, mask=head < of_k)
                if i == 0:
                    tl.store(value_scales_ptr + row, pair, mask=head < of_v)
            word = (word << 1) | (word >> 15)
            at = row[None, :] * N + j[:, None]
            tl.store(keys_ptr + at, word.to(tl.int16), mask=exists & (head < of_k)[None, :])
            tl.store(values_ptr + at, word.to(tl.int16), mask=exists & (head < of_v)[None, :])
    else:
        y = turned[0]
        if is_q:
            tl.store(q_ptr + (t * H + head)[:, None] * D + j[None, :], y, mask=inside)
        else:
            if KIND == "bf16":
                codes = y
            else:
                TOP: tl.constexpr = INT8_TOP if KIND == "int8" else E4M3_TOP
                wide = y.to(tl.float32)
                scale = tl.div_rn(tl.max(tl.abs(wide), 1), TOP)
                scale = tl.where(scale < FLOOR, FLOOR, scale)
                tl.store(key_scales_ptr + row, scale, mask=head < of_k)
                tl.store(value_scales_ptr + row, scale, mask=head < of_v)
                quotient = tl.div_rn(wide, tl.broadcast_to(scale[:, None], (R, C)))
                codes = encode(quotient, KIND == "int8", True, NATIVE_FP8)
            at = row[:, None] * D + j[None, :]
            tl.store(keys_ptr + at, codes, mask=(head < of_k)[:, None])
            tl.store(values_ptr + at, codes, mask=(head < of_v)[:, None])


def rope_write_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    pages: KVPages,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Equations (1) to (3); arguments and result as in `attention_ops.rope_write`."""
    T, D, kv_heads = len(qkv), pages.head_dim, pages.kv_heads
    heads = qkv.shape[1] // D - 2 * kv_heads
    q = qkv.new_empty(T, heads, D)
    int4 = pages.kind == "int4"
    codes = [t.view(torch.int16) if int4 else t for t in (pages.keys, pages.values)]
    scales = [
        None if t is None else t.view(torch.int32) if int4 else t
        for t in (pages.key_scales, pages.value_scales)
    ]
    flags = capabilities(qkv)
    del flags["FMA"]
    grid = (T, triton.cdiv(heads, HEADS) + 2 * triton.cdiv(kv_heads, HEADS))
    rope_write_kernel[grid](
        qkv, cos, sin, slots, q_norm, k_norm, q, *codes, *scales,
        heads, kv_heads, qkv.stride(0), cos.stride(0), sin.stride(0), eps,
        KIND=pages.kind, D=D, PAGE=pages.page_size, R=HEADS, ASM=ptx_level(qkv), num_warps=4,
        enable_fp_fusion=False,  # products are rounded before they are added, as transformers has it
        **flags,
    )  # fmt: skip
    return q
