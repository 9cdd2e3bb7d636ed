"""The rounding of activations that a scheme does at run time, simulated while calibrating.

Calibration then sees what the packed linear will multiply: a Hessian of rounded inputs lets GPTQ make up for part
of that rounding, and later blocks for the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from quantkit.kernels.cpu import FP8, quantize_activations
from quantkit.scheme import Scheme


def round_activations(
    x: torch.Tensor, scheme: Scheme, input_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K] rounded as the scheme's kernels round it, in x's dtype; x itself where they do not.

    Args:
        input_scale: of a scheme with a static scale, float32 [1]. Without it such a scheme does not round.
    """
    if scheme.activation is None or (scheme.activation_scale == "static" and input_scale is None):
        return x
    dtype = torch.int8 if scheme.activation == "int8" else FP8
    group_size = scheme.block_size or 0 if scheme.activation_scale == "group" else 0
    rows = x.reshape(-1, x.shape[-1])
    static = None if input_scale is None else input_scale.to(x.device)
    codes, scales = quantize_activations(rows, dtype, static, group_size)
    if group_size:
        scales = scales.repeat_interleave(group_size, 1)[:, : x.shape[-1]]
    return (codes.float() * scales).to(x.dtype).view(x.shape)


@contextmanager
def rounded_inputs(
    block: nn.Module, schemes: dict[str, Scheme], input_scales: dict[str, torch.Tensor] | None = None
) -> Iterator[None]:
    """Rounds the inputs of the named linears of a block for as long as it lasts; gradients pass unchanged."""

    def hook(scheme: Scheme, input_scale: torch.Tensor | None):  # type: ignore[no-untyped-def]
        def rounded(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x = args[0]
            y = round_activations(x.detach(), scheme, input_scale)
            return (x + (y - x.detach()) if x.requires_grad else y, *args[1:])

        return rounded

    handles = [
        block.get_submodule(name).register_forward_pre_hook(hook(scheme, (input_scales or {}).get(name)))
        for name, scheme in schemes.items()
        if scheme.activation is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
