"""GPTAQ's target is the least-squares solution of the original layer's output, and GPTQ rounds to it."""

import pytest
import torch

from quantkit.calibration.gptaq import DAMP_PERCENT, correction
from quantkit.calibration.gptq import HessianError, factorize, gptq
from quantkit.calibration.pipeline import quantize_linear
from quantkit.calibration.statistics import InputStatistics
from quantkit.recipe import ModulePlan
from quantkit.scheme import parse_scheme

K, N, TOKENS = 96, 40, 600


def problem(noise=0.2):
    """A weight [N, K], inputs of the quantized model and of the original [TOKENS, K], float64, and their statistics."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=g, dtype=torch.float64)
    mix = torch.randn(K, K, generator=g, dtype=torch.float64) / K**0.5
    original = torch.randn(TOKENS, K, generator=g, dtype=torch.float64) @ mix
    # errors that depend on what is there, as those of earlier layers do
    x = original @ (torch.eye(K) + noise * torch.randn(K, K, generator=g, dtype=torch.float64) / K**0.5)
    statistics = InputStatistics(K)
    for rows, exact in zip(x.split(250), original.split(250), strict=True):
        statistics.add(rows, exact)
    return w, x, original, statistics


def in_float64(x, original):
    statistics = InputStatistics(0)
    statistics.hessian = x.T @ x / TOKENS
    statistics.drift = (original - x).T @ x / TOKENS
    statistics.tokens = TOKENS
    return statistics


def test_the_target_is_the_damped_least_squares_solution():
    w, x, original, _ = problem()
    statistics = in_float64(x, original)
    target = w + w @ correction(statistics)
    # argmin over W* of || W X_o - W* X ||^2 + damping |W* - W|^2, as one least-squares problem with more rows
    damping = (DAMP_PERCENT * statistics.hessian.diagonal().mean() * TOKENS).sqrt()
    rows = torch.cat([x, damping * torch.eye(K, dtype=x.dtype)])
    wanted = torch.cat([original @ w.T, damping * w.T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    # a backward stable solver errs by eps cond(rows) or, of the normal equations, its square
    bound = K * torch.finfo(x.dtype).eps * torch.linalg.cond(rows) ** 2
    assert torch.linalg.norm(target - expected) <= bound * torch.linalg.norm(w)


def test_float32_statistics_give_the_same_target():
    w, x, original, statistics = problem()
    exact = w @ correction(in_float64(x, original))
    found = (w.float() @ correction(statistics)).double()
    H = in_float64(x, original).hessian
    damped = H + DAMP_PERCENT * H.diagonal().mean() * torch.eye(K)
    # sums of TOKENS products and a solve of K columns in float32, by the condition of what is solved
    bound = (TOKENS + K) * 2**-24 * torch.linalg.cond(damped)
    assert (found - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-g32-asym", "w3a16-g32", "w8a16", "fp8"])
def test_it_is_nearer_to_the_original_output_than_gptq(name):
    w, x, original, _ = problem()
    scheme, statistics = parse_scheme(name), in_float64(x, original)
    factor = factorize(statistics.hessian)

    def loss(target):
        q = gptq(target, factor, scheme).quantized.dequantize(torch.float64)
        return (original @ w.T - x @ q.T).square().sum()

    assert loss(w + w @ correction(statistics)) < 0.8 * loss(w)


def test_no_drift_is_gptq_to_the_bit():
    w, x, _, _ = problem()
    statistics = InputStatistics(K)
    statistics.add(x.float(), x.float())
    assert not statistics.drift.any()
    plans = {method: ModulePlan("up", parse_scheme("w4a16-g32"), method) for method in ("gptq", "gptaq")}
    a, b = (quantize_linear(w.float(), plan, statistics).quantized for plan in plans.values())
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)


def test_drift_is_the_mean_over_all_batches():
    _, x, original, statistics = problem()
    exact = (original - x).T @ x / TOKENS
    magnitude = (original - x).abs().T @ x.abs() / TOKENS
    # inputs are rounded to float32 before they are subtracted
    rounded = 2**-23 * ((original.abs() + x.abs()).T @ x.abs() / TOKENS)
    assert ((statistics.drift - exact).abs() <= (TOKENS + 10) * 2**-24 * magnitude + rounded).all()


def test_scaled_inputs_scale_the_drift():
    _, x, original, statistics = problem()
    s = torch.rand(K, generator=torch.Generator().manual_seed(3)) + 0.5
    both = InputStatistics(K)
    both.add(x.float() * s, original.float() * s)
    scaled = statistics.scaled(s)
    for name in ("hessian", "drift", "mean_abs", "max_abs"):
        one, two = getattr(scaled, name), getattr(both, name)
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5 * two.abs().max().item()), name


def test_without_the_original_inputs_there_is_no_correction():
    statistics = InputStatistics(K)
    statistics.add(problem()[1])
    with pytest.raises(HessianError, match="inputs of the original model were not noted"):
        correction(statistics)
