"""Pages of keys and values: sizes, rounding, and the kernel that writes them after RoPE, to the bit where rounding allows."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.errors import QuantKitError
from quantkit.kernels import attention_cpu, attention_ops, cpu, kv_operands, rope_write
from quantkit.kernels.kv_pages import (
    FLOOR,
    KINDS,
    KVPages,
    dequantize,
    groups_of,
    hadamard,
    pack_int4,
    quantize,
    rotate,
    unpack_int4,
)
from rounding import DEVICE, FP8, GPU, triton_runs

assert attention_ops.SCHEMAS  # defines the ops


def test_a_page_has_the_bytes_of_its_table():
    sizes = {
        kind: KVPages.allocate(kind, 2, 8, 128, page_size=16).bytes_per_token // 8  # of a head
        for kind in KINDS
    }
    assert sizes == {"bf16": 512, "int8": 264, "fp8": 264, "int4": 64 + 16 + 64 + 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="int3"), "kind is int3, expected one of bf16, int8, fp8, int4"),
        (dict(page_size=48), "page_size is 48, expected one of 16, 32, 64, 128, 256"),
        (dict(head_dim=80), "head_dim is 80, expected one of 16, 32, 64, 128, 256"),
        (dict(dtype=torch.float64), "dtype is torch.float64, expected one of float32, float16, bfloat16"),
    ],
)
def test_pages_that_there_are_none_of_are_refused(changes, message):
    with pytest.raises(QuantKitError, match=f"kv_pages: {message}; choose"):
        KVPages.allocate(**dict(kind="int8", pages=1, kv_heads=1, head_dim=64) | changes)


@pytest.mark.parametrize("D", [16, 32, 64, 128, 256])
def test_int4_words_hold_a_code_of_each_quarter(D):
    codes = torch.randint(0, 16, (3, D), generator=torch.Generator().manual_seed(0))
    packed = pack_int4(codes)
    assert packed.shape == (3, D // 2)
    assert torch.equal(unpack_int4(packed), codes.int())
    word = packed[0, 0].int() | packed[0, 1].int() << 8
    code = codes[0, :: D // 4].tolist()
    expected = code[0] << 1 | code[1] << 5 | code[2] << 9 | (code[3] & 7) << 13 | code[3] >> 3
    assert word == expected


def test_hadamard_is_its_own_inverse():
    for n in (1, 2, 64, 256):
        torch.testing.assert_close(hadamard(n) @ hadamard(n), torch.eye(n))
    x = torch.randn(5, 128, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_values_are_rounded_by_half_a_step_at_most(kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, 128, generator=g) * torch.logspace(-6, 4, 40)[:, None, None]
    x[3] = 0
    x[4] = 7.3  # no spread at all
    x[5, 0, 9] *= 300
    groups = groups_of(128) if kind == "int4" else 1
    codes, scales = quantize(x, kind, groups)
    y = dequantize(codes, scales, kind)
    if kind == "fp8":
        step = torch.maximum(
            x.abs() * 2**-3, scales[..., None] * 2**-9
        )  # e4m3 has 3 bits, subnormals of 2^-9
    elif kind == "int8":
        step = scales[..., None].expand_as(x)
    else:  # codes are two scales apart; rounding a scale down to 8 bits cuts the ends of the range by 15 / 256 of it
        step = 2.15 * scales[..., 0].repeat_interleave(128 // groups, -1)
    assert ((x - y).abs() <= step / 2 * (1 + 2**-20)).all()
    assert torch.equal(y[3], torch.zeros_like(y[3])) or kind == "int4"
    assert (y[3].abs() <= 15 * FLOOR).all()


@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.int8), ("fp8", FP8)])
def test_8_bits_are_rounded_as_activations_are(kind, dtype):
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(x, kind)
    expected, of_rows = cpu.quantize_activations(x, dtype)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales[:, None], of_rows)


def run_ptx(asm: str, register: int, outputs: int) -> list[np.ndarray]:
    """What the few instructions of `kv_operands.py` make of one register: pairs of float16."""
    held = {f"${outputs}": register}
    pair = lambda word: np.array([word & 0xFFFF, word >> 16], np.uint16).view(np.float16)
    for line in asm.splitlines():
        if line[:1] in "{}." or not line:
            continue
        operation, _, rest = line.rstrip(";").partition(" ")
        to, *names = rest.split(", ")
        a, *more = (held[name] if name in held else int(name, 0) for name in names)
        match operation:
            case "mov.b32":
                result = a
            case "xor.b32":
                result = a ^ more[0]
            case "and.b32":
                result = a & more[0]
            case "shl.b32":
                result = a << more[0] & 0xFFFFFFFF
            case "shr.u32":
                result = a >> more[0]
            case "prmt.b32":
                result = sum(
                    ((a | more[0] << 32) >> 8 * (more[1] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4)
                )
            case "lop3.b32":
                assert more[2] == 0xEA
                result = a & more[0] | more[1]
            case "add.rn.f16x2":
                low, high = (pair(a) + pair(more[0])).view(np.uint16).tolist()
                result = low | high << 16
            case _:
                raise AssertionError(operation)
        held[to] = result
    return [pair(held[f"${i}"]) for i in range(outputs)]


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_the_instructions_for_operands_decode_what_the_format_says(kind):
    asm = {"int8": kv_operands.INT8, "fp8": kv_operands.FP8, "int4": kv_operands.INT4}[kind].value
    g = torch.Generator().manual_seed(0)
    for low, high in torch.randint(0, 2**16, (2000, 2), generator=g).tolist():
        planes = run_ptx(asm, low | high << 16, kv_operands.COUNTS[kind])
        for i, word in enumerate((low, high)):
            codes = torch.tensor([word & 0xFF, word >> 8], dtype=torch.uint8)
            if kind == "int8":
                expected = codes.view(torch.int8).float()
            elif kind == "fp8":  # without the NaNs, which nothing writes
                expected = torch.where(codes & 0x7F == 0x7F, torch.nan, codes.view(FP8).float() / 256)
            else:
                expected = 2 * unpack_int4(codes) * torch.tensor([1, 16, 1, 16]) / kv_operands.INT4_STEP.value
            found = torch.tensor([float(plane[i]) for plane in planes])
            assert torch.equal(found[~expected.isnan()], expected[~expected.isnan()].float())


def operands(D: int, heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv as columns of a wider tensor, cos, sin and slots of four tokens, of which the third is written nowhere."""
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(4, (heads + 2 * kv_heads) * D + 16, generator=g)
    wide[:, 16 + D // 3 :: D] *= 20
    angles = torch.tensor([0, 1, 77, 4000.0])[:, None] * 10000 ** (-torch.arange(D // 2) / (D // 2))
    cos, sin = (f(torch.cat([angles, angles], 1)).to(DEVICE, dtype) for f in (torch.cos, torch.sin))
    slots = torch.tensor([17, 0, -1, 63], device=DEVICE)
    return wide.to(DEVICE, dtype)[:, 16:], cos, sin, slots


def poisoned(kind: str, kv_heads: int, D: int, dtype: torch.dtype) -> KVPages:
    pages = KVPages.allocate(kind, 4, kv_heads, D, page_size=16, dtype=dtype, device=DEVICE)
    for t in list(pages)[:4]:
        if t is not None:
            t.view(torch.uint8).fill_(0xFF)
    return pages


def unequal(a: KVPages, b: KVPages) -> int:
    """Bytes of two pages that differ."""
    pairs = zip(list(a)[:4], list(b)[:4], strict=True)
    return sum(int((x.view(torch.uint8) != y.view(torch.uint8)).sum()) for x, y in pairs if x is not None)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by transformers for x [T, heads, D]."""
    return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)[0]


SIZES = [
    (64, 4, 2),
    (128, 18, 2),
    (16, 3, 1),
    (32, 2, 2),
    (256, 1, 1),
]  # D, H (more than a program's), kv heads
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "heads", "kv_heads"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_transformers_makes_rounded(kind, D, heads, kv_heads, dtype):
    qkv, cos, sin, slots = operands(D, heads, kv_heads, dtype)
    q, k, v = qkv.unflatten(1, (-1, D)).split([heads, kv_heads, kv_heads], 1)
    expected = poisoned(kind, kv_heads, D, dtype)
    expected.write(turned(k, cos, sin), v, slots)
    q = turned(q, cos, sin)
    runs = [lambda *arguments: torch.ops.quantkit.rope_write(*arguments[:4], *arguments[4])]
    if triton_runs(dtype) and dtype != torch.float32:
        runs.append(lambda *arguments: rope_write.rope_write_triton(*arguments, None, None, 0.0))
    for run in runs:
        pages = poisoned(kind, kv_heads, D, dtype)
        found = run(qkv, cos, sin, slots, pages)
        assert found.shape == q.shape
        if kind != "int4":
            assert torch.equal(found, q)
            assert unequal(pages, expected) == 0
            continue
        # the product with H adds up in any order: D sums of float32, then one rounding of q
        error = D * 2**-23 * (q.double().abs().sum(-1, keepdim=True) * D**-0.5)
        bound = error + torch.finfo(dtype).eps / 2 * (rotate(q.double()).abs() + error) * 1.01
        assert ((found.double() - rotate(q.double())).abs() <= bound + 2**-24).all()
        # which moves a code by one where it is near the middle of two, seldom, and a pair by a unit of bfloat16
        assert unequal(pages, expected) <= 0.02 * 3 * kv_heads * (D + 20) + 2
        there = slots[slots >= 0]
        for a, b in zip(pages.gather(there // 16), expected.gather(there // 16), strict=True):
            a, b = (t.unflatten(-2, (-1, 16))[:, torch.arange(3), there % 16] for t in (a, b))
            assert ((a - b).abs() <= b.abs().amax(-1, keepdim=True) / 7).all()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_head_norms_come_before_rope(kind):
    D, heads, kv_heads, dtype = 64, 3, 1, torch.float16
    qkv, cos, sin, slots = operands(D, heads, kv_heads, dtype)
    q, k, v = qkv.unflatten(1, (-1, D)).split([heads, kv_heads, kv_heads], 1)
    norms = [Qwen3RMSNorm(D, 1e-5).to(DEVICE, dtype) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.weight.data += 0.1 * (i + 1) * torch.linspace(-1, 1, D).to(DEVICE, dtype)
    weights = [norm.weight.data for norm in norms]
    expected = poisoned(kind, kv_heads, D, dtype)
    expected.write(turned(norms[1](k), cos, sin), v, slots)
    q = turned(norms[0](q), cos, sin)
    q = rotate(q).to(dtype) if kind == "int4" else q
    pages = poisoned(kind, kv_heads, D, dtype)
    found = attention_cpu.rope_write_torch(qkv, cos, sin, slots, pages, *weights, 1e-5)
    assert torch.equal(found, q)
    assert unequal(pages, expected) == 0
    pages = poisoned(kind, kv_heads, D, dtype)
    found = rope_write.rope_write_triton(qkv, cos, sin, slots, pages, *weights, 1e-5)
    # float32's mean and root may turn the rounding of n, two more follow, then the product with H
    largest = q.abs().amax(-1, keepdim=True) * (4 if kind == "int4" else 1)
    assert ((found - q).abs() <= 4 * torch.finfo(dtype).eps * largest).all()
    assert unequal(pages, expected) <= 8
    if kind == "bf16":
        assert torch.equal(pages.values.nan_to_num(7), expected.values.nan_to_num(7))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_real_size_writes_what_the_definition_does(kind):
    g = torch.Generator().manual_seed(0)
    T, D, heads, kv_heads, dtype = 300, 128, 32, 8, torch.bfloat16
    qkv = torch.randn(T, (heads + 2 * kv_heads) * D, generator=g).to(DEVICE, dtype)
    cos, sin = (torch.randn(T, D, generator=g).to(DEVICE, dtype) for _ in range(2))
    slots = torch.randperm(320, generator=g)[:T].to(DEVICE)
    pages = [
        KVPages.allocate(kind, 5, kv_heads, D, page_size=64, dtype=dtype, device=DEVICE) for _ in range(2)
    ]
    for one in pages:
        for t in list(one)[:4]:
            if t is not None:
                t.view(torch.uint8).zero_()
    arguments = (qkv, cos, sin, slots)
    a = attention_cpu.rope_write_torch(*arguments, pages[0], None, None, 0.0)
    b = rope_write.rope_write_triton(*arguments, pages[1], None, None, 0.0)
    assert GPU
    if kind == "int4":
        torch.testing.assert_close(a, b)
        assert unequal(*pages) <= 0.01 * pages[0].nbytes
    else:
        assert torch.equal(a, b)
        assert unequal(*pages) == 0
