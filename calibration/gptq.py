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

from dataclasses import dataclass

import torch

from quantkit.calibration.grid import Grid, at_least_float32, search_clip
from quantkit.errors import QuantKitError
from quantkit.packing import QuantizedTensor
from quantkit.scheme import Scheme

DAMP_PERCENT = 0.01  # of mean(diag H), section 3.3 step 3
LEAST_RAISE = 1e-3  # the damping tried after 0 has failed
MOST_DAMP = 1.0  # the largest tried; a Hessian that needs more holds no information


class HessianError(QuantKitError):
    """The Hessian cannot be inverted whatever the damping: quantize this module by rounding to nearest."""


@dataclass(frozen=True)
class GPTQResult:
    """The quantized weight, and the damping (in units of mean(diag H)) with which the Hessian inverted."""

    quantized: QuantizedTensor
    damp_percent: float


class InputStatistics:
    """Running statistics of the rows x of a linear's input, over all tokens added so far.

    Attributes:
        hessian: mean of x x^T, float32 [K, K]. A mean, so that it neither grows with the number of
            tokens nor loses the late ones to rounding.
        mean_abs, max_abs: mean and largest |x|, float32 [K].
        tokens: rows added.
    """

    def __init__(self, K: int, device: torch.device | str = "cpu") -> None:
        self.hessian = torch.zeros(K, K, device=device)
        self.mean_abs = torch.zeros(K, device=device)
        self.max_abs = torch.zeros(K, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add x [..., K], any floating dtype."""
        x = x.reshape(-1, x.shape[-1]).to(self.hessian)
        if not len(x):
            return
        total = self.tokens + len(x)
        self.hessian.addmm_(x.T, x, beta=self.tokens / total, alpha=1 / total)
        x = x.abs()
        self.mean_abs.lerp_(x.mean(0), len(x) / total)
        torch.maximum(self.max_abs, x.amax(0), out=self.max_abs)
        self.tokens = total

    def scaled(self, factors: torch.Tensor) -> "InputStatistics":
        """Statistics of x * factors, factors positive [K]."""
        out = InputStatistics(len(factors), factors.device)
        out.hessian = self.hessian * torch.outer(factors, factors)
        out.mean_abs, out.max_abs, out.tokens = self.mean_abs * factors, self.max_abs * factors, self.tokens
        return out


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) for a weight error E [N, K]: the mean over tokens of the squared error of the output."""
    e = error.to(hessian.dtype)
    return ((e @ hessian) * e).sum().item()


def inverse_cholesky(hessian: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor, float]:
    """Upper triangular U [K, K] with U^T U = inv(H + damp * mean(diag H) * I), and that damp.

    H reversed in rows and columns is L L^T; L reversed is an upper triangular R with R R^T = H, and
    U = inv(R). That inverts one triangle, where the paper's route needs inv(H) and a second Cholesky.

    Raises:
        HessianError: not positive definite even with the largest damping, or not finite.
    """
    if not torch.isfinite(hessian).all():
        raise HessianError("the Hessian has NaN or infinite entries: the module's inputs overflowed")
    mean = hessian.diagonal().mean()
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    damp = damp_percent
    while True:
        lower, info = torch.linalg.cholesky_ex((hessian + damp * mean * eye).flip(0, 1))
        if info == 0:
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True), damp
        if damp >= MOST_DAMP:
            raise HessianError(f"the Hessian is not positive definite even with damp_percent {damp:g}")
        damp = min(max(10 * damp, LEAST_RAISE), MOST_DAMP)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
    *,
    grid: Grid | None = None,
    damp_percent: float = DAMP_PERCENT,
    block_size: int = 128,
    act_order: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> GPTQResult:
    """Quantize a weight to a scheme of 2 to 4 bits, given the second moments of its inputs.

    Args:
        weight: any floating dtype [N, K].
        hessian: mean (or sum) over calibration tokens of x x^T [K, K]. The computation runs in its
            dtype, float32 or float64. Inputs that were always zero are rounded to nearest.
        scheme: of 2 to 4 bits.
        grid: the grid to round onto; by default `search_clip` with the costs above.
        damp_percent: added to the diagonal, in units of its mean; ten times more for each failure.
        block_size: columns whose errors reach the rest of the row in one product. It changes speed only.
        act_order: visit columns by falling diag(H) instead of from left to right.
        scale_dtype: of the stored scales, bfloat16 or float16.

    Raises:
        HessianError: the Hessian is not finite, or not positive definite under any damping.
        QuantKitError: the scheme has 8 bits, or the weight has NaN or infinite entries.
    """
    if scheme.bits == 8:
        raise QuantKitError(f"GPTQ quantizes to 2 to 4 bits; {scheme.label} is rounded to nearest")
    H = at_least_float32(hessian).clone()
    N, K = weight.shape
    if H.shape != (K, K):
        raise QuantKitError(f"the Hessian is {tuple(H.shape)}, but a weight {N} x {K} needs ({K}, {K})")

    diagonal = H.diagonal()  # a view
    order = torch.arange(K, device=H.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    dead = diagonal == 0
    diagonal[dead] = diagonal[~dead].mean() if not dead.all() else 1.0
    U, damp = inverse_cholesky(H[order][:, order], damp_percent)
    if grid is None:
        costs = torch.empty_like(diagonal)
        costs[order] = U.diagonal() ** -2
        grid = search_clip(weight.to(H.dtype), scheme, costs, scale_dtype)

    W = weight.to(H.dtype)[:, order].T.contiguous().T  # [N, K] with contiguous columns
    codes = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    for start in range(0, K, block_size):
        stop = min(start + block_size, K)
        scales, zeros = grid.expand(W.dtype, order[start:stop])
        errors = torch.zeros_like(W[:, start:stop])
        for j in range(start, stop):
            w, scale = W[:, j], scales[:, j - start]
            zero = zeros if isinstance(zeros, float) else zeros[:, j - start]
            q = (w / scale + zero).round_().clamp_(0, scheme.largest_code)
            error = (w - (q - zero) * scale) / U[j, j]
            W[:, j + 1 : stop] -= error[:, None] * U[j, j + 1 : stop]
            codes[order[j]], errors[:, j - start] = q.to(torch.uint8), error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return GPTQResult(grid.pack(codes.T), damp)
