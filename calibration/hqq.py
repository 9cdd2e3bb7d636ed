"""HQQ (Badri and Shaji 2023, 'Half-Quadratic Quantization of Large Machine Learning Models'): no calibration data.

Minimises sum |W - dequantize(codes)|^p with p < 1, which lets the few large weights of a group have large errors
so that the many others have small ones. A variable e for the errors splits the problem in two (half-quadratic):

    e <- shrink(W - dequantize(codes)),   shrink(x) = sign(x) max(|x| - (p / beta) |x|^(p - 1), 0)
    grid <- argmin || W - e - dequantize(codes) ||^2 over scale and zero of each group,   beta <- kappa beta

The authors fix the scale and fit a zero in floating point. Here zeros are integers or absent (FORMAT.md), so the
scale is fitted as well; every step's grid is judged by the objective and the best of them is kept, the searched
range of `search_clip` being the first.
"""

import torch

from quantkit.calibration.grid import (
    Grid,
    at_least_float32,
    search_clip,
    split_groups,
    storable,
)
from quantkit.errors import QuantKitError
from quantkit.packing import QuantizedTensor
from quantkit.scheme import Scheme

P, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20  # as in the authors' code


def hqq(
    weight: torch.Tensor, scheme: Scheme, *, scale_dtype: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    """Quantize weight [N, K] of any floating dtype to a scheme of 2 to 4 bits without calibration.

    Raises:
        QuantKitError: the scheme has 8 bits, or the weight has NaN or infinite entries.
    """
    if scheme.bits == 8:
        raise QuantKitError(f"HQQ quantizes to 2 to 4 bits; {scheme.label} is rounded to nearest")
    w = at_least_float32(weight)
    best = grid = search_clip(w, scheme, None, scale_dtype)
    groups = split_groups(w, scheme.group_size)
    size = (
        groups.abs().mean(2, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    )  # beta is for weights of size 1
    least, beta = objective(w, grid, size), BETA
    for _ in range(STEPS):
        error = split_groups(w - grid.dequantize(grid.round(w), w.dtype), scheme.group_size) / size
        target = groups - size * shrink(error, beta)
        grid = fit(target, grid, split_groups(grid.round(w).to(w.dtype), scheme.group_size), scale_dtype)
        loss = objective(w, grid, size)
        best, least = choose(loss < least, grid, best), torch.minimum(loss, least)
        beta *= KAPPA
    return best.pack(best.round(w))


def shrink(x: torch.Tensor, beta: float) -> torch.Tensor:
    """The proximal operator of |x|^p / beta, as the authors approximate it; 0 at 0."""
    size = x.abs()
    return x.sign() * (size - (P / beta) * size.clamp(min=1e-8) ** (P - 1)).clamp(min=0)


def objective(w: torch.Tensor, grid: Grid, size: torch.Tensor) -> torch.Tensor:
    """sum |w - dequantized|^p of each group [N, groups], in units of the group's mean |w|."""
    error = split_groups(w - grid.dequantize(grid.round(w), w.dtype), grid.scheme.group_size)
    return ((error / size).abs() ** P).sum(2)


def fit(target: torch.Tensor, grid: Grid, codes: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
    """Least squares of scale, and of zero where the scheme has one, for given codes [N, groups, G]."""
    scheme = grid.scheme
    zeros = grid.zeros
    if zeros is None:
        steps = codes - scheme.symmetric_zero
    else:
        scale = grid.scales.to(target.dtype)[:, :, None]
        zero = (codes - target / scale).mean(2).round().clamp(0, scheme.largest_code)
        zeros, steps = zero.to(torch.uint8), codes - zero[:, :, None]
    energy = steps.square().sum(2)
    scale = torch.where(
        energy > 0, (steps * target).sum(2) / energy.clamp(min=1), grid.scales.to(target.dtype)
    )
    return Grid(scheme, grid.shape, storable(scale, scale_dtype), zeros)


def choose(better: torch.Tensor, new: Grid, old: Grid) -> Grid:
    """The new grid in the groups where it is better."""
    zeros = None if old.zeros is None or new.zeros is None else torch.where(better, new.zeros, old.zeros)
    return Grid(old.scheme, old.shape, torch.where(better, new.scales, old.scales), zeros)
