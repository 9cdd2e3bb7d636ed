"""What the models that GGUF and transformers both know are called in each: tensors, configs, and the order of rows.

llama.cpp turns q and k of Llama's kind so that neighbouring rows of a head form a pair for the rotation of
positions; transformers pairs row i with row i + half a head. Qwen's are stored as transformers has them.
"""

import math
import re
from typing import Any

import torch

from quantkit.errors import QuantKitError
from quantkit.formats.reader import layers_in
from quantkit.models import head_dim_of

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}  # model_type: GGUF's
TURNED = ("llama",)  # GGUF's architectures whose q and k rows are turned
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output")
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's, by which frequencies are divided
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14}


def model_name(name: str) -> str | None:
    """GGUF's name of a tensor -> transformers'; None for one that the model does not store."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found is None or found[2] not in INNER:
        return None
    return f"model.layers.{found[1]}.{INNER[found[2]]}.{kind}"


def gguf_name(name: str) -> str:
    """transformers' name of a tensor -> GGUF's.

    Raises:
        QuantKitError: GGUF's architectures that are known here have none such.
    """
    stem, _, kind = name.rpartition(".")
    for theirs, ours in OUTER.items():
        if stem == ours:
            return f"{theirs}.{kind}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    for theirs, ours in INNER.items():
        if found and found[2] == ours:
            return f"blk.{found[1]}.{theirs}.{kind}"
    raise QuantKitError(f"{name}: has no name in GGUF; export models of {', '.join(ARCHITECTURES)}")


def heads_of(gguf: str, heads: int, kv_heads: int) -> int | None:
    """The heads by which a tensor's rows are turned, where it is q or k."""
    stem = gguf.rpartition(".")[0].rpartition(".")[2]
    return {"attn_q": heads, "attn_k": kv_heads}.get(stem)


def turn(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [N, ...] from transformers' order to llama.cpp's: the halves of each head in turns."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turn_back(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes `turn`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def config_from(metadata: dict[str, Any], names: set[str], vocabulary: int) -> dict[str, Any]:
    """transformers' config, as a dict, of a model that comes with no config.json."""
    kind = str(metadata.get("general.architecture"))
    if kind not in ARCHITECTURES.values():
        raise QuantKitError(
            f"GGUF architecture {kind!r}, expected {', '.join(dict.fromkeys(ARCHITECTURES.values()))}; quantkit maps only these"
        )

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{kind}.{key}", default)
        if not isinstance(found, (int, float)) or not 0 < found < 2**31:
            raise QuantKitError(f"GGUF metadata {kind}.{key} is {found!r}, expected a positive number")
        return found

    if metadata.get(f"{kind}.rope.scaling.type", "none") != "none" or ROPE_FACTORS in names:
        raise QuantKitError(
            "GGUF with scaled rotations, whose parameters it does not hold whole; put the original model's config.json "
            "into the same folder"
        )
    layers, stored = value("block_count"), layers_in(names)
    if layers > stored:
        raise QuantKitError(
            f"GGUF metadata {kind}.block_count is {layers}, but the file holds tensors of {stored}; it is damaged, or a part of "
            "a split one: join those with llama.cpp's gguf-split"
        )
    heads, width = value("attention.head_count"), value("embedding_length")
    config = {
        "model_type": kind,
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind] + "ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "rms_norm_eps": decimal(value("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": value("context_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": decimal(value("rope.freq_base", 10000.0))},
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": "float16",
    }
    head_dim = value("attention.key_length", max(width // heads, 1))
    if kind != "qwen2":
        config["head_dim"] = head_dim
    elif head_dim * heads != width:
        raise QuantKitError(
            f"GGUF metadata {kind}.attention.key_length is {head_dim}, expected {width} / {heads} heads"
        )
    if kind == "llama":
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in names,
            "mlp_bias": "blk.0.ffn_up.bias" in names,
        }
    for ours, theirs in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")):
        config[ours] = metadata.get(f"tokenizer.ggml.{theirs}")
    return config


def decimal(value: float) -> float:
    """The number of few digits that a float32 stands for: 1e-06, not 9.999999974752427e-07."""
    return float(f"{value:.7g}")


def metadata_of(config: Any, name: str, kind: str) -> dict[str, Any]:
    """GGUF's metadata of a config of transformers; `kind` is the type of most weights.

    Raises:
        QuantKitError: the model is of an architecture, or has rotations or an activation, that are not mapped here.
    """
    model_type = config.model_type
    if model_type not in ARCHITECTURES:
        raise QuantKitError(
            f"--to gguf: model_type {model_type!r}, expected {', '.join(ARCHITECTURES)}; export to compressed-tensors"
        )
    rope = dict(config.rope_parameters)
    if rope.get("rope_type", "default") not in ("default", "llama3", "linear"):
        raise QuantKitError(
            f"--to gguf: rotations of type {rope['rope_type']!r}, expected default, linear or llama3; export to "
            "compressed-tensors"
        )
    if config.hidden_act != "silu":
        raise QuantKitError(
            f"--to gguf: hidden_act {config.hidden_act!r}, expected 'silu', which GGUF takes for granted; export to "
            "compressed-tensors"
        )
    arch = ARCHITECTURES[model_type]
    head_dim = head_dim_of(config)
    values: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.vocab_size": config.vocab_size,
    }
    if rope.get("rope_type") == "linear":
        values |= {
            f"{arch}.rope.scaling.type": "linear",
            f"{arch}.rope.scaling.factor": float(rope["factor"]),
        }
    return values


def rope_factors(config: Any) -> torch.Tensor | None:
    """What Llama 3 divides each frequency of the rotation by, float32 [head_dim / 2]; None for other models.

    Waves longer than the old context / low_freq_factor are stretched by `factor`, those shorter than it /
    high_freq_factor stay, in between the inverse goes over linearly in the number of waves.
    """
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = head_dim_of(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / rope["factor"] + share)).float()
