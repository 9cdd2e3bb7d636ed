"""What the original and the quantized model write after a few prompts, for a reader to compare."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.block_loader import release_memory
from quantkit.load import load_model
from quantkit.report import Sample
from quantkit.source import first_line, load_tokenizer, whole_model

PROMPTS = ("The history of the city begins", "In the morning she opened the door and")
NEW_TOKENS = 40
SMALL = (
    10**9
)  # bytes of weights: a model that may be loaded whole though the run itself never held more than a block


def try_out(
    folder: Path, original: Path, packed: Path, device: torch.device, source_bytes: int, held_whole: bool
) -> tuple[tuple[Sample, ...], str]:
    """What both models write, and why they did not.

    Args:
        folder: of the original, with its tokenizer.
        original: it, or the GGUF file in it.
        packed: the folder of the quantized model.
        source_bytes, held_whole: as for `why_not`.
    """
    if skipped := why_not(source_bytes, held_whole, device):
        return (), skipped
    dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        tokenizer = load_tokenizer(folder)
        return samples(
            lambda: whole_model(original, device), lambda: load_model(packed, device, dtype=dtype), tokenizer
        ), ""
    except Exception as error:
        # the checkpoint is made: whatever `generate` makes of an odd model costs the sample alone
        return (), first_line(error)
    finally:
        release_memory()


def samples(
    original: Callable[[], PreTrainedModel],
    quantized: Callable[[], PreTrainedModel],
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
) -> tuple[Sample, ...]:
    """Greedy continuations by both models.

    Args:
        original, quantized: load them; the first is gone before the second is loaded.
    """
    before = continuations(original(), tokenizer, prompts, new_tokens)
    after = continuations(quantized(), tokenizer, prompts, new_tokens)
    return tuple(Sample(*texts) for texts in zip(prompts, before, after, strict=True))


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], new_tokens: int
) -> list[str]:
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        end = tokenizer.eos_token_id
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=end,
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def why_not(weight_bytes: int, held_whole: bool, device: torch.device) -> str:
    """Why no model of so many bytes is to be loaded whole; '' if it may be.

    Args:
        weight_bytes: of the original's weights as stored.
        held_whole: the run had the whole model in memory before.
    """
    needed = weight_bytes * (2 if device.type == "cpu" else 1)  # a CPU computes in float32
    free = free_bytes(device)
    if free is not None and needed > free // 2:
        return f"the model needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    if weight_bytes > SMALL and not held_whole:
        return f"the whole model was never loaded, since its weights take {weight_bytes / 1e9:.1f} GB"
    return ""


def free_bytes(device: torch.device) -> int | None:
    """Memory that a program could still take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None
