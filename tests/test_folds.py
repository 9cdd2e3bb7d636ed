"""Scales of input channels leave the product as it is, wherever they are put; and the scales of equalization."""

import pytest
import torch

from quantkit.calibration.equalize import equalizing_scales
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


def test_equalizing_moves_outlying_channels_alone():
    produced = 1 + rand(K).abs() / 4
    produced[[3, 7]] = torch.tensor([40.0, 90.0], dtype=torch.float64)
    s = equalizing_scales(produced)
    usual = 3 * produced.median()
    assert torch.equal((s > 1).nonzero().flatten(), torch.tensor([3, 7]))
    assert torch.allclose((produced / s)[[3, 7]], usual, rtol=1e-14, atol=0)
    assert (s[produced < usual] == 1).all()


@pytest.mark.parametrize("zeros", [slice(3), slice(None), slice(K // 2 + 2)])
def test_channels_that_nothing_produces_keep_their_scale(zeros):
    produced = rand(K).abs()
    produced[zeros] = 0
    s = equalizing_scales(produced)
    assert (s[zeros] == 1).all()
    assert torch.isfinite(s).all()
