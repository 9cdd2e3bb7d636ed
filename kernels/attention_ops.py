"""Attention over pages as torch ops: importing this file defines `torch.ops.quantkit.{rope_write, decode_plan,
decode_attention, prefill_attention}`, in the manner of `ops.py`: check, choose a kernel (`dispatch.py`), run it.

Pages pass as their tensors, which `*pages` of a `KVPages` yields, because an op has to say which of its arguments it
changes:

    q = torch.ops.quantkit.rope_write(qkv, cos, sin, slots, *pages)
    y = torch.ops.quantkit.decode_attention(q, *pages, page_table, lengths, scale)

With int4 pages q is rotated by `rope_write`, as the attention ops expect it; their y is not rotated.
"""

import torch
from torch import Tensor

from quantkit.errors import QuantKitError
from quantkit.kernels.dispatch import Kernel, Problem, choose, target_of
from quantkit.kernels.kv_pages import KINDS, STORED_AS, KVPages, check_layout, groups_of

PAGES = "Tensor{a} keys, Tensor{b} values, Tensor{c}? key_scales, Tensor{d}? value_scales, str kind"
READ = PAGES.format(a="", b="", c="", d="")
WRITTEN = PAGES.format(a="(a!)", b="(b!)", c="(c!)", d="(d!)")
SCHEMAS = {
    "rope_write": (
        f"(Tensor qkv, Tensor cos, Tensor sin, Tensor slots, {WRITTEN}, "
        "Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6) -> Tensor"
    ),
    "decode_attention": (
        f"(Tensor q, {READ}, Tensor page_table, Tensor lengths, float scale, "
        "int window=0, float soft_cap=0.0, int max_length=0, Tensor? plan=None) -> Tensor"
    ),
    "decode_plan": (
        f"(Tensor q, {READ}, Tensor page_table, Tensor lengths, int window=0, int max_length=0) -> Tensor"
    ),
    "prefill_attention": (
        f"(Tensor q, {READ}, Tensor page_table, Tensor lengths, Tensor q_starts, float scale, "
        "int window=0, float soft_cap=0.0) -> Tensor"
    ),
}
MEND = "pass what KVPages.allocate made"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expect(
    op: str, name: str, t: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, like: Tensor, mend: str
) -> None:
    """One tensor's dtype, shape (None: any size), device and contiguity, or an error that says what was found."""
    fits = t.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, t.shape, strict=True))
    if t.dtype != dtype or not fits:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise QuantKitError(
            f"{op}: {name} is {_dtype_name(t.dtype)} {list(t.shape)}, expected {_dtype_name(dtype)} [{sizes}]; {mend}"
        )
    if t.device != like.device:
        raise QuantKitError(f"{op}: {name} is on {t.device}, expected {like.device}; move it there")
    if not t.is_contiguous():
        raise QuantKitError(f"{op}: {name} has strides {t.stride()}, expected contiguous; call .contiguous()")


def _check_pages(op: str, pages: KVPages, x: Tensor) -> None:
    """Whether the tensors are pages of the kind for x, and fit each other."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QuantKitError(
            f"{op}: {'qkv' if x.dim() == 2 else 'q'} is {_dtype_name(x.dtype)}, expected float32, float16 or bfloat16; convert it"
        )
    if pages.kind not in KINDS or pages.keys.dim() != 4:
        raise QuantKitError(
            f"{op}: pages of kind {pages.kind!r} and keys {list(pages.keys.shape)}, expected {', '.join(KINDS)} "
            f"and [pages, kv_heads, page_size, columns]; {MEND}"
        )
    check_layout(pages.kind, pages.page_size, pages.head_dim, x.dtype)
    count, heads, page_size, columns = pages.keys.shape
    stored = STORED_AS.get(pages.kind, x.dtype)
    for name, codes in (("keys", pages.keys), ("values", pages.values)):
        _expect(
            op, name, codes, (None if name == "keys" else count, heads, page_size, columns), stored, x, MEND
        )
    of_groups = {"key_scales": groups_of(pages.head_dim), "value_scales": 1}
    for name, groups in of_groups.items():
        scales = getattr(pages, name)
        if (scales is None) != (pages.kind == "bf16"):
            found, expected = ("None", "scales") if scales is None else ("a tensor", "None")
            raise QuantKitError(f"{op}: {name} is {found}, expected {expected} for {pages.kind}; {MEND}")
        if scales is not None:
            of_pairs = (groups, 2) if pages.kind == "int4" else ()
            dtype = torch.bfloat16 if pages.kind == "int4" else torch.float32
            _expect(op, name, scales, (count, heads, page_size, *of_pairs), dtype, x, MEND)


def _kernel(op: str, x: Tensor, rows: int, pages: KVPages, length: int, group: int) -> Kernel:
    """What runs a problem of so many rows (tokens or sequences), tokens a sequence, and query heads a kv head."""
    problem = Problem(
        target_of(x.device), rows, pages.head_dim, length, x.dtype, pages.keys.dtype, group_size=group
    )
    return choose(op, problem)[0]


def kernel_of(op: str, x: Tensor, pages: KVPages, rows: int, length: int) -> str:
    """The name of the kernel that runs an op for q or qkv like x; see `_kernel`."""
    return _kernel(
        op, x, rows, pages, length, max(1, x.shape[1] // pages.kv_heads if x.dim() == 3 else 1)
    ).name


def _check_rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    pages: KVPages,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> int:
    """Query heads of qkv."""
    op = "rope_write"
    _check_pages(op, pages, qkv)
    D, kv_heads = pages.head_dim, pages.kv_heads
    columns = qkv.shape[-1]
    if qkv.dim() != 2 or qkv.stride(1) != 1 or columns % D or columns <= 2 * kv_heads * D:
        raise QuantKitError(
            f"{op}: qkv has shape {list(qkv.shape)} and strides {qkv.stride()}, expected [T, (H + {2 * kv_heads}) * {D}] "
            f"with columns side by side; merge q, k and v in this order, heads of {D} columns"
        )
    heads = columns // D - 2 * kv_heads
    if heads % kv_heads:
        raise QuantKitError(
            f"{op}: qkv has {heads} query heads, expected a multiple of {kv_heads} kv heads; {MEND} for this model"
        )
    T = len(qkv)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape != (T, D) or t.dtype != qkv.dtype or t.device != qkv.device or t.stride(1) != 1:
            raise QuantKitError(
                f"{op}: {name} is {_dtype_name(t.dtype)} {list(t.shape)} on {t.device}, expected "
                f"{_dtype_name(qkv.dtype)} [{T}, {D}] on {qkv.device}, columns side by side; take the rows of the tokens"
            )
    _expect(op, "slots", slots, (T,), torch.int64, qkv, "one slot a row of qkv, -1 for none")
    if (q_norm is None) != (k_norm is None):
        raise QuantKitError(f"{op}: one of q_norm and k_norm is None, expected both or neither; pass both")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            _expect(
                op, name, weight, (D,), qkv.dtype, qkv, "pass the head norm's weight in the model's dtype"
            )
    return heads


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    kind: str,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Head norms and RoPE, and the write of rounded keys and values to pages.

    Args:
        qkv: float [T, (H + 2 kv_heads) * head_dim], all heads of q, then of k, then of v; rows may lie apart.
        cos, sin: qkv.dtype [T, head_dim], as transformers' rotary embedding gives them, the second half as the first.
        slots: int64 [T], page * page_size + place of each token; -1: it is not written. No two are the same.
        keys, values, key_scales, value_scales, kind: `*pages` of a `KVPages`, which are written to.
        q_norm, k_norm: weights of an RMS norm over each head before RoPE, qkv.dtype [head_dim], or None.
        eps: of that norm.

    Returns:
        q: qkv.dtype [T, H, head_dim]; rotated if pages are int4.

    Raises:
        QuantKitError: a shape, dtype or device does not fit.
    """
    pages = KVPages(keys, values, key_scales, value_scales, kind)
    heads = _check_rope_write(qkv, cos, sin, slots, pages, q_norm, k_norm)
    T = len(qkv)
    if T == 0:
        return qkv.new_empty(0, heads, pages.head_dim)
    kernel = _kernel("rope_write", qkv, T, pages, 1, heads // pages.kv_heads)
    return kernel.run(qkv, cos, sin, slots, pages, q_norm, k_norm, eps)


def _fake_rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    kind: str,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    pages = KVPages(keys, values, key_scales, value_scales, kind)
    heads = _check_rope_write(qkv, cos, sin, slots, pages, q_norm, k_norm)
    return qkv.new_empty(len(qkv), heads, pages.head_dim)


def _check_attention(
    op: str, q: Tensor, pages: KVPages, page_table: Tensor, lengths: Tensor, window: int, soft_cap: float
) -> None:
    _check_pages(op, pages, q)
    heads, D = pages.kv_heads, pages.head_dim
    if q.dim() != 3 or q.shape[2] != D or q.shape[1] % heads or q.shape[1] == 0:
        raise QuantKitError(
            f"{op}: q has shape {list(q.shape)}, expected [rows, a multiple of {heads} heads, {D}] for these pages; "
            f"reshape it, or {MEND} for this model"
        )
    if not q.is_contiguous():
        raise QuantKitError(f"{op}: q has strides {q.stride()}, expected contiguous; call .contiguous()")
    _expect(op, "lengths", lengths, (None,), torch.int32, q, "tokens in the pages of each sequence")
    _expect(op, "page_table", page_table, (len(lengths), None), torch.int32, q, "page ids, a row a sequence")
    if window < 0 or soft_cap < 0:
        raise QuantKitError(
            f"{op}: window is {window} and soft_cap {soft_cap}, expected 0 or more; 0 is for none"
        )


def _check_decode(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    lengths: Tensor,
    window: int,
    soft_cap: float,
    max_length: int,
) -> int:
    """The bound of lengths that holds."""
    op = "decode_attention"
    _check_attention(op, q, pages, page_table, lengths, window, soft_cap)
    if len(q) != len(lengths):
        raise QuantKitError(
            f"{op}: q has {len(q)} rows, expected {len(lengths)}, one a length; use prefill_attention for more"
        )
    room = page_table.shape[1] * pages.page_size
    if not 0 <= max_length <= room:
        raise QuantKitError(
            f"{op}: max_length is {max_length}, expected at most the {room} tokens of a row of page_table; give it more pages"
        )
    return max_length or room


def decode_plan(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    kind: str,
    page_table: Tensor,
    lengths: Tensor,
    window: int = 0,
    max_length: int = 0,
) -> Tensor:
    """How `decode_attention` of these arguments divides its work, for all layers whose arguments have the same shapes.

    Returns:
        int32 [n, columns], to be given to `decode_attention`; [0, 0] where nothing is divided.
    """
    pages = KVPages(keys, values, key_scales, value_scales, kind)
    max_length = _check_decode(q, pages, page_table, lengths, window, 0.0, max_length)
    if q.numel() == 0 or max_length == 0:
        return q.new_empty((0, 0), dtype=torch.int32)
    kernel = _kernel("decode_plan", q, len(q), pages, max_length, q.shape[1] // pages.kv_heads)
    return kernel.run(q, pages, lengths, window, max_length)


def _plan_size(q: Tensor, pages: KVPages, max_length: int) -> tuple[int, int]:
    if q.numel() == 0 or max_length == 0:
        return 0, 0
    kernel = _kernel("decode_plan", q, len(q), pages, max_length, q.shape[1] // pages.kv_heads)
    if kernel.name == "decode_plan_torch":
        return 0, 0
    from quantkit.kernels.decode_attention import PLAN_WIDTH, plan_rows

    return plan_rows(q, pages, max_length), PLAN_WIDTH


def _check_plan(q: Tensor, pages: KVPages, max_length: int, plan: Tensor | None) -> None:
    if plan is not None:
        mend = "pass what decode_plan makes of the same arguments"
        _expect("decode_attention", "plan", plan, _plan_size(q, pages, max_length), torch.int32, q, mend)


def _fake_decode_plan(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    kind: str,
    page_table: Tensor,
    lengths: Tensor,
    window: int = 0,
    max_length: int = 0,
) -> Tensor:
    pages = KVPages(keys, values, key_scales, value_scales, kind)
    max_length = _check_decode(q, pages, page_table, lengths, window, 0.0, max_length)
    return q.new_empty(_plan_size(q, pages, max_length), dtype=torch.int32)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    kind: str,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    max_length: int = 0,
    plan: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence to the tokens that its pages hold, the newest included.

    Args:
        q: float [B, H, head_dim], as `rope_write` returns it; of B sequences.
        keys, values, key_scales, value_scales, kind: `*pages` of a `KVPages`.
        page_table: int32 [B, max_pages], pages of each sequence in the order of its tokens. Entries past its length, or
            all before its window, may be anything.
        lengths: int32 [B], tokens of each sequence; 0: an idle row, whose y is 0.
        scale: of q . k.
        window: tokens that a query sees, itself included; 0: all.
        soft_cap: c of c * tanh(score / c); 0: none.
        max_length: no length is larger (one that is counts as this one); 0: what page_table has room for. How far the work is
            divided depends on it, not the work: kernels look at lengths on the device, so a captured call can be replayed
            for longer sequences.
        plan: `decode_plan` of the same arguments, which layers share; None: made here.

    Returns:
        y: q.dtype [B, H, head_dim].

    Raises:
        QuantKitError: a shape, dtype or device does not fit.
    """
    pages = KVPages(keys, values, key_scales, value_scales, kind)
    max_length = _check_decode(q, pages, page_table, lengths, window, soft_cap, max_length)
    if q.numel() == 0 or max_length == 0:
        return torch.zeros_like(q)
    kernel = _kernel("decode_attention", q, len(q), pages, max_length, q.shape[1] // pages.kv_heads)
    _check_plan(q, pages, max_length, plan)
    return kernel.run(q, pages, page_table, lengths, scale, window, soft_cap, max_length, plan)


def _fake_decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    kind: str,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    max_length: int = 0,
    plan: Tensor | None = None,
) -> Tensor:
    pages = KVPages(keys, values, key_scales, value_scales, kind)
    _check_decode(q, pages, page_table, lengths, window, soft_cap, max_length)
    return torch.empty_like(q)


def _check_prefill(
    q: Tensor,
    pages: KVPages,
    page_table: Tensor,
    lengths: Tensor,
    q_starts: Tensor,
    window: int,
    soft_cap: float,
) -> None:
    op = "prefill_attention"
    _check_attention(op, q, pages, page_table, lengths, window, soft_cap)
    _expect(
        op,
        "q_starts",
        q_starts,
        (len(lengths) + 1,),
        torch.int32,
        q,
        "the first row of q of each sequence, and T",
    )


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    kind: str,
    page_table: Tensor,
    lengths: Tensor,
    q_starts: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention of the newest tokens of each sequence to all that its pages hold.

    Args:
        q: float [T, H, head_dim], as `rope_write` returns it; rows q_starts[b] to q_starts[b + 1] - 1 are the last tokens
            of sequence b, in order.
        q_starts: int32 [B + 1], from 0 to T, not falling.

    Returns:
        y: q.dtype [T, H, head_dim]; 0 for rows before a sequence's first token (padding), of which there are some where it has
            more queries than tokens.

    The rest as in `decode_attention`.
    """
    pages = KVPages(keys, values, key_scales, value_scales, kind)
    _check_prefill(q, pages, page_table, lengths, q_starts, window, soft_cap)
    if q.numel() == 0 or page_table.numel() == 0:
        return torch.zeros_like(q)
    room = page_table.shape[1] * pages.page_size
    kernel = _kernel("prefill_attention", q, len(q), pages, room, q.shape[1] // pages.kv_heads)
    return kernel.run(q, pages, page_table, lengths, q_starts, scale, window, soft_cap)


def _fake_prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    kind: str,
    page_table: Tensor,
    lengths: Tensor,
    q_starts: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    pages = KVPages(keys, values, key_scales, value_scales, kind)
    _check_prefill(q, pages, page_table, lengths, q_starts, window, soft_cap)
    return torch.empty_like(q)


for _name, _implementation, _fake in (
    ("rope_write", rope_write, _fake_rope_write),
    ("decode_plan", decode_plan, _fake_decode_plan),
    ("decode_attention", decode_attention, _fake_decode_attention),
    ("prefill_attention", prefill_attention, _fake_prefill_attention),
):
    torch.library.define(f"quantkit::{_name}", SCHEMAS[_name], tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"quantkit::{_name}", ("cpu", "cuda"), _implementation)
    torch.library.register_fake(f"quantkit::{_name}", _fake)
