"""What quantization cost a model: perplexity and divergence from the original, over one text."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.decode import Generating
from quantkit.errors import QuantKitError
from quantkit.eval.divergence import divergence
from quantkit.eval.perplexity import negative_log_likelihood, windows
from quantkit.eval.records import Record, environment
from quantkit.eval.sizes import bits_per_weight, disk_bytes, memory_bytes
from quantkit.fuse import CACHE_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Quality:
    """Figures of one model, and how they were made.

    Attributes:
        perplexity: per token of the model's own tokenizer.
        window: tokens a window; the stride equals it.
        windows: number of windows.
        predictions: windows * (window - 1), the tokens that perplexity averages over.
        dtype: what the model computed in.
        reference_perplexity, reference_dtype: the same for the reference; None without one.
        kl: mean over all windows * window positions of KL(p_reference || p), nats.
        top1: share of those positions where both models rank the same token first.
        notes: departures from what was asked for, such as a window clipped to the model's context.
        kv: what the model held keys and values as; None: they went through no cache.
    """

    perplexity: float
    window: int
    windows: int
    predictions: int
    dtype: str
    reference_perplexity: float | None = None
    reference_dtype: str | None = None
    kl: float | None = None
    top1: float | None = None
    notes: tuple[str, ...] = ()
    kv: str | None = None

    @property
    def ratio(self) -> float | None:
        """Perplexity over the reference's."""
        return self.perplexity / self.reference_perplexity if self.reference_perplexity else None

    @property
    def protocol(self) -> str:
        """The conditions, to be printed beside every figure."""
        against = f", against {self.reference_dtype}" if self.reference_dtype else ""
        cache = f", {self.kv} KV" if self.kv else ""
        return (
            f"{self.windows} non-overlapping windows of {self.window} tokens (stride {self.window}), "
            f"{self.predictions} predictions, no BOS added, {self.dtype}{cache}{against}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field, with `ratio`, `stride` and `protocol`, for a JSON record."""
        return {
            **asdict(self),
            "notes": list(self.notes),
            "stride": self.window,
            "ratio": self.ratio,
            "protocol": self.protocol,
        }


@torch.no_grad()
def evaluate(
    model: "PreTrainedModel",
    tokens: torch.Tensor,
    window: int = 1024,
    against: "PreTrainedModel | None" = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Perplexity of a causal language model and, given the original, the divergence from it.

    Each model runs in its own dtype on its own device, one window at a time.

    Args:
        tokens: the whole text, tokenized without special tokens, int64 [T].
        window: tokens a window; clipped to the shortest context of the models and to the text, said in `notes`.
        against: the reference model with the same vocabulary.
        limit: evaluate only the first so many windows.
        progress: called with (windows done, windows in all) after each.

    Raises:
        QuantKitError: too little text, tokens outside the vocabulary, two vocabularies, or logits that are
            not finite.
    """
    models = [model] if against is None else [model, against]
    size, notes = clip(window, tokens.numel(), models)
    texts = windows(tokens, size, limit)
    check_vocabulary(texts, models)
    modes = [m.training for m in models]
    nll, reference_nll, kl, agreed = 0.0, 0.0, 0.0, 0
    try:
        for m in models:
            m.eval()
        for i, text in enumerate(texts):
            logits = read(model, text)
            nll += finite(negative_log_likelihood(logits, text), "the model", i)
            if against is not None:
                reference = read(against, text)
                reference_nll += finite(negative_log_likelihood(reference, text), "the reference", i)
                window_kl, window_agreed = divergence(reference, logits)
                kl, agreed = kl + window_kl, agreed + window_agreed
            if progress is not None:
                progress(i + 1, len(texts))
    finally:
        for m, mode in zip(models, modes, strict=True):
            m.train(mode)

    predictions = len(texts) * (size - 1)
    compared = against is not None
    return Quality(
        perplexity=math.exp(nll / predictions),
        window=size,
        windows=len(texts),
        predictions=predictions,
        dtype=dtype_name(model),
        reference_perplexity=math.exp(reference_nll / predictions) if compared else None,
        reference_dtype=dtype_name(against) if against is not None else None,
        kl=kl / texts.numel() if compared else None,
        top1=agreed / texts.numel() if compared else None,
        notes=tuple(notes),
        kv=model.kv if isinstance(model, Generating) else None,
    )


def clip(window: int, length: int, models: "list[PreTrainedModel]") -> tuple[int, list[str]]:
    """The window that the models' contexts and the text's length allow, and what to say about it."""
    contexts = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in models]
    context = min((c for c in contexts if c), default=window)
    if length < 2:
        raise QuantKitError(f"the text has {length} tokens; a prediction needs at least 2")
    notes = []
    if window > context:
        notes.append(f"window clipped from {window} to the model's context of {context} tokens")
        window = context
    if length < window:
        notes.append(f"the text has {length} tokens, fewer than one window of {window}: read as one window")
        window = length
    return window, notes


def check_vocabulary(texts: torch.Tensor, models: "list[PreTrainedModel]") -> None:
    sizes = [m.config.get_text_config().vocab_size for m in models]
    if len(set(sizes)) > 1:
        raise QuantKitError(
            f"the model has {sizes[0]} tokens and the reference {sizes[1]}; KL needs one vocabulary"
        )
    if (highest := int(texts.max())) >= sizes[0]:
        raise QuantKitError(
            f"the text has token {highest}, the model's vocabulary {sizes[0]} tokens; use the model's own tokenizer"
        )


def read(model: "PreTrainedModel", text: torch.Tensor) -> torch.Tensor:
    """Logits of one window, int64 [S] -> the model's dtype [S, V]; of an optimized model through its pages."""
    ids = text[None].to(model.device)
    if isinstance(model, Generating):
        return model(input_ids=ids, **{CACHE_NAME: model.new_cache(*ids.shape)}).logits[0]
    return model(input_ids=ids, use_cache=False).logits[0]


def finite(nll: float, which: str, window: int) -> float:
    if not math.isfinite(nll):
        raise QuantKitError(
            f"{which} gives logits that are not finite in window {window}; "
            "look for nan or inf among its scales, and for overflow if it runs in float16"
        )
    return nll


def dtype_name(model: "PreTrainedModel") -> str:
    return str(model.dtype).removeprefix("torch.")


def quality_record(
    quality: Quality,
    model: "PreTrainedModel",
    *,
    name: str,
    scheme: str,
    method: str | None,
    text: str,
    folder: str | Path | None = None,
    commit: str | None = None,
) -> Record:
    """The figures with the model's sizes and the conditions, for `records.write_records`.

    Args:
        model: the one that `quality` is of.
        name: of the original model.
        scheme, method: what was quantized to and how; the dtype and None for the original.
        text: name of the evaluation text.
        folder: the checkpoint's, for its size on disk.
        commit: see `records.environment`.
    """
    return {
        "kind": "quality",
        "model": name,
        "scheme": scheme,
        "method": method,
        "text": text,
        "bits_per_weight": bits_per_weight(model),
        "disk_bytes": disk_bytes(folder) if folder is not None else None,
        "memory_bytes": memory_bytes(model),
        **quality.to_dict(),
        **environment(model.device, commit),
    }
