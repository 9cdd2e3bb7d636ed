"""A few windows of text that nobody calibrated on, on their way through both models, one block at a time.

They cost little, because they are few, and no whole model is ever needed to say what was lost.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from quantkit.calibration.data import text_source
from quantkit.calibration.pipeline import Activations, advance, capture, run_original
from quantkit.errors import QuantKitError
from quantkit.eval.held_out import DEFAULT_TEXT, drift, final_divergence, head_of, held_out_windows
from quantkit.quantize import Job
from quantkit.report import BlockReport, HeldOut
from quantkit.source import load_tokenizer

WINDOWS, WINDOW = 8, 512


class Witness:
    """Held-out text beside a run.

    Attributes:
        blocks: how far both models' hidden states are apart after each block so far.
        silent: why it saw nothing, or nothing more.
    """

    def __init__(self, job: Job, tokens: torch.Tensor, source: str) -> None:
        """Takes the text up to the first block; what lies outside the blocks must be loaded.

        Args:
            tokens: int64 [windows, window].
            source: what the text is.
        """
        self.job, self.tokens, self.source = job, tokens, source
        self.blocks: list[BlockReport] = []
        self.silent = "" if len(tokens) else "no text was found for it"
        self.activations = Activations([])
        if not self.silent:
            try:
                self.activations = capture(job.model, job.blocks, tokens, job.device)
            except QuantKitError as error:
                self.silent = str(error)
        self.activations.original = list(self.activations.hidden)

    def begin(self, index: int) -> None:
        """Reads a block that is not quantized yet."""
        if not self.silent:
            run_original(self.job.blocks[index], index, self.activations, self.job.device)

    def advance(self, index: int, input_scales: dict[str, torch.Tensor]) -> None:
        """Reads the block with its dequantized weights and rounded inputs."""
        if self.silent:
            return
        schemes = {name: plan.scheme for name, plan in self.job.block_plans(index).items()}
        block: nn.Module = self.job.blocks[index]
        try:
            advance(block, index, self.activations, self.job.device, schemes, input_scales)
        except QuantKitError as error:
            self.silent = str(error)
            return
        assert self.activations.original is not None
        found = drift(self.activations.original, self.activations.hidden)
        self.blocks.append(BlockReport(index, found))

    def testify(self) -> HeldOut | None:
        """The figures, once the last block is done and what lies outside the blocks is loaded again.

        A packed LM head counts as the original one.
        """
        if self.silent or self.activations.original is None:
            return None
        model = self.job.model
        embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        return final_divergence(
            head_of(model, self.job.blocks),
            self.activations.original,
            self.activations.hidden,
            self.tokens,
            self.source,
            vocabulary=embedding.shape[0],
            device=self.job.device,
        )


def call_witness(job: Job, folder: Path, calibration: torch.Tensor | None) -> Witness | None:
    """A witness for a job whose model, with its tokenizer, lies in the folder; None if it has no tokenizer.

    What lies outside the blocks must be loaded.

    Args:
        calibration: int64 [samples, seq_len]; None without one.
    """
    source = job.recipe.calibration.source if calibration is not None else "self"
    context = getattr(job.model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    try:
        tokenizer = load_tokenizer(folder)
        text = None if source == "self" else text_source(source)
        found = Witness(job, *unseen_text(tokenizer, source, text, calibration, context))
    except QuantKitError:
        return None
    job.watched = True
    return found


def unseen_text(
    tokenizer: object, name: str, text: Iterable[str] | None, calibration: torch.Tensor | None, context: int
) -> tuple[torch.Tensor, str]:
    """Tokens int64 [windows, window] for a witness, and what they are.

    Args:
        name, text: of the calibration source; text None where it has none.
        calibration: int64 [samples, seq_len]; None without one.
        context: tokens that the model can read.
    """
    window = min(WINDOW, context)
    seen = torch.empty(0, window, dtype=torch.int64) if calibration is None else calibration
    tokens, same = held_out_windows(tokenizer, text, seen, WINDOWS, window)
    return tokens, name if same else DEFAULT_TEXT
