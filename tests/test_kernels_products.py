"""Every product kernel against its float64 reference, within the rounding that its formula allows.

Without a GPU the Triton kernels run in Triton's interpreter, at small shapes and not in bfloat16, whose bit patterns
its `tl.dot` multiplies as they are, and to which it cuts float32 without rounding; the CPU's own kernels run in all three types. The cases marked gpu are the same at
the sizes of real layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.kernels import cpu, dequantize, fp8_block, int4pack, ops, w4a8, w4a16, w8a8, w8a16, wna16
from quantkit.kernels.dispatch import native_fp8, target_of
from quantkit.kernels.interleave import interleave_int4
from quantkit.kernels.quantize_activations import quantize_activations
from quantkit.packing import QuantizedTensor
from quantkit.scheme import parse_scheme
from rounding import DEVICE, FP8, GPU, Random, assert_within, triton_runs

gpu = pytest.mark.gpu

DTYPES = [torch.float16, torch.float32, torch.bfloat16]
SHAPES = [  # M, N, K
    (1, 64, 128),  # decode, nothing ragged
    (3, 130, 40),  # N past two tiles, K shorter than one tile and not a multiple of 32
    (17, 72, 100),  # the second launch configuration, K not a multiple of 8
    (70, 136, 288),  # the third, M and N past one tile, K with a ragged group of 64 and of 128
    pytest.param((1, 4096, 4096), marks=gpu),
    pytest.param((16, 14336, 4096), marks=gpu),
    pytest.param((33, 4096, 14336), marks=gpu),
    pytest.param((257, 6144, 4096), marks=gpu),
    pytest.param((5, 1000, 4100), marks=gpu),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
codes_dtypes = pytest.mark.parametrize("codes_dtype", [torch.int8, FP8], ids=["int8", "fp8"])
biases = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym-bias"])
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
@dtypes
@shapes
def test_w4a16(random: Random, shape, dtype, group_size, asymmetric):
    M, N, K = shape
    groups = -(-K // group_size) if group_size else 1
    x, codes = random.x(M, K, dtype), random.int4(N, K)
    scales = random.scales(N, groups, dtype=torch.bfloat16)
    zeros = random.zeros(N, groups) if asymmetric else None
    b = random.bias(N, dtype) if asymmetric else None
    expected = w4a16.reference(x, codes, scales, zeros, b, group_size)
    w = w4a16.dequantize(codes, scales, zeros, group_size, K)
    magnitude = x.double().abs() @ w.abs().T + (0 if b is None else b.double().abs())

    if triton_runs(dtype):
        y = dequantize.w4a16_vendor(x, codes, scales, zeros, b, group_size)
        assert_within(y, expected, magnitude, K, roundings=1 + asymmetric)
    # the kernel that the op chooses may round w to x.dtype, and once before the bias is added
    y = torch.ops.quantkit.w4a16(x, codes, scales, zeros, b, group_size)
    assert_within(y, expected, magnitude, K, roundings=1 + asymmetric)


@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.float32], ids=str)
def test_w4a16_takes_scales_of_any_float(random: Random, scales_dtype):
    M, N, K, group_size = 2, 40, 96, 32
    x, codes = random.x(M, K, torch.float16), random.int4(N, K)
    scales, zeros = random.scales(N, 3, dtype=scales_dtype), random.zeros(N, 3)
    expected = w4a16.reference(x, codes, scales, zeros, None, group_size)
    w = w4a16.dequantize(codes, scales, zeros, group_size, K)
    y = dequantize.w4a16_vendor(x, codes, scales, zeros, None, group_size)
    assert_within(y, expected, x.double().abs() @ w.abs().T, K, roundings=1)


LOW_BITS = [  # bits, group_size, with zeros and bias
    (2, 0, False),
    (2, 32, True),
    (2, 64, False),
    (3, 0, True),
    (3, 32, False),
    (3, 128, True),
]


@pytest.mark.parametrize(("bits", "group_size", "asymmetric"), LOW_BITS)
@dtypes
@shapes
def test_wna16(random: Random, shape, dtype, bits, group_size, asymmetric):
    M, N, K = shape
    groups = -(-K // group_size) if group_size else 1
    x, codes = random.x(M, K, dtype), random.codes(N, K, bits)
    scales = random.scales(N, groups, dtype=torch.bfloat16)
    zeros = random.zeros(N, groups, bits=bits) if asymmetric else None
    b = random.bias(N, dtype) if asymmetric else None
    arguments = (x, codes, scales, zeros, b, group_size, bits)
    expected = wna16.reference(*arguments)
    w = wna16.dequantize(codes, scales, zeros, group_size, K, bits)
    magnitude = x.double().abs() @ w.abs().T + (0 if b is None else b.double().abs())

    if triton_runs(dtype):
        assert_within(wna16.wna16_triton(*arguments), expected, magnitude, K)
    if not GPU:  # w is rounded to x.dtype, and y once before the bias is added
        y = torch.ops.quantkit.wna16(*arguments)
        assert_within(y, expected, magnitude, K, roundings=1 + asymmetric)


@pytest.mark.parametrize(
    ("group_size", "asymmetric"), [(0, False), (0, True), (32, True), (64, False), (128, True)]
)
@dtypes
@shapes
def test_w4a8(random: Random, shape, dtype, group_size, asymmetric):
    M, N, K = shape
    groups = -(-K // group_size) if group_size else 1
    x, codes = random.x(M, K, dtype), random.codes(N, K, 4)
    scales = random.scales(N, groups, dtype=torch.bfloat16)
    zeros = random.zeros(N, groups) if asymmetric else None
    b = random.bias(N, dtype) if asymmetric else None
    x_codes, x_scales = quantize_activations(x, torch.int8)
    weights = (codes, scales, zeros, b, group_size)
    expected = w4a8.reference(x_codes, x_scales, *weights)
    w = w4a16.dequantize(codes, scales, zeros, group_size, K)
    magnitude = (x_codes.double().abs() * x_scales) @ w.abs().T
    magnitude += 0 if b is None else b.double().abs()

    if triton_runs(dtype):
        y = w4a8.w4a8_triton(x_codes, x_scales, *weights, dtype)
        assert_within(y, expected, magnitude, K)
    assert_within(torch.ops.quantkit.w4a8(x, *weights), expected, magnitude, K)


LABELS = [
    f"w{bits}a16-{rest}" for bits in (2, 3, 4) for rest in ("g32", "g64-asym", "channel", "channel-asym")
]


@pytest.mark.parametrize("label", LABELS)
def test_the_references_read_the_neutral_layout(random: Random, label):
    N, K, scheme = 24, 100, parse_scheme(label)
    group_size = scheme.group_size or 0
    groups = -(-K // group_size) if group_size else 1
    bits = scheme.bits
    codes, scales = random.codes(N, K, bits), random.scales(N, groups, dtype=torch.float16)
    zeros = None if scheme.symmetric else random.zeros(N, groups, bits=bits)
    weight = QuantizedTensor(scheme, (N, K), codes, scales, zeros)
    grouped = (codes, scales, zeros, group_size, K)
    assert torch.equal(wna16.dequantize(*grouped, bits), weight.dequantize(torch.float64))
    if bits == 4:
        assert torch.equal(w4a16.dequantize(*grouped), weight.dequantize(torch.float64))
    if not GPU:
        w = cpu.dequantize(*grouped, bits)
        assert torch.equal(w, weight.dequantize())


@biases
@codes_dtypes
@dtypes
@shapes
def test_w8a16(random: Random, shape, dtype, codes_dtype, bias):
    M, N, K = shape
    x, codes, scales = random.x(M, K, dtype), random.bytes8(N, K, codes_dtype), random.scales(N, 1)
    b = random.bias(N, dtype) if bias else None
    expected = w8a16.reference(x, codes, scales, b)
    magnitude = x.double().abs() @ (codes.double().abs() * scales).T + (b.double().abs() if bias else 0)

    if triton_runs(dtype):
        assert_within(w8a16.w8a16_triton(x, codes, scales, b), expected, magnitude, K)
        assert_within(
            dequantize.w8a16_vendor(x, codes, scales, b), expected, magnitude, K, roundings=1 + bias
        )
    if not GPU:
        assert_within(
            torch.ops.quantkit.w8a16(x, codes, scales, b), expected, magnitude, K, roundings=1 + bias
        )


def natives(dtype: torch.dtype) -> list[bool]:
    """The FP8 paths that can run here: the interpreter has both, a GPU the decoding one and perhaps its own."""
    return [False, True][: 1 + (not GPU or native_fp8(target_of(DEVICE)))] * triton_runs(dtype)


# An FP8 tensor core of Hopper aligns the products and the running sum of one instruction (32 columns) to the largest
# and keeps 13 bits below it; four instructions pass before the sum is promoted to float32.
LOST_BY_FP8_TENSOR_CORES = 4 * 2**-13


@biases
@pytest.mark.parametrize("static", [False, True], ids=["token", "static"])
@codes_dtypes
@dtypes
@shapes
def test_w8a8(random: Random, shape, dtype, codes_dtype, static, bias):
    M, N, K = shape
    x, codes, scales = random.x(M, K, dtype), random.bytes8(N, K, codes_dtype), random.scales(N, 1)
    b = random.bias(N, dtype) if bias else None
    input_scale = torch.tensor([0.1], device=DEVICE) if static else None
    x_codes, x_scales = quantize_activations(x, codes_dtype, input_scale)
    typed = x_codes if codes_dtype == torch.int8 else x_codes.view(FP8)
    expected = w8a8.reference(typed, x_scales, codes, scales, b)
    magnitude = (typed.double().abs() * x_scales) @ (codes.double().abs() * scales).T
    magnitude += b.double().abs() if bias else 0

    for native in natives(dtype) if codes_dtype == FP8 else [False] * triton_runs(dtype):
        y = w8a8.w8a8_rounded(x_codes, x_scales, codes, scales, b, dtype, native)
        assert_within(y, expected, magnitude, K, lost=LOST_BY_FP8_TENSOR_CORES * (native and GPU))
    y = torch.ops.quantkit.w8a8(x, codes, scales, input_scale, b)
    assert_within(y, expected, magnitude, K, lost=LOST_BY_FP8_TENSOR_CORES * (codes_dtype == FP8 and GPU))


@biases
@dtypes
@shapes
def test_fp8_block(random: Random, shape, dtype, bias):
    M, N, K = shape
    x, codes, scales = (
        random.x(M, K, dtype),
        random.bytes8(N, K, FP8),
        random.scales(-(-N // 128), -(-K // 128)),
    )
    b = random.bias(N, dtype) if bias else None
    x_codes, x_scales = quantize_activations(x, FP8, group_size=128)
    expected = fp8_block.reference(x_codes.view(FP8), x_scales, codes, scales, b)
    wide = x_codes.view(FP8).double() * x_scales.double().repeat_interleave(128, 1)[:, :K]
    w = codes.double() * cpu.expand_blocks(scales, N, K)
    magnitude = wide.abs() @ w.abs().T + (b.double().abs() if bias else 0)

    for native in natives(dtype):
        y = fp8_block.fp8_block_rounded(x_codes, x_scales, codes, scales, b, dtype, native)
        assert_within(y, expected, magnitude, K, lost=LOST_BY_FP8_TENSOR_CORES * (native and GPU))
    y = torch.ops.quantkit.fp8_block(x, codes, scales, b)
    assert_within(y, expected, magnitude, K, lost=LOST_BY_FP8_TENSOR_CORES * GPU)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 100, 7])
def test_grouped_codes_take_any_group_size_on_a_cpu(random: Random, group_size, bits):
    M, N, K = 3, 24, 100
    groups = -(-K // group_size)
    x, codes = random.x(M, K, torch.float32).cpu(), random.codes(N, K, bits).cpu()
    scales, zeros = random.scales(N, groups).cpu(), random.zeros(N, groups, bits=bits).cpu()
    arguments = (x, codes, scales, zeros, None, group_size)
    ops = torch.ops.quantkit
    y = ops.w4a16(*arguments) if bits == 4 else ops.wna16(*arguments, bits)
    expected = wna16.reference(*arguments, bits)
    assert_within(y, expected, x.double().abs() @ torch.full((K, N), 15 * 0.021).double(), K)


cpu_only = pytest.mark.skipif(GPU, reason="tests PyTorch's CPU kernels; run it where there is no GPU")
PACKED_SHAPES = [  # M, N, K
    (1, 64, 128),  # decode, one block of rows
    (3, 208, 256),  # three blocks and 16 rows over
    (129, 48, 384),  # past the rows that PyTorch's kernel is used for, and no whole block
]


@cpu_only
@biases
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_w4a16_in_the_order_of_the_cpu(random: Random, shape, group_size, asymmetric, bias):
    M, N, K = shape
    codes, scales = random.int4(N, K), random.scales(N, K // group_size, dtype=torch.bfloat16)
    zeros = random.zeros(N, K // group_size) if asymmetric else None
    b = random.bias(N, torch.bfloat16) if bias else None
    weights = int4pack.pack_cpu(codes, scales, zeros, group_size)
    assert torch.equal(int4pack.unpack_cpu(weights[0]), codes)

    w = w4a16.dequantize(codes, scales, zeros, group_size, K)
    for dtype in (torch.bfloat16, torch.float32):
        x = random.x(M, K, dtype)
        y = torch.ops.quantkit.w4a16_cpu(x, *weights, b, group_size)
        expected = w4a16.reference(x, codes, scales, zeros, b, group_size)
        magnitude = x.double().abs() @ w.abs().T + (b.double().abs() if bias else 0)
        # y or w is rounded before the bias and the residual are added
        assert_within(y, expected, magnitude, K, roundings=2)


@cpu_only
@pytest.mark.parametrize(
    ("N", "K", "group_size", "dtype", "reason"),
    [
        (24, 64, 32, torch.bfloat16, "needs N in multiples of 16, not 24"),
        (
            32,
            96,
            64,
            torch.bfloat16,
            "needs a group_size of 32, 64, 128, 256 that divides K, not 64 for K = 96",
        ),
        (
            32,
            64,
            0,
            torch.bfloat16,
            "needs a group_size of 32, 64, 128, 256 that divides K, not 0 for K = 64",
        ),
        (32, 64, 32, torch.float16, "needs bfloat16 x and scales, not torch.bfloat16 and torch.float16"),
    ],
)
def test_what_cannot_be_packed_says_why(random: Random, N, K, group_size, dtype, reason):
    assert int4pack.not_packable(N, K, group_size, torch.bfloat16, dtype) == reason
    scales = random.scales(N, -(-K // group_size) if group_size else 1, dtype=dtype)
    with pytest.raises(ValueError, match="pack_cpu: needs"):
        int4pack.pack_cpu(random.int4(N, K), scales, None, group_size)


@cpu_only
def test_w8a16_takes_codes_and_activations_at_any_address(random: Random):
    """PyTorch's int8 kernel loads from aligned addresses only: a tensor read from a file need not have one."""
    M, N, K = 2, 8, 32
    codes, x = random.bytes8(N, K, torch.int8), random.x(M, K, torch.bfloat16)
    scales = random.scales(N, 1)
    expected = w8a16.reference(x, codes, scales, None)
    magnitude = x.double().abs() @ (codes.double().abs() * scales).T
    for shift in (1, 8, 16):
        moved_codes = torch.zeros(N * K + shift, dtype=torch.int8)[shift:].view(N, K).copy_(codes)
        moved_x = torch.zeros(M * K + shift, dtype=torch.bfloat16)[shift:].view(M, K).copy_(x)
        y = torch.ops.quantkit.w8a16(moved_x, moved_codes, scales, None)
        assert_within(y, expected, magnitude, K, roundings=1)


@dataclass(frozen=True)
class Call:
    """One op with arguments for x [..., 40] and N = 24 on the test's device."""

    op: str
    weights: tuple

    def __call__(self, x: Tensor) -> Tensor:
        return getattr(torch.ops.quantkit, self.op)(x, *self.weights)


def calls(random: Random, dtype: torch.dtype = torch.float32) -> list[Call]:
    N, K = 24, 40
    b, s, one = random.bias(N, dtype), random.scales(N, 1), torch.ones(1, device=DEVICE)
    int8, fp8 = random.bytes8(N, K, torch.int8), random.bytes8(N, K, FP8)
    return [
        Call("w4a16", (random.int4(N, K), random.scales(N, 2), random.zeros(N, 2), b, 32)),
        Call("w4a16", (random.int4(N, K), s, None, None, 0)),
        Call("wna16", (random.codes(N, K, 3), random.scales(N, 2), random.zeros(N, 2, bits=3), b, 32, 3)),
        Call("wna16", (random.codes(N, K, 2), s, None, None, 0, 2)),
        Call("w4a8", (random.codes(N, K, 4), random.scales(N, 2), random.zeros(N, 2), b, 32)),
        Call(
            "w4a8_interleaved",
            (*interleave_int4(random.codes(N, K, 4), s, random.zeros(N, 1), K), b, 128),
        ),
        Call("w8a16", (int8, s, b)),
        Call("w8a16", (fp8, s, None)),
        Call("w8a8", (int8, s, None, b)),
        Call("w8a8", (fp8, s, one, None)),
        Call("fp8_block", (fp8, random.scales(1, 1), b)),
    ]


CALLS = [
    "w4a16-asym",
    "w4a16-channel",
    "w3a16-asym",
    "w2a16-channel",
    "w4a8-asym",
    "w4a8-interleaved-asym",
    "w8a16-int8",
    "w8a16-fp8",
    "w8a8-int8",
    "w8a8-fp8-static",
    "fp8_block",
]
each_call = pytest.mark.parametrize("index", range(len(CALLS)), ids=CALLS)


@each_call
def test_leading_shapes_strides_and_no_rows(random: Random, index):
    call = calls(random)[index]
    x = random.x(6, 40, torch.float32)
    y = call(x)
    assert torch.equal(call(x.view(2, 3, 40)), y.view(2, 3, 24))
    assert torch.equal(call(x.t().contiguous().t()), y)  # columns not contiguous
    assert torch.equal(call(torch.cat([x, x], 1)[:, :40]), y)  # rows with a stride
    torch.testing.assert_close(call(x[1]), y[1])  # another M may sum in another order
    for empty in (x[:0], x.view(2, 3, 40)[:, :0]):
        assert call(empty).shape == (*empty.shape[:-1], 24)


@each_call
def test_a_row_of_zeros_gives_the_bias(random: Random, index):
    call = calls(random)[index]
    bias = {"w4a16": -2, "w4a8": -2, "w4a8_interleaved": -2, "wna16": -3}.get(call.op, -1)
    expected = call.weights[bias]
    y = call(torch.zeros(2, 40, device=DEVICE))
    assert torch.equal(y, torch.zeros(2, 24, device=DEVICE) + (0 if expected is None else expected))


@each_call
def test_opcheck(random: Random, index):
    call = calls(random)[index]
    fp8 = call.weights[0].dtype == FP8
    # torch's schema test compares every argument with torch.allclose, which has no float8
    tests = (() if fp8 else ("test_schema",)) + (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    x = random.x(3, 40, torch.float32)
    torch.library.opcheck(getattr(torch.ops.quantkit, call.op), (x, *call.weights), test_utils=tests)


@each_call
def test_compiles_without_a_graph_break_and_with_any_number_of_rows(random: Random, index):
    torch._dynamo.reset()  # every call compiles the same lambda, and dynamo counts them
    call = calls(random)[index]
    compiled = torch.compile(
        lambda x: call(x * 2) + 1, fullgraph=True, dynamic=True, backend="inductor" if GPU else "aot_eager"
    )
    for M in (3, 7):
        x = random.x(M, 40, torch.float32)
        torch.testing.assert_close(compiled(x), call(x * 2) + 1)


@gpu
@each_call
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_graph_capture(random: Random, index, dtype):
    call = calls(random, dtype)[index]
    x, other = random.x(4, 40, dtype), random.x(4, 40, dtype)
    call(x)  # the first call compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, call(other))


WRONG = [  # op, argument, its replacement, what the message must say
    ("w4a16", 0, lambda t: t[:, :4].contiguous(), "codes has shape [24, 4], expected [24, 5] for x [2, 40]"),
    ("w4a16", 0, lambda t: t.long(), "codes is int64, expected int32"),
    ("w4a16", 1, lambda t: t[:, :1].contiguous(), "scales has shape [24, 1], expected [24, 2]"),
    ("w4a16", 2, lambda t: t.int(), "zeros is int32, expected uint8"),
    ("w4a16", 3, lambda t: t[:5], "bias has shape [5], expected [24]"),
    ("w4a16", 4, lambda g: -1, "group_size is -1, expected"),
    ("wna16", 0, lambda t: t[:, :3].contiguous(), "codes has shape [24, 3], expected [24, 6] for x [2, 40]"),
    ("wna16", 5, lambda bits: 4, "bits is 4, expected 2 or 3; w4a16 takes codes of 4 bits"),
    ("w4a8", 1, lambda t: t[:, :1].contiguous(), "scales has shape [24, 1], expected [24, 2]"),
    ("w4a8_interleaved", 0, lambda t: t[:, :5].contiguous(), "words has shape [24, 5], expected [24, 16]"),
    ("w4a8_interleaved", 1, lambda t: t.T.contiguous(), "scales has shape [24, 1], expected [1, 24]"),
    ("w4a8_interleaved", 4, lambda g: 32, "group_size is 32, expected a multiple of 128, or 0"),
    ("w8a16", 0, lambda t: t.float(), "codes is float32, expected int8 or float8_e4m3fn"),
    ("w8a16", 1, lambda t: t.half(), "scales is float16, expected float32"),
    ("w8a16", 1, lambda t: t[:1].expand(24, 1), "scales has strides (0, 1); call .contiguous()"),
    ("w8a8", 2, lambda t: torch.ones(2, device=DEVICE), "input_scale has shape [2], expected [1]"),
    ("fp8_block", 0, lambda t: t.to(torch.int8), "codes is int8, expected float8_e4m3fn"),
    ("fp8_block", 1, lambda t: t.expand(2, 1).contiguous(), "scales has shape [2, 1], expected [1, 1]"),
]


@pytest.mark.parametrize(
    ("op", "argument", "change", "message"), WRONG, ids=[f"{w[0]}: {w[3][:30]}" for w in WRONG]
)
def test_a_wrong_argument_is_named(random: Random, op: str, argument: int, change: Callable, message: str):
    weights = list(next(call.weights for call in calls(random) if call.op == op))
    weights[argument] = change(weights[argument])
    x = random.x(2, 40, torch.float32)
    with pytest.raises(ValueError, match=f"^{op}: ") as error:
        getattr(torch.ops.quantkit, op)(x, *weights)
    assert message in str(error.value)


def test_a_wrong_x_is_named(random: Random):
    call = calls(random)[0]
    with pytest.raises(ValueError, match="w4a16: x is float64, expected float32 or float16 or bfloat16"):
        call(torch.ones(1, 40, dtype=torch.float64, device=DEVICE))
    with pytest.raises(
        ValueError, match=r"w4a16: codes has shape \[24, 5\], expected \[24, 6\] for x \[1, 48\]"
    ):
        call(torch.ones(1, 48, device=DEVICE))


def test_int8_sums_that_could_overflow_are_refused():
    K = ops.INT8_MAX_K + 1
    x, codes = torch.ones(1, K, device=DEVICE), torch.ones(1, K, dtype=torch.int8, device=DEVICE)
    with pytest.raises(ValueError, match=f"K is {K}, expected at most {K - 1}"):
        torch.ops.quantkit.w8a8(x, codes, torch.ones(1, 1, device=DEVICE), None, None)


@cpu_only
def test_the_packed_op_compiles_and_checks_its_arguments(random: Random):
    codes, scales, zeros = (
        random.int4(32, 64),
        random.scales(32, 2, dtype=torch.bfloat16),
        random.zeros(32, 2),
    )
    weights = int4pack.pack_cpu(codes, scales, zeros, 32)
    op, x = torch.ops.quantkit.w4a16_cpu, random.x(3, 64, torch.bfloat16)
    torch.library.opcheck(op, (x, *weights, None, 32))
    compiled = torch.compile(lambda x: op(x, *weights, None, 32) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), op(x, *weights, None, 32) + 1)
    assert op(x[:0], *weights, None, 32).shape == (0, 32)
    with pytest.raises(
        ValueError, match="w4a16_cpu: group_size is 48, K is 64, N is 32, expected a group_size of 32"
    ):
        op(x, *weights, None, 48)
    with pytest.raises(
        ValueError, match=r"w4a16_cpu: packed has shape \[32, 32\], expected \[32, 64\] for x \[3, 128\]"
    ):
        op(torch.cat([x, x], 1), *weights, None, 32)
