"""Putting scales of input channels where they cost nothing: into the norm or the linear that produces the channels.

Dividing channel k of x by s[k] and multiplying column k of the weight by it leaves the product as it is. AWQ,
SmoothQuant and equalization choose s; this file divides.
"""

import torch
from torch import nn

from quantkit.models import Fold


def tie(x: torch.Tensor, head_dim: int | None = None, repeats: int = 1) -> torch.Tensor:
    """Mean of x [K] over the query heads that share a value head, at every one of them [K]."""
    if repeats == 1 or head_dim is None:
        return x
    shared = x.view(-1, repeats, head_dim)  # [value heads, repeats, head_dim]
    return shared.mean(1, keepdim=True).expand_as(shared).reshape(-1)


def untie(s: torch.Tensor, head_dim: int, repeats: int) -> torch.Tensor:
    """Tied scales [K] of an output projection -> scales of the value projection's rows [K / repeats]."""
    return s.view(-1, repeats, head_dim)[:, 0].reshape(-1)


def fold_into_norm(
    norm_weight: torch.Tensor, s: torch.Tensor, one_plus: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's output by s.

    The divided weight is rounded to its own dtype, say bfloat16. So the quotient differs from s by a
    rounding, and the linears have to be multiplied by the quotient that was reached, not by s.

    Args:
        norm_weight: of y = x / rms(x) * weight [K]. A LayerNorm's bias is divided by the same factors.
        s: [K].
        one_plus: the norm multiplies by 1 + weight (Gemma).

    Returns:
        The new weight, in norm_weight's dtype, and the factors that it really divides by, in s's dtype [K].
    """
    offset = 1.0 if one_plus else 0.0
    old = norm_weight.to(s.dtype) + offset
    new = (old / s - offset).to(norm_weight.dtype)
    reached = new.to(s.dtype) + offset
    exact = (reached != 0) & (old != 0)
    return new, torch.where(exact, old / reached, s)


def fold_into_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Divide the last len(s) outputs of a linear by s: all of v_proj or up_proj, the v part of a fused qkv_proj.

    Args:
        weight: [N, K], N >= len(s).
        bias: [N] or None.
        s: [len(s)].

    Returns:
        New weight and bias in their dtypes. Their rounding is not made up for, unlike a norm's: round
        float32 copies, or quantize the source linear afterwards from this weight.
    """
    factors = torch.cat([s.new_ones(len(weight) - len(s)), s])
    divided = (weight.to(s.dtype) / factors[:, None]).to(weight.dtype)
    return divided, None if bias is None else (bias.to(s.dtype) / factors).to(bias.dtype)


def heads(block: nn.Module, fold: Fold) -> tuple[int | None, int]:
    """(head_dim, query heads a value head) where a fold's channels are those of value heads, else (None, 1)."""
    attention = getattr(block, "self_attn", None) if fold.per_head else None
    return (attention.head_dim, attention.num_key_value_groups) if attention is not None else (None, 1)  # type: ignore[return-value]


@torch.no_grad()
def divide_source(
    block: nn.Module,
    fold: Fold,
    s: torch.Tensor,
    norms_plus_one: bool = False,
    stored_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Divides the outputs of the fold's source by s [K], in the block.

    Args:
        norms_plus_one: the norms multiply by 1 + weight.
        stored_dtype: what a norm will be rounded to when it is stored; None: its own dtype.

    Returns:
        the factors that the outputs were really divided by [K].
    """
    source = block.get_submodule(fold.source)
    if isinstance(source, nn.Linear):
        head_dim, repeats = heads(block, fold)
        rows = untie(s, head_dim, repeats) if head_dim is not None else s
        weight, bias = fold_into_linear(source.weight.detach(), source.bias, rows)
        source.weight.data = weight
        if bias is not None:
            source.bias.data = bias
        return s
    norm: torch.Tensor = source.weight.detach()  # type: ignore[operator, assignment]
    folded, s = fold_into_norm(norm.to(stored_dtype or norm.dtype), s, norms_plus_one)
    source.weight.data = folded.to(norm.dtype)
    return s
