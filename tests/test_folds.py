"""Scales of input channels leave the product as it is, wherever they are put; and the scales of equalization."""

import pytest
import torch

from quantkit.calibration.awq import scaled_error
from quantkit.calibration.equalize import scales_from_norm, scales_from_rows
from quantkit.calibration.folds import fold_into_linear, fold_into_norm, tie, untie

K = 160


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_folding_into_a_norm_keeps_the_function():
    x = rand(400, K)
    s = torch.rand(K, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10 + 0.1
    for dtype in (torch.float64, torch.bfloat16):
        for one_plus in (False, True):
            weight = torch.linspace(-2, 2, K).to(dtype)
            new, reached = fold_into_norm(weight, s, one_plus)
            assert new.dtype == dtype
            before, after = ((n.double() + one_plus) * x for n in (weight, new))
            # two roundings of float64, whatever the norm's own dtype lost; the offset cancels up to 1 / |1 + w|
            assert torch.allclose(after * reached, before, rtol=1e-13, atol=0)
            if dtype == torch.bfloat16 and not one_plus:
                assert torch.allclose(reached, s, rtol=2**-8, atol=0)


def test_folding_into_a_linear_keeps_the_function():
    x, w, after, bias = rand(400, K), rand(12, K, seed=1), rand(16, K, seed=2), rand(12, seed=3)
    s = torch.rand(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    new, new_bias = fold_into_linear(w, bias, s)
    y, new_y = x @ w.T + bias, x @ new.T + new_bias
    assert torch.equal(new[:-10], w[:-10])  # the part of a fused projection that is not the source
    consumer = after[:, :10]
    assert torch.allclose(new_y[:, -10:] @ (consumer * s).T, y[:, -10:] @ consumer.T, rtol=1e-10, atol=1e-10)
    assert fold_into_linear(w, None, s)[1] is None


def test_tying_takes_the_mean_over_the_heads_that_share_and_untying_one_of_them():
    x = rand(2 * 3 * 4).abs()  # two value heads, three query heads each, four channels
    tied = tie(x, 4, 3)
    assert torch.equal(tied.view(2, 3, 4)[:, 0], x.view(2, 3, 4).mean(1))
    assert torch.equal(tied.view(2, 3, 4), tied.view(2, 3, 4)[:, :1].expand(2, 3, 4))
    assert torch.equal(untie(tied, 4, 3), tied.view(2, 3, 4)[:, 0].flatten())
    assert torch.equal(tie(x, None, 3), x)
    assert torch.equal(tie(x, 4, 1), x)


def test_equalizing_gives_both_sides_one_range():
    """Equation (11) of arXiv:1906.04721: afterwards the two ranges of a channel are the same, up to one factor."""
    before, after = (
        rand(K, 30) * torch.logspace(-2, 2, K).double()[:, None],
        [rand(12, K), rand(16, K, seed=1)],
    )
    r1 = before.abs().amax(1)
    s = scales_from_rows(r1, after)
    r2 = torch.cat(after).abs().amax(0)
    ratios = (r2 * s) / (r1 / s)
    assert torch.allclose(ratios, ratios[0].expand(K), rtol=1e-12, atol=0)
    assert (s.min() * s.max()).item() == pytest.approx(1)


def test_a_norms_weight_tells_which_channels_are_large():
    norm, w = rand(K), rand(12, K, seed=1)
    norm[7] = 50
    w[:, 7] /= 50  # lost beside its neighbours, unless its scale is large
    scheme = parse_scheme("w4a16-g32")
    s = scales_from_norm(norm, [w], scheme)
    H = torch.diag(norm.square())
    assert s[7] > 3 * s.median()
    assert scaled_error([w], H, s, scheme) < 0.5 * scaled_error([w], H, torch.ones_like(s), scheme)


def test_channels_that_are_zero_on_a_side_keep_their_scale():
    produced, w = rand(K).abs(), rand(12, K, seed=1)
    produced[:3], w[:, 3:5] = 0, 0
    s = scales_from_rows(produced, [w])
    assert (s[:5] == 1).all()
    assert torch.isfinite(s).all()
    assert (s > 0).all()
    assert torch.equal(scales_from_rows(produced * 0, [w]), torch.ones(K, dtype=torch.float64))
