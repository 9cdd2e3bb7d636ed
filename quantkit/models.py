"""What QuantKit knows of architectures: where the decoder blocks are, and which scales can be folded where."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from quantkit.errors import QuantKitError


@dataclass(frozen=True)
class Fold:
    """A place where a per-channel scale can hide: `source`'s outputs are divided, the linears' columns multiplied.

    Names are relative to the decoder block. `source` is a norm, or a linear whose last rows feed the linears:
    one row a column, or with `per_head` one row for the columns of all query heads that share a value head.
    """

    source: str
    linears: tuple[str, ...]
    per_head: bool = False


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = (
    Fold("input_layernorm", ATTENTION),
    Fold("self_attn.v_proj", ("self_attn.o_proj",), per_head=True),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
)
GEMMA = (*LLAMA[:2], Fold("pre_feedforward_layernorm", LLAMA[2].linears), LLAMA[3])
PHI3 = (
    Fold("input_layernorm", ("self_attn.qkv_proj",)),
    Fold("self_attn.qkv_proj", ("self_attn.o_proj",), per_head=True),
    Fold("post_attention_layernorm", ("mlp.gate_up_proj",)),
    Fold("mlp.gate_up_proj", ("mlp.down_proj",)),
)
FOLDS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "qwen2_vl_text": LLAMA,
    "phi3": PHI3,
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe"), LLAMA[:2]
    ),  # experts share the norm with their router
}
NORMS_PLUS_ONE = {"gemma2", "gemma3_text"}  # y = x / rms(x) * (1 + weight)

# Linears of a block whose outputs are added to the residual stream as they are; what reads it, reads it
# through the norms of FOLDS. Not so in Gemma 2 and 3: there a norm with a weight lies between.
WRITERS = {
    kind: ("self_attn.o_proj", "mlp.down_proj") for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")
}
FINAL_NORM = "model.norm"


def head_dim_of(config: Any) -> int:
    """Columns of an attention head, of a text model's config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder blocks: the longest ModuleList of modules with linears in them.

    Lists inside of others (a block's experts) do not count, nor do those outside the language tower.

    Raises:
        QuantKitError: the model has no such list.
    """
    prefix, tower = language_tower(model)
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in tower.named_modules(prefix=prefix):
        inner = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inner and linears(module):
            found.append((name, module))
    if not found:
        conv1d = sum(type(module).__name__ == "Conv1D" for module in model.modules())
        why = (
            f"its {conv1d} Conv1D layers (GPT-2's transposed linears) are not supported"
            if conv1d
            else "it has no nn.Linear"
        )
        raise QuantKitError(f"{type(model).__name__}: no linear to quantize in its decoder blocks: {why}")
    return max(found, key=lambda item: len(item[1]))


def language_tower(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the text model inside a multimodal one; '' and the model itself where there is no other.

    Raises:
        QuantKitError: the text model of a multimodal one cannot be told from the rest of it.
    """
    config = getattr(model, "config", None)
    if getattr(config, "vision_config", None) is None:
        return "", model
    tower = model.get_decoder()  # type: ignore[operator]
    if getattr(getattr(tower, "config", None), "vision_config", None) is not None:
        raise QuantKitError(
            f"{type(model).__name__}: its text model has no module of its own; such multimodal models are not supported"
        )
    return next((name, module) for name, module in model.named_modules() if module is tower)


def packable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that a recipe can name: all but routers of experts, and in a multimodal model but its other towers.

    A router is what stands beside a module `experts`: it decides where tokens go, and is small.
    """
    _, tower = language_tower(model)
    allowed = set(tower.modules())
    if tower is not model:
        allowed.add(model.get_output_embeddings())  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "experts"):
            allowed -= set(module.children())
    return {name: linear for name, linear in linears(model).items() if linear in allowed}


def linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """The linears inside a module by name, in the order in which they were made."""
    return {prefix + name: child for name, child in module.named_modules() if type(child) is nn.Linear}
