"""What calibration remembers of the inputs of a linear, in place of the inputs themselves."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Lets float32 products of a GPU run on its tensor cores, in TF32: for losses that are only compared or shown."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


SAMPLED = 16  # rows kept of each batch, for searches over real inputs


def spread(count: int) -> torch.Tensor:
    """Which of `count` rows are kept: int64 [min(count, SAMPLED)], from all places of a sequence.

    A batch holds sequences of one length. With equal steps, which that length divides, the rows would come from
    one or two of its places, the first token's above all, whose activations are like no other's.
    """
    n = min(count, SAMPLED)
    return torch.arange(n) * (count + count // n) // n % count


class InputStatistics:
    """Running statistics of the rows x of a linear's input, over all tokens added so far.

    Attributes:
        hessian: mean of x x^T, float32 [K, K]. A mean, so that it neither grows with the number of
            tokens nor loses the late ones to rounding.
        drift: mean of (x_original - x) x^T, float32 [K, K], where the inputs of the model that is not quantized
            were added too; else None.
        mean_abs, max_abs: mean and largest |x|, float32 [K].
        tokens: rows added.
    """

    def __init__(self, K: int, device: torch.device | str = "cpu") -> None:
        self.hessian = torch.zeros(K, K, device=device)
        self.drift: torch.Tensor | None = None
        self.mean_abs = torch.zeros(K, device=device)
        self.max_abs = torch.zeros(K, device=device)
        self.tokens = 0
        self.sampled: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Add x [..., K], any floating dtype, and what stands in its place in the original model."""
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        total = self.tokens + len(x)
        weights = dict(beta=self.tokens / total, alpha=1 / total)
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half and x.device.type == "cuda":
            # products of 8 or 11 bits are exact in float32, in which the tensor cores sum them
            moments = torch.mm(x.T, x, out_dtype=torch.float32)
            self.hessian.mul_(weights["beta"]).add_(moments, alpha=weights["alpha"])
            x = x.float()
        else:
            x = x.to(self.hessian)
            self.hessian.addmm_(x.T, x, **weights)
        if original is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.hessian)
            with tensor_cores() if half else nullcontext():
                self.drift.addmm_((original.reshape(x.shape).to(x) - x).T, x, **weights)
        self.sampled.append(x[spread(len(x)).to(x.device)])
        x = x.abs()
        self.mean_abs.lerp_(x.mean(0), len(x) / total)
        torch.maximum(self.max_abs, x.amax(0), out=self.max_abs)
        self.tokens = total

    def rows(self) -> torch.Tensor:
        """A sample of the rows added, spread over each batch, float32 [n, K]."""
        return torch.cat(self.sampled)

    def scaled(self, factors: torch.Tensor) -> "InputStatistics":
        """Statistics of x * factors, factors positive [K]."""
        out = InputStatistics(0, factors.device)
        both = torch.outer(factors, factors)
        out.hessian = self.hessian * both
        out.drift = None if self.drift is None else self.drift * both
        out.mean_abs, out.max_abs, out.tokens = self.mean_abs * factors, self.max_abs * factors, self.tokens
        out.sampled = [rows * factors for rows in self.sampled]
        return out


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) for a weight error E [N, K]: the mean over tokens of the squared error of the output.

    Args:
        hessian: H [K, K]; or a cost of each column [K], which stands for diag(cost).
    """
    e = error.to(hessian.dtype)
    return ((e * hessian if hessian.dim() == 1 else e @ hessian) * e).sum().item()
