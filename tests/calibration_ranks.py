"""What each process of test_parallel_calibration.py does."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

import quantkit.streaming
from quantkit import QuantKitError, Recipe, Rule, cli, quantize_checkpoint
from quantkit.checkpoint import CheckpointWriter
from quantkit.peers import join


def tokens_of(samples: int) -> torch.Tensor:
    return torch.randint(3, 128, (samples, 24), generator=torch.Generator().manual_seed(0))


def main(rank: int, jobs: list[dict[str, Any]], errors: str) -> None:
    """Runs jobs one after the other; notes what each process says of those that are refused."""
    torch.set_num_threads(1)
    peers = join(torch.device("cpu"))
    for number, job in enumerate(jobs):
        recipe = Recipe(job["scheme"], job["method"], tuple(Rule(*rule) for rule in job.get("rules", ())))
        source = job["source"] if isinstance(job["source"], str) else job["source"][rank]
        tokens = tokens_of(job.get("samples", 8))
        try:
            quantize_checkpoint(source, job["out"], recipe, "cpu", tokens, report=job.get("report", False), peers=peers)
        except QuantKitError as error:
            Path(errors, f"{number}-{rank}").write_text(f"{type(error).__name__}: {error}")
