"""What QuantKit knows of architectures: where the decoder blocks are, and which scales can be folded where."""

from dataclasses import dataclass

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
    "phi3": PHI3,
}
NORMS_PLUS_ONE = {"gemma2", "gemma3_text"}  # y = x / rms(x) * (1 + weight)

# Linears of a block whose outputs are added to the residual stream as they are; what reads it, reads it
# through the norms of FOLDS. Not so in Gemma 2 and 3: there a norm with a weight lies between.
WRITERS = {
    kind: ("self_attn.o_proj", "mlp.down_proj") for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")
}
FINAL_NORM = "model.norm"


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder blocks: the longest ModuleList of modules with linears in them.

    Raises:
        QuantKitError: the model has no such list.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and linears(module)
    ]
    if not found:
        conv1d = sum(type(module).__name__ == "Conv1D" for module in model.modules())
        why = (
            f"its {conv1d} Conv1D layers (GPT-2's transposed linears) are not supported"
            if conv1d
            else "it has no nn.Linear"
        )
        raise QuantKitError(f"{type(model).__name__}: no linear to quantize in its decoder blocks: {why}")
    return max(found, key=lambda item: len(item[1]))


def linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """The linears inside a module by name, in the order in which they were made."""
    return {prefix + name: child for name, child in module.named_modules() if type(child) is nn.Linear}
