"""GPTQ's inner loop in Triton: its codes and errors replayed in float64, and beside those of the definition in PyTorch."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.calibration import gptq as gptq_module
from quantkit.calibration.gptq import factorize, gptq, inverse_cholesky, round_columns
from quantkit.calibration.grid import search_clip
from quantkit.kernels import gptq_columns
from quantkit.scheme import LARGEST_CODE, parse_scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [
    ("int2", True),
    ("int3", False),
    ("int3", True),
    ("int4", False),
    ("int4", True),
    ("int8", False),
    ("fp8", False),
]
SHAPES = [(128, 37), (72, 30), (17, 1), (1, 5)]  # columns and rows
UNIT = 2.0**-24


@pytest.fixture(autouse=True)
def _no_device_to_switch_to(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def problem(kind, has_zeros, C, N, seed=0):
    """Arguments of `round_columns`, all but `errors`, with scales of either sign where the kind has them."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.arange(C) // 32
    columns = torch.randn(C, N, generator=g)
    mix = torch.randn(3 * C + 8, C, generator=g) @ torch.randn(C, C, generator=g) / C**0.5
    U = torch.zeros(C, C + 5)[:, 3 : C + 3]  # part of a larger matrix
    U.copy_(inverse_cholesky(mix.T @ mix / len(mix), 0.01)[0])
    top = LARGEST_CODE[kind]
    reach = 2 * 3.0 / top if kind in ("int2", "int3", "int4") else 3.0 / top
    scales = reach * (0.5 + torch.rand(int(groups[-1]) + 1, N, generator=g))
    zeros = float((top + 1) // 2) if kind in ("int2", "int3", "int4") else 0.0
    if has_zeros:
        zeros = torch.randint(0, top + 1, scales.shape, generator=g).float().to(DEVICE)
    elif kind in ("int2", "int3", "int4"):
        scales *= torch.where(torch.rand(scales.shape, generator=g) < 0.5, 1, -1)
    return [columns.to(DEVICE), U.to(DEVICE), scales.to(DEVICE), zeros, groups.to(DEVICE)], kind


def run(function, problem):
    arguments, kind = problem
    columns, *rest = (
        a.clone() if isinstance(a, torch.Tensor) and i == 0 else a for i, a in enumerate(arguments)
    )
    errors = torch.full_like(columns, torch.nan)
    return function(columns, *rest, errors, kind, LARGEST_CODE[kind]), errors


def check_replay(problem, codes, errors):
    """Every code is the nearest to its column, with the errors of the columns before made up for, in float64.

    `lost` bounds what float32 has lost of each column so far: half a unit of each product, difference and quotient
    (two for Triton's division on a GPU), and what the errors of the columns before had lost themselves.
    """
    (columns, U, scales, zeros, groups), kind = problem
    w, U, scales = columns.double().cpu(), U.double().cpu(), scales.double().cpu()
    zeros = zeros.double().cpu() if isinstance(zeros, torch.Tensor) else torch.full_like(scales, zeros)
    codes, errors, top = codes.cpu(), errors.double().cpu(), LARGEST_CODE[kind]
    lost = torch.zeros_like(w)
    for j, group in enumerate(groups.tolist()):
        scale, zero = scales[group], zeros[group]
        at = w[j] / scale + zero
        slack = lost[j] / scale.abs() + 4 * UNIT * (at.abs() + zero)
        if kind == "fp8":
            code = codes[j].view(torch.float8_e4m3fn).double()
            half = 2.0 ** (at.abs().clamp(min=2.0**-6, max=top).log2().floor() - 4)
            low, high = -top, top
        else:
            code = codes[j].view(torch.int8 if kind == "int8" else torch.uint8).double()
            half, (low, high) = torch.full_like(at, 0.5), (-top, top) if kind == "int8" else (0, top)
        assert ((code >= low) & (code <= high)).all()
        assert ((at.clamp(low, high) - code).abs() <= half + slack).all(), f"column {j}"
        value = (code - zero) * scale
        error = (w[j] - value) / U[j, j]
        blurred = (lost[j] + 2 * UNIT * (w[j].abs() + 2 * value.abs())) / U[j, j] + 4 * UNIT * error.abs()
        assert ((errors[j] - error).abs() <= blurred).all(), f"column {j}"
        w[j + 1 :] -= U[j, j + 1 :, None] * error
        lost[j + 1 :] += (
            U[j, j + 1 :, None].abs() * (blurred + 2 * UNIT * error.abs()) + UNIT * w[j + 1 :].abs()
        )


@pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
@pytest.mark.parametrize(("C", "N"), SHAPES)
def test_codes_and_errors_are_those_of_the_definition(kind, has_zeros, C, N):
    given = problem(kind, has_zeros, C, N)
    found, expected = run(gptq_columns.round_columns, given), run(round_columns, given)
    check_replay(given, *expected)
    check_replay(given, *found)
    # where a product is rounded otherwise a value near a tie falls the other way, and the rest of its row with it
    same = (found[0] == expected[0]).all(0)
    assert same.float().mean() >= (1 if N < 20 else 0.9)
    scale = expected[1].abs().amax(0).clamp(min=1)
    assert ((found[1] - expected[1]).abs().amax(0) <= 1e-4 * scale)[same].all()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("int4", [0.5, 1.5, 2.5, -0.5, 7.4999, 1e9, -1e9, 0.0]),
        ("int8", [0.5, 1.5, -0.5, -2.5, 126.5, 127.6, -1e9, 0.0]),
        ("fp8", [17.0, 19.0, -17.0, 2.0**-10, 464.0, -1e9, 3 * 2.0**-10, 0.0]),
    ],
)
def test_ties_go_to_even_and_values_past_the_ends_to_the_ends(kind, given):
    columns = torch.tensor([given])
    zero = 8.0 if kind == "int4" else 0.0
    arguments = [
        columns,
        torch.ones(1, 1),
        torch.ones(1, len(given)),
        zero,
        torch.zeros(1, dtype=torch.int64),
    ]
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    found, expected = (run(f, (arguments, kind)) for f in (gptq_columns.round_columns, round_columns))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["w4a16-g32", "fp8-block"])
def test_gptq_with_the_kernel_is_gptq(name, monkeypatch):
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(40, 200, generator=g), torch.randn(500, 200, generator=g) * torch.linspace(0.1, 3, 200)
    scheme, factor = parse_scheme(name), factorize((x.T @ x / 500).to(DEVICE))
    grid = search_clip(w.to(DEVICE), scheme, factor.costs)
    results = []
    for function in (round_columns, gptq_columns.round_columns):
        monkeypatch.setattr(gptq_module, "inner_loop", lambda columns, function=function: function)
        results.append(gptq(w.to(DEVICE), factor, scheme, grid=grid).quantized.dequantize().cpu())
    same = (results[0] == results[1]).all(1)
    assert same.float().mean() >= 0.9
    error = [((x @ (w - q).T).square().sum()).item() for q in results]
    assert error[0] == pytest.approx(error[1], rel=0.02)


@pytest.mark.gpu
def test_a_gpu_takes_the_kernel():
    on_gpu = torch.zeros(4, 4, device="cuda")
    assert gptq_module.inner_loop(on_gpu) is gptq_columns.round_columns
    assert gptq_module.inner_loop(on_gpu.double()) is round_columns
    assert gptq_module.inner_loop(on_gpu.cpu()) is round_columns


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
def test_many_rows_on_a_gpu_replayed(kind, has_zeros):
    given = problem(kind, has_zeros, 128, 4099, seed=1)
    found, expected = run(gptq_columns.round_columns, given), run(round_columns, given)
    check_replay(given, *found)
    assert (found[0] == expected[0]).all(0).float().mean() >= 0.95
