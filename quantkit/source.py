"""The model to be quantized: found, its config read, its skeleton built, its tokenizer loaded."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quantkit.errors import QuantKitError

# What a checkpoint takes over from its source beside weights and config: the tokenizer and its like.
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*processor*.json",
    "LICENSE*",
)


def resolve(model: str | Path) -> Path:
    """A local directory, or the snapshot of a hub name.

    Raises:
        QuantKitError: there is no such directory and the hub does not give such a model.
    """
    path = Path(model)
    if path.is_dir():
        return path
    name = str(model)
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise QuantKitError(f"{model}: no such model directory")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "README.md", *COPIED]))
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, malformed
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QuantKitError(
            f"{model}: no such directory, and the hub gives no such model ({reason})"
        ) from error


def auto_config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # config classes check their fields, each with errors of its own
        raise QuantKitError(
            f"{folder / 'config.json'}: transformers cannot read it: {first_line(error.__cause__ or error)}"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers whose `from_pretrained` opens a model of this config as a language model."""
    multimodal = getattr(config, "vision_config", None) is not None
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The language model of a config with its parameters on the meta device, its buffers real."""
    try:
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, dtype=config.dtype or torch.float32)
    except Exception as error:  # whatever a model's constructor makes of odd sizes
        raise QuantKitError(
            f"{config.name_or_path}: no causal language model: {first_line(error)}"
        ) from error
    model.tie_weights()  # init_empty_weights replaces parameters one by one, and so unties them
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise QuantKitError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)})") from error


def whole_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """The original model; a packed one with its linears dequantized."""
    from quantkit.foreign import dequantized_model  # which imports this module
    from quantkit.formats import PLAIN, open_source

    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    source = open_source(folder)
    if source.format != PLAIN:
        return dequantized_model(source, device, dtype)
    return auto_class(auto_config(folder)).from_pretrained(folder, dtype=dtype).to(device).eval()
