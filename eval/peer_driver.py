"""Runs in the environment of another quantization tool: model and tokens in, dequantized weights out.

    python -I peer_driver.py JOB.json

`quality_peers.py` writes the job: the fields of `Job`. In job.out this leaves `weights.safetensors`, the state dict
of the model with every quantized weight as the float32 numbers that it stands for, and `run.json`. Each tool is
called as its own documentation does for such a model, its defaults where nothing is said; imports nothing of quantkit.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

Weights = dict[str, Tensor]  # what replaces tensors of the model's state dict


@dataclass(frozen=True)
class Job:
    """What to quantize, to what, and how.

    Attributes:
        peer: key of `PEERS`.
        model: directory of the original model.
        tokens: file of the calibration tokens, int64 [samples, seq_len], made by torch.save.
        out: directory for the results.
        seed: of whatever the tool draws.
        bits: of a weight.
        group_size: columns of a row that share a scale; None: the whole row.
        activation: what x will be rounded to when the model runs: 'int8', 'fp8' or None.
        method: the tool's name for what it does, see its function.
        symmetric: no zero points.
        iterations: of a method that trains.
    """

    peer: str
    model: str
    tokens: str
    out: str
    seed: int
    bits: int
    group_size: int | None
    activation: str | None
    method: str
    symmetric: bool
    iterations: int | None


def load(folder: str) -> nn.Module:
    """The model in float32: half precision is many times slower on a CPU, and rounds the statistics too."""
    from transformers import AutoModelForCausalLM

    # not from_pretrained(dtype=...), which has another name in transformers 4
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All linears but the LM head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def masked(tokens: Tensor) -> list[dict[str, Tensor]]:
    """Each row as the arguments of a model's call."""
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]


def batches(rows: Any) -> DataLoader[Any]:
    """The rows one by one, in order."""
    return DataLoader(rows, batch_size=None)


def llmcompressor(job: Job, tokens: Tensor) -> Weights:
    """'gptq', 'awq', 'smoothquant+gptq' (strength 0.8) or 'rtn'."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    weights = {
        "num_bits": job.bits,
        "type": "float" if job.activation == "fp8" else "int",
        "strategy": "group" if job.group_size else "channel",
        "group_size": job.group_size,
        "symmetric": job.symmetric,
    }
    scheme: dict[str, object] = {"targets": ["Linear"], "weights": weights}
    if job.activation:
        scheme["input_activations"] = {
            "num_bits": 8,
            "type": "float" if job.activation == "fp8" else "int",
            "strategy": "token",
            "symmetric": True,
            "dynamic": True,
        }
    chosen = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipes = {
        "gptq": lambda: [GPTQModifier(**chosen)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**chosen)],
        "smoothquant+gptq": lambda: [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**chosen)],
        "rtn": lambda: [QuantizationModifier(**chosen)],
    }
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: (
            None
        )  # AWQ pins memory for an accelerator it may not have
    model = load(job.model)
    model = oneshot(
        model=model,
        recipe=recipes[job.method](),
        dataset=None if job.method == "rtn" else batches(masked(tokens)),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    found = {name: tensor for name, tensor in model.state_dict().items() if "_proj" not in name}
    module: Any
    for name, module in block_linears(model).items():
        found[f"{name}.weight"] = fake_quantize(
            module.weight.float(),
            module.weight_scale.float(),
            getattr(module, "weight_zero_point", None),
            module.quantization_scheme.weights,
        )
    return found


def gptqmodel(job: Job, tokens: Tensor) -> Weights:
    """'gptq', by way of the checkpoint that it saves."""
    from gptqmodel import BACKEND, GPTQConfig, GPTQModel

    config = GPTQConfig(bits=job.bits, group_size=job.group_size or -1, sym=job.symmetric)
    model = GPTQModel.load(job.model, config)
    model.quantize(masked(tokens), batch_size=1)
    packed = Path(job.out) / "packed"
    model.save(str(packed))
    model = GPTQModel.load(str(packed), backend=BACKEND.TORCH, device="cpu")
    return {
        f"{name}.weight": module.dequantize_weight().t()
        for name, module in model.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }


def autoround(job: Job, tokens: Tensor) -> Weights:
    """'autoround': signed gradient descent on roundings and ranges."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model = load(job.model)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=job.bits,
        group_size=job.group_size or -1,
        sym=job.symmetric,
        iters=job.iterations,
        dataset=batches(tokens[:, None]),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        seed=job.seed,
    )
    model, _ = rounding.quantize()
    return {f"{name}.weight": module.weight for name, module in block_linears(model).items()}


def autoawq(job: Job, tokens: Tensor) -> Weights:
    """'awq': its scales are folded into the model, and the weights clipped and rounded."""
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    model = AutoAWQForCausalLM.from_pretrained(job.model, torch_dtype=torch.float32, device_map="cpu")
    model.quantize(
        None,
        quant_config={
            "zero_point": not job.symmetric,
            "q_group_size": job.group_size,
            "w_bit": job.bits,
            "version": "GEMM",
        },
        calib_data=tokens.tolist(),
        max_calib_samples=len(tokens),
        max_calib_seq_len=tokens.shape[1],
    )
    found = {
        name: tensor for name, tensor in model.model.state_dict().items() if name.endswith("norm.weight")
    }
    for name, module in model.model.named_modules():
        if hasattr(module, "qweight"):
            packed = (module.qweight, module.qzeros, module.scales.float(), module.w_bit, module.group_size)
            found[f"{name}.weight"] = dequantize_gemm(*packed).t()
    return found


def hqq(job: Job, tokens: Tensor) -> Weights:
    """'hqq': needs no calibration."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)
    return {
        f"{name}.weight": HQQLinear(
            module, config, compute_dtype=torch.float32, device="cpu", del_orig=False
        ).dequantize()
        for name, module in block_linears(load(job.model)).items()
    }


PEERS: dict[str, tuple[str, Callable[[Job, Tensor], Weights]]] = {  # module to import, function
    "llmcompressor": ("llmcompressor", llmcompressor),
    "gptqmodel": ("gptqmodel", gptqmodel),
    "auto-round": ("auto_round", autoround),
    "autoawq": ("awq", autoawq),
    "hqq": ("hqq.core.quantize", hqq),
}


def processor_seconds() -> float:
    """That this process and its children have used so far, all threads together."""
    return sum(os.times()[:4])


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    module, quantize = PEERS[job.peer]
    import_module(module)  # seconds of it, which are not the method's
    tokens = torch.load(job.tokens)
    original = {name: tensor.float() for name, tensor in load(job.model).state_dict().items()}
    torch.manual_seed(job.seed)
    started, processor = time.monotonic(), processor_seconds()
    found = quantize(job, tokens)
    seconds, processor = time.monotonic() - started, processor_seconds() - processor
    changed = {
        name: tensor.detach().float().contiguous().clone()
        for name, tensor in found.items()
        if name in original and not torch.equal(tensor.float(), original[name])
    }
    out = Path(job.out)
    save_file(changed, out / "weights.safetensors")
    run = {
        "seconds": seconds,
        "cpu_seconds": processor,
        "peer_torch": torch.__version__,
        "peer_transformers": version("transformers"),
        "job": asdict(job),
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
