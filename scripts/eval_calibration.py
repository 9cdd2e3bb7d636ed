"""Times `quantkit quantize` on a random model of a real one's shape, and notes its memory; under torchrun by all processes."""

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from quantkit.errors import as_one_line
from quantkit.eval.calibration_speed import time_calibration
from quantkit.eval.random_model import CONFIGS
from quantkit.eval.records import write_records
from quantkit.peers import join
from quantkit.processes import launched
from quantkit.recipe import CalibrationSpec, Recipe


def main(
    model: Annotated[str, typer.Option(help=f"Shape: {', '.join(CONFIGS)}.")] = "llama-3-8b",
    scheme: Annotated[str, typer.Option(help="As for `quantkit quantize`.")] = "w4a16",
    method: Annotated[
        list[str] | None, typer.Option(help="One an option; the three quality levels by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 2048,
    layers: Annotated[int | None, typer.Option(help="Only so many decoder blocks.")] = None,
    device: Annotated[str, typer.Option(help="cuda, cpu, ...")] = "cuda",
    records: Annotated[Path | None, typer.Option(help="Append to this .jsonl file.")] = None,
) -> None:
    """Print seconds and peaks of memory of each run."""
    if model not in CONFIGS:
        raise typer.BadParameter(f"{model}: known are {', '.join(CONFIGS)}", param_hint="--model")
    spec = CalibrationSpec(samples=samples, seq_len=seq_len)
    recipes = [Recipe(scheme, word, calibration=spec) for word in method or []]
    recipes = recipes or [
        Recipe(scheme, calibration=spec, quality=level) for level in ("fast", "balanced", "best")
    ]
    where = torch.device(device)
    peers = join(where) if launched() > 1 else None
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made if peers is None else peers.from_first(lambda: made, "the benchmark's folder"))
        for record in time_calibration(model, recipes, folder, where, layers, peers=peers):
            if peers is not None and not peers.first:
                continue
            processes = f"{record['ranks']} processes: " if "ranks" in record else ""
            print(
                f"{processes}{record['model']} {record['layers']} blocks, {record['scheme']} {record['method']}, "
                f"{samples} x {seq_len} tokens: {record['seconds']:.1f} s, device {record['device_peak_bytes'] / 1e9:.2f} GB, "
                f"process {record['process_peak_bytes'] / 1e9:.1f} GB, source {record['source_bytes'] / 1e9:.1f} GB",
                flush=True,
            )
            if records is not None:
                write_records(records, [record])
        if peers is not None:
            peers.gather(None, "the end of the benchmark")


if __name__ == "__main__":
    with as_one_line():
        typer.run(main)
