"""Scales of input channels from the weights alone, where nothing was calibrated.

Channels that a linear produces: cross-layer equalization (Nagel et al., ICCV 2019, arXiv:1906.04721).

    s_k = sqrt(r1_k / r2_k)                                                                         (11)

with r1_k the range of row k of the linear before and r2_k that of the column that reads it. Channel k is divided by
s_k and the column multiplied by it, so both have the range sqrt(r1_k r2_k) and neither is lost among larger ones.

Channels that a norm produces: its output is g_k times something of size one, so the norm's weight g tells how large
each channel of x will be. That is all that AWQ asks of calibration (`awq.py`): mean |x_k| ~ |g_k|, E[x x^T] ~ diag(g^2).
"""

from collections.abc import Sequence

import torch

from quantkit.calibration.awq import search_scales
from quantkit.scheme import Scheme


def scales_from_norm(norm: torch.Tensor, weights: Sequence[torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """AWQ's scales s [K] for what a norm produces.

    Args:
        norm: the factor of each channel [K].
        weights: of the linears that read the channels, float32 [N_i, K] each.
        scheme: what they are rounded to.
    """
    size = norm.abs()
    return search_scales(weights, torch.diag(size.square()), size, scheme)


def scales_from_rows(produced: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scales s [K] by equation (11), sqrt(max s * min s) = 1; 1 for channels that are zero on a side.

    Args:
        produced: largest |weight| of the row that makes each channel [K].
        weights: of the linears that read the channels, [N_i, K] each.
    """
    read = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    active = (produced > 0) & (read > 0)
    if not active.any():
        return torch.ones_like(read)
    s = (produced / torch.where(active, read, 1.0)).sqrt()
    low, high = s[active].aminmax()
    return torch.where(active, s / (low * high).sqrt(), 1.0)
