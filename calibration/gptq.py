"""GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323), Algorithm 1.

Minimises tr(E H E^T), E = W - dequantize(codes) and H = X^T X, one column at a time: round column j,
then move its rounding error into the columns that are not rounded yet, weighted by row j of the upper
triangular U with U^T U = inv(H).

The grid is fitted before the first column is rounded ('static groups'), each scale to its natural group
of neighbouring columns. So columns can be visited by falling diag(H) (`act_order`) and the codes are
stored in natural order all the same: kernels need no permutation and no g_idx.

Rounding column j by e_j costs (e_j / U_jj)^2 after the later columns have made up for it, and the sum of
these costs is the objective. They weight the search for the range of each group's grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit.calibration.grid import Grid, at_least_float32, search_clip
from quantkit.errors import QuantKitError
from quantkit.packing import QuantizedTensor
from quantkit.scheme import Scheme

DAMP_PERCENT = 0.01  # of mean(diag H), section 3.3 step 3
LEAST_RAISE = 1e-3  # the damping tried after 0 has failed
MOST_DAMP = 1.0  # the largest tried; a Hessian that needs more holds no information
BLOCK_SIZE = 128  # columns whose errors reach the rest of the row in one product; it changes speed only


class HessianError(QuantKitError):
    """The Hessian cannot be inverted whatever the damping: quantize this module by rounding to nearest."""


@dataclass(frozen=True)
class GPTQResult:
    """What GPTQ made of a weight.

    Attributes:
        quantized: the packed weight.
        damp_percent: with which the Hessian inverted, in units of mean(diag H).
        targets: [N, K] the weights as they were when their turn to be rounded came, errors of earlier columns
            made up for; None unless asked for.
    """

    quantized: QuantizedTensor
    damp_percent: float
    targets: torch.Tensor | None = None


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian, shared by the linears that have the same input.

    Attributes:
        U: upper triangular [K, K], U^T U = inv(H) with rows and columns of H in `order`.
        order: int64 [K], the columns as they are visited.
        costs: [K] in natural order, 1 / U_jj^2.
        damp_percent: that was needed.
    """

    U: torch.Tensor
    order: torch.Tensor
    costs: torch.Tensor
    damp_percent: float


def factorize(hessian: torch.Tensor, damp_percent: float = DAMP_PERCENT, act_order: bool = True) -> Factor:
    """Steps 1 to 3 of the algorithm, everything that does not depend on the weight.

    Args:
        hessian: mean (or sum) over calibration tokens of x x^T [K, K]. The computation runs in its dtype,
            float32 or float64. Inputs that were always zero get the mean of the diagonal, so that their columns
            are rounded to nearest.
        damp_percent: added to the diagonal, in units of its mean; ten times more for each failure.
        act_order: visit columns by falling diag(H) instead of from left to right.

    Raises:
        HessianError: not finite, or not positive definite under any damping.
    """
    H = at_least_float32(hessian)
    diagonal = H.diagonal().clone()
    dead = diagonal == 0
    diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)
    U, damp = inverse_cholesky(H[order[:, None], order], damp_percent, diagonal[order])
    costs = torch.empty_like(diagonal)
    costs[order] = U.diagonal() ** -2
    return Factor(U, order, costs, damp)


def inverse_cholesky(
    hessian: torch.Tensor, damp_percent: float, diagonal: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Upper triangular U [K, K] with U^T U = inv(H + damp * mean(diag H) * I), and that damp.

    H reversed in rows and columns is L L^T; L reversed is an upper triangular R with R R^T = H, and
    U = inv(R). That inverts one triangle, where the paper's route needs inv(H) and a second Cholesky.

    Args:
        diagonal: in the place of H's own.

    Raises:
        HessianError: not positive definite even with the largest damping, or not finite.
    """
    if not torch.isfinite(hessian).all():
        raise HessianError("the Hessian has NaN or infinite entries: the module's inputs overflowed")
    reversed_ = hessian.flip(0, 1)  # a copy
    diagonal = (hessian.diagonal() if diagonal is None else diagonal).flip(0)
    mean, damp = diagonal.mean(), damp_percent
    while True:
        reversed_.diagonal().copy_(diagonal + damp * mean)
        lower, info = torch.linalg.cholesky_ex(reversed_)
        if info == 0:
            break
        if damp >= MOST_DAMP:
            raise HessianError(f"the Hessian is not positive definite even with damp_percent {damp:g}")
        damp = min(max(10 * damp, LEAST_RAISE), MOST_DAMP)
    del reversed_
    upper = lower.flip(0, 1)
    del lower
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True).contiguous(), damp  # LAPACK's are by columns


def gptq(
    weight: torch.Tensor,
    factor: Factor,
    scheme: Scheme,
    *,
    grid: Grid | None = None,
    block_size: int = BLOCK_SIZE,
    scale_dtype: torch.dtype = torch.bfloat16,
    keep_targets: bool = False,
) -> GPTQResult:
    """Quantize a weight, given the second moments of its inputs.

    Args:
        weight: any floating dtype [N, K].
        factor: of those second moments; the computation runs in its dtype.
        scheme: any.
        grid: the grid to round onto; by default `search_clip` with the costs above.
        block_size: columns whose errors reach the rest of the row in one product. It changes speed only.
        scale_dtype: of the stored scales of 2 to 4 bits, bfloat16 or float16.
        keep_targets: return them.

    Raises:
        QuantKitError: the weight has NaN or infinite entries, or does not have the Hessian's K.
    """
    U, order = factor.U, factor.order
    N, K = weight.shape
    if len(U) != K:
        raise QuantKitError(f"the Hessian is {tuple(U.shape)}, but a weight {N} x {K} needs ({K}, {K})")
    w = weight.to(U.dtype)
    if grid is None:
        grid = search_clip(w, scheme, factor.costs, scale_dtype)
    scales, zeros, group_of = grid.tables(U.dtype)
    columns = w.T[order]  # [K, N], a copy, so that a column of the weight is contiguous
    del w
    codes = torch.empty(K, N, dtype=torch.uint8, device=U.device)
    errors = torch.empty(K if keep_targets else block_size, N, dtype=U.dtype, device=U.device)
    for start in range(0, K, block_size):
        stop = min(start + block_size, K)
        done = errors[start:stop] if keep_targets else errors[: stop - start]
        picked = order[start:stop]
        codes[picked] = inner_loop(columns)(
            columns[start:stop],
            U[start:stop, start:stop],
            scales,
            zeros,
            group_of[picked],
            done,
            scheme.weight,
            scheme.largest_code,
        )
        columns[stop:].addmm_(U[start:stop, stop:].T, done, alpha=-1)
    quantized = grid.pack(grid.from_bytes(codes.T))
    targets = None
    if keep_targets:  # the error of column j, as it is carried on, is (target - rounded) / U_jj
        offsets = torch.empty_like(errors)
        offsets[order] = errors * U.diagonal()[:, None]
        targets = quantized.dequantize(U.dtype) + offsets.T
    return GPTQResult(quantized, factor.damp_percent, targets)


def inner_loop(columns: torch.Tensor) -> Callable[..., torch.Tensor]:
    """`round_columns`, or the kernel that does the same on a GPU."""
    if columns.device.type != "cuda" or columns.dtype != torch.float32:
        return round_columns
    from quantkit.kernels import gptq_columns  # Triton is not everywhere

    return gptq_columns.round_columns


def round_columns(
    columns: torch.Tensor,
    U: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | float,
    groups: torch.Tensor,
    errors: torch.Tensor,
    kind: str,
    top: int,
) -> torch.Tensor:
    """Rounds C columns of a weight, given transposed, one after the other: the paper's inner loop.

    Args:
        columns: float [C, N]; overwritten.
        U: upper triangular, of the same dtype [C, C].
        scales, zeros: of each group and row, of the same dtype [groups, N]; or one zero for all.
        groups: int64 [C], each column's group.
        errors: [C, N], of the same dtype; filled with what the columns after these have to make up
            for: (w - value) / U_jj.
        kind: what a code is: int2, int3, int4, int8 or fp8.
        top: the largest code.

    Returns:
        codes uint8 [C, N]; int8 and e4m3 ones as their bits.
    """
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    diagonal = U.diagonal().tolist()
    for j, group in enumerate(groups.tolist()):
        w, scale = columns[j], scales[group]
        zero = zeros if isinstance(zeros, float) else zeros[group]
        if kind == "fp8":
            code = (w / scale).clamp_(-top, top).to(torch.float8_e4m3fn)
            value, codes[j] = code.to(w.dtype) * scale, code.view(torch.uint8)
        elif kind == "int8":
            code = (w / scale).round_().clamp_(-top, top)
            value, codes[j] = code * scale, code.to(torch.int8).view(torch.uint8)
        else:
            code = (w / scale + zero).round_().clamp_(0, top)
            value, codes[j] = (code - zero) * scale, code.to(torch.uint8)
        errors[j] = (w - value) / diagonal[j]
        columns[j + 1 :] -= U[j, j + 1 :, None] * errors[j]
    return codes
