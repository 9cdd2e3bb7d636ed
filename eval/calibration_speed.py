"""How long quantizing a model of a real one's shape takes, and in how much memory: random weights, random tokens."""

import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantkit.eval.random_model import CONFIGS
from quantkit.eval.random_weights import STD
from quantkit.eval.records import Record, environment
from quantkit.peers import Peers
from quantkit.quantize import Progress
from quantkit.recipe import Recipe
from quantkit.streaming import quantize_checkpoint

SPREAD = 0.5  # of the logarithm of input channels' sizes: real weights have columns of different sizes
SEED = 0


def write_random_model(name: str, folder: Path, device: torch.device, layers: int | None = None) -> int:
    """A Llama of random bfloat16 weights as a checkpoint, one file a decoder block; its size in bytes.

    Matrices are normal, with columns of lognormally distributed sizes; norms are near one.

    Args:
        name: in `CONFIGS`.
        layers: number of decoder blocks instead of the config's.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**CONFIGS[name])
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(SEED)
    parts: dict[str, dict[str, torch.Size]] = {}
    for key, shape in shapes.items():
        block = key.split(".")[2] if ".layers." in key else "outer"
        parts.setdefault(f"model-{block}.safetensors", {})[key] = shape
    size, where = 0, {}
    for file, wanted in parts.items():
        tensors = {key: random_weight(shape, generator).cpu() for key, shape in wanted.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in tensors.values())
        where.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)
    return size


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    draw = lambda *size: torch.randn(size, generator=generator, device=generator.device)
    if len(shape) == 1:
        return (1 + 0.1 * draw(*shape)).to(torch.bfloat16)
    columns = (SPREAD * draw(shape[1])).exp()
    return (STD * draw(*shape) * columns).to(torch.bfloat16)


def time_calibration(
    name: str,
    recipes: list[Recipe],
    scratch: Path,
    device: torch.device,
    layers: int | None = None,
    commit: str | None = None,
    peers: Peers | None = None,
) -> Iterator[Record]:
    """Quantizes a random model by each recipe, whose `calibration` says how many tokens.

    Args:
        scratch: for files, the same folder for all processes.
        peers: the processes that do it together, each with this call.

    Yields:
        records: `seconds` of the whole run, files included; `device_peak_bytes`, the largest that was allocated
        at once; `process_peak_bytes`, resident, over all runs so far: of this process. `ranks`, if they are several.
        `runs_before` in these processes, if there were any: the first one also loads libraries, and compiles kernels that are
        not in Triton's cache.
    """
    source, out, first = scratch / "source", scratch / "out", peers is None or peers.first
    size = write_random_model(name, source, device, layers) if first else 0
    os.sync()  # a model that was fetched before lies on the disk, which then is free for what is measured
    generator = torch.Generator().manual_seed(SEED)
    for runs_before, recipe in enumerate(recipes):
        spec = recipe.calibration
        vocabulary = CONFIGS[name]["vocab_size"]
        tokens = torch.randint(vocabulary, (spec.samples, spec.seq_len), generator=generator)
        peaks = [0]

        def note(*_: Any, peaks: list[int] = peaks) -> None:
            if device.type == "cuda":
                peaks.append(torch.cuda.max_memory_allocated(device))

        if first:
            shutil.rmtree(out, ignore_errors=True)
        if peers is not None:
            peers.gather(None, "files of the benchmark")
        begun = time.monotonic()
        progress = Progress(module=note, step=note)
        summary = quantize_checkpoint(source, out, recipe, device, tokens, progress, peers=peers)
        note()
        yield {
            "kind": "calibration",
            **({} if peers is None else {"ranks": peers.count}),
            **({"runs_before": runs_before} if runs_before else {}),
            "model": name,
            "layers": layers or CONFIGS[name]["num_hidden_layers"],
            "scheme": recipe.scheme,
            "method": next(iter(summary.modules.values()))["method"],
            "samples": spec.samples,
            "seq_len": spec.seq_len,
            "seconds": time.monotonic() - begun,
            "device_peak_bytes": max(peaks),
            "process_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "source_bytes": size,
            **environment(device, commit),
        }
