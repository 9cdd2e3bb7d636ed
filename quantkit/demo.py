"""The main job in one go: every scheme of one small model, quantized, loaded back, judged."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.calibration.data import evaluation_text, text_source
from quantkit.eval.decode import generate_seconds, scheme_of
from quantkit.eval.held_out import DEFAULT_TEXT
from quantkit.eval.quality import Quality, evaluate, quality_record
from quantkit.load import load, load_model
from quantkit.quantize import calibration_tokens
from quantkit.recipe import CalibrationSpec, Recipe
from quantkit.source import load_tokenizer
from quantkit.streaming import quantize_checkpoint

EXAMPLE = Path(__file__).parent / "examples" / "lm-7m"
ROWS = (  # scheme, method: the default one, and what it is better than
    ("w8a16", "rtn"),
    ("w8a8", "smooth+gptq"),
    ("fp8", "gptq"),
    ("fp8-static", "gptq"),
    ("fp8-block", "gptq"),
    ("fp8-w8a16", "gptq"),
    ("w4a16-g128", "rtn"),
    ("w4a16-g128", "awq"),
    ("w4a16-g128", "gptq"),
    ("w4a16-g128", "awq+gptq"),
    ("w4a16-g32", "awq+gptq"),
    ("w4a16-g128-asym", "awq+gptq"),
    ("w4a16-channel", "awq+gptq"),
    ("w4a8-g128", "smooth+gptq"),
    ("w3a16-g128", "awq+gptq"),
    ("w2a16-g32", "awq+gptq"),
)
PROMPT, NEW_TOKENS = 32, 16  # of the speed figure


def text_tokens(tokenizer: Any, source: str | None) -> torch.Tensor:
    """A named text, or the default one, tokenized whole without special tokens: int64 [T]."""
    text = "\n".join(text_source(source, tokenizer)) if source else evaluation_text()
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]


def method_of(model: PreTrainedModel) -> str | None:
    """Methods that made a quantized model's modules, joined by '+'; None for an original."""
    modules = getattr(getattr(model.config, "quantization_config", None), "modules", {})
    return "+".join(sorted({entry["method"] for entry in modules.values()})) or None


def record_of(
    model: PreTrainedModel, folder: Path, quality: Quality, text: str | None, original: str | Path
) -> dict[str, Any]:
    """The record of a quality measurement; `text` and `original` are names or paths."""
    return quality_record(
        quality,
        model,
        name=Path(original).name,
        scheme=scheme_of(model),
        method=method_of(model),
        text=Path(text).name if text else DEFAULT_TEXT,
        folder=folder,
    )


def run_demo(
    folder: Path,
    text: str | None,
    spec: CalibrationSpec,
    windows: int,
    device: torch.device,
    dtype: torch.dtype | str,
    advance: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One quality record for the original and for each of `ROWS`, with `tokens_per_s` of decode at batch 1.

    Args:
        folder: the original model.
        text: evaluation text, see `text_tokens`.
        spec: the calibration; its tokens are made once and serve every row.
        windows: evaluation windows of 1024 tokens.
        dtype: to compute in, or 'auto', the model's own.
        advance: called with the name of what comes next.
    """
    tokenizer = load_tokenizer(folder)
    original = load_model(folder, device, dtype=dtype)
    tokens = text_tokens(tokenizer, text)
    prompt = tokens[:PROMPT].view(1, -1).to(device)
    calibration = calibration_tokens(spec, tokenizer, lambda: original)

    def judge(model: PreTrainedModel, where: Path) -> dict[str, Any]:
        quality = evaluate(model, tokens, against=original, limit=windows)
        record = record_of(model, where, quality, text, folder)
        return {**record, "tokens_per_s": 1 / generate_seconds(model, prompt, NEW_TOKENS, repeats=2)}

    found = [judge(original, folder)]
    for scheme, method in ROWS:
        advance(f"{scheme} {method}")
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "model"
            quantize_checkpoint(folder, out, Recipe(scheme, method, calibration=spec), device, calibration)
            found.append(judge(load(out, device, dtype=dtype), out))
    advance("done")
    return found
