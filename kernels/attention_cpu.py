"""Attention over pages of keys and values in plain torch: what a CPU runs, and any GPU for float32 models.

Pages are gathered and dequantized, one row of the batch beside the other. Unquantized pages go to PyTorch's
scaled_dot_product_attention in the model's dtype as transformers' "sdpa" hands them to it, with a mask, and the result is the
same to the bit; what is quantized is attended to in float32. A soft cap is computed as transformers' eager attention does.
What is past a sequence's length is never used, whatever it is: pages that are not written may hold NaN.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.kv_pages import KVPages, rotate


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., D] normed in the order of transformers' Qwen3RMSNorm; itself without a weight."""
    if weight is None:
        return x
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] turned by cos and sin [T, D], rounded where transformers' apply_rotary_pos_emb rounds."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


def rope_write_torch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    pages: KVPages,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """The definition of `attention_ops.rope_write`, on any device."""
    D, kv_heads = pages.head_dim, pages.kv_heads
    rows = qkv.unflatten(1, (-1, D))
    q, k, v = rows.split([rows.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
    pages.write(rope(rms_norm(k, k_norm, eps), cos, sin), v, slots)
    q = rope(rms_norm(q, q_norm, eps), cos, sin)
    return rotate(q).to(q.dtype) if pages.kind == "int4" else q


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, kind: str, scale: float, soft_cap: float) -> Tensor:
    """Attention of q [B, H, S, D] to k, v [B, kv_heads, L, D], where seen [B, 1, S, L]; 0 where a query sees nothing."""
    dtype = q.dtype
    # a NaN times a probability of zero would still be one
    written = seen.any(2).unsqueeze(-1)
    k, v = torch.where(written, k, 0), torch.where(written, v, 0)
    if kind != "bf16":
        q, k, v = q.float(), k.float(), v.float()
    if soft_cap:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = torch.tanh(q @ k.transpose(2, 3) * scale / soft_cap) * soft_cap
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        y = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    else:
        heads, group = q.shape[:2], q.shape[1] // k.shape[1]
        packed = q.shape[2] == 1  # the queries of a kv head as rows of one product, for a mask they share
        rows = q.unflatten(1, (-1, group)).squeeze(3) if packed else q
        y = F.scaled_dot_product_attention(rows, k, v, seen, scale=scale, enable_gqa=not packed and group > 1)
        y = y.reshape(*heads, -1, y.shape[-1])
    y = torch.where(seen.any(-1, keepdim=True), y, 0)
    return (rotate(y) if kind == "int4" else y).to(dtype)


def decode_plan_torch(q: Tensor, pages: KVPages, lengths: Tensor, window: int, max_length: int) -> Tensor:
    """None: here nothing is cut."""
    return torch.empty(0, 0, dtype=torch.int32, device=q.device)


def decode_attention_torch(
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
    """The definition of `attention_ops.decode_attention`, on any device."""
    page_size = pages.page_size
    table = page_table[:, : -(-max_length // page_size)]
    last = lengths.clamp(max=max_length).unsqueeze(1) - 1
    t = torch.arange(table.shape[1] * page_size, device=q.device)
    seen = t <= last
    if window:
        seen &= t > last - window
    # what the table says of pages that nobody sees may be anything
    k, v = pages.gather(torch.where(seen.unflatten(1, (-1, page_size)).any(2), table, 0).long())
    return attend(q.unsqueeze(2), k, v, seen[:, None, None], pages.kind, scale, soft_cap).squeeze(2)


def prefill_attention_torch(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    lengths: Tensor,
    q_starts: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor:
    """The definition of `attention_ops.prefill_attention`, one sequence after the other."""
    y = torch.zeros_like(q)
    starts = q_starts.tolist()
    for b, (start, stop, length) in enumerate(zip(starts, starts[1:], lengths.tolist(), strict=False)):
        if stop == start or not length:
            continue
        table = page_table[b, : -(-length // pages.page_size)]
        t = torch.arange(len(table) * pages.page_size, device=q.device)
        position = torch.arange(length - (stop - start), length, device=q.device).unsqueeze(1)
        seen = t <= position
        if window:
            seen &= t > position - window
        used = seen.any(0).view(-1, pages.page_size).any(1)
        k, v = (x.unsqueeze(0) for x in pages.gather(torch.where(used, table, 0).long()))
        one = q[start:stop].transpose(0, 1).unsqueeze(0)
        y[start:stop] = attend(one, k, v, seen[None, None], pages.kind, scale, soft_cap)[0].transpose(0, 1)
    return y
