"""Decoder blocks of Llama's kind with fewer kernels: the same function, of the same weights.

    h = x + o(attention(qkv(norm_1(x))))          y = h + down(silu(gate) * up),  gate, up = gate_up(norm_2(h))

q, k and v are one product, gate and up another. A norm's kernel adds the residual that comes before it and rounds for a
product of 8 bits. silu(gate) * up is a kernel of its own, which rounds likewise, or the end of gate_up's where that can.
Where o and down are cut over processes, the norm after them adds their parts (`exchange.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_outputs import BaseModelOutputWithPast

import quantkit.kernels.attention_ops  # noqa: F401  (defines torch.ops.quantkit)
from quantkit.cache import PagedCache, Step
from quantkit.continuous import page_allocator, step_of
from quantkit.errors import QuantKitError
from quantkit.exchange import open_exchange
from quantkit.kernels.cpu import epilogue
from quantkit.kernels.kv_pages import KVPages
from quantkit.linear import QuantLinear
from quantkit.packing import TURN, in_turns, merge_rows
from quantkit.rank_linear import RowLinear

KINDS = ("llama", "mistral", "qwen2", "qwen3")  # model types whose blocks are as above


CACHE_NAME = ALL_CACHE_NAMES[0]  # of the argument that holds the cache, "cache" from transformers 5.24 on
CACHE_NAMES = ("past_key_values", "cache")  # the second, of any version, in continuous batching
# Kinds of rotary embeddings whose frequencies are the same whatever the length of the text.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
CAPTURING = "transformers.utils.output_capturing"  # whose hooks stay where outputs were once asked for


@dataclass
class Flow:
    """What flows through the blocks, y + h: the next norm adds them.

    Nothing else holds the two, so that of a long prompt, whose hidden states are large, no more are there than are needed.

    Attributes:
        y: [B, T, hidden], what came last; a process's part of it where the linear that it is from leaves the sum to the norm.
        h: of the same shape, all before; None before the first norm.
        gives: whether a part of y may be given to the other processes as it is made: only norms follow that take it.
        given: whether it was.
    """

    y: Any
    h: Any = None
    gives: bool = False
    given: bool = False


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
        def attention(qkv: torch.Tensor) -> torch.Tensor:
            # its projections are `Rows` of what it is given
            return self.self_attn(hidden_states=qkv, **kwargs)[0]

        flow = Flow(hidden_states)
        self.run(flow, attention)
        down = cut_by_inputs(self.mlp.down_proj)
        return flow.h + (flow.y if down is None else down.whole(flow.y))

    def run(self, flow: Flow, attention: Callable[[torch.Tensor], torch.Tensor], before: Any = None) -> None:
        """Takes the flow through the block.

        before: the linear that its y is from; None: it is from none.
        """
        down = self.mlp.down_proj
        flow.y = attention(after_norm(self.qkv, self.input_layernorm, flow, before))
        y = after_norm(self.gate_up, self.post_attention_layernorm, flow, self.self_attn.o_proj)
        flow.y = part_of(down, y, flow) if isinstance(self.gate_up, SwiGLULinear) else after_swiglu(down, y)


class FusedDecoder(nn.Module):
    """The blocks of a model and what lies around them, with a forward of its own where there is a `PagedCache`."""

    config: Any
    embed_tokens: nn.Module
    layers: Any
    norm: Any
    rotary_emb: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(("input_ids", "attention_mask", "position_ids"), args, strict=False))
        cache: Any = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        allocator = page_allocator(cache)
        if allocator is None and not isinstance(cache, PagedCache):
            return super().forward(**kwargs)
        self.check_pages_serve(kwargs)
        embedded = kwargs.get("inputs_embeds")
        flow = Flow(self.embed_tokens(kwargs["input_ids"]) if embedded is None else embedded)
        if allocator is not None:
            step, layers = step_of(allocator, kwargs), allocator.pages
        else:
            step = cache.take(flow.y.shape[0], flow.y.shape[1], kwargs.get("attention_mask"))
            layers = [layer.pages for layer in cache.layers]
        positions = kwargs.get("position_ids")
        if positions is None:
            rotary = self.rotary_of(step.positions, cache, flow.y)
        else:
            rotary = self.rotary_emb(flow.y, positions)
        given: dict[str, Any] = {"last_hidden_state": self.run(flow, rotary, step, layers), CACHE_NAME: cache}
        return BaseModelOutputWithPast(**given)

    def check_pages_serve(self, kwargs: dict[str, Any]) -> None:
        """Refuses what a forward over pages would leave out."""
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name, getattr(self.config, name, False)):
                raise QuantKitError(
                    "PagedCache: gives neither attentions nor hidden states; ask for them without it"
                )
        if hooked := hooked_part(self):
            raise QuantKitError(
                f"PagedCache: {hooked} has forward hooks, which a block over pages does not call; remove them, or go "
                "without the cache"
            )
        device = self.norm.weight.device.type
        if torch.is_autocast_enabled(device):
            raise QuantKitError(
                f"PagedCache: autocast is on for {device}, expected the model's own dtype; load it with dtype=... instead"
            )

    def rotary_of(
        self, positions: torch.Tensor, cache: PagedCache, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `rotary_emb` gives, from a table: two kernels a step instead of ten."""
        if cache.rotary is None:
            every = torch.arange(cache.max_length, device=x.device).unsqueeze(0)
            cos, sin = self.rotary_emb(x, every)
            cache.rotary = cos[0], sin[0]
        # a step has no padding, whose positions are negative and are not seen
        rows = positions if positions.shape[1] == 1 else positions.clamp(min=0)
        return cache.rotary[0][rows], cache.rotary[1][rows]

    def run(
        self, flow: Flow, rotary: Sequence[torch.Tensor], step: Step, layers: Sequence[KVPages]
    ) -> torch.Tensor:
        """Embeddings [B, T, hidden] -> what the LM head takes, of the same shape."""
        cos, sin = (part.expand(*flow.y.shape[:2], -1).flatten(0, 1) for part in rotary)
        before = None
        flow.gives = True
        if step.starts is None:
            self.plan(flow.y, step, layers)
        for block, pages in zip(self.layers, layers, strict=True):
            block.run(flow, partial(attend, block.self_attn, flow, cos, sin, step, pages), before)
            before = block.mlp.down_proj
        return normed(self.norm, flow, before)[0]

    def plan(self, x: torch.Tensor, step: Step, layers: Sequence[KVPages]) -> None:
        """Plans of attention, once a step: their kernels have ended when the first layer's attention begins, which does not wait
        for them."""
        for block, pages in zip(self.layers, layers, strict=True):
            window = window_of(block.self_attn)
            if window not in step.plans:
                heads = pages.kv_heads * block.self_attn.num_key_value_groups
                q = x.new_empty(len(step.lengths), heads, pages.head_dim)
                seen = (step.page_table, step.lengths)
                step.plans[window] = torch.ops.quantkit.decode_plan(q, *pages, *seen, window, step.max_length)


def window_of(attention: Any) -> int:
    """Tokens that a query of a block's `self_attn` sees; 0: all."""
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)) or 0


def attend(
    attention: Any,
    flow: Flow,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step: Step,
    pages: KVPages,
    qkv: torch.Tensor,
) -> torch.Tensor:
    """Attention of tokens to those in the pages, their own included.

    Args:
        attention: the block's `self_attn`, for its norms of heads, its output projection and its figures.
        flow: that the result is for.
        cos, sin: [B T, head_dim].
        pages: of this layer, to which keys and values are written.
        qkv: [B, T, (heads + 2 kv_heads) * head_dim].
    """
    norms: tuple[Any, ...] = ()
    if q_norm := getattr(attention, "q_norm", None):
        norms = (q_norm.weight, attention.k_norm.weight, q_norm.variance_epsilon)
    q = torch.ops.quantkit.rope_write(qkv.flatten(0, 1), cos, sin, step.slots, *pages, *norms)
    window, seen = window_of(attention), (step.page_table, step.lengths)
    if step.starts is None:
        y = torch.ops.quantkit.decode_attention(
            q, *pages, *seen, attention.scaling, window, 0.0, step.max_length, step.plans[window]
        )
    elif step.whole and pages.kind == "bf16" and not 0 < window < qkv.shape[1]:
        y = causal_attention(q.unflatten(0, qkv.shape[:2]), pages, step.page_table, attention.scaling)
    else:
        y = torch.ops.quantkit.prefill_attention(q, *pages, *seen, step.starts, attention.scaling, window)
    return part_of(attention.o_proj, y.view(*qkv.shape[:-1], q.shape[1] * q.shape[2]), flow)


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


class SwiGLULinear(QuantLinear):
    """Gates and ups in turns of `TURN` rows, and what follows: y = silu(gate) * up, in one kernel from the tiles of a GPU.

    Of float32 sums, rounded once; a kernel after the product has its results rounded.
    """

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not self.tiled:  # the model was moved to another device or dtype
            return epilogue(super().multiply(x), None, swiglu=True)
        weights = (self.packed, self.packed_scales, self.packed_zeros, self.bias, None)
        rest = (self.scheme.group_size or 0, self.out_features, True)
        return torch.ops.quantkit.w4a16_tiles(x, *weights, *rest)  # type: ignore[no-any-return]

    def input_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        raise QuantKitError("gradients: the model was optimized, expected one that was not; load it again")


def merged(parts: Sequence[Any], swiglu: bool = False) -> nn.Module:
    """One linear whose rows are those of all parts; `Beside` where they are not packed alike.

    swiglu: of a gate and an up, a `SwiGLULinear` where they are in tiles.
    """
    kinds = {(type(part), part.bias is None, getattr(part, "repacked_for", None)) for part in parts}
    ((kind, no_bias, x_dtype),) = kinds if len(kinds) == 1 else {(None, True, None)}
    if kind not in (QuantLinear, nn.Linear):
        return Beside(parts)
    swiglu = swiglu and kind is QuantLinear and parts[0].tiled and parts[0].out_features % TURN == 0
    bias = None if no_bias else (in_turns if swiglu else torch.cat)([part.bias for part in parts])
    if kind is nn.Linear:
        N, K = sum(part.out_features for part in parts), parts[0].in_features
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear
    try:
        weight = merge_rows([part.quantized() for part in parts], interleave=swiglu)
    except QuantKitError:
        return Beside(parts)
    packed = (SwiGLULinear if swiglu else QuantLinear).from_quantized(weight, bias)
    packed.fp8_accumulation = parts[0].fp8_accumulation
    if x_dtype is not None:
        packed.repack(x_dtype)
    return packed


def causal_attention(q: torch.Tensor, pages: KVPages, page_table: torch.Tensor, scale: float) -> torch.Tensor:
    """PyTorch's kernels for q [B, T, heads, head_dim] of whole texts, whose keys and values are in unquantized pages."""
    T = q.shape[1]
    k, v = (part[:, :, :T] for part in pages.gather(page_table[:, : -(-T // pages.page_size)].long()))
    grouped = q.shape[2] != k.shape[1]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2).contiguous()


def cut_by_inputs(linear: Any) -> RowLinear | None:
    """A linear, or what is under its adapter, where it leaves a sum over processes to the norm after it."""
    base = getattr(linear, "base_layer", linear)
    return base if getattr(base, "exchange", None) is not None else None


def part_of(linear: Any, x: torch.Tensor, flow: Flow) -> torch.Tensor:
    """linear(x), for the flow; an adapter over the linear would add to what was given."""
    cut = cut_by_inputs(linear)
    if not flow.gives or cut is None or cut is not linear:
        return linear(x)  # type: ignore[no-any-return]
    y, flow.given = cut.given(x)
    return y


def normed(
    norm: Any,
    flow: Flow,
    before: Any,
    rounding: tuple[torch.dtype | None, torch.Tensor | None, int] = (None, None, 0),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `rms_norm_quantize` of the flow, which then holds the sum alone.

    before: the linear that y is from, which may leave it to us to add the processes' parts.
    """
    cut, y = cut_by_inputs(before), flow.y.contiguous()
    given = (norm.weight, norm.variance_epsilon, flow.h, *rounding)
    if cut is None or cut.exchange is None:
        codes, scales, h = torch.ops.quantkit.rms_norm_quantize(y, *given)
    else:
        codes, scales, h = cut.exchange.norm(y, cut.late_bias, *given, flow.given)  # type: ignore[arg-type]
    flow.y, flow.h, flow.given = None, y if flow.h is None else h, False
    return codes, scales


def after_norm(linear: Any, norm: Any, flow: Flow, before: Any) -> torch.Tensor:
    """linear(norm(y + h)); the flow then holds the sum alone."""
    rounding, dtype = getattr(linear, "rounding", None), flow.y.dtype
    codes, scales = normed(norm, flow, before, rounding or (None, None, 0))
    return linear.of_rounded(codes, scales, dtype) if rounding else linear(codes)  # type: ignore[no-any-return]


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
    if hooked := next((name for name, module in model.named_modules() if hasattr(module, "_hf_hook")), None):
        raise QuantKitError(
            f"{kind}: {hooked or 'it'} has accelerate's hooks, expected none; load it with device_map={{'': device}}"
        )
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
    leave_sums_to_norms(blocks, model.dtype)
    put_before(model.get_decoder(), FusedDecoder)  # type: ignore[operator]


def fuse_block(block: Any) -> None:
    attention, mlp = block.self_attn, block.mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    block.qkv = merged(parts)
    rounded = getattr(mlp.down_proj, "rounding", None) is not None  # x, by the kernel that makes it
    block.gate_up = merged([mlp.gate_proj, mlp.up_proj], swiglu=not rounded)
    start = 0
    for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        setattr(attention, name, Rows(start, start + part.out_features))
        start += part.out_features
    del mlp.gate_proj, mlp.up_proj
    put_before(block, FusedBlock)


def leave_sums_to_norms(blocks: Any, dtype: torch.dtype) -> None:
    """Has the norms of a model that is cut over processes add the parts of the linears before them, all by one exchange."""
    cut = [
        linear
        for block in blocks
        for linear in (block.self_attn.o_proj, block.mlp.down_proj)
        if isinstance(linear, RowLinear) and linear.adds
    ]
    if not cut:
        return
    exchange = open_exchange(cut[0].group, cut[0].out_features, dtype, cut[0].device)
    for linear in cut:
        linear.exchange = exchange


def hooked_part(decoder: Any) -> str | None:
    """A module in the blocks with forward hooks other than those by which transformers captures outputs."""
    for name, module in decoder.layers.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(hook, "__module__", "") != CAPTURING for hook in hooks):
            return f"layers.{name}"
    return None


def put_before(module: Any, new: type) -> None:
    """Makes a module one of a class whose methods come before those of its own, and which has its name: transformers
    looks up by it what a class can record."""
    kind = type(module)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (new, kind), names)
