"""What each process of test_tensor_parallel.py does: loads directories cut over all of them, and notes what comes out."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.linear import QuantLinear
from parallel import fork_all

PROMPT = torch.tensor([[5, 9, 17, 3, 44, 91, 8, 60]])


@torch.no_grad()
def answers(model: Any) -> dict[str, torch.Tensor]:
    """Logits of a prompt, and the tokens that follow it greedily."""
    logits = model(PROMPT).logits
    assert type(logits) is torch.Tensor
    tokens = model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {"logits": logits.float(), "tokens": tokens}


def linear_bytes(model: Any) -> dict[str, int]:
    return {name: m.weight_bytes for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def noted(call: Any) -> dict[str, Any]:
    try:
        return {"model": call()}
    except quantkit.QuantKitError as error:
        return {"error": str(error)}


def main(rank: int, folders: dict[str, str], out: str) -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    quantkit.processes.start("cpu")
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        note = noted(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto"))
        if model := note.pop("model", None):
            note |= {**answers(model), "bytes": linear_bytes(model)}
        found[name] = note
    torch.save(found, Path(out) / f"{rank}.pt")


fork_all(main)
