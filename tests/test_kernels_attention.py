"""Attention over pages against float64, with a bound from the rounding steps; idle rows, garbage pages, captured sizes."""

import itertools
from dataclasses import dataclass
from zlib import crc32

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations import sdpa_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.errors import QuantKitError  # noqa: E402
from quantkit.eval.attention import (  # noqa: E402
    ERROR_BOUND,
    Heads,
    exact,
    full_cache,
    queries,
    relative_error,
)
from quantkit.kernels import attention_cpu, attention_ops, decode_attention, prefill_attention  # noqa: E402
from quantkit.kernels.dispatch import Problem, select  # noqa: E402
from quantkit.kernels.kv_pages import KINDS, KVPages, dequantize, rotate  # noqa: E402
from rounding import DEVICE, GPU, triton_runs  # noqa: E402

KV_HEADS = 2


@dataclass(frozen=True)
class Case:
    """What is attended to."""

    kind: str
    D: int
    group: int
    page_size: int
    lengths: tuple[int, ...]
    window: int = 0
    soft_cap: float = 0.0
    queries: tuple[int, ...] = ()  # of each sequence, in prefill


CASES = [
    Case("bf16", 64, 4, 16, (0, 1, 75, 130)),  # idle, one token, ends of pages and tiles, several programs
    Case("bf16", 128, 1, 64, (64, 200), window=20),  # a window that begins inside a page
    Case("int8", 64, 8, 32, (33, 0), soft_cap=5.0),
    Case("int8", 128, 1, 16, (150,), window=130),
    Case("fp8", 128, 4, 64, (90,)),
    Case("fp8", 16, 3, 16, (40, 17), window=7, soft_cap=3.0),  # padded planes, a group of no power of two
    Case("int4", 128, 4, 64, (300, 129)),
    Case("int4", 64, 8, 16, (70, 5), window=50, soft_cap=4.0),  # two planes a group
    Case("int4", 32, 16, 256, (40,)),  # 16 query heads
    Case("bf16", 64, 8, 64, (640,), soft_cap=4.0),
]
PREFILLS = [
    Case("bf16", 64, 4, 16, (0, 50, 40), queries=(0, 50, 7)),
    Case("int8", 64, 2, 32, (70,), queries=(33,), window=20, soft_cap=5.0),
    Case("fp8", 32, 1, 16, (80, 3), queries=(70, 3)),
    Case("int4", 128, 4, 64, (90, 6), queries=(20, 1)),
    Case("int4", 64, 3, 64, (70,), queries=(9,), window=16),
]
# Each kind, head dim and group, with every window and cap, and with every page size and dtype of x in turn.
EVERY = [
    (
        Case(kind, D, group, (16, 64, 256)[(i + k) % 3], (0, 1, 75, 1300, 640), *masked, (0, 1, 75, 300, 17)),
        (torch.float16, torch.bfloat16)[(i + k) % 2],
    )
    for i, (kind, D, group) in enumerate(itertools.product(KINDS, (64, 128), (1, 4, 8)))
    for k, masked in enumerate(((0, 0.0), (100, 0.0), (0, 4.0)))
]


def ids(case: Case) -> str:
    return f"{case.kind}-D{case.D}-g{case.group}-page{case.page_size}-w{case.window}-c{case.soft_cap}"


def written(case: Case, dtype: torch.dtype) -> tuple[KVPages, Tensor, Tensor]:
    """Pages with fresh keys and values, outliers among them, in shuffled order; all else is NaN or garbage."""
    g = torch.Generator().manual_seed(crc32(ids(case).encode()))
    most = max(1, -(-max(case.lengths) // case.page_size)) + 1
    count = most * len(case.lengths) + 3
    pages = KVPages.allocate(
        case.kind, count, KV_HEADS, case.D, page_size=case.page_size, dtype=dtype, device=DEVICE
    )
    for t in list(pages)[:4]:
        if t is not None:
            t.view(torch.uint8).fill_(0xFF)  # NaN in every float, e4m3 too
    table = torch.randperm(count, generator=g)[: most * len(case.lengths)].view(-1, most)
    for b, length in enumerate(case.lengths):
        k, v = torch.randn(2, length, KV_HEADS, case.D, generator=g)
        k[..., case.D // 3] *= 5
        v *= torch.logspace(-3, 2, max(length, 1))[torch.randperm(length, generator=g), None, None]
        t = torch.arange(length)
        slots = table[b, t // case.page_size] * case.page_size + t % case.page_size
        pages.write(k.to(DEVICE, dtype), v.to(DEVICE, dtype), slots.to(DEVICE))
        first = max(0, length - case.window - max(case.queries, default=0)) if case.window else 0
        table[b, -(-length // case.page_size) :] = -(2**30)
        table[b, : first // case.page_size] = 2**30
    return (
        pages,
        table.int().to(DEVICE),
        torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE),
    )


def reference(
    q: Tensor, pages: KVPages, tokens: Tensor, seen: Tensor, case: Case, eager: bool
) -> tuple[Tensor, Tensor]:
    """Attention of q [n, H, D] to some tokens (their slots), of which query i sees seen[i], in float64, and a bound of the
    error.

    The bound, with u the unit roundoff of what p is rounded to, in the space in which V is stored:
    a score is wrong by its D float32 products and sums, the rest of q that float16 loses below 2^-24 of the largest (2^-20
    where a plane is divided by 16), and some roundings of the score and of what is added to it; p by twice the worst of
    these, since it is divided by a sum, by u, or by 2^-24 of the largest p, and by the sums over L tokens; then y is rounded.
    An eager score with a cap is rounded to the dtype by each of its five operations, as in transformers: three times before
    tanh, whose slope is at most 1, and twice after it.
    """
    page, place = tokens // case.page_size, tokens % case.page_size
    k, v = (
        dequantize(codes[page, :, place], None if s is None else s[page, :, place], case.kind).double()
        for codes, s in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales))
    )
    scale = case.D**-0.5
    k_terms, v_terms = k.abs(), v.abs()
    if case.kind == "int4":  # its kernels sum 2 c s q, and (m - 15 s) q besides
        k_terms, v_terms = (
            (
                45 * s[page, :, place, :, 0].double() + s[page, :, place, :, 1].double().abs()
            ).repeat_interleave(case.D // s.shape[-2], -1)
            for s in (pages.key_scales, pages.value_scales)
        )
    k, v, k_terms, v_terms = (  # [H, L, D]
        t.repeat_interleave(case.group, 1).transpose(0, 1) for t in (k, v, k_terms, v_terms)
    )
    wide = q.double().transpose(0, 1)  # [H, n, D]
    s = wide @ k.transpose(1, 2) * scale
    size = wide.abs() @ k_terms.transpose(1, 2) * scale
    lost = wide.abs().amax(-1, keepdim=True) * k.abs().sum(-1).unsqueeze(1) * scale * 2**-20
    wrong = (case.D + 16) * 2**-23 * (size + 8) + (lost if case.kind != "bf16" else 0)
    if case.soft_cap:
        before = s.abs()
        s = case.soft_cap * torch.tanh(s / case.soft_cap)
        wrong = wrong + case.soft_cap * 2**-21
        if eager and case.kind == "bf16":
            wrong = wrong + torch.finfo(q.dtype).eps / 2 * (3 * before + 2 * s.abs())
    s = s.masked_fill(~seen, -torch.inf)
    p = torch.where(seen.any(-1, keepdim=True), s.softmax(-1), 0)
    y, magnitude = p @ v, p @ v.abs()
    L = len(tokens)
    rounded = torch.float16 if case.kind != "bf16" else q.dtype
    unit = torch.finfo(rounded).eps / 2 if rounded != torch.float32 else 0
    worst = torch.where(seen, wrong, 0).amax(-1, keepdim=True)
    largest = (p * v.abs().amax(-1).unsqueeze(1)).amax(-1, keepdim=True)
    bound = magnitude * (2 * worst + unit) + p @ v_terms * (L + 64) * 2**-23 + L * 2**-24 * largest
    if case.kind == "int4":
        bound = (bound + case.D * 2**-23 * magnitude).sum(-1, keepdim=True) * case.D**-0.5
        y = rotate(y)
    bound = bound + torch.finfo(q.dtype).eps * y.abs() + torch.finfo(q.dtype).smallest_normal
    return y.transpose(0, 1), bound.expand_as(y).transpose(0, 1)


def assert_right(
    y: Tensor, q: Tensor, pages: KVPages, table: Tensor, case: Case, starts: list[int], eager: bool = False
) -> None:
    """Rows starts[b] to starts[b + 1] of y are attention of the last queries of sequence b; others are not looked at."""
    for b, length in enumerate(case.lengths):
        rows = slice(starts[b], starts[b + 1])
        n = starts[b + 1] - starts[b]
        if not length:
            assert not y[rows].any()
            continue
        t = torch.arange(length, device=q.device)
        position = torch.arange(length - n, length, device=q.device).unsqueeze(1)
        seen = (t <= position) & (t > position - (case.window or length))
        used = seen.any(0)
        tokens = table[b, t[used] // case.page_size].long() * case.page_size + t[used] % case.page_size
        expected, bound = reference(q[rows], pages, tokens, seen[:, used], case, eager)
        worst = ((y[rows].double() - expected).abs() / bound).max().item()
        assert worst <= 1, f"error is {worst:.2f}x the rounding bound in sequence {b}"  # NaN fails too


def run_decode(case: Case, dtype: torch.dtype, with_triton: bool) -> None:
    pages, table, lengths = written(case, dtype)
    q = torch.randn(len(lengths), KV_HEADS * case.group, case.D, generator=torch.Generator().manual_seed(1))
    q[..., 1] *= 4
    q = q.to(DEVICE, dtype)
    arguments = (pages, table, lengths, case.D**-0.5, case.window, case.soft_cap)
    limit = max(case.lengths)
    runs = [attention_cpu.decode_attention_torch]
    if with_triton:
        runs.append(decode_attention.decode_attention_triton)
    for run in runs:
        y = run(q, *arguments, limit)
        assert y.dtype == dtype
        eager = run is attention_cpu.decode_attention_torch
        assert_right(y, q, pages, table, case, list(range(len(lengths) + 1)), eager)
    y = torch.ops.quantkit.decode_attention(q, *pages, *arguments[1:])
    assert_right(y, q, pages, table, case, list(range(len(lengths) + 1)), not GPU)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_decode_stays_within_its_rounding_steps(case):
    run_decode(case, torch.float16, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES[::2], ids=ids)
def test_decode_of_other_models(case, dtype):
    run_decode(case, dtype, GPU and dtype == torch.bfloat16)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_ends_one_sequence_and_begins_others(kind, page_size, monkeypatch):
    """15 tiles for four programs, which get parts of a sequence, whole ones, and one without tokens."""
    monkeypatch.setattr(decode_attention, "multiprocessors_of", lambda device: 4)
    lengths = (200, 70, 0, 130, 300)
    run_decode(Case(kind, 64, 4, page_size, lengths), torch.bfloat16 if GPU else torch.float16, True)
    run_decode(Case(kind, 64, 3, page_size, lengths, window=90), torch.float16, True)


def run_prefill(case: Case, dtype: torch.dtype, with_triton: bool) -> None:
    pages, table, lengths = written(case, dtype)
    starts = [0, *torch.tensor(case.queries).cumsum(0).tolist()]
    q = torch.randn(starts[-1], KV_HEADS * case.group, case.D, generator=torch.Generator().manual_seed(1)).to(
        DEVICE, dtype
    )
    rest = (
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        case.D**-0.5,
        case.window,
        case.soft_cap,
    )
    y = torch.ops.quantkit.prefill_attention(q, *pages, table, lengths, *rest)
    assert_right(y, q, pages, table, case, starts, not GPU)
    if with_triton:
        y = prefill_attention.prefill_attention_triton(q, pages, table, lengths, *rest)
        assert_right(y, q, pages, table, case, starts)


@pytest.mark.parametrize("case", PREFILLS, ids=ids)
def test_prefill_stays_within_its_rounding_steps(case):
    run_prefill(case, torch.float16, True)


def test_a_sequence_without_tokens_has_rows_of_zeros():
    case = Case("int8", 64, 2, 16, (20, 0), queries=(3, 2))
    run_prefill(case, torch.float16, True)


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_rows_of_padding_before_a_sequence_see_nothing(kind):
    """As a batch that is padded on the left has them: more queries than tokens."""
    run_prefill(Case(kind, 64, 2, 16, (3, 11, 7), queries=(11, 11, 11)), torch.float16, True)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), EVERY, ids=lambda x: ids(x) if isinstance(x, Case) else str(x))
def test_every_combination_on_a_gpu(case, dtype):
    run_decode(case, dtype, True)
    run_prefill(case, dtype, True)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(9000, 1, 24000, 640), (12000, 700), (300, 17, 900, 64) * 10], ids=len)
@pytest.mark.parametrize("kind", KINDS)
def test_launches_for_more_tokens_and_more_sequences(kind, lengths):
    run_decode(Case(kind, 128, 4, 64, lengths), torch.bfloat16, True)


@pytest.mark.gpu
def test_a_captured_call_follows_the_lengths_on_the_device():
    case = Case("int8", 128, 4, 64, (700, 300))
    pages, table, lengths = written(case, torch.bfloat16)
    q = torch.randn(2, 8, 128, device=DEVICE).bfloat16()
    run = lambda: torch.ops.quantkit.decode_attention(q, *pages, table, lengths, 0.1)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for now in ((1, 300), (700, 0), (64, 65)):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        assert torch.equal(y, run())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_triton_can_be_captured(kind):
    """No shape depends on a value, which would have to come from the device first: fake tensors have none."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # the matrix of rotations is kept
        pages = KVPages.allocate(kind, 4, KV_HEADS, 64, page_size=16, dtype=torch.float32)
        cos, sin = torch.ones(3, 64), torch.ones(3, 64)
        slots = torch.tensor([0, 17, -1])
        q = attention_cpu.rope_write_torch(torch.randn(3, 8 * 64), cos, sin, slots, pages, None, None, 1e-6)
        table, lengths = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
        y = attention_cpu.decode_attention_torch(q, pages, table, lengths, 0.1, 0, 0.0, 32)
    assert y.shape == (3, 4, 64)


def test_a_sequence_in_parts_gives_the_same_bits_again():
    case = Case("bf16", 64, 4, 16, (300, 190))
    pages, table, lengths = written(case, torch.float16)
    q = torch.randn(2, 8, 64, device=DEVICE).half()
    run = lambda: decode_attention.decode_attention_triton(q, pages, table, lengths, 0.1, 0, 0.0, 300)
    assert torch.equal(run(), run())


@pytest.mark.parametrize(
    ("lengths", "window", "programs", "most", "shared"),
    [
        (
            [4096],
            0,
            49,
            2,
            False,
        ),  # tiles of a program at most, and whether one may have tiles of two sequences
        ([4096] * 16, 0, 49, 22, False),
        ([640] * 15 + [570], 0, 16, 10, False),
        ([64, 0, 8000, 130], 0, 49, 3, True),
        ([4096, 4096, 100], 128, 40, 1, False),
        ([500] * 5, 0, 1, 40, True),
        ([577] * 64, 0, 49, 14, True),
    ],
)
def test_programs_cover_every_tile_once_in_equal_shares(lengths, window, programs, most, shared):
    B, T = len(lengths), 64
    plan = torch.empty(programs + B, 8, dtype=torch.int32, device=DEVICE)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    sizes = dict(BP=triton.next_power_of_2(B), T=T, WINDOW=window > 0, ROWS=32, WIDTH=8)
    decode_attention.plan_kernel[(triton.cdiv(programs, 32),)](
        on_device, plan, B, 2**30, programs, window, **sizes
    )
    rows, of_sequences = plan[:programs].tolist(), plan[programs:].tolist()
    parts: dict[int, list[tuple[int, int, int]]] = {
        b: [] for b in range(B)
    }  # program, whether not its first, tiles
    for unit, (b, begin, left, sequences, *_) in enumerate(rows):
        assert left <= most
        assert sequences <= 1 or shared
        for i in range(sequences):
            first, stop = of_sequences[b + i][1:3]
            begin = first if i else begin
            end = min(begin + left, stop)
            parts[b + i].append((unit, i > 0, end - begin))
            left -= end - begin
    for b, length in enumerate(lengths):
        found, first, stop, unit, count, late = of_sequences[b][:6]
        assert found == length
        assert first == (max(length - window, 0) // T if window else 0)
        assert stop == max(-(-length // T), first + 1)
        assert sum(tiles for _, _, tiles in parts[b]) == stop - first
        assert [(u, second) for u, second, _ in parts[b]] == [
            (unit + i, i == 0 and late) for i in range(count)
        ]


def test_a_cpu_attends_as_transformers_does_to_the_bit():
    for dtype in (torch.bfloat16, torch.float32):
        case = Case("bf16", 64, 4, 16, (75, 130, 16))
        pages, table, lengths = written(case, dtype)
        q = torch.randn(3, 8, 64).to(DEVICE, dtype)
        module = torch.nn.Module()
        module.num_key_value_groups, module.is_causal, module.training = case.group, True, False
        valid = torch.where(torch.arange(144) < lengths.cpu()[:, None], 1, 0).bool().to(DEVICE)
        k, v = pages.gather(table.clamp(0, len(pages.keys) - 1).long())
        k, v = (torch.where(valid[:, None, :, None], t[:, :, :144], 0) for t in (k, v))
        arguments = (module, q.unsqueeze(2), k, v)
        y = attention_cpu.decode_attention_torch(q, pages, table, lengths, 0.125, 0, 0.0, 144)
        mask = valid[:, None, None]
        expected = sdpa_attention.sdpa_attention_forward(*arguments, mask, scaling=0.125)[0].squeeze(1)
        if hasattr(sdpa_attention, "pack_gqa"):
            assert torch.equal(y, expected)
        else:  # older ones repeat keys and values, and products of other shapes add in another order
            torch.testing.assert_close(y, expected)
        y = attention_cpu.decode_attention_torch(q, pages, table, lengths, 0.125, 0, 5.0, 144)
        least = torch.where(mask, 0, torch.finfo(dtype).min).to(dtype)
        expected = eager_attention_forward(*arguments, least, scaling=0.125, softcap=5.0)[0]
        assert torch.equal(y, expected.squeeze(1))


def test_dispatch_leaves_float32_and_many_heads_to_torch():
    name = lambda dtype, group: (
        select("decode_attention", Problem("sm_90", 1, 128, 99, dtype, dtype, group)).name
    )
    assert name(torch.bfloat16, 8) == "decode_attention_triton"
    assert name(torch.float32, 8) == "decode_attention_torch"
    assert name(torch.bfloat16, 71) == "decode_attention_torch"


def arguments_of(op: str, kind: str = "int8") -> dict:
    """Arguments by name that fit."""
    pages = KVPages.allocate(kind, 4, KV_HEADS, 64, page_size=16, dtype=torch.float32)
    for t in list(pages)[:4]:
        if t is not None:
            t.zero_()
    named = dict(zip(("keys", "values", "key_scales", "value_scales", "kind"), pages, strict=True))
    if op == "rope_write":
        slots = torch.tensor([0, 17, -1])
        rows = torch.randn(3, 8 * 64)
        return dict(qkv=rows, cos=torch.ones(3, 64), sin=torch.ones(3, 64), slots=slots, **named)
    table, lengths = torch.arange(4).int().view(2, 2), torch.tensor([3, 0], dtype=torch.int32)
    named |= dict(q=torch.randn(2, 4, 64), page_table=table, lengths=lengths, scale=0.125)
    if op == "decode_plan":
        del named["scale"]
    return named if op.startswith("decode") else named | dict(q_starts=torch.tensor([0, 2, 2]).int())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", attention_ops.SCHEMAS)
def test_fakes_and_schemas_agree_with_what_ops_do(op, kind):
    torch.library.opcheck(
        getattr(torch.ops.quantkit, op),
        (),
        arguments_of(op, kind),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("op", attention_ops.SCHEMAS)
def test_no_rows_give_no_rows(op):
    named = arguments_of(op)
    for name in ("qkv", "cos", "sin", "slots", "q"):
        if name in named:
            named[name] = named[name][:0]
    if op.startswith("decode"):
        named |= dict(page_table=named["page_table"][:0], lengths=named["lengths"][:0])
    shape = (0, 0) if op == "decode_plan" else (0, 4, 64)
    assert getattr(torch.ops.quantkit, op)(**named).shape == shape


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("rope_write", dict(qkv=torch.ones(3, 100)), r"qkv has shape \[3, 100\] .*expected \[T, \(H \+ 4\) \* 64\]"),
        ("rope_write", dict(qkv=torch.ones(3, 7 * 64)), "qkv has 3 query heads, expected a multiple of 2 kv heads"),
        ("rope_write", dict(cos=torch.ones(2, 64)), r"cos is float32 \[2, 64\] on cpu, expected float32 \[3, 64\]"),
        ("rope_write", dict(slots=torch.ones(3).int()), r"slots is int32 \[3\], expected int64 \[3\]; one slot a row"),
        ("rope_write", dict(q_norm=torch.ones(64)), "one of q_norm and k_norm is None, expected both or neither"),
        ("rope_write", dict(q_norm=torch.ones(64), k_norm=torch.ones(1)), r"k_norm is float32 \[1\], expected"),
        ("decode_attention", dict(q=torch.ones(2, 4, 64).int()), "q is int32, expected float32, float16 or bfloat16"),
        ("decode_attention", dict(q=torch.ones(2, 3, 64)), r"q has shape \[2, 3, 64\], expected .* multiple of 2 heads"),
        ("decode_attention", dict(q=torch.ones(4, 2, 64).transpose(0, 1)), "q has strides .*, expected contiguous"),
        ("decode_attention", dict(q=torch.ones(3, 4, 64)), "q has 3 rows, expected 2, one a length; use prefill"),
        ("decode_attention", dict(kind="int3"), "pages of kind 'int3' .*, expected bf16, int8, fp8, int4"),
        ("decode_attention", dict(kind="fp8"), "keys is int8 .*, expected uint8 .*; pass what KVPages.allocate made"),
        ("decode_attention", dict(key_scales=None), "key_scales is None, expected scales for int8"),
        ("decode_attention", dict(lengths=torch.ones(2)), r"lengths is float32 \[2\], expected int32 \[any\]"),
        ("decode_attention", dict(page_table=torch.ones(3, 2).int()), r"page_table is int32 \[3, 2\], expected int32 \[2"),
        ("decode_attention", dict(max_length=33), "max_length is 33, expected at most the 32 tokens"),
        ("decode_attention", dict(plan=torch.ones(2, 8).int()), r"plan is int32 \[2, 8\], expected int32 \[0, 0\]; pass what"),
        ("decode_attention", dict(window=-1), "window is -1 and soft_cap 0.0, expected 0 or more"),
        ("prefill_attention", dict(q_starts=torch.ones(2).int()), r"q_starts is int32 \[2\], expected int32 \[3\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(op, changes, message):
    with pytest.raises(QuantKitError, match=f"{op}: {message}"):
        getattr(torch.ops.quantkit, op)(**arguments_of(op) | changes)


def test_pages_of_one_kind_take_no_scales_of_another():
    named = arguments_of("decode_attention", "bf16")
    with pytest.raises(QuantKitError, match="value_scales is a tensor, expected None for bf16"):
        torch.ops.quantkit.decode_attention(**named | dict(value_scales=torch.ones(1)))
    assert not triton_runs(torch.bfloat16) or GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_small_sums_of_many_tokens(kind):
    """Tokens that weigh about alike leave a small sum of large parts: the tensor cores must not cut off what decides it."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape, length, chunk = Heads("few heads", 4, 2, 128), 32768, 16
    cache = full_cache(shape, 1, length, kind, torch.bfloat16, 64, generator)
    q = queries(chunk, shape, torch.bfloat16, generator)
    starts = torch.tensor([0, chunk], dtype=torch.int32, device="cuda")
    given = (*cache.pages, cache.table, cache.lengths)
    scale = shape.head_dim**-0.5
    y = torch.ops.quantkit.prefill_attention(q, *given, starts, scale)
    assert relative_error(y, exact(q, cache, chunk, scale)) < ERROR_BOUND
    y = torch.ops.quantkit.decode_attention(q[:1], *given, scale)
    assert relative_error(y, exact(q[:1], cache, 1, scale)) < ERROR_BOUND
