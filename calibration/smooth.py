"""SmoothQuant (Xiao et al., ICML 2023, arXiv:2211.10438): scales that share outliers between x and W.

    s_k = max|X_k|^a / max|W_k|^(1-a)                                                                (4)

x is divided by s, column k of the weight multiplied by s_k. The paper takes one a for a model, 0.5 to 0.8. Here
each place gets the a of least output error over a sample of tokens, with x and W both rounded:

    a* = argmin || X W^T - Q_x(X / s) Q_w(W s)^T ||^2

Where GPTQ rounds the weight, what rounding x costs and what is left of the weight's rounding are added up:

    a* = argmin || (X - s Q_x(X / s)) W^T ||^2 / tokens + sum_nj (W - Q_w(W s) / s)_nj^2 costs_j
"""

from collections.abc import Callable, Sequence

import torch

from quantkit.calibration.activations import round_activations
from quantkit.calibration.awq import some_rows
from quantkit.calibration.grid import fit_grid
from quantkit.calibration.statistics import InputStatistics, output_error, tensor_cores
from quantkit.scheme import Scheme

EXPONENTS = tuple(i / 20 for i in range(20))


def smooth_scales(
    weights: Sequence[torch.Tensor],
    inputs: InputStatistics,
    scheme: Scheme,
    shared: Callable[[torch.Tensor], torch.Tensor],
    costs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales s [K] of the input channels that a group of linears shares, sqrt(max s * min s) = 1.

    Args:
        weights: float32 [N_i, K] each.
        inputs: with `rows`, a sample of tokens.
        scheme: what weight and x are rounded to.
        shared: which channels must get the same s.
        costs: of GPTQ's columns [K], if that rounds the weight.

    Returns:
        never worse than s = 1 on the sample; 1 for channels that were never active.
    """
    weights = [some_rows(w) for w in weights]
    x = inputs.rows()
    x_max = shared(inputs.max_abs)
    w_max = shared(torch.stack([w.abs().amax(0) for w in weights]).amax(0))
    active = (x_max > 0) & (w_max > 0)
    best = torch.ones_like(x_max)
    if not active.any():
        return best
    with tensor_cores():
        exact = [x @ w.T for w in weights]
        least = rounded_error(x, weights, exact, best, scheme, costs)
        for a in EXPONENTS:
            s = x_max**a / w_max ** (1 - a)
            low, high = s[active].aminmax()
            s = torch.where(active, s / (low * high).sqrt(), 1.0)
            loss = rounded_error(x, weights, exact, s, scheme, costs)
            if loss < least:
                best, least = s, loss
    return best


def rounded_error(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    s: torch.Tensor,
    scheme: Scheme,
    costs: torch.Tensor | None = None,
) -> float:
    """Squared error of the outputs, mean over the tokens, when x / s and W s are rounded; see `smooth_scales`."""
    rounded = round_activations(x / s, scheme)
    total = 0.0
    for w, y in zip(weights, exact, strict=True):
        scaled = w * s
        grid = fit_grid(scaled, scheme)
        approximate = grid.dequantize(grid.round(scaled))
        if costs is not None:
            total += output_error((scaled - approximate) / s, costs)
        y_rounded = rounded @ (approximate if costs is None else scaled).T
        total += (y - y_rounded).square().sum().item() / len(x)
    return total
