"""Hopper's kernel for INT4 weights beside int8 x: the order of its codes and its launches anywhere, its products on the GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.kernels import ops, w4a8, w4a16  # noqa: F401
from quantkit.kernels.interleave import deinterleave_int4, interleave_int4, not_interleavable_int4
from quantkit.kernels.quantize_activations import quantize_activations
from quantkit.linear import QuantLinear, repacked_op
from quantkit.packing import QuantizedTensor, unpack_codes
from quantkit.scheme import parse_scheme
from rounding import DEVICE, Random, assert_within

gpu = pytest.mark.gpu
asymmetric = pytest.mark.parametrize("asymmetric", [False, True], ids=["", "asym"])

# M: all blocks of rows, and ragged ones; N, K: one tile each, parts of a tile, several tiles a program
PRODUCTS = [
    (M, N, K)
    for N, K in ((4096, 4096), (28672, 4096), (4096, 14336), (336, 272), (208, 4112))
    for M in (1, 7, 16, 33, 64, 100, 256, 300, 1000)
]
products = pytest.mark.parametrize("product", PRODUCTS, ids=lambda s: "x".join(map(str, s)))


def weights(random: Random, N: int, K: int, group_size: int, asymmetric: bool, dtype=torch.bfloat16):
    """Neutral codes, scales and zeros."""
    groups = -(-K // group_size) if group_size else 1
    zeros = random.zeros(N, groups) if asymmetric else None
    return random.codes(N, K, 4), random.scales(N, groups, dtype=dtype), zeros


@asymmetric
@pytest.mark.parametrize(("N", "K"), [(16, 128), (32, 48), (48, 400)])
def test_interleaving_moves_each_code_to_its_place_and_back(random: Random, N, K, asymmetric):
    neutral = weights(random, N, K, 128, asymmetric)
    words, scales, zeros = interleave_int4(*neutral, K)
    assert words.shape == (N, 16 * -(-K // 128))
    assert torch.equal(scales, neutral[1].T)
    assert asymmetric == (zeros is not None)
    back = deinterleave_int4(words, scales, zeros, K)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(back, neutral, strict=True))
    q, placed = unpack_codes(neutral[0], K, 4), words.view(torch.uint8)
    for column in range(K):
        t, kt, half, c, i = column // 128, column // 32 % 4, column // 16 % 2, column // 4 % 4, column % 4
        code = placed[:, 64 * t + 16 * c + 4 * kt + i] >> 4 * half & 0xF
        assert torch.equal(code, (q[:, column] ^ (0 if asymmetric else 8)).to(torch.uint8))


@asymmetric
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_interleaved_op_is_the_neutral_one(random: Random, x_dtype, group_size, asymmetric):
    M, N, K = 3, 48, 272
    x, bias = random.x(M, K, x_dtype).cpu(), random.bias(N, x_dtype).cpu()
    neutral = [None if t is None else t.cpu() for t in weights(random, N, K, group_size, asymmetric)]
    y = torch.ops.quantkit.w4a8_interleaved(x, *interleave_int4(*neutral, K), bias, group_size)
    assert torch.equal(y, torch.ops.quantkit.w4a8(x, *neutral, bias, group_size))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_product_of_rounded_x_is_the_product_of_x(random: Random, interleaved):
    M, N, K = 4, 48, 272
    x, bias = random.x(M, K, torch.float16), random.bias(N, torch.float16)
    neutral = weights(random, N, K, 128, asymmetric=True)
    op, held = ("w4a8_interleaved", interleave_int4(*neutral, K)) if interleaved else ("w4a8", neutral)
    x_codes, x_scales = quantize_activations(x, torch.int8)
    multiply = getattr(torch.ops.quantkit, f"{op}_rounded")
    y = multiply(x_codes.view(2, 2, K), x_scales, *held, bias, 128, torch.float16)
    assert torch.equal(y.view(M, N), getattr(torch.ops.quantkit, op)(x, *held, bias, 128))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(multiply, (x_codes, x_scales, *held, bias, 128, torch.float16), test_utils=tests)
    assert multiply(x_codes[:0], x_scales[:0], *held, bias, 128, torch.float16).shape == (0, N)
    with pytest.raises(ValueError, match=rf"{op}: x_codes is float16, expected int8"):
        multiply(x, x_scales, *held, bias, 128, torch.float16)
    with pytest.raises(ValueError, match=r"x_scales is float32 \[1, 1\], expected float32 \[4, 1\]"):
        multiply(x_codes, x_scales[:1], *held, bias, 128, torch.float16)


@pytest.mark.parametrize(
    ("label", "N", "K", "op"),
    [
        ("w4a8", 4096, 4096, "w4a8_interleaved"),
        ("w4a8-channel", 4096, 4096, "w4a8_interleaved"),
        ("w4a8-g128-asym", 4096, 4096, "w4a8_interleaved"),
        ("w4a8-g64", 4096, 4096, None),
        ("w4a8", 4104, 4096, None),
        ("w4a8", 4096, 4104, None),
        ("w4a8-channel", 4096, 2**17 + 2**12, None),  # sums past int32
    ],
)
def test_weights_that_hoppers_kernel_takes_are_interleaved(label, N, K, op):
    scheme = parse_scheme(label)
    assert repacked_op(scheme, "sm_90", N, K, torch.bfloat16) == op
    assert repacked_op(scheme, "sm_90", N, K, torch.float32) is None
    assert repacked_op(scheme, "sm_80", N, K, torch.bfloat16) is None
    assert (not_interleavable_int4(N, K, scheme.group_size or 0, torch.bfloat16) is None) == (op is not None)


def test_weights_that_hoppers_kernel_cannot_sum_are_refused():
    op = torch.ops.quantkit.w4a8_interleaved
    x, words = torch.zeros(1, 256), torch.zeros(16, 32, dtype=torch.int32)
    with pytest.raises(ValueError, match="group_size is 64, expected a multiple of 128"):
        op(x, words, torch.zeros(4, 16), None, None, 64)
    K = 2**17 + 2**12
    with pytest.raises(ValueError, match=f"K is {K}, expected at most 132104 with one scale a row"):
        op(torch.zeros(1, K), torch.zeros(16, K // 8, dtype=torch.int32), torch.zeros(1, 16), None, None, 0)


@pytest.mark.parametrize("M", [1, 8, 9, 32, 64, 65, 128, 300, 4096])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (28672, 4096), (4096, 14336), (16, 16), (57344, 8192)])
def test_launches_fit_a_multiprocessor(M, N, K):
    hopper = pytest.importorskip("quantkit.kernels.w4a8_hopper")
    launch = hopper.config(M, N, K)
    assert hopper.shared_bytes(launch) <= hopper.SHARED
    assert launch["stages"] >= 4
    assert launch["block_n"] in (64, 128)
    programs = launch["programs"] or hopper.tiles_of(launch, M, N)
    if 132 < programs <= 264 and launch["block_m"] <= 64:
        assert hopper.two_fit(launch)


def check(
    random: Random,
    product,
    group_size: int,
    asymmetric: bool,
    dtype: torch.dtype,
    scale_dtype=None,
    launch=None,
):
    from quantkit.kernels.w4a8_hopper import w4a8_hopper

    M, N, K = product
    x_codes, x_scales = quantize_activations(random.x(M, K, dtype), torch.int8)
    neutral = weights(random, N, K, group_size, asymmetric, scale_dtype or dtype)
    bias = random.bias(N, dtype) if M % 2 else None
    expected = w4a8.reference(x_codes, x_scales, *neutral, bias, group_size)
    magnitude = (x_codes.double().abs() * x_scales) @ w4a16.dequantize(*neutral, group_size, K).abs().T
    magnitude += bias.double().abs() if bias is not None else 0
    operands = (x_codes, x_scales, *interleave_int4(*neutral, K), bias, group_size, dtype)
    poison = torch.full((M, N), float("nan"), device=DEVICE, dtype=dtype)
    del poison  # the allocator hands its memory to y
    y = w4a8_hopper(*operands, launch)
    assert_within(y, expected, magnitude, K)
    assert torch.equal(y, w4a8_hopper(*operands, launch))


@gpu
@pytest.mark.parametrize("programs", [0, 38, 29])  # a tile each, several whole ones, ranges that cut tiles
def test_more_blocks_of_x_than_go_through_the_weight_together(random: Random, programs):
    launch = dict(block_m=8, block_n=64, stages=4, programs=programs)
    check(random, (300, 144, 1152), 128, False, torch.bfloat16, launch=launch)


@gpu
@asymmetric
@products
def test_groups(random: Random, product, asymmetric):
    check(random, product, 128, asymmetric, torch.bfloat16)


@gpu
@asymmetric
@pytest.mark.parametrize("group_size", [0, 256])
@pytest.mark.parametrize("product", [(5, 336, 272), (64, 28672, 4096), (200, 4096, 4096), (1000, 208, 4112)])
def test_other_groups_and_float16(random: Random, product, group_size, asymmetric):
    check(random, product, group_size, asymmetric, torch.float16, torch.float32 if product[0] % 2 else None)


@gpu
@asymmetric
def test_every_code_and_zero_reaches_the_tensor_cores_as_its_own_number(asymmetric):
    from quantkit.kernels.w4a8_hopper import w4a8_hopper
    from quantkit.packing import pack_codes

    q = torch.arange(16, device=DEVICE).repeat(64, 8)  # [64, 128], shifted from row to row
    q = torch.stack([row.roll(n) for n, row in enumerate(q)])
    zeros = (torch.arange(64, device=DEVICE) % 16).to(torch.uint8)[:, None] if asymmetric else None
    scales = torch.ones(64, 1, device=DEVICE, dtype=torch.bfloat16)
    x = torch.eye(128, device=DEVICE, dtype=torch.int8)
    ones = torch.ones(128, 1, device=DEVICE)
    held = interleave_int4(pack_codes(q, 4), scales, zeros, 128)
    y = w4a8_hopper(x, ones, *held, None, 128, torch.bfloat16)
    assert torch.equal(y.T, (q - (8 if zeros is None else zeros.int())).bfloat16())


@gpu
@pytest.mark.parametrize("label", ["w4a8", "w4a8-g128-asym", "w4a8-channel"])
def test_a_linear_holds_its_weight_once_and_gives_it_back(random: Random, label):
    N, K = 272, 400
    scheme = parse_scheme(label)
    neutral = weights(random, N, K, scheme.group_size or 0, not scheme.symmetric)
    module = QuantLinear.from_quantized(QuantizedTensor(scheme, (N, K), *neutral))
    x = random.x(3, K, torch.bfloat16)
    x_codes, x_scales = quantize_activations(x, torch.int8)
    w = w4a16.dequantize(*neutral, scheme.group_size or 0, K)
    module.repack(torch.bfloat16)
    assert module.codes is None
    groups = neutral[1].shape[1]
    assert module.weight_bytes == N * 256 + N * groups * (2 if scheme.symmetric else 3)
    magnitude = (x_codes.double().abs() * x_scales) @ w.abs().T
    assert_within(module(x), (x_codes.double() * x_scales) @ w.T, magnitude, K)
    assert torch.equal(module.state_dict()["codes"], neutral[0])
    module.cpu()
    assert torch.equal(module.codes, neutral[0].cpu())
    assert torch.equal(module.scales, neutral[1].cpu())
