"""RMS norm with what comes before and after it: every rounding where transformers has it, and the codes of the result."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.kernels import cpu, ops, rms_norm
from rounding import DEVICE, FP8, assert_rounded, triton_runs

gpu = pytest.mark.gpu
EPS = 1e-5
MODES = [(None, 0, False), (torch.int8, 0, False), (FP8, 0, False), (FP8, 128, False)]  # dtype, group, static
MODES += [(torch.int8, 0, True), (FP8, 0, True)]
# M, K: one column, a group and a bit, groups, a row that fills no power of two, the largest of Llama's, several rows a
# program
SHAPES = [(1, 1), (3, 130), (1, 384), (3, 4500), (1, 14336), (1100, 70)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Of the float32 chain before n is rounded, in units of 2^-24, relative: a square, at most 64 additions in a lane and 16 across
# lanes, / K and + eps are halved by the root; the instruction for 1 / sqrt is good to 2^-22.9; one product.
ERROR = ((1 + 64 + 16 + 2) / 2 + 2.2 + 1) * 2**-24


def operands(M: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x and residual with outliers, and a row of zeros where there are several; weights of both signs."""
    g = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, M, K, generator=g)
    x[:, K // 3] *= 100
    residual *= torch.logspace(-2, 1, M)[:, None]
    if M > 1:
        x[1] = residual[1] = 0
    weight = 1 + 0.3 * torch.randn(K, generator=g)
    weight[K // 2] *= -1
    return x.to(DEVICE, dtype), residual.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def between(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What y may be: the interval of n in exact arithmetic, brought through the two roundings, which keep order."""
    n, _ = rms_norm.reference(x, weight, EPS, residual)
    ends = [(n + sign * ERROR * n.abs()).to(x.dtype) * weight for sign in (-1, 1)]
    return torch.minimum(*ends), torch.maximum(*ends)


# the interpreter takes seconds for a thousand rows: in one dtype there
@pytest.mark.parametrize(
    ("M", "K", "dtype"),
    [
        pytest.param(M, K, dtype, marks=gpu if M > 1000 and dtype != torch.float16 else ())
        for M, K in SHAPES
        for dtype in DTYPES
    ],
    ids=str,
)
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("to", "group_size", "is_static"), MODES)
def test_every_rounding_is_where_it_should_be(M, K, to, group_size, is_static, has_residual, dtype):
    x, residual, weight = operands(M, K, dtype)
    residual = residual if has_residual else None
    static = torch.tensor([0.0137], device=DEVICE) if is_static else None
    low, high = between(x, weight, residual)
    arguments = (x, weight, EPS, residual, to, static, group_size)
    runs = [cpu.rms_norm_torch, torch.ops.quantkit.rms_norm_quantize]
    for run in [*runs, rms_norm.rms_norm_triton] if triton_runs(dtype) else runs:
        y, scales, h = run(*arguments)
        if has_residual:
            assert torch.equal(h, x + residual)
        else:
            assert h.shape == (0,)
        assert y.shape == x.shape
        if to is None:
            assert y.dtype == dtype
            assert scales.shape == (0,)
            assert ((low <= y) & (y <= high)).all()
        else:
            assert y.dtype == to
            assert_rounded(y, scales, low, high, static, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definition_is_the_norm_of_transformers(dtype):
    x, residual, weight = operands(3, 130, dtype)
    norm = LlamaRMSNorm(130, EPS).to(DEVICE, dtype)
    norm.weight.data = weight
    expected = norm(residual + x)
    y, _, _ = cpu.rms_norm_torch(x, weight, EPS, residual, None, None, 0)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("group_size", [0, 128])
def test_a_nan_reaches_the_scales_of_its_row_alone(group_size):
    x, residual, weight = operands(3, 384, torch.float16)
    residual[1, 7] = torch.nan
    _, scales, _ = rms_norm.rms_norm_triton(x, weight, EPS, residual, FP8, None, group_size)
    assert scales.isfinite().all(1).tolist() == [True, False, True]
    assert scales.isfinite().any(1).tolist() == [True, False, True]


def test_rows_of_a_wider_tensor_are_read_in_place():
    x, residual, weight = operands(3, 256, torch.float16)
    wide = torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], 1)
    expected = rms_norm.rms_norm_triton(x, weight, EPS, residual, torch.int8, None, 0)
    found = rms_norm.rms_norm_triton(wide[:, 256:512], weight, EPS, residual, torch.int8, None, 0)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("to", "group_size", "is_static"), MODES)
@pytest.mark.parametrize("rows", [(2, 3), (0,)], ids=str)
def test_the_op_keeps_leading_dimensions_and_its_fake_agrees(rows, to, group_size, is_static):
    x = torch.randn(*rows, 130, device=DEVICE)
    static = torch.ones(1, device=DEVICE) if is_static else None
    for residual in (None, x.clone()):
        arguments = (x, x.new_ones(130), EPS, residual, to, static, group_size)
        results = torch.ops.quantkit.rms_norm_quantize(*arguments)
        fakes = ops._fake_rms_norm(*arguments)
        assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in fakes]
        torch.library.opcheck(torch.ops.quantkit.rms_norm_quantize, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(weight=torch.ones(3)), r"weight has shape \[3\], expected \[4\]"),
        (dict(weight=torch.ones(4).half()), "weight is float16, expected float32"),
        (dict(residual=torch.ones(1, 4)), r"residual has shape \[1, 4\], expected \[2, 4\]"),
        (dict(dtype=torch.uint8), "dtype is torch.uint8, expected int8 or float8_e4m3fn, or None"),
        (dict(dtype=torch.int8, group_size=128), "group_size is 128, expected 0 for one scale a row, or 128"),
        (dict(dtype=FP8, group_size=64), "group_size is 64, expected 0"),
        (dict(dtype=FP8, group_size=128, input_scale=torch.ones(1)), "group_size is 128, expected 0"),
        (
            dict(input_scale=torch.ones(1)),
            "dtype is None, expected int8 or float8_e4m3fn with an input_scale",
        ),
        (dict(dtype=FP8, input_scale=torch.ones(2)), r"input_scale has shape \[2\], expected \[1\]"),
        (dict(x=torch.ones(2, 0)), r"x has shape \[2, 0\], expected \[..., K\]"),
        (dict(x=torch.ones(2, 4).int()), "x is int32, expected float32 or float16 or bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    arguments = dict(x=torch.ones(2, 4), weight=torch.ones(4), residual=None, dtype=None, input_scale=None)
    arguments |= dict(group_size=0) | changes
    with pytest.raises(ValueError, match=f"rms_norm_quantize: {message}"):
        torch.ops.quantkit.rms_norm_quantize(eps=EPS, **arguments)
