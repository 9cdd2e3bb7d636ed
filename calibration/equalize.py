"""Scales of input channels from the weights alone: cross-layer equalization (Nagel et al., ICCV 2019, arXiv:1906.04721).

    s_k = sqrt(r1_k / r2_k)                                                                         (11)

with r1_k the range of what produces channel k (a row of the linear before) and r2_k that of the column that reads
it. Channel k is divided by s_k and the column multiplied by it, so both have the range sqrt(r1_k r2_k) and neither
is lost among larger ones. A norm's weight is not quantized and needs no range of its own: it is moved into the
columns whole, s_k = |norm weight|.
"""

from collections.abc import Sequence

import torch


def equalizing_scales(
    produced: torch.Tensor, weights: Sequence[torch.Tensor], from_norm: bool
) -> torch.Tensor:
    """Scales s [K] with sqrt(max s * min s) = 1; 1 for channels that are zero on a side.

    Args:
        produced: range r1 of each channel at its producer [K], the norm's weight where it is a norm.
        weights: of the linears that read the channels, [N_i, K] each.
        from_norm: the producer is a norm.
    """
    r1 = produced.abs()
    r2 = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    active = (r1 > 0) & (r2 > 0)
    s = r1 if from_norm else (r1 / torch.where(active, r2, 1.0)).sqrt()
    if not active.any():
        return torch.ones_like(r1)
    low, high = s[active].aminmax()
    return torch.where(active, s / (low * high).sqrt(), 1.0)
