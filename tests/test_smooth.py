"""SmoothQuant's scales, searched: against the error of the rounded product on the same rows."""

import pytest
import torch
from test_activations import rounded_float64

from quantkit.calibration.folds import tie
from quantkit.calibration.rtn import rtn
from quantkit.calibration.smooth import EXPONENTS, rounded_error, smooth_scales
from quantkit.calibration.statistics import SAMPLED, InputStatistics
from quantkit.scheme import parse_scheme

K = 160
SCHEMES = ["w8a8", "w4a8", "fp8", "fp8-block", "w4a16-g32"]


def untied(x):
    return x


def problem(outliers=True):
    """Two weights that share inputs, some channels of which are large, and the statistics of those; float32."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 50, K, generator=g)
    if outliers:
        x[..., ::20] *= 30
    weights = [torch.randn(n, K, generator=g) for n in (12, 16)]
    statistics = InputStatistics(K)
    for batch in x:
        statistics.add(batch)
    return weights, statistics


def error(weights, rows, s, scheme):
    """The squared error of the products in float64, from the codes of weights and activations themselves."""
    x, total = rows.double(), 0.0
    for w in weights:
        q = rtn(w * s, scheme).dequantize(torch.float64)
        total += (x @ w.double().T - rounded_float64(rows / s, scheme) @ q.T).square().sum().item()
    return total


@pytest.mark.parametrize("outliers", [True, False])
@pytest.mark.parametrize("name", SCHEMES)
def test_it_is_never_worse_than_no_scales_on_its_sample(name, outliers):
    weights, statistics = problem(outliers)
    scheme = parse_scheme(name)
    s = smooth_scales(weights, statistics, scheme, untied)
    ratio = error(weights, statistics.rows(), s, scheme) / error(
        weights, statistics.rows(), torch.ones(K), scheme
    )
    # int8 has no exponent: one large channel takes the codes of all others
    assert ratio < 0.5 if outliers and scheme.activation == "int8" else ratio <= 1 + 1e-4
    assert torch.isfinite(s).all()
    assert (s > 0).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_what_it_minimises_is_the_error_of_the_rounded_product(name):
    weights, statistics = problem()
    scheme, rows = parse_scheme(name), statistics.rows()
    s = rows.abs().amax(0).sqrt()
    exact = [rows @ w.T for w in weights]
    found = rounded_error(rows, weights, exact, s, scheme)
    # the difference of two products of K terms that float32 rounds
    magnitude = sum((rows.abs() @ w.abs().T).double().square().sum().item() for w in weights) / len(rows)
    expected = error(weights, rows, s, scheme) / len(rows)
    lost = 2 * K * 2**-24 * magnitude**0.5
    assert abs(found**0.5 - expected**0.5) <= lost


@pytest.mark.parametrize("name", ["w8a8", "w4a8"])
def test_before_gptq_the_error_of_x_and_the_columns_costs_add_up(name):
    weights, statistics = problem()
    scheme, rows = parse_scheme(name), statistics.rows()
    costs = torch.rand(K, generator=torch.Generator().manual_seed(1))
    s = rows.abs().amax(0).sqrt()
    x, rounded = rows.double(), rounded_float64(rows / s, scheme)
    of_x = sum(((x - rounded * s) @ w.double().T).square().sum().item() for w in weights) / len(rows)
    of_w = sum(
        ((w - rtn(w * s, scheme).dequantize(torch.float64) / s).square() * costs).sum().item()
        for w in weights
    )
    exact = [rows @ w.T for w in weights]
    found = rounded_error(rows, weights, exact, s, scheme, costs)
    magnitude = sum((rows.abs() @ w.abs().T).double().square().sum().item() for w in weights) / len(rows)
    lost = 2 * K * 2**-24 * magnitude**0.5
    assert abs(found**0.5 - (of_x + of_w) ** 0.5) <= lost


def test_it_is_equation_4_with_the_best_exponent():
    weights, statistics = problem()
    scheme, rows = parse_scheme("w8a8"), statistics.rows()
    x_max, w_max = statistics.max_abs, torch.cat(weights).abs().amax(0)
    tried = [x_max**a / w_max ** (1 - a) for a in EXPONENTS]
    tried = [s / (s.min() * s.max()).sqrt() for s in tried]
    best = min(tried, key=lambda s: error(weights, rows, s, scheme))
    assert torch.allclose(smooth_scales(weights, statistics, scheme, untied), best, rtol=1e-6)


def test_channels_of_query_heads_that_share_a_value_head_get_one_scale():
    weights, statistics = problem()
    s = smooth_scales(weights, statistics, parse_scheme("w8a8"), lambda x: tie(x, 16, 5))
    by_head = s.view(2, 5, 16)
    assert (by_head == by_head[:, :1]).all()
    assert error(weights, statistics.rows(), s, parse_scheme("w8a8")) <= error(
        weights, statistics.rows(), torch.ones(K), parse_scheme("w8a8")
    ) * (1 + 1e-4)


def test_dead_channels_are_left_alone():
    weights, _ = problem()
    x = torch.randn(40, K, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 30, K)
    x[:, :7] = 0
    weights[0][:, 7:9], weights[1][:, 7:9] = 0, 0
    statistics = InputStatistics(K)
    statistics.add(x)
    s = smooth_scales(weights, statistics, parse_scheme("w8a8"), untied)
    assert (s[:9] == 1).all()
    assert (s[9:].min() * s[9:].max()).item() == pytest.approx(1, rel=1e-6)
    nothing = InputStatistics(K)
    nothing.add(x * 0)
    assert torch.equal(smooth_scales(weights, nothing, parse_scheme("w8a8"), untied), torch.ones(K))


@pytest.mark.parametrize(("sequences", "seq_len"), [(8, 512), (2, 2048), (1, 64), (3, 5)])
def test_the_sample_comes_from_all_places_of_the_sequences(sequences, seq_len):
    statistics = InputStatistics(1)
    statistics.add(torch.arange(seq_len).repeat(sequences)[:, None])
    places = statistics.rows().flatten().tolist()
    assert len(places) == min(SAMPLED, sequences * seq_len)
    assert len(set(places)) == min(SAMPLED, seq_len) or sequences * seq_len < SAMPLED
    assert places.count(0) <= 1 or sequences * seq_len < SAMPLED
