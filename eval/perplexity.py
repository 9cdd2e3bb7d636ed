"""Perplexity over non-overlapping windows: exp of the mean negative log-likelihood of the next token.

Each window is read alone: nothing is prepended (no BOS), its first token is context only, so a window of S
tokens makes S - 1 predictions. The text's last partial window is dropped.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from quantkit.errors import QuantKitError

CHUNK = 2**24  # float32 logits worked on at once: 64 MiB, 128 positions of a 128k vocabulary


def windows(tokens: torch.Tensor, window: int, limit: int | None = None) -> torch.Tensor:
    """Cuts a text of T tokens, int64 [T] or [1, T], into int64 [n, window].

    A text shorter than one window is one window of its own length.

    Args:
        limit: the first so many windows; None: all.

    Raises:
        QuantKitError: fewer than two tokens, a window of fewer than two, or no windows asked for.
    """
    if window < 2:
        raise QuantKitError(f"window is {window} tokens; a prediction needs at least 2")
    if limit is not None and limit < 1:
        raise QuantKitError(f"{limit} windows asked for; at least 1 is needed")
    tokens = tokens.flatten()
    if len(tokens) < 2:
        raise QuantKitError(f"the evaluation text has {len(tokens)} tokens; a prediction needs at least 2")
    window = min(window, len(tokens))
    return tokens[: len(tokens) // window * window].view(-1, window)[:limit]


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Slices of the positions [S] that keep float32 logits [chunk, V] within `CHUNK` elements."""
    step = max(1, CHUNK // vocabulary)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def negative_log_likelihood(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Sum over the S - 1 predictions of -log p(tokens[s + 1] | tokens[: s + 1]), in nats.

    Args:
        logits: any floating dtype [S, V]; the log-softmax is taken in float32, the sum in float64.
        tokens: int64 [S].
    """
    targets = tokens[1:].to(logits.device)
    total = 0.0
    for part in chunks(len(targets), logits.shape[-1]):
        nll = F.cross_entropy(logits[:-1][part].float(), targets[part], reduction="none")
        total += nll.double().sum().item()
    return total
