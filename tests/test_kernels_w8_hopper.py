"""Hopper's kernel for 8-bit weights: the order of its bytes and its launches anywhere, its products on the GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.kernels import cpu, fp8_block, ops, w8a8, w8a16  # noqa: F401
from quantkit.kernels.interleave import deinterleave, interleave
from quantkit.kernels.quantize_activations import quantize_activations
from quantkit.linear import QuantLinear
from quantkit.packing import QuantizedTensor
from quantkit.scheme import parse_scheme
from rounding import DEVICE, FP8, Random, assert_within

gpu = pytest.mark.gpu
codes_dtypes = pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])

# M: all blocks of rows, and ragged ones; N, K: one tile each, parts of a tile, several tiles a program
PRODUCTS = [
    (M, N, K)
    for N, K in ((4096, 4096), (28672, 4096), (4096, 14336), (336, 272), (200, 4112))
    for M in (1, 7, 16, 33, 64, 100, 256, 300, 1000)
]
products = pytest.mark.parametrize("product", PRODUCTS, ids=lambda s: "x".join(map(str, s)))
# see test_kernels_products.py
LOST_BY_FP8_TENSOR_CORES = 4 * 2**-13


@codes_dtypes
@pytest.mark.parametrize(("N", "K"), [(8, 128), (24, 40), (16, 392)])
def test_interleaving_moves_each_byte_to_its_place_and_back(random: Random, N, K, dtype):
    codes = random.bytes8(N, K, dtype)
    words = interleave(codes)
    assert words.shape == (N, 32 * -(-K // 128))
    assert torch.equal(deinterleave(words, K, dtype).view(torch.uint8), codes.view(torch.uint8))
    placed = words.view(torch.uint8)
    for half, c, kt, e, c8 in torch.cartesian_prod(
        torch.arange(2), torch.arange(4), torch.arange(4), torch.arange(2), torch.arange(2)
    ).tolist():
        column = 64 * half + 16 * kt + 8 * c8 + 2 * c + e
        if column < K:
            expected = codes.view(torch.uint8)[:, column]
            assert torch.equal(placed[:, 64 * half + 16 * c + 4 * kt + 2 * e + c8], expected)


@codes_dtypes
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_interleaved_op_is_the_neutral_one(random: Random, dtype, x_dtype):
    M, N, K = 3, 40, 264
    x, codes, scales = (
        random.x(M, K, x_dtype).cpu(),
        random.bytes8(N, K, dtype).cpu(),
        random.scales(N, 1).cpu(),
    )
    bias = random.bias(N, x_dtype).cpu()
    y = torch.ops.quantkit.w8a16_interleaved(x, interleave(codes), scales, bias, dtype == torch.int8)
    assert torch.equal(y, cpu.w8a16_dequantize(x, codes, scales, bias))


@pytest.mark.parametrize("x_bytes", [1, 2])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("M", [1, 8, 9, 64, 65, 128, 300, 4096])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (28672, 4096), (4096, 14336), (8, 16), (57344, 8192)])
def test_launches_fit_a_multiprocessor(M, N, K, x_bytes, blocks):
    hopper = pytest.importorskip("quantkit.kernels.w8_hopper")
    blocks = blocks and x_bytes == 1
    launch, x_left = hopper.config(M, N, K, x_bytes, blocks), hopper.x_is_left(M, blocks)
    assert hopper.shared_bytes(launch, x_bytes, x_left) <= hopper.SHARED
    assert launch["stages"] >= 3
    assert launch["block_m" if x_left else "block_n"] in (64, 128)
    programs = launch["programs"] or hopper.tiles_of(launch, M, N)
    if 132 < programs <= 264 and launch["block_m"] <= 64:
        assert hopper.two_fit(launch, x_bytes, x_left)


@gpu
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16], ids=str)
@codes_dtypes
@products
def test_w8a8(random: Random, product, dtype, x_dtype):
    from quantkit.kernels.w8_hopper import w8a8_hopper

    M, N, K = product
    x, codes, scales = random.x(M, K, x_dtype), random.bytes8(N, K, dtype), random.scales(N, 1)
    bias = random.bias(N, x_dtype) if M % 2 else None
    x_codes, x_scales = quantize_activations(x, dtype)
    typed = x_codes.view(dtype)
    expected = w8a8.reference(typed, x_scales, codes, scales, bias)
    magnitude = (typed.double().abs() * x_scales) @ (codes.double().abs() * scales).T
    magnitude += bias.double().abs() if bias is not None else 0
    operands = (typed, x_scales, codes, scales, bias, x_dtype)
    y = w8a8_hopper(*operands)
    assert_within(y, expected, magnitude, K, lost=LOST_BY_FP8_TENSOR_CORES * (dtype == FP8))
    assert torch.equal(y, w8a8_hopper(*operands))


@gpu
@pytest.mark.parametrize("programs", [0, 38, 29])  # a tile each, several whole ones, ranges that cut tiles
@pytest.mark.parametrize("x_dtype", [None, torch.bfloat16], ids=["8 bits", "16 bits"])
def test_more_blocks_of_x_than_go_through_the_weight_together(random: Random, x_dtype, programs):
    """Groups of 16 blocks of x, of 16-bit x 4, and a last one that is not full, of 38 blocks by 3."""
    from quantkit.kernels.w8_hopper import w8a8_hopper, w8a16_hopper

    M, N, K = 300, 136, 1104
    launch = dict(block_m=8, block_n=64, stages=4, programs=programs)
    x, codes, scales = random.x(M, K, torch.bfloat16), random.bytes8(N, K, torch.int8), random.scales(N, 1)
    if x_dtype is None:
        given, x_scales = quantize_activations(x, torch.int8)
        y = w8a8_hopper(given, x_scales, codes, scales, None, torch.bfloat16, launch=launch)
    else:
        given, x_scales = x, torch.ones(M, 1, device=DEVICE)
        y = w8a16_hopper(x, interleave(codes), scales, None, True, launch)
    expected = w8a8.reference(given, x_scales, codes, scales, None)
    magnitude = (given.double().abs() * x_scales) @ (codes.double().abs() * scales).T
    assert_within(y, expected, magnitude, K)


@gpu
@pytest.mark.parametrize("K", [4096, 14336])
@pytest.mark.parametrize("M", [16, 300])
def test_sums_of_e4m3_products(random: Random, M, K):
    """Accurate: as good as sums in float32. Fast: an error that grows with the tensor cores' sum, and no more."""
    from quantkit.kernels.w8_hopper import w8a8_hopper

    N, x_dtype = 4096, torch.bfloat16
    x, codes, scales = random.x(M, K, x_dtype), random.bytes8(N, K, FP8), random.scales(N, 1)
    x_codes, x_scales = quantize_activations(x, FP8)
    operands = (x_codes.view(FP8), x_scales, codes, scales, None)
    expected = w8a8.reference(*operands)
    in_float32 = (x_codes.view(FP8).float() @ codes.float().T * x_scales * scales.T).to(x_dtype)

    def error(y):
        return ((y.double() - expected).norm() / expected.norm()).item()

    assert error(w8a8_hopper(*operands, x_dtype)) <= 1.1 * error(in_float32)
    fast = w8a8_hopper(*operands, x_dtype, fast=True)
    magnitude = (x_codes.view(FP8).double().abs() * x_scales) @ (codes.double().abs() * scales).T
    # each instruction adds 32 columns to a sum of which 13 bits stay
    assert_within(fast, expected, magnitude, K, lost=K / 32 * 2**-13)
    assert error(fast) > 1.01 * error(in_float32)  # or the mode does nothing


@gpu
@products
def test_fp8_block(random: Random, product):
    from quantkit.kernels.w8_hopper import fp8_block_hopper

    M, N, K = product
    x, codes = random.x(M, K, torch.bfloat16), random.bytes8(N, K, FP8)
    scales = random.scales(-(-N // 128), -(-K // 128))
    x_codes, x_scales = quantize_activations(x, FP8, group_size=128)
    expected = fp8_block.reference(x_codes.view(FP8), x_scales, codes, scales, None)
    wide = x_codes.view(FP8).double() * x_scales.double().repeat_interleave(128, 1)[:, :K]
    magnitude = wide.abs() @ (codes.double() * cpu.expand_blocks(scales, N, K)).abs().T
    operands = (x_codes.view(FP8), x_scales, codes, scales, None, torch.bfloat16)
    y = fp8_block_hopper(*operands)
    assert_within(y, expected, magnitude, K, lost=LOST_BY_FP8_TENSOR_CORES)
    assert torch.equal(y, fp8_block_hopper(*operands))


@gpu
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16], ids=str)
@codes_dtypes
@products
def test_w8a16(random: Random, product, dtype, x_dtype):
    from quantkit.kernels.w8_hopper import w8a16_hopper

    M, N, K = product
    x, codes, scales = random.x(M, K, x_dtype), random.bytes8(N, K, dtype), random.scales(N, 1)
    bias = random.bias(N, x_dtype) if M % 2 else None
    expected = w8a16.reference(x, codes, scales, bias)
    magnitude = x.double().abs() @ (codes.double().abs() * scales).T
    magnitude += bias.double().abs() if bias is not None else 0
    words = interleave(codes)
    y = w8a16_hopper(x, words, scales, bias, dtype == torch.int8)
    assert_within(y, expected, magnitude, K)
    assert torch.equal(y, w8a16_hopper(x, words, scales, bias, dtype == torch.int8))


@gpu
@codes_dtypes
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_code_reaches_the_tensor_cores_as_its_own_number(dtype, x_dtype):
    from quantkit.kernels.w8_hopper import w8a16_hopper

    every = torch.arange(256, device=DEVICE).to(torch.uint8).view(dtype)
    every = every[every.float().isfinite() & (every.float() > -128.5 if dtype == torch.int8 else True)]
    codes = (
        every.repeat(256)[: 256 * len(every) // 256 * 256].view(-1, 128)[: len(every) // 8 * 8].contiguous()
    )
    x = torch.eye(128, device=DEVICE, dtype=x_dtype)
    ones = torch.ones(len(codes), 1, device=DEVICE)
    y = w8a16_hopper(x, interleave(codes), ones, None, dtype == torch.int8)
    assert torch.equal(y.T, codes.to(x_dtype))


@codes_dtypes
@pytest.mark.parametrize("static", [False, True], ids=["token", "static"])
def test_a_product_of_rounded_x_is_the_product_of_x(random: Random, dtype, static):
    M, N, K = 3, 48, 160
    x, codes, scales = random.x(M, K, torch.float16), random.bytes8(N, K, dtype), random.scales(N, 1)
    bias, fixed = random.bias(N, torch.float16), torch.tensor([0.1], device=DEVICE) if static else None
    op = torch.ops.quantkit
    x_codes, x_scales = quantize_activations(x, dtype, fixed)
    y = op.w8a8_rounded(x_codes.view(dtype), x_scales, codes, scales, bias, torch.float16)
    assert torch.equal(y, op.w8a8(x, codes, scales, fixed, bias))
    if dtype == FP8:
        tiles = random.scales(1, 2)
        x_codes, x_scales = quantize_activations(x, dtype, group_size=128)
        y = op.fp8_block_rounded(x_codes.view(FP8), x_scales, codes, tiles, bias, torch.float16)
        assert torch.equal(y, op.fp8_block(x, codes, tiles, bias))


def test_rounded_x_that_does_not_fit_is_refused(random: Random):
    codes, scales = random.bytes8(16, 32, torch.int8), random.scales(16, 1)
    x_codes, x_scales = random.bytes8(2, 32, torch.int8), random.scales(2, 1)
    op = torch.ops.quantkit.w8a8_rounded
    with pytest.raises(ValueError, match="x_codes is float8_e4m3fn and codes int8"):
        op(x_codes.view(FP8), x_scales, codes, scales, None, torch.float16)
    with pytest.raises(ValueError, match=r"x_scales is float32 \[2\], expected float32 \[2, 1\] or \[1, 1\]"):
        op(x_codes, x_scales[:, 0], codes, scales, None, torch.float16)
    apart = random.scales(2, 3)[:, :1]
    with pytest.raises(ValueError, match=r"x_scales is on .* with strides \(3, 1\), expected .* contiguous"):
        op(x_codes, apart, codes, scales, None, torch.float16)
    with pytest.raises(ValueError, match=r"x_codes has shape \[\], expected \[..., K\]"):
        op(x_codes[0, 0], x_scales, codes, scales, None, torch.float16)
    with pytest.raises(ValueError, match="dtype is int8, expected float32 or float16 or bfloat16"):
        op(x_codes, x_scales, codes, scales, None, torch.int8)
    with pytest.raises(ValueError, match=r"strides \(1, 2\), expected .* contiguous"):
        op(x_codes.T.contiguous().T, x_scales, codes, scales, None, torch.float16)


@gpu
def test_rows_of_x_at_any_address(random: Random):
    M, N, K = 5, 256, 256
    codes, scales = random.bytes8(N, K, torch.int8), random.scales(N, 1)
    wide = random.x(M, K + 8, torch.bfloat16)
    words = interleave(codes)
    for shift in (1, 8):
        x = wide[:, shift : shift + K]
        y = torch.ops.quantkit.w8a16_interleaved(x, words, scales, None, True)
        assert torch.equal(y, torch.ops.quantkit.w8a16_interleaved(x.contiguous(), words, scales, None, True))


@gpu
def test_codes_at_any_address(random: Random):
    M, N, K = 5, 256, 256
    held = random.bytes8(1, N * K + 1, torch.int8)[0]
    x, scales = random.x(M, K, torch.bfloat16), random.scales(N, 1)
    codes = held[1:].view(N, K)
    y = torch.ops.quantkit.w8a8(x, codes, scales, None, None)
    assert torch.equal(y, torch.ops.quantkit.w8a8(x, codes.clone(), scales, None, None))


@gpu
@pytest.mark.parametrize("label", ["w8a16", "fp8-w8a16"])
def test_a_linear_holds_its_weight_once_and_gives_it_back(random: Random, label):
    N, K = 264, 392
    scheme = parse_scheme(label)
    dtype = torch.int8 if scheme.weight == "int8" else FP8
    q = QuantizedTensor(scheme, (N, K), random.bytes8(N, K, dtype), random.scales(N, 1))
    module = QuantLinear.from_quantized(q)
    x = random.x(3, K, torch.bfloat16)
    before = module(x)
    module.repack(torch.bfloat16)
    assert module.codes is None
    assert module.weight_bytes == N * 512 + 4 * N
    magnitude = x.double().abs() @ (q.codes.double().abs() * q.scales).T
    assert_within(module(x), before.double(), magnitude, K, roundings=1)
    assert torch.equal(module.state_dict()["codes"].view(torch.uint8), q.codes.view(torch.uint8))
    module.cpu()
    assert torch.equal(module.codes.view(torch.uint8), q.codes.view(torch.uint8).cpu())
