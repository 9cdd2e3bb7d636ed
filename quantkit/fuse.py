"""Decoder blocks of Llama's kind with fewer kernels: the same function, of the same weights.

    h = x + o(attention(qkv(norm_1(x))))          y = h + down(silu(gate) * up),  gate, up = gate_up(norm_2(h))

q, k and v are one product, gate and up another. A norm's kernel adds the residual that comes before it and rounds for a
product of 8 bits; a product adds the residual that comes after it where its kernel can.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantkit.errors import QuantKitError
from quantkit.linear import QuantLinear
from quantkit.packing import merge_rows

KINDS = ("llama", "mistral", "qwen2", "qwen3")  # model types whose blocks are as above


class FusedBlock(nn.Module):
    """A decoder block, called as transformers calls the one that it stands for.

    Attributes:
        self_attn: the attention's own module, without its products: what attention functions ask for its shape.
        qkv, o, gate_up, down: QuantLinears, or nn.Linears where the block is not quantized.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        if attention.config.hidden_act != "silu":
            raise QuantKitError(
                f"{type(mlp).__name__}: hidden_act {attention.config.hidden_act!r}, expected 'silu'; it cannot be fused"
            )
        self.input_norm, self.post_norm = block.input_layernorm, block.post_attention_layernorm
        self.rows = [getattr(attention, f"{name}_proj").out_features for name in "qkv"]
        self.qkv = merged([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up = merged([mlp.gate_proj, mlp.up_proj])
        self.o, self.down = attention.o_proj, mlp.down_proj
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            delattr(attention, name)
        self.self_attn = attention
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        qkv, x = after_norm(self.qkv, self.input_norm, hidden_states, None)
        y = self.attend(qkv, attention_mask, past_key_values, position_embeddings, **kwargs)
        gate_up, h = after_norm(self.gate_up, self.post_norm, self.o(y), x)
        return h + after_swiglu(self.down, gate_up)

    def attend(
        self,
        qkv: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of merged q, k and v [batch, T, rows], by the function that the model is set to."""
        attention, shape = self.self_attn, qkv.shape[:-1]
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in qkv.split(self.rows, -1))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        modeling = sys.modules[type(attention).__module__]
        assert position_embeddings is not None
        q, k = modeling.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, attention.layer_idx)
        config = attention.config
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, modeling.eager_attention_forward
        )
        window = getattr(attention, "sliding_window", None)
        if not hasattr(attention, "sliding_window") and config.model_type == "mistral":
            window = config.sliding_window
        out, _ = attend(
            attention,
            q,
            k,
            v,
            attention_mask,
            dropout=0.0,
            scaling=attention.scaling,
            sliding_window=window,
            **kwargs,
        )
        return out.reshape(*shape, -1).contiguous()


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
    """Puts a `FusedBlock` in the place of each decoder block, one at a time: weights are held once.

    Raises:
        QuantKitError: the model is of a kind whose blocks are not known, or was fused before.
    """
    kind = model.config.get_text_config().model_type
    if kind not in KINDS:
        raise QuantKitError(
            f"model_type {kind!r}: its blocks cannot be fused, those of {', '.join(KINDS)} can"
        )
    blocks = model.get_decoder().layers  # type: ignore[operator]
    if any(isinstance(block, FusedBlock) for block in blocks):
        raise QuantKitError(f"{type(model).__name__}: its blocks are fused already")
    for i in range(len(blocks)):
        blocks[i] = FusedBlock(blocks[i])
