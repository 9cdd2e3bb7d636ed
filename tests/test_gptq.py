import pytest
import torch

from quantkit.calibration import gptq as gptq_module
from quantkit.calibration.gptq import GPTQResult, HessianError, factorize, inverse_cholesky
from quantkit.calibration.grid import fit_grid, search_clip
from quantkit.calibration.rtn import rtn
from quantkit.calibration.statistics import InputStatistics, output_error
from quantkit.errors import QuantKitError
from quantkit.scheme import parse_scheme

SCHEMES = ["w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a16-channel"]
SCHEMES += [name + "-asym" for name in SCHEMES] + ["w3a16-g64", "w2a16-g32-asym"]
EIGHT_BIT = ["w8a16", "w8a8", "fp8", "fp8-block"]
K = 200  # a multiple of neither a group nor a block


def problem(K=K, N=48, tokens=800):
    """A weight [N, K] and the second moments of correlated inputs of very different sizes, float64."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=g, dtype=torch.float64)
    mix = torch.randn(K, K, generator=g, dtype=torch.float64) / K**0.5
    x = torch.randn(tokens, K, generator=g, dtype=torch.float64) @ mix * torch.linspace(0.1, 3, K).double()
    return w, x.T @ x / tokens


def gptq(w, hessian, scheme, damp_percent=0.01, act_order=True, **options) -> GPTQResult:
    return gptq_module.gptq(w, factorize(hessian, damp_percent, act_order), scheme, **options)


def loss(w, hessian, quantized):
    return output_error(w - quantized.dequantize(torch.float64), hessian)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", SCHEMES + EIGHT_BIT)
def test_identity_hessian_is_round_to_nearest(name, act_order):
    w, scheme = problem()[0], parse_scheme(name)
    eye = torch.eye(K, dtype=torch.float64)
    for grid, expected in (
        (fit_grid(w, scheme), rtn(w, scheme)),
        (None, rtn(w, scheme, grid=search_clip(w, scheme))),
    ):
        result = gptq(w, eye, scheme, grid=grid, damp_percent=0.0, act_order=act_order)
        assert result.damp_percent == 0
        assert all(map(torch.equal, result.quantized.tensors().values(), expected.tensors().values()))


@pytest.mark.parametrize("block_size", [1, 48, 1000])
def test_block_size_changes_nothing(block_size):
    w, H = problem()
    a, b = (gptq(w, H, parse_scheme("w4a16-g64"), block_size=size).quantized for size in (128, block_size))
    assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", SCHEMES + EIGHT_BIT)
def test_beats_round_to_nearest_on_its_own_objective(name, act_order):
    w, H = problem()
    scheme = parse_scheme(name)
    assert loss(w, H, gptq(w, H, scheme, act_order=act_order).quantized) < loss(w, H, rtn(w, scheme))


@pytest.mark.parametrize("name", SCHEMES[:4])  # min-max of few weights is already close to the best range
def test_the_searched_range_beats_the_full_range_of_symmetric_grids(name):
    w, H = problem()
    scheme = parse_scheme(name)
    full = gptq(w, H, scheme, grid=fit_grid(w, scheme)).quantized
    assert loss(w, H, gptq(w, H, scheme).quantized) < loss(w, H, full)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", ["w4a16-g32", "w3a16-g32-asym", *EIGHT_BIT])
def test_codes_follow_algorithm_1_column_by_column(name, act_order):
    N, K = 130, 140  # rows and columns of two tiles of fp8-block
    w, H = problem(K, N)
    scheme = parse_scheme(name)
    grid = search_clip(w, scheme)
    found = gptq(w, H, scheme, grid=grid, act_order=act_order, keep_targets=True)
    scale, zero = (torch.as_tensor(t, dtype=w.dtype).broadcast_to(N, K) for t in grid.expand(w.dtype))
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(K)
    # the paper's equations (2) and (3): inv(H) of the columns that remain, eliminated one at a time
    inverse = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(K, dtype=H.dtype))
    now, codes, targets = w.clone(), torch.empty_like(w), torch.empty_like(w)
    low, high = grid.code_range
    for j in order.tolist():
        targets[:, j] = now[:, j]
        codes[:, j] = (now[:, j] / scale[:, j] + zero[:, j]).clamp(low, high)
        if scheme.weight == "fp8":
            codes[:, j] = codes[:, j].to(torch.float8_e4m3fn).double()
        else:
            codes[:, j] = codes[:, j].round()
        value = (codes[:, j] - zero[:, j]) * scale[:, j]
        now -= torch.outer((now[:, j] - value) / inverse[j, j], inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1  # eliminated: its row is never read again
    expected = (codes - zero) * scale
    assert torch.equal(found.quantized.dequantize(torch.float64), expected)
    # both routes invert H, whose condition its damping by 1 % bounds
    assert torch.allclose(found.targets, targets, rtol=0, atol=1e-9)


def test_what_a_column_loses_the_others_make_up_for_as_least_squares_would():
    """The best update of the weights that are left, given the error of those that are rounded."""
    w, H = problem(K=24, N=6)
    scheme = parse_scheme("w4a16-channel")
    found = gptq(w, H, scheme, act_order=False, keep_targets=True)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(24, dtype=H.dtype)
    error = w - found.quantized.dequantize(torch.float64)
    for j in (1, 2, 13, 23):
        # argmin over d of [e d] H [e d]^T, e the errors of columns before j, d what the others are moved by
        best = torch.linalg.solve(damped[j:, j:], damped[j:, :j] @ error[:, :j].T).T
        assert torch.allclose(found.targets[:, j], (w[:, j:] + best)[:, 0], rtol=0, atol=1e-9)


def test_inverse_cholesky_factors_the_inverse():
    H = problem()[1]
    U, damp = inverse_cholesky(H, 0.01)
    damped = H + damp * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    assert torch.equal(U, U.triu())
    # K eps cond(H) bounds the residual of a Cholesky inverse; damping by 1 % bounds cond(H) by its norm
    bound = K * torch.finfo(H.dtype).eps * torch.linalg.cond(damped)
    assert (U.T @ U @ damped - torch.eye(K, dtype=H.dtype)).abs().max() <= bound


def test_damping_rises_until_a_singular_hessian_inverts():
    w, _ = problem()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    H = x.T @ x
    result = gptq(w, H, parse_scheme("w4a16"), damp_percent=0.0)
    assert 0 < result.damp_percent <= 0.01
    assert loss(w, H, result.quantized) < loss(w, H, rtn(w, parse_scheme("w4a16")))


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.full((K, K), float("nan")), "NaN or infinite"),
        (-torch.eye(K), "not positive definite even with damp_percent 1"),
    ],
)
def test_hopeless_hessians_have_their_own_error(hessian, message):
    with pytest.raises(HessianError, match=message):
        gptq(problem()[0], hessian, parse_scheme("w4a16"))


@pytest.mark.parametrize("dead", [[0, 5, 199], list(range(K))], ids=["some", "all"])
def test_dead_inputs_are_rounded_to_nearest(dead):
    w, H = problem()
    H[dead], H[:, dead] = 0, 0
    scheme = parse_scheme("w4a16-g32-asym")
    a = gptq(w, H, scheme, grid=fit_grid(w, scheme)).quantized.dequantize(torch.float64)
    assert torch.equal(a[:, dead], rtn(w, scheme).dequantize(torch.float64)[:, dead])


@pytest.mark.parametrize("name", ["w4a16-g32", "w4a16-g32-asym"])
def test_extreme_weights_stay_finite(name):
    w, H = problem()
    w[0], w[1], w[2, 7] = 0, 1e-30, 1e4
    for dtype in (torch.float32, torch.float64):
        dequantized = gptq(w.to(dtype), H.to(dtype), parse_scheme(name)).quantized.dequantize()
        assert torch.isfinite(dequantized).all()
        assert (dequantized[0] == 0).all()


def test_float32_loses_little_against_float64():
    w, H = problem()
    scheme = parse_scheme("w4a16-g64")
    a = loss(w, H, gptq(w.float(), H.float(), scheme).quantized)
    b = loss(w, H, gptq(w, H, scheme).quantized)
    assert a == pytest.approx(b, rel=0.02)  # a code that falls the other way moves all that follow


def test_same_call_same_bits():
    w, H = problem()
    a, b = (gptq(w.float(), H.float(), parse_scheme("w4a16")).quantized.codes for _ in range(2))
    assert torch.equal(a, b)


def test_other_shapes_are_refused():
    w, H = problem()
    with pytest.raises(
        QuantKitError, match=r"Hessian is \(199, 199\), but a weight 48 x 200 needs \(200, 200\)"
    ):
        gptq(w, H[1:, 1:], parse_scheme("w4a16"))


def test_statistics_do_not_depend_on_how_the_tokens_come():
    x = torch.randn(1000, 33, generator=torch.Generator().manual_seed(0)) * 3
    whole, parts = InputStatistics(33), InputStatistics(33)
    whole.add(x)
    for part in (x[:1], x[1:400].view(3, 133, 33), x[:0], x[400:]):
        parts.add(part)
    assert whole.tokens == parts.tokens == 1000
    exact = x.double().T @ x.double() / 1000
    # float32 sums of 1000 products in some order, and a handful of running-mean updates
    bound = 1010 * 2**-24 * (x.double().abs().T @ x.double().abs() / 1000)
    for s in (whole, parts):
        assert ((s.hessian.double() - exact).abs() <= bound).all()
        assert torch.allclose(s.mean_abs.double(), x.double().abs().mean(0), rtol=1010 * 2**-24, atol=0)
        assert torch.equal(s.max_abs, x.abs().amax(0))


def test_output_error_is_the_mean_squared_error_of_the_output():
    w, _ = problem()
    x = torch.randn(500, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    error = w - rtn(w, parse_scheme("w4a16")).dequantize(torch.float64)
    expected = (x @ error.T).square().sum(1).mean().item()
    assert output_error(error, x.T @ x / 500) == pytest.approx(expected, rel=1e-12)
