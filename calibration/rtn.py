"""Round to nearest: every weight goes to the closest point of a grid that covers the weights' range.

It needs no calibration data. It is the whole method for the 8-bit schemes, and what the 4-bit methods
fall back to and are measured against.
"""

import torch

from quantkit.calibration.grid import Grid, fit_grid
from quantkit.packing import QuantizedTensor
from quantkit.scheme import Scheme


def rtn(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype = torch.bfloat16,
    grid: Grid | None = None,
) -> QuantizedTensor:
    """Quantize weight [N, K] to the nearest codes, for any scheme.

    Args:
        weight: any floating dtype [N, K]; float64 is rounded in float64, the others in float32.
        scheme: any; a static activation scale is added by the caller.
        scale_dtype: of the stored scales of 2 to 4 bits, bfloat16 or float16.
        grid: round onto this grid instead of the one that covers the weight's range.

    Raises:
        QuantKitError: the weight has NaN or infinite entries.
    """
    grid = grid if grid is not None else fit_grid(weight, scheme, scale_dtype)
    return grid.pack(grid.round(weight))
