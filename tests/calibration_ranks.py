"""What each process of test_parallel_calibration.py does."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from quantkit import QuantKitError, Recipe, cli, quantize_checkpoint
from quantkit.peers import join
from quantkit.streaming import Run


def tokens_of(samples: int) -> torch.Tensor:
    """Calibration tokens for the tiny models, int64 [samples, 24]."""
    return torch.randint(3, 128, (samples, 24), generator=torch.Generator().manual_seed(0))


def die_at(part: str) -> None:
    """Ends this process, without a word, when it comes to a part."""
    store = Run.store

    def dying(self: Run, name: str, *rest: Any) -> Any:
        if name == part:
            os._exit(9)
        return store(self, name, *rest)

    Run.store = dying  # type: ignore[method-assign]


def main(rank: int, jobs: list[dict[str, Any]], said: str) -> None:
    """Runs jobs one after the other, or a command; notes what this process says of those that fail."""
    torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        if rank in job.get("dead", {}).values():
            die_at(next(iter(job["dead"])))
        if "argv" in job:
            sys.argv = ["quantkit", *job["argv"]]
            cli.main()
        began = time.monotonic()
        try:
            peers = join(torch.device("cpu"))
            quantize_checkpoint(
                job["sources"][rank % len(job["sources"])],
                job["out"],
                Recipe(job["scheme"], job["method"]),
                "cpu",
                tokens_of(job.get("samples", 8)),
                report=job.get("report", False),
                peers=peers,
            )
        except QuantKitError as error:
            took = time.monotonic() - began
            Path(said, f"{number}-{rank}").write_text(f"{type(error).__name__} {took:.0f} {error}")
