"""HQQ against its own objective."""

import pytest
import torch

from quantkit.calibration.grid import fit_grid, search_clip, split_groups
from quantkit.calibration.hqq import P, hqq, shrink
from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.scheme import parse_scheme

SCHEMES = ["w4a16-g32", "w4a16-g64-asym", "w3a16-g128", "w2a16-g32-asym", "w2a16-g32", "w4a16-channel"]
SHAPE = (24, 200)  # 200 is a multiple of no group


def weight(dtype=torch.float64):
    """Heavy tails, for which p < 1 is made."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(SHAPE, generator=g, dtype=torch.float64)
    return (w * (1 + torch.randn(SHAPE, generator=g, dtype=torch.float64).square())).to(dtype)


def losses(w, quantized):
    """sum |w - dequantized|^p of each group."""
    error = split_groups(w - quantized.dequantize(torch.float64), quantized.scheme.group_size)
    return (error.abs() ** P).sum(2)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_group_is_worse_than_the_searched_range_and_most_are_better(name):
    w, scheme = weight(), parse_scheme(name)
    grid = search_clip(w, scheme)
    found, searched = losses(w, hqq(w, scheme)), losses(w, grid.pack(grid.round(w)))
    assert (found <= searched * (1 + 1e-12)).all()
    assert found.sum() < 0.99 * searched.sum()


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_on_a_grid_are_kept(name):
    scheme = parse_scheme(name)
    grid = fit_grid(weight(), scheme)
    exact = grid.dequantize(grid.round(weight()), torch.float64)
    # so that the range tells the grid: the lowest code stands in every group, and the highest where zeros are fitted
    for start in range(0, SHAPE[1], scheme.group_size or SHAPE[1]):
        scale, zero = (torch.as_tensor(t).broadcast_to(SHAPE)[:, start] for t in grid.expand(torch.float64))
        exact[:, start] = -zero * scale
        if not scheme.symmetric:
            exact[:, start + 1] = (scheme.largest_code - zero) * scale
    found = hqq(exact, scheme)
    assert torch.equal(found.codes, rtn(exact, scheme, grid=grid).codes)
    assert torch.equal(found.dequantize(torch.float64), exact)


@pytest.mark.parametrize("name", SCHEMES)
def test_float32_loses_little_against_float64(name):
    scheme = parse_scheme(name)
    a, b = (losses(weight(), hqq(weight(dtype), scheme)).sum() for dtype in (torch.float32, torch.float64))
    assert a.item() == pytest.approx(b.item(), rel=1e-3)  # a code at a tie may fall the other way


def test_the_proximal_operator_is_nought_for_small_errors_and_leaves_large_ones():
    x = torch.tensor([-100.0, -0.01, 0.0, 1e-9, 0.01, 100.0], dtype=torch.float64)
    y = shrink(x, 10.0)
    assert torch.equal(y[1:5], torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(y[[0, 5]], x[[0, 5]] * (1 - P / 10 * 100 ** (P - 2)))


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-g32-asym"])
def test_extreme_weights_stay_finite(name):
    w = weight(torch.float32)
    w[0], w[1], w[2, 7], w[3] = 0, 1e-30, 1e30, 1e-45
    quantized = hqq(w, parse_scheme(name))
    assert torch.isfinite(quantized.dequantize()).all()
    assert torch.isfinite(quantized.scales).all()
    assert (quantized.scales != 0).all()
    assert (quantized.dequantize()[0] == 0).all()


def test_same_call_same_bits():
    a, b = (hqq(weight(), parse_scheme("w4a16-g32")) for _ in range(2))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_eight_bits_are_refused(name):
    with pytest.raises(QuantKitError, match=f"HQQ quantizes to 2 to 4 bits; {name} is rounded to nearest"):
        hqq(weight(), parse_scheme(name))
