"""How the ranks of tensor parallelism add their parts of rows: in the kernel of the norm that follows, or by NCCL or gloo.

The kernel (`kernels/all_reduce_norm.py`) needs memory that all ranks see, PyTorch's symmetric memory: it is asked for once, before any
CUDA graph, by all ranks together. Where one of them cannot have it, or a part is larger than `ONE_SHOT_BYTES`, the
library's all-reduce comes first and `rms_norm_quantize` after it. A large product of one row and 4-bit weights gives its
row to the other ranks itself, as it is done (`kernels/w4a16_decode.py`).
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quantkit.errors import MachineError
from quantkit.kernels.dispatch import Problem, choose, multiprocessors_of, target_of
from quantkit.processes import gather, timeout

try:
    from quantkit.kernels import w4a16_decode
    from quantkit.kernels.all_reduce_norm import (
        EMPTY,
        INTEGERS,
        Mailbox,
        all_reduce_norm,
        mailbox_shape,
        rows_of,
        unsupported,
    )
except ImportError:  # no Triton on this platform
    pass

MULTICAST_OFF = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class Exchange:
    """Adds the parts that the ranks of a group have of rows of K values.

    Attributes:
        group: of the processes.
        mailbox: of the kernel; None: the library adds.
        why_not: there is none.
        given: `product` has given a row that `norm` has not added yet.
    """

    def __init__(self, group: Any, mailbox: "Mailbox | None" = None, why_not: str = "") -> None:
        self.group, self.mailbox, self.why_not, self.given = group, mailbox, why_not, False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Exchange":
        """Itself: a group of processes and what they share have no copy."""
        return self

    def add(self, part: Tensor, bias: Tensor | None) -> Tensor:
        """The sum of the ranks' parts, which overwrites this one's, plus a bias that is added once."""
        dist.all_reduce(part, group=self.group)
        return part if bias is None else part + bias

    def product(
        self, x: Tensor, tiles: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
    ) -> Tensor | None:
        """`ops.w4a16_tiles` of one row x [..., K], a part that the other ranks get as it is made: `norm` comes next, with `given`.

        Returns:
            None: it would not pay, or no kernel that gives takes x; nothing was done.

        Raises:
            MachineError: the row of a call before was never added.
        """
        K, box = x.shape[-1], self.mailbox
        if box is None or x.numel() != K or x.element_size() != box.slots.element_size():
            return None
        row, N = x.reshape(1, K), box.slots.shape[-1]
        problem = Problem(target_of(x.device), 1, N, K, x.dtype, tiles.dtype, group_size)
        kernel, launch = choose("w4a16_tiles", problem)
        if kernel.name != "w4a16_decode":
            return None
        launch = launch or w4a16_decode.launch_of(row, N, group_size)
        if not w4a16_decode.giving_pays(launch, N, K, multiprocessors_of(x.device)):
            return None
        self.expect(given=False)
        y = w4a16_decode.w4a16_decode(
            row, tiles, scales, zeros, None, None, group_size, N, False, launch, box
        )
        self.given = True
        return y.view(*x.shape[:-1], N)

    def expect(self, given: bool) -> None:
        """Refuses what would take one row for another: a row that was given lies in the ranks' slots until a norm takes it."""
        if self.given is not given:
            raise MachineError(
                "sums over processes: a step was stopped between a linear and the norm that adds its parts; load the model "
                "again, in all processes"
            )

    def norm(
        self,
        part: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        eps: float,
        residual: Tensor,
        dtype: torch.dtype | None = None,
        input_scale: Tensor | None = None,
        group_size: int = 0,
        given: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`ops.rms_norm_quantize` of the sum of the ranks' parts [..., K] and a bias [K]; part may be overwritten.

        given: it is what `product` gave.

        Raises:
            MachineError: that does not hold.
        """
        self.expect(given)
        rest = (dtype, input_scale, group_size)
        K = part.shape[-1]
        box = self.mailbox
        fits = box is not None and part.numel() <= K * box.rows and part.dtype == weight.dtype
        if box is None or not fits:
            whole = self.add(part, bias)
            return torch.ops.quantkit.rms_norm_quantize(whole, weight, eps, residual, *rest)  # type: ignore[no-any-return]
        rows = part.reshape(-1, K)
        codes, scales, h = all_reduce_norm(
            rows, box, bias, weight, eps, residual.reshape(-1, K), *rest, given
        )
        self.given = False
        return codes.view(part.shape), scales, h.view(part.shape)


def open_exchange(group: Any, K: int, dtype: torch.dtype, device: torch.device) -> Exchange:
    """An exchange of rows of K values; all ranks of the group call it, before a CUDA graph is captured.

    Raises:
        MachineError: a rank does not answer.
    """
    group = dist.group.WORLD if group is None else group
    ranks, mailbox = dist.get_world_size(group), None
    slots, why_not = symmetric_slots(ranks, K, dtype, device)
    why_not = agreed(why_not, group)
    if not why_not:
        mailbox, why_not = meet(slots, group)
        why_not = agreed(why_not, group)  # and all slots are EMPTY
    return Exchange(group, None if why_not else mailbox, why_not)


def agreed(why_not: str, group: Any) -> str:
    """The first rank's reason not to share memory; '' where none has one and all are on one host."""
    found = gather((why_not, os.uname().nodename), "memory that all see", group)
    hosts = {host for _, host in found}
    reasons = [f"process {rank}: {why}" for rank, (why, _) in enumerate(found) if why]
    return reasons[0] if reasons else "" if len(hosts) == 1 else f"processes on {', '.join(sorted(hosts))}"


def symmetric_slots(
    ranks: int, K: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, str]:
    """This rank's slots, of memory that can be shared; or why there are none."""
    if device.type == "cpu" or "Mailbox" not in globals():
        return None, "no GPU, or no Triton"
    if why_not := unsupported(device, ranks, K, dtype.itemsize):
        return None, why_not
    # The host's GPUs may be shared with others, whom a fault of NVLink's multicast would stop.
    os.environ[MULTICAST_OFF] = "1"
    try:
        from torch._C._autograd import DeviceType
        from torch.distributed import _symmetric_memory as symmetric

        if symmetric._SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index or 0):
            return None, f"torch would use multicast though {MULTICAST_OFF} is set"
        shape = mailbox_shape(ranks, rows_of(K, dtype.itemsize, multiprocessors_of(device)), K)
        return symmetric.empty(shape, dtype=INTEGERS[dtype.itemsize], device=device), ""
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        return None, first_line(error)


def meet(slots: Any, group: Any) -> tuple["Mailbox | None", str]:
    """The mailbox of these slots and the other ranks'; or why there is none."""
    try:
        from torch.distributed import _symmetric_memory as symmetric

        handle = symmetric.rendezvous(slots, group)
        ranks = range(handle.world_size)
        theirs = [handle.get_buffer(rank, slots.shape, slots.dtype) for rank in ranks]
        slots.fill_(EMPTY.value)
        mailbox = Mailbox(
            slots,
            torch.tensor([buffer.data_ptr() for buffer in theirs], device=slots.device),
            torch.zeros(slots.shape[2], dtype=torch.int32, device=slots.device),
            handle.rank,
            timeout(),
            (handle, theirs),
        )
        torch.cuda.synchronize(slots.device)
        return mailbox, ""
    except (RuntimeError, TypeError, AttributeError) as error:
        return None, first_line(error)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
