"""What each process of test_tensor_parallel.py does: loads directories cut over all of them, and notes what comes out."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.distributed.sharding_utils import DtensorShardOperation

import quantkit
from quantkit import processes
from quantkit.linear import QuantLinear

PROMPT = torch.tensor([[5, 9, 17, 3, 44, 91, 8, 60]])
read: list[int] = []  # bytes of the pieces of files that the loader took


def answers(model: Any) -> dict[str, torch.Tensor]:
    """Logits of a prompt, and the tokens that follow it greedily."""
    with torch.no_grad():
        logits = model(PROMPT).logits
    assert type(logits) is torch.Tensor
    tokens = model.generate(PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {"logits": logits.float(), "tokens": tokens}


def gradient(model: Any) -> torch.Tensor:
    """Of a loss, by the embeddings of the prompt."""
    x = torch.randn(1, 8, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    model(inputs_embeds=x.requires_grad_()).logits.square().mean().backward()
    assert x.grad is not None
    return x.grad


def linear_bytes(model: Any) -> int:
    return sum(m.weight_bytes for m in model.modules() if isinstance(m, QuantLinear))


def all_bytes(model: Any) -> int:
    """Of all that would be in a checkpoint, repacked or not."""
    tensors = {id(t): t for t in model.state_dict().values()}
    return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors.values())


def noted(call: Any) -> dict[str, Any]:
    try:
        return {"model": call()}
    except quantkit.QuantKitError as error:
        return {"error": str(error)}


def count_reads() -> None:
    shard = DtensorShardOperation.shard_tensor

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        piece = shard(self, *args, **kwargs)
        read.append(piece.nbytes)
        return piece

    DtensorShardOperation.shard_tensor = counted


def look(folder: str, extras: list[str], dtype: torch.dtype) -> dict[str, Any]:
    read.clear()
    load = quantkit.load if "load" in extras else AutoModelForCausalLM.from_pretrained
    note = noted(lambda: load(folder, dtype=dtype, tp_plan="auto"))
    if (model := note.pop("model", None)) is None:
        return note
    note |= {"read": sum(read), "held": linear_bytes(model), "all": all_bytes(model)}
    note["rows"] = len(model.get_input_embeddings().weight)
    note |= answers(model)
    note["repacked"] = any(m.repacked_for for m in model.modules() if isinstance(m, QuantLinear))
    if "compile" in extras:
        with torch.no_grad():
            note["graphs"] = torch._dynamo.explain(model)(PROMPT).graph_count
    if "gradient" in extras:
        note["gradient"] = gradient(model)
    if "save" in extras:
        note["saved"] = noted(lambda: model.save_pretrained(folder + "-saved"))["error"]
    if "head" in extras:
        note["head"] = noted(lambda: quantkit.optimize(model, head="w8a16"))["error"]
    if "mixed" in extras:
        note["mixed"] = noted(lambda: quantkit.optimize(model))["error"]
    if "optimize" in extras:
        note["optimized"] = answers(quantkit.optimize(model))
    return note


def main(rank: int, cases: dict[str, Any], out: str) -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    processes.start("cpu")
    count_reads()
    found = {
        name: look(folders[rank % len(folders)], extras, getattr(torch, dtype))
        for name, (folders, extras, dtype) in cases.items()
    }
    if rank == 0:
        found["deserted"] = desert(cases["w8a8"][0][0])
    else:
        quantkit.load(cases["w8a8"][0][0], tp_plan="auto")
    torch.save(found, Path(out) / f"{rank}.pt")


def desert(folder: str) -> dict[str, Any]:
    """What a forward raises, and after how many seconds, where the other process has ended."""
    model = quantkit.load(folder, tp_plan="auto")
    began = time.monotonic()
    try:
        while True:  # it may not have ended yet
            answers(model)
    except RuntimeError as error:
        return {"seconds": time.monotonic() - began, "error": str(error)}
