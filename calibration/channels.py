"""Scales of input channels that no norm or linear can take: x is multiplied by them at run time.

    y = (x * c) @ (W diag(1 / c))^T,   c = 1 / s rounded to bfloat16

with s of AWQ or SmoothQuant. The weight is multiplied by what the rounding left of s, so the function stays the same.
"""

import weakref
from collections.abc import Callable

import torch
from torch import nn

STORED = torch.bfloat16


def channel_scales(s: torch.Tensor) -> torch.Tensor | None:
    """c, bfloat16 [K], for scales s [K], floating; None where all are 1 and nothing is to be multiplied."""
    c = (1 / s).to(STORED)
    return None if (c == 1).all() else c


class ScaleInput:
    """A forward hook that hands a linear x * c in the place of x.

    Linears that share x and the hook get the same tensor while it lives, so that they are still seen to share it.
    """

    def __init__(self, c: torch.Tensor) -> None:
        self.c = c
        self.last: Callable[[], torch.Tensor | None] = lambda: None  # x
        self.scaled: Callable[[], torch.Tensor | None] = lambda: None  # x * c

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, y = args[0], self.scaled()
        if y is None or self.last() is not x:
            y = (x * self.c.to(x.device)).to(x.dtype)
            self.last, self.scaled = weakref.ref(x), weakref.ref(y)
        return (y, *args[1:])


def scale_input(linear: nn.Linear, hook: ScaleInput | None) -> None:
    """Makes a linear see x * c before all hooks that are added later; None: x, as it was without a hook."""
    hooks = linear._forward_pre_hooks
    for key in [key for key, old in hooks.items() if isinstance(old, ScaleInput)]:
        del hooks[key]
    if hook is not None:
        linear.register_forward_pre_hook(hook, prepend=True)
