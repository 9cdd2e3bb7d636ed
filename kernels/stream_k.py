"""Stream-K: work cut into equal ranges whatever the tiles; programs that share a tile add their sums by a counter.

A program leaves its part of a shared tile in a workspace and counts up the tile's counter; the last one to do so adds
all parts in the order of the programs, so results are the same in every run, and sets the counter to zero again.
Here is what the launches of all such kernels share, the counters; each kernel has its own few lines of the rest.
"""

from functools import cache
from itertools import count

import torch
from torch import Tensor

COUNTERS = 4096  # of one launch: tiles that may be shared
LAUNCHES = 256  # launches in flight on one GPU that have counters of their own

_launch = count()


def next_counters(device: torch.device) -> Tensor:
    """Zeros for one launch, int32 [COUNTERS]; the launch leaves them at zero.

    Raises:
        RuntimeError: the first launch on this device is being captured.
    """
    return counters(device)[next(_launch) % LAUNCHES]


@cache
def counters(device: torch.device) -> Tensor:
    """Those of all launches: [LAUNCHES, COUNTERS], used in turn."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "stream_k: the first launch is being captured; run the product once before the capture"
        )
    return torch.zeros(LAUNCHES, COUNTERS, dtype=torch.int32, device=device)
