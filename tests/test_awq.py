import pytest
import torch

from quantkit.calibration.awq import awq, candidates, scaled_error, search_scales
from quantkit.calibration.folds import fold_into_linear, untie
from quantkit.calibration.gptq import factorize
from quantkit.calibration.rtn import rtn
from quantkit.calibration.statistics import output_error
from quantkit.scheme import parse_scheme

K = 160  # ragged in groups of 64 and 128
SCHEMES = ["w4a16-g32", "w4a16-g64-asym", "w4a16-g128", "w4a16-g128-asym", "w4a16-channel"]
EIGHT_BIT = ["w8a8", "fp8", "fp8-block"]


def problem(outliers=True):
    """Two weights that share inputs x [tokens, K], some channels of which are large; float64."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, K, generator=g, dtype=torch.float64)
    if outliers:
        x[:, ::20] *= 30
    weights = [torch.randn(n, K, generator=g, dtype=torch.float64) for n in (12, 16)]
    return x, weights, x.T @ x / len(x), x.abs().mean(0)


@pytest.mark.parametrize("outliers", [True, False])
@pytest.mark.parametrize("name", [*SCHEMES, *EIGHT_BIT])
def test_search_is_never_worse_than_no_scales(name, outliers):
    _, weights, H, mean_abs = problem(outliers)
    scheme = parse_scheme(name)
    s = search_scales(weights, H, mean_abs, scheme)
    ratio = scaled_error(weights, H, s, scheme) / scaled_error(weights, H, torch.ones_like(s), scheme)
    assert ratio < 0.9 if outliers and scheme.bits < 8 else ratio <= 1


def test_scaled_error_is_the_error_of_the_outputs():
    x, weights, H, mean_abs = problem()
    scheme = parse_scheme("w4a16-g32")
    s = search_scales(weights, H, mean_abs, scheme)
    expected = sum(
        (x @ w.T - (x / s) @ rtn(w * s, scheme).dequantize(torch.float64).T).square().sum(1).mean()
        for w in weights
    )
    assert scaled_error(weights, H, s, scheme) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("name", SCHEMES)
def test_with_costs_of_columns_the_loss_is_what_gptq_pays_for_them(name):
    _, (w, _), H, mean_abs = problem()
    scheme, factor = parse_scheme(name), factorize(H)
    s = search_scales([w], factor.costs, mean_abs, scheme)
    e = w - rtn(w * s, scheme).dequantize(torch.float64) / s
    paid = (e[:, factor.order] / factor.U.diagonal()).square().sum().item()
    assert scaled_error([w], factor.costs, s, scheme) == pytest.approx(paid, rel=1e-10)
    assert paid < 0.9 * scaled_error([w], factor.costs, torch.ones_like(s), scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_clipping_lowers_the_error_of_rounding(name):
    _, (w, _), H, mean_abs = problem()
    scheme = parse_scheme(name)
    s = search_scales([w], H, mean_abs, scheme)
    clipped = w - awq(w * s, H / torch.outer(s, s), scheme).dequantize(torch.float64) / s
    assert output_error(clipped, H) < scaled_error([w], H, s, scheme)


def test_scales_are_normalised_and_dead_channels_left_alone():
    x, weights, _, _ = problem()
    x[:, :7] = 0
    s = search_scales(weights, x.T @ x, x.abs().mean(0), parse_scheme("w4a16-g32"))
    assert (s[:7] == 1).all()
    assert torch.isfinite(s).all()
    assert s[7:].min() * s[7:].max() == pytest.approx(1)


def test_scales_are_one_where_nothing_was_seen():
    _, weights, H, mean_abs = problem()
    s = search_scales(weights, H * 0, mean_abs * 0, parse_scheme("w4a16"))
    assert torch.equal(s, torch.ones(K, dtype=torch.float64))


def test_extreme_weights_give_finite_scales():
    _, (w, _), H, mean_abs = problem()
    w[0], w[1], w[2, 3], w[:, 5] = 0, 1e-30, 1e4, 0
    for dtype in (torch.float32, torch.float64):
        s = search_scales([w.to(dtype)], H.to(dtype), mean_abs.to(dtype), parse_scheme("w4a16-g32"))
        assert torch.isfinite(s).all()
        assert (s > 0).all()
        assert torch.isfinite(awq(w * s, H / torch.outer(s, s), parse_scheme("w4a16-g32")).dequantize()).all()


def test_value_and_output_projections_keep_grouped_query_attention():
    value_heads, repeats, head_dim, tokens = 2, 3, 16, 5
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    x, wv, wo = rand(tokens, 40), rand(value_heads * head_dim, 40), rand(24, value_heads * repeats * head_dim)
    mix = rand(value_heads * repeats, tokens, tokens)  # attention weights of each query head

    def attend(wv, wo):
        v = (x @ wv.T).view(tokens, value_heads, head_dim).repeat_interleave(repeats, 1)
        return torch.einsum("hqt,thd->qhd", mix, v).flatten(1), wo

    inputs, _ = attend(wv, wo)
    H, mean_abs = inputs.T @ inputs, inputs.abs().mean(0)
    scheme = parse_scheme("w4a16-g32")
    s = search_scales([wo], H, mean_abs, scheme, head_dim=head_dim, repeats=repeats)
    by_head = s.view(value_heads, repeats, head_dim)
    assert (by_head == by_head[:, :1]).all()
    new_wv, _ = fold_into_linear(wv, None, untie(s, head_dim, repeats))
    new_inputs, _ = attend(new_wv, wo)
    assert torch.allclose(new_inputs @ (wo * s).T, inputs @ wo.T, rtol=1e-10, atol=1e-10)
    assert scaled_error([wo], H, s, scheme) <= scaled_error([wo], H, torch.ones_like(s), scheme)


def test_candidates_are_the_two_forms_of_equation_5():
    _, weights, _, mean_abs = problem()
    tried = list(candidates(weights, mean_abs, parse_scheme("w4a16-g32")))
    assert len(tried) == 39
    half = mean_abs**0.5
    assert any(torch.allclose(s, half / (half.min() * half.max()).sqrt()) for s in tried)


def test_same_call_same_bits():
    _, weights, H, mean_abs = problem()
    a, b = (search_scales(weights, H, mean_abs, parse_scheme("w4a16-g32")) for _ in range(2))
    assert torch.equal(a, b)
