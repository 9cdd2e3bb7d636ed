"""SwiGLU with the rounding after it: every rounding where transformers has it, and the codes of the result."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.kernels import cpu, ops, swiglu
from rounding import DEVICE, FP8, assert_rounded, triton_runs

MODES = [(None, 0, False), (torch.int8, 0, False), (FP8, 0, False), (FP8, 128, False)]  # dtype, group, static
MODES += [(torch.int8, 0, True), (FP8, 0, True)]
# M, F: one column, a group and a bit, groups, a row that fills no power of two, Llama's, several rows a program
SHAPES = [(1, 1), (3, 130), (1, 384), (3, 4500), (1, 14336), (1100, 70)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def operands(M: int, F: int, dtype: torch.dtype) -> Tensor:
    """Gates and ups with outliers of both signs, past the range of exp too, and a row of zeros where there are several."""
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(M, 2 * F, generator=g)
    x[:, F // 3] *= 20
    x[0, : min(F, 64)] = torch.linspace(-110, 110, 64)[:F]
    x[:, F + F // 5] *= 30
    if M > 1:
        x[1] = 0
    return x.to(DEVICE, dtype)


def between(x: Tensor) -> tuple[Tensor, Tensor]:
    """What y may be: the interval of a in exact arithmetic, brought through the two roundings, which keep order.

    In units of 2^-24, relative: the argument of 2^x is gate * log2(e), a rounded product with a rounded number, 2 |gate|; its
    instruction 3; 1 + exp is 1, and the division 4. Where exp is more than float32 has, a is 0, and less than 2^-121.
    """
    gate, up = x.chunk(2, -1)
    a = swiglu.reference(gate)
    error = (2 * gate.double().abs() + 8) * 2**-24 * a.abs() + 2.0**-121
    ends = [(a + sign * error).to(x.dtype) * up for sign in (-1, 1)]
    return torch.minimum(*ends), torch.maximum(*ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("to", "group_size", "is_static"), MODES)
@pytest.mark.parametrize(("M", "F"), SHAPES)
def test_every_rounding_is_where_it_should_be(M, F, to, group_size, is_static, dtype):
    x = operands(M, F, dtype)
    static = torch.tensor([0.037], device=DEVICE) if is_static else None
    low, high = between(x)
    runs = [cpu.swiglu_torch, torch.ops.quantkit.swiglu_quantize]
    for run in [*runs, swiglu.swiglu_triton] if triton_runs(dtype) else runs:
        y, scales = run(x, to, static, group_size)
        assert y.shape == (M, F)
        if to is None:
            assert y.dtype == dtype
            assert scales.shape == (0,)
            assert ((low <= y) & (y <= high)).all()
        else:
            assert y.dtype == to
            assert_rounded(y, scales, low, high, static, group_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definition_is_the_product_of_transformers(dtype):
    x = operands(3, 130, dtype)
    gate, up = x[:, :130], x[:, 130:]
    assert torch.equal(cpu.swiglu_torch(x, None, None, 0)[0], torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("column", [7, 391], ids=["gate", "up"])
def test_a_nan_reaches_its_scale_alone(column, group_size):
    x = operands(3, 384, torch.float16).clamp(-50, 50)
    x[2, column] = torch.nan
    y, scales = swiglu.swiglu_triton(x, FP8, None, group_size)
    assert scales.isfinite().all(1).tolist() == [True, True, False]
    assert scales.isnan().sum() == 1
    assert y.float().isnan().sum() == (group_size or 384)


@pytest.mark.parametrize(("to", "group_size", "is_static"), MODES)
@pytest.mark.parametrize("rows", [(2, 3), (0,)], ids=str)
def test_the_op_keeps_leading_dimensions_and_its_fake_agrees(rows, to, group_size, is_static):
    arguments = (
        torch.randn(*rows, 260, device=DEVICE),
        to,
        torch.ones(1, device=DEVICE) if is_static else None,
        group_size,
    )
    results = torch.ops.quantkit.swiglu_quantize(*arguments)
    fakes = ops._fake_swiglu(*arguments)
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in fakes]
    torch.library.opcheck(torch.ops.quantkit.swiglu_quantize, arguments, test_utils="test_faketensor")


def test_an_odd_number_of_columns_is_named():
    with pytest.raises(ValueError, match=r"swiglu_quantize: x has shape \[2, 5\], expected \[..., 2 F\]"):
        torch.ops.quantkit.swiglu_quantize(torch.ones(2, 5), None, None, 0)
