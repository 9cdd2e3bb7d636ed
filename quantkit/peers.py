"""The processes of one calibration: what one has, all get, in the order of their ranks.

Nothing depends on the order in which messages come, or on how a library adds: the same processes give the same bytes.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from quantkit.errors import QuantKitError
from quantkit.processes import agree, gather, named_faults, start, timeout

T = TypeVar("T")
ALIGNED = 16  # bytes, of a tensor among others that are sent
AT_ONCE = 1 << 24  # numbers that a process gets from each other one at a time: 64 MB


@dataclass(frozen=True)
class Peers:
    """This process among `count`; the one of rank 0 writes.

    Attributes:
        words: the group by which they exchange what is no tensor; the default group if it is None. GPUs' own group would
            wait for all that a GPU still has to do.
    """

    rank: int
    count: int
    words: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's rows: neighbours, as many as of the others, or one more."""
        return rows.tensor_split(self.count)[self.rank]

    def gather(self, value: T, doing: str) -> list[T]:
        """What each process has for a value. Its tensors come to the device type that they are on where they come from."""
        letter, tensors = apart(value)
        letters = gather(letter, doing, self.words)
        return [self.opened(theirs, tensors, rank, doing) for rank, theirs in enumerate(letters)]

    def agree(self, value: str, what: str) -> None:
        """Refuses what is not the same on all."""
        agree(value, "", what, self.words)

    def exchange(self, call: Callable[[], T], doing: str) -> list[T]:
        """What a call gives on each process; what it raises on one of them, all raise."""
        found: list[tuple[Any, QuantKitError | None]] = self.gather(attempt(call), doing)
        raise_first([error for _, error in found])
        return [theirs for theirs, _ in found]

    def from_first(self, call: Callable[[], T], doing: str) -> T:
        """What a call gives on the first process, which alone makes it, or raises."""
        letter, tensors = apart(attempt(call)) if self.first else (None, [])
        letters = [letter]
        with named_faults(doing):
            dist.broadcast_object_list(letters, src=0, group=self.words)
        assert letters[0] is not None
        value, wrong = self.opened(letters[0], tensors, 0, doing)
        raise_first([wrong])
        return value  # type: ignore[return-value]

    def opened(self, letter: "Letter", tensors: list[torch.Tensor], rank: int, doing: str) -> Any:
        """The value in a letter from a process, whose own call has its tensors; all call it together."""
        on_gpus = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")
        sizes = [
            ALIGNED * -(-shape.numel() * dtype.itemsize // ALIGNED) for shape, dtype, _ in letter.tensors
        ]
        packet = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        views = [
            piece[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for piece, (shape, dtype, _) in zip(packet.split(sizes), letter.tensors, strict=True)
        ]
        if self.rank == rank:
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor)
        if len(packet):
            with named_faults(doing):
                dist.broadcast(packet, src=rank)
        if self.rank != rank:
            # copies: a view would keep the packet, and files hold no two tensors of one memory
            kinds = [kind for *_, kind in letter.tensors]
            tensors = [view.to(kind, copy=True) for view, kind in zip(views, kinds, strict=True)]
        return together(letter.text, tensors)

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


@dataclass(frozen=True)
class Letter:
    """A value on its way: pickled without its tensors, which travel as they are, from GPU to GPU.

    Attributes:
        tensors: shape, dtype and device type of each.
    """

    text: bytes
    tensors: list[tuple[torch.Size, torch.dtype, str]]


def apart(value: Any) -> tuple[Letter, list[torch.Tensor]]:
    """The letter of a value, and its tensors."""
    tensors: list[torch.Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: Any) -> int | None:
            if not isinstance(found, torch.Tensor):
                return None
            tensors.append(found.detach())
            return len(tensors) - 1

    text = io.BytesIO()
    Pickler(text).dump(value)
    return Letter(text.getvalue(), [(t.shape, t.dtype, t.device.type) for t in tensors]), tensors


def together(text: bytes, tensors: list[torch.Tensor]) -> Any:
    """The value of a letter's text and tensors."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> torch.Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(text)).load()


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
    words = None
    if device.type == "cuda":
        with named_faults("start"):
            words = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout()))
    return Peers(dist.get_rank(), dist.get_world_size(), words)
