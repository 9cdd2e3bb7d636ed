"""AWQ (Lin et al., MLSys 2024, arXiv:2306.00978): protect the weights that meet large activations.

Multiply column k of the weight by s[k] before rounding, divide x[:, k] by it. The product is the same, but
weights with a large s are rounded on a relatively finer grid. The division costs nothing at run time,
because it is folded into the norm or the linear that produces x.

    s* = argmin over s of L(s),    L(s) = E_x || W x - Q(W diag(s)) diag(s)^-1 x ||^2              (4)
       = tr(E H E^T),              E = W - Q(W diag(s)) diag(s)^-1,    H = E_x[x x^T]
    s = s_X^r,  r in [0, 1)        s_X[k] = mean |x[:, k]|                                         (5)
    s = s_X^r / s_W^(1 - r)        s_W[k] = mean over rows of |W[:, k]| / (largest of its group)

The last line is the 'duo' form of the authors' code. H stands for the token sample, so a search costs
matrix products of the weight's size, whatever the amount of calibration text.

Where GPTQ rounds afterwards, its columns' costs 1 / U_jj^2 (see gptq.py) stand in the place of H: an error that
the later columns make up for should not count. That is the better choice of s, and needs no products.
"""

from collections.abc import Iterator, Sequence

import torch

from quantkit.calibration.folds import tie
from quantkit.calibration.grid import at_least_float32, fit_grid, search_clip, split_groups
from quantkit.calibration.statistics import output_error, tensor_cores
from quantkit.packing import QuantizedTensor
from quantkit.scheme import Scheme

RATIOS = 20  # steps of r, as in section 4.1
SEARCHED = 1 << 24  # weights of a linear that the search looks at


def search_scales(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    mean_abs: torch.Tensor,
    scheme: Scheme,
    *,
    head_dim: int | None = None,
    repeats: int = 1,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Scales s [K] of the input channels shared by a group of linears: equations (4) and (5).

    Args:
        weights: of the linears that share the input x, any floating dtype, [N_i, K] each.
        hessian: mean (or sum) over tokens of x x^T [K, K], or the columns' costs [K]; float32 or float64, and
            so is s.
        mean_abs: mean of |x| over tokens [K].
        scheme: any.
        head_dim, repeats: for the output projection under grouped-query attention, where each value head
            serves `repeats` query heads: channels that come from the same value channel get the same s,
            and `untie` gives the value projection's share. See there.
        scale_dtype: of the stored scales.

    Returns:
        s, positive and finite, sqrt(max s * min s) = 1 over the active channels; 1 for channels that were
        never active. Never worse in L than s = 1.
    """
    H = at_least_float32(hessian)
    weights = [some_rows(w).to(H.dtype) for w in weights]
    best = torch.ones(len(H), dtype=H.dtype, device=H.device)
    with tensor_cores():  # the losses are only compared
        least = scaled_error(weights, H, best, scheme, scale_dtype)
        for s in candidates(weights, mean_abs.to(H.dtype), scheme, head_dim, repeats):
            loss = scaled_error(weights, H, s, scheme, scale_dtype)
            if loss < least:
                best, least = s, loss
    return best


def some_rows(weight: torch.Tensor) -> torch.Tensor:
    """Rows of a weight [N, K], evenly spaced, at most `SEARCHED` weights: enough to rank scales that all rows share."""
    return weight[:: -(-weight.numel() // SEARCHED)]


def candidates(
    weights: Sequence[torch.Tensor],
    mean_abs: torch.Tensor,
    scheme: Scheme,
    head_dim: int | None = None,
    repeats: int = 1,
) -> Iterator[torch.Tensor]:
    """The scales [K] that are tried: both forms of (5) for every ratio but r = 0 of the first, which is s = 1."""
    K = len(mean_abs)
    relative = torch.cat([relative_magnitude(w, scheme.group_size) for w in weights]).mean(0)
    s_x, s_w = (tie(s, head_dim, repeats) for s in (mean_abs, relative))
    active = (s_x > 0) & (s_w > 0)
    if not active.any():
        return
    for i in range(RATIOS):
        r = i / RATIOS
        for s in (s_x**r, s_x**r / s_w ** (1 - r))[i == 0 :]:
            low, high = s[active].aminmax()
            yield torch.where(active, s / (low * high).sqrt(), 1.0).view(K)


def relative_magnitude(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """|w| / (largest |w| of its group) [N, K]; 0 in groups of zeros."""
    groups = split_groups(weight.abs(), group_size)
    largest = groups.amax(2, keepdim=True)
    return (groups / torch.where(largest > 0, largest, 1.0)).flatten(1)[:, : weight.shape[1]]


def scaled_error(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    s: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> float:
    """L(s) of equation (4), summed over the linears; their weights in the Hessian's dtype."""
    total = 0.0
    for w in weights:
        grid = fit_grid(w * s, scheme, scale_dtype)
        total += output_error(w - grid.dequantize(grid.round(w * s), w.dtype) / s, hessian)
    return total


def awq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedTensor:
    """Codes of a weight that has been scaled, on a grid whose range is clipped to the least output error (section 4.1).

    Args:
        weight: W diag(s) [N, K].
        hessian: of the inputs divided by s: mean of x x^T / (s s^T) [K, K].
        scheme: of 2 to 4 bits.
        scale_dtype: of the stored scales.
    """
    grid = search_clip(weight, scheme, hessian, scale_dtype)
    return grid.pack(grid.round(weight))
