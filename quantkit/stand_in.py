"""Stand-ins for decoder blocks, so that a model can be run around blocks that are not loaded, or not to run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Stands for a decoder block in its model's list; subclasses say what it makes of the block's arguments."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its weights may not be loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # models ask a block for its attention type


@contextmanager
def standing_in(blocks: nn.ModuleList, stand_ins: Iterable[StandIn] = ()) -> Iterator[None]:
    """Puts the stand-ins in the places of the first blocks; more may be put in within it.

    Afterwards the list holds the blocks again.
    """
    originals = list(blocks)
    try:
        for i, stand_in in enumerate(stand_ins):
            blocks[i] = stand_in
        yield
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
