"""The processes of one calibration: what one has, all get, in the order of their ranks.

Nothing depends on the order in which messages come, or on how a library adds: the same processes give the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from quantkit.errors import QuantKitError
from quantkit.processes import agree, gather, named_faults, start

T = TypeVar("T")
AT_ONCE = 1 << 24  # numbers that a process gets from each other one at a time: 64 MB


@dataclass(frozen=True)
class Peers:
    """This process among `count`; the one of rank 0 writes."""

    rank: int
    count: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's rows: neighbours, as many as of the others, or one more."""
        return rows.tensor_split(self.count)[self.rank]

    def gather(self, value: T, doing: str) -> list[T]:
        """What each process has for a value; tensors must be on the CPU."""
        return gather(value, doing)

    def agree(self, value: str, what: str) -> None:
        """Refuses what is not the same on all."""
        agree(value, "", what)

    def exchange(self, call: Callable[[], T], doing: str) -> list[T]:
        """What a call gives on each process; what it raises on one of them, all raise."""
        value, wrong = attempt(call)
        found = gather((value, wrong), doing)
        raise_first([error for _, error in found])
        return [theirs for theirs, _ in found]

    def from_first(self, call: Callable[[], T], doing: str) -> T:
        """What a call gives on the first process, which alone makes it, or raises."""
        found = [attempt(call) if self.first else None]
        with named_faults(doing):
            dist.broadcast_object_list(found, src=0)
        assert found[0] is not None
        value, wrong = found[0]
        raise_first([wrong])
        return value  # type: ignore[return-value]

    def add(self, tensor: torch.Tensor, doing: str) -> None:
        """Makes a float32 tensor the sum of all processes' in place, added in the order of their ranks."""
        flat = tensor.view(-1)
        for piece in flat.split(AT_ONCE):
            parts = [torch.empty_like(piece) for _ in range(self.count)]
            with named_faults(doing):
                dist.all_gather(parts, piece)
            piece.copy_(parts[0])
            for part in parts[1:]:
                piece.add_(part)


def attempt(call: Callable[[], T]) -> tuple[T | None, QuantKitError | None]:
    try:
        return call(), None
    except QuantKitError as error:
        return None, type(error)(str(error))  # without its cause, which may not be sent


def raise_first(errors: list[QuantKitError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def join(device: torch.device) -> Peers:
    """Joins the processes that a launcher has started, each on its own device of this type.

    Raises:
        QuantKitError: they were not started by torchrun, or a device is named that they would share.
        MachineError: not all of them came in time.
    """
    if device.type == "cuda" and device.index is not None:
        raise QuantKitError(
            f"--device {device}: several processes would share it; use --device cuda, and each takes its own"
        )
    start(device.type)
    return Peers(dist.get_rank(), dist.get_world_size())
