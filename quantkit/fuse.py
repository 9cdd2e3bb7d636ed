"""Decoder blocks of Llama's kind with fewer kernels: the same function, of the same weights.

    h = x + o(attention(qkv(norm_1(x))))          y = h + down(silu(gate) * up),  gate, up = gate_up(norm_2(h))

q, k and v are one product, gate and up another. A norm's kernel adds the residual that comes before it and rounds for a
product of 8 bits; a product adds the residual that comes after it where its kernel can.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from quantkit.errors import QuantKitError
from quantkit.linear import QuantLinear
from quantkit.packing import merge_rows

KINDS = ("llama", "mistral", "qwen2", "qwen3")  # model types whose blocks are as above


class FusedBlock(nn.Module):
    """A decoder block that was fused: its class comes before the block's own, and only its forward is new.

    Attributes:
        qkv, gate_up: the merged linears; the block's `self_attn` and `mlp` keep `o_proj` and `down_proj`.
    """

    input_layernorm: Any
    post_attention_layernorm: Any
    self_attn: Any
    mlp: Any
    qkv: nn.Module
    gate_up: nn.Module

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        qkv, x = after_norm(self.qkv, self.input_layernorm, hidden_states, None)
        y = self.self_attn(hidden_states=qkv, **kwargs)[0]  # its projections are `Rows` of what it is given
        gate_up, h = after_norm(self.gate_up, self.post_attention_layernorm, y, x)
        return h + after_swiglu(self.mlp.down_proj, gate_up)


class Rows(nn.Module):
    """Takes the place of a linear that was merged: its part of the merged result."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        return merged[..., self.start : self.stop]


class Beside(nn.Module):
    """Linears of one x that cannot be merged: their results side by side."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def merged(parts: Sequence[Any]) -> nn.Module:
    """One linear whose rows are those of all parts; `Beside` where they are not packed alike."""
    kinds = {(type(part), part.bias is None, getattr(part, "repacked_for", None)) for part in parts}
    ((kind, no_bias, x_dtype),) = kinds if len(kinds) == 1 else {(None, True, None)}
    if kind not in (QuantLinear, nn.Linear):
        return Beside(parts)
    bias = None if no_bias else torch.cat([part.bias for part in parts])
    if kind is nn.Linear:
        N, K = sum(part.out_features for part in parts), parts[0].in_features
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear
    try:
        weight = merge_rows([part.quantized() for part in parts])
    except QuantKitError:
        return Beside(parts)
    packed = QuantLinear.from_quantized(weight, bias)
    packed.fast_accumulation = parts[0].fast_accumulation
    if x_dtype is not None:
        packed.repack(x_dtype)
    return packed


def after_norm(
    linear: Any, norm: Any, x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear(norm(x + residual)), and x + residual."""
    rounding = getattr(linear, "rounding", None)
    x = x.contiguous()
    codes, scales, h = torch.ops.quantkit.rms_norm_quantize(
        x, norm.weight, norm.variance_epsilon, residual, *(rounding or (None, None, 0))
    )
    y = linear.of_rounded(codes, scales, x.dtype) if rounding else linear(codes)
    return y, x if residual is None else h


def after_swiglu(linear: Any, gate_up: torch.Tensor) -> torch.Tensor:
    """linear(silu(gate) * up) of all gates, then all ups."""
    rounding = getattr(linear, "rounding", None)
    codes, scales = torch.ops.quantkit.swiglu_quantize(gate_up, *(rounding or (None, None, 0)))
    return linear.of_rounded(codes, scales, gate_up.dtype) if rounding else linear(codes)


def fuse(model: PreTrainedModel) -> None:
    """Turns each decoder block into a `FusedBlock`, in place and one at a time: weights are held once.

    Raises:
        QuantKitError: the model is of a kind whose blocks are not known, was fused before, or is not on one device.
    """
    kind, config = type(model).__name__, model.config.get_text_config()
    if config.model_type not in KINDS:
        raise QuantKitError(
            f"{kind}: model_type {config.model_type!r}, expected {', '.join(KINDS)}; its blocks cannot be fused"
        )
    if config.hidden_act != "silu":
        raise QuantKitError(
            f"{kind}: hidden_act {config.hidden_act!r}, expected 'silu'; its blocks cannot be fused"
        )
    blocks = model.get_decoder().layers  # type: ignore[operator]
    if any(isinstance(block, FusedBlock) for block in blocks):
        raise QuantKitError(f"{kind}: its blocks are fused already")
    devices = {str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1:
        raise QuantKitError(
            f"{kind}: is on {', '.join(sorted(devices))}, expected one device; load it with device_map={{'': device}}"
        )
    if any(isinstance(tensor, DTensor) for block in blocks for tensor in block.parameters()):
        raise QuantKitError(
            f"{kind}: has linears in its blocks that are not packed and cut over processes, expected packed ones; load it "
            "without tp_plan"
        )
    for block in blocks:
        fuse_block(block)


def fuse_block(block: Any) -> None:
    attention, mlp = block.self_attn, block.mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    block.qkv = merged(parts)
    block.gate_up = merged([mlp.gate_proj, mlp.up_proj])
    start = 0
    for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        setattr(attention, name, Rows(start, start + part.out_features))
        start += part.out_features
    del mlp.gate_proj, mlp.up_proj
    kind = type(block)
    block.__class__ = type(f"Fused{kind.__name__}", (FusedBlock, kind), {"__module__": kind.__module__})
