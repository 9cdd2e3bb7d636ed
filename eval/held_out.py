"""The quantized model against the original on text that it was not calibrated on, from their last hidden states.

A run that works through a model block by block never holds the whole of it. It sends a few windows through
the blocks, once through the original ones and once through the packed ones, and compares what comes out.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quantkit.calibration.data import encode, evaluation_text
from quantkit.eval.divergence import position_divergence
from quantkit.eval.perplexity import chunks
from quantkit.report import HeldOut
from quantkit.stand_in import StandIn, standing_in

DEFAULT_TEXT = f"pydoc_data.topics of Python {sys.version_info.major}.{sys.version_info.minor}"
RUN = 16  # tokens: a window that shares so many in a row with the calibration was calibrated on
POOL = 8  # windows are spread over the first POOL * n that qualify
BINS = 64  # of kl_by_position
Head = Callable[[torch.Tensor], torch.Tensor]


def held_out_windows(
    tokenizer: Any, text: Iterable[str] | None, calibration: torch.Tensor, n: int, window: int
) -> tuple[torch.Tensor, bool]:
    """Windows of the calibration text that were not calibrated on, or of `evaluation_text` where it has too few.

    Windows are cut as `calibration.data.pack_tokens` cuts them. One is left out if any `RUN` tokens in a row
    of it are in the calibration tokens, wherever they stand there.

    Args:
        tokenizer: as for `pack_tokens`.
        text: the documents of the calibration source; None if it has none, as 'self'.
        calibration: int64 [samples, seq_len].
        n: windows wanted; fewer, or none, if no text has so many.
        window: tokens a window, the BOS included.

    Returns:
        int64 [<= n, window], and whether they are of `text`.
    """
    if text is not None:
        found = unseen_windows(tokenizer, text, calibration, n, window)
        if len(found) >= n:
            return found, True
    return unseen_windows(tokenizer, [evaluation_text()], calibration, n, window), False


def unseen_windows(
    tokenizer: Any, documents: Iterable[str], calibration: torch.Tensor, n: int, window: int
) -> torch.Tensor:
    bos = [tokenizer.bos_token_id]
    bos = bos if encode(tokenizer, ["a"], add_special_tokens=True)[0][:1] == bos else []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    length = window - len(bos)
    seen = run_hashes(calibration).unique()
    found: list[torch.Tensor] = []
    rest: list[int] = []
    documents = iter(documents)
    while len(found) < POOL * n and (batch := list(islice(documents, 64))):
        for document in encode(tokenizer, batch):
            rest += document + eos
        whole = len(rest) // length
        candidates = torch.tensor(rest[: whole * length], dtype=torch.int64).view(whole, length)
        rest = rest[whole * length :]
        known = torch.isin(run_hashes(candidates), seen).any(-1)
        found += list(candidates[~known][: POOL * n - len(found)])
    if not found:
        return torch.empty(0, window, dtype=torch.int64)
    spread = [found[i * len(found) // n] for i in range(n)] if len(found) > n else found
    start = torch.tensor(bos, dtype=torch.int64).expand(len(spread), -1)
    return torch.cat([start, torch.stack(spread)], 1)


def run_hashes(tokens: torch.Tensor) -> torch.Tensor:
    """A hash of each `RUN` tokens in a row: int64 [rows, S] -> int64 [rows, S - RUN + 1]; of the row if it is shorter."""
    run = min(RUN, tokens.shape[1])
    factors = torch.randint(-(2**62), 2**62, (run,), generator=torch.Generator().manual_seed(0)) | 1
    hashes = torch.zeros(len(tokens), tokens.shape[1] - run + 1, dtype=torch.int64)
    for i, factor in enumerate(factors):
        hashes += tokens[:, i : i + hashes.shape[1]] * factor  # wraps around, as a hash may
    return hashes


class Given(StandIn):
    """Gives `hidden`, whatever it gets; what it gets where that is None."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.hidden: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden if self.hidden is None else self.hidden


def head_of(model: nn.Module, blocks: nn.ModuleList) -> Head:
    """What a model makes of the last block's output: hidden [S, hidden] -> logits [S, V].

    The model itself is run, with stand-ins for its blocks, so that whatever lies behind them (norm, head,
    soft capping) is the architecture's own. All of it works on each position alone.
    """

    @torch.no_grad()
    def head(hidden: torch.Tensor) -> torch.Tensor:
        given = [Given(block) for block in blocks]
        given[-1].hidden = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with standing_in(blocks, given):
            return model(ids, use_cache=False).logits[0]

    return head


@torch.no_grad()
def final_divergence(
    head: Head,
    original: Sequence[torch.Tensor],
    quantized: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    source: str,
    *,
    vocabulary: int,
    quantized_head: Head | None = None,
    device: torch.device | str = "cpu",
) -> HeldOut:
    """Perplexities and divergence from the outputs of the last decoder block.

    Logits are made for as many positions at a time as `perplexity.CHUNK` allows, and never kept.

    Args:
        head: as `head_of` gives it.
        original, quantized: hidden states of the two streams, a tensor [batch, window, hidden] a batch.
        tokens: int64 [windows, window]: what was read.
        source: what the text is.
        vocabulary: size V of the logits.
        quantized_head: of the quantized model, where it differs.
        device: where the heads are.
    """
    windows, window = tokens.shape
    pairs = [
        (before, after)
        for befores, afters in zip(original, quantized, strict=True)
        for before, after in zip(befores, afters, strict=True)
    ]
    nll = torch.zeros(2, dtype=torch.float64)  # of the original, of the quantized
    kl = torch.zeros(window, dtype=torch.float64)
    agreed = 0
    for (before, after), text in zip(pairs, tokens, strict=True):
        for part in chunks(window, vocabulary):
            p = head(before[part].to(device))
            q = (quantized_head or head)(after[part].to(device))
            part_kl, part_agreed = position_divergence(p, q)
            kl[part] += part_kl.cpu()
            agreed += int(part_agreed.sum())
            targets = text[part.start + 1 : part.stop + 1].to(p.device)
            for i, logits in enumerate((p, q)):
                losses = F.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")
                nll[i] += losses.double().sum().cpu()
    reference, ours = (nll / (windows * (window - 1))).tolist()
    return HeldOut(
        source=source,
        windows=windows,
        window=window,
        perplexity=exp(ours),
        reference_perplexity=exp(reference),
        kl=kl.sum().item() / (windows * window),
        top1=agreed / (windows * window),
        kl_by_position=tuple(part.mean().item() / windows for part in kl.tensor_split(min(BINS, window))),
    )


def exp(value: float) -> float:
    """e^value, infinity where that is larger than a float: a broken model is to be reported, not to end the run."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@torch.no_grad()
def drift(original: Sequence[torch.Tensor], quantized: Sequence[torch.Tensor]) -> float:
    """|quantized - original| / |original|, Frobenius norms over all of two streams' hidden states."""
    lost = whole = 0.0
    for before, after in zip(original, quantized, strict=True):
        lost += (after.double() - before.double()).square().sum().item()
        whole += before.double().square().sum().item()
    return (lost / whole) ** 0.5 if whole else 0.0
