"""The processes that work together on one model: their start, and how they agree, each wait with an end.

`torchrun --nproc-per-node N` starts them and sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from quantkit.errors import MachineError, QuantKitError

TIMEOUT = "QUANTKIT_TIMEOUT"  # seconds that a process waits for the others
SECONDS = 600.0


def timeout() -> float:
    """Seconds that a process waits for the others.

    Raises:
        QuantKitError: the environment holds no number of them.
    """
    text = os.environ.get(TIMEOUT, str(SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise QuantKitError(f"{TIMEOUT}={text}: expected seconds above 0; unset it for {SECONDS:g}")
    return seconds


def launched() -> int:
    """How many processes a launcher such as torchrun has started; 1 without one."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise QuantKitError(f"WORLD_SIZE={text}: expected a number of processes; start with torchrun")
    return int(text)


def start(device_type: str) -> None:
    """Joins the processes that a launcher has started, unless this one has joined them.

    Raises:
        QuantKitError: no launcher.
        MachineError: not all of them came in time.
    """
    if dist.is_initialized():
        return
    absent = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise QuantKitError(
            f"several processes: {', '.join(absent)} not set, expected what torchrun sets; "
            "start with torchrun --nproc-per-node N"
        )
    device = None
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
        if device.index >= torch.cuda.device_count():
            raise QuantKitError(
                f"process {device.index} of this machine, which shows {torch.cuda.device_count()} GPUs to torch; start as "
                "many processes as GPUs"
            )
        torch.cuda.set_device(device)
    with named_faults("start"):
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout()),
            device_id=device,
        )


@contextmanager
def named_faults(doing: str) -> Iterator[None]:
    """Turns what torch.distributed raises where a peer is absent or gone into one line."""
    try:
        yield
    except (dist.DistError, RuntimeError, ValueError) as error:
        if isinstance(error, QuantKitError):
            raise
        rank, ranks = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MachineError(
            f"process {rank} of {ranks}: another one did not answer ({doing}: {first}); see its own error, and start all "
            f"again, with a larger {TIMEOUT} (seconds) if it was only slow"
        ) from error


def gather(value: Any, doing: str, group: Any = None) -> list[Any]:
    """What each process has for a value, in the order of their ranks."""
    found: list[Any] = [None] * dist.get_world_size(group)
    with named_faults(doing):
        dist.all_gather_object(found, value, group)
    return found


def agree(value: str, error: str, what: str, group: Any = None) -> None:
    """Refuses on every process what is refused on one, or is not the same on all.

    Args:
        value: that must be the same.
        error: what is wrong on this process; '' where nothing is.
        what: the value is.

    Raises:
        QuantKitError: on all processes alike.
    """
    found = gather((value, error), what, group)
    for rank, (_, wrong) in enumerate(found):
        if wrong:
            raise QuantKitError(wrong if len({w for _, w in found}) == 1 else f"process {rank}: {wrong}")
    for rank, (theirs, _) in enumerate(found):
        if theirs != found[0][0]:
            raise QuantKitError(
                f"{what}: process {rank} has {theirs}, process 0 has {found[0][0]}, expected the same; give all processes the "
                "same files"
            )
