"""The least time a product can take on a device: bytes over memory bandwidth, or operations over the peak."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from quantkit.eval.timing import time_launches


@dataclass(frozen=True)
class Roof:
    """Limits of one device.

    Attributes:
        bandwidth: bytes per second read from device memory.
        flops: dense bfloat16 operations per second (a multiply-add is two).
        flops_8bit: the same with both operands 8 bits wide.
        source: where the figures come from.
    """

    bandwidth: float
    flops: float
    flops_8bit: float
    source: str

    def seconds(self, nbytes: float, flops: float = 0.0, eight_bit: bool = False) -> float:
        return max(nbytes / self.bandwidth, flops / (self.flops_8bit if eight_bit else self.flops))


ROOFS = {
    # The bandwidth is a measured pure read, about 10 % under the data sheet's 4.8 TB/s.
    "NVIDIA H200": Roof(4.3e12, 989e12, 1979e12, "measured read; data sheet, dense"),
}


def roof(device: torch.device) -> Roof | None:
    """The device's limits: from the table, else measured; None on a CPU, whose caches make one figure meaningless."""
    if device.type != "cuda":
        return None
    return ROOFS.get(torch.cuda.get_device_name(device)) or measured_roof(device)


def measured_roof(device: torch.device) -> Roof:
    """The better bandwidth of reading 1 GiB and of copying it; the rate of an 8192-cubed bfloat16 product, 8 bits twice it."""
    old = torch.empty(2**30, dtype=torch.uint8, device=device).random_(256)
    new = torch.empty_like(old)
    copy = time_launches([lambda: new.copy_(old)], device).us * 1e-6 / 2
    read = time_launches([lambda: old.view(torch.float32).sum()], device).us * 1e-6
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    flops = 2 * 8192**3 / (time_launches([lambda: F.linear(a, b)], device).us * 1e-6)
    return Roof(old.nbytes / min(copy, read), flops, 2 * flops, "measured read or copy, and bfloat16 product")
