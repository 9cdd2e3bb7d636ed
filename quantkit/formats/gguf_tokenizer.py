"""A tokenizer in GGUF's metadata, from the tokenizer.json that transformers has."""

from pathlib import Path
from typing import Any

from quantkit.checkpoint import read_json
from quantkit.errors import QuantKitError
from quantkit.formats.gguf_names import ARCHITECTURES

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's kinds of tokens
# How text is cut before the merges: llama.cpp knows it by a name, tokenizer.json has the expression itself. They differ
# in the digits that one token may hold.
CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {CUT % "{1,3}": "llama-bpe", CUT % "": "qwen2"}


def tokenizer_metadata(folder: Path, config: Any) -> tuple[dict[str, Any], str]:
    """`tokenizer.ggml.*` for a model's folder, and what the user should know ('': nothing).

    Byte-level BPE, and BPE with byte tokens as SentencePiece has it; other tokenizers are left out.
    """
    file, special = folder / "tokenizer.json", special_tokens(folder, config)
    if not file.is_file():
        return (
            special,
            f"{folder} has no tokenizer.json, so the GGUF holds no tokenizer: llama.cpp will not run it",
        )
    content = read_json(file)
    try:
        values, note = tokens_of(file, content, config)
        "".join(values.get("tokenizer.ggml.tokens", [])).encode()  # halves of surrogates are no text
        "".join(values.get("tokenizer.ggml.merges", [])).encode()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise QuantKitError(
            f"{file}: cannot be read ({error!r}), expected a tokenizer of the tokenizers library; copy it again"
        ) from error
    return values | special, note


def tokens_of(file: Path, content: dict[str, Any], config: Any) -> tuple[dict[str, Any], str]:
    """What tokenizer.json says of tokens, kinds and merges; {} and why, where GGUF does not hold it."""
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return {}, f"{file}: a tokenizer of type {model.get('type')}, which GGUF does not hold; left out"
    bytewise = bool(model.get("byte_fallback"))
    pre = "default" if bytewise else PRE.get(cut_of(content))
    if pre is None:
        return {}, f"{file}: cuts text by a pattern that quantkit has no name of llama.cpp's for; left out"
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [UNUSED] * config.vocab_size
    for text, number in model["vocab"].items():
        if 0 <= number < len(tokens):
            tokens[number], kinds[number] = text, NORMAL
            if bytewise and len(text) == 6 and text.startswith("<0x"):
                kinds[number] = BYTE
            if text == model.get("unk_token"):
                kinds[number] = UNKNOWN
    for added in content.get("added_tokens") or []:
        if 0 <= added["id"] < len(tokens):
            tokens[added["id"]] = added["content"]
            if kinds[added["id"]] != UNKNOWN:
                kinds[added["id"]] = CONTROL if added.get("special") else USER
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if bytewise else "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
    }
    if bytewise:  # SentencePiece's own scores fall with the number of the token
        values["tokenizer.ggml.scores"] = [-float(i) for i in range(len(tokens))]
    else:
        merges = model.get("merges") or []
        values["tokenizer.ggml.merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    return values, ""


def cut_of(content: dict[str, Any]) -> str:
    """The expression that alone cuts text before byte-level BPE; '' where it is cut otherwise."""
    stage = content.get("pre_tokenizer") or {}
    stages = stage.get("pretokenizers", [stage])
    if [stage.get("type") for stage in stages] != ["Split", "ByteLevel"]:
        return ""
    split, bytelevel = stages
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return ""
    if bytelevel.get("use_regex", True) or bytelevel.get("add_prefix_space", True):
        return ""
    return str(split["pattern"].get("Regex", ""))


def special_tokens(folder: Path, config: Any) -> dict[str, Any]:
    """Numbers of the special tokens, whether the first is put before a text, and the chat template."""
    values: dict[str, Any] = {}
    for ours, theirs in (
        ("bos_token_id", "bos_token_id"),
        ("eos_token_id", "eos_token_id"),
        ("pad_token_id", "padding_token_id"),
    ):
        number = getattr(config, ours, None)
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            values[f"tokenizer.ggml.{theirs}"] = number
    file = folder / "tokenizer_config.json"
    described = read_json(file) if file.is_file() else {}
    if isinstance(described.get("add_bos_token"), bool):
        values["tokenizer.ggml.add_bos_token"] = described["add_bos_token"]
    elif ARCHITECTURES[config.model_type] == "llama" and config.bos_token_id is not None:
        values["tokenizer.ggml.add_bos_token"] = True
    template = described.get("chat_template")
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            template = file.read_text(encoding="utf-8")
        except ValueError as error:
            raise QuantKitError(f"{file}: not UTF-8 ({error}); copy it again") from error
    if isinstance(template, str):
        values["tokenizer.chat_template"] = template
    return values
