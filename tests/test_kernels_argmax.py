"""The first of the largest numbers of a row, for numbers of any kind and rows anywhere."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.decode import greedy
from quantkit.kernels.argmax import PIECE, argmax_triton
from rounding import DEVICE

gpu = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
# one number, a part of a piece, whole pieces and one more or less, vocabularies
SIZES = [1, 96, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 50257]


def hard(M: int, N: int, dtype: torch.dtype) -> Tensor:
    """With ties within and across pieces, a largest one at either end, rows of one number, of both zeros and with NaNs."""
    x = torch.randn(M, N, generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, change in zip(x, range(10), strict=False):
        if change == 0:
            row.clamp_(max=1.5)
        elif change < 4:
            row.fill_((0, -torch.inf, torch.inf)[change - 1])
        elif change < 6:
            row[-1 if change == 4 else 0] = 99
        elif change == 6:
            row.clamp_(max=0)
            row[N // 2 :: 5], row[N // 3 :: 7] = -0.0, 0.0
        elif change == 7:
            row.copy_(-row.abs() - 1)
        else:
            row[N // 2 :: 7] = torch.nan
            row[-1] = torch.inf if change == 8 else -torch.inf
    return x


@DTYPES
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("place", ["side by side", "apart", "in columns"])
def test_the_first_of_the_largest(N, dtype, place):
    x = hard(12, N, dtype)
    given = x.to(DEVICE)
    if place == "apart":  # as logits[:, -1] are
        given = torch.stack([given, given.flip(1)], 1)[:, 0]
    elif place == "in columns":
        given = given.T.contiguous().T
    found = argmax_triton(given)
    assert found.dtype == torch.int64
    assert torch.equal(found.cpu(), x.argmax(-1))


def test_no_rows():
    assert argmax_triton(torch.empty(0, 7, device=DEVICE)).shape == (0,)


@gpu
@DTYPES
@pytest.mark.parametrize("N", [128256, 151936])
@pytest.mark.parametrize("M", [0, 1, 8, 300])
def test_the_greedy_choice_on_a_gpu(M, N, dtype):
    x = hard(M, N, dtype)
    assert torch.equal(greedy(x.cuda()).cpu(), x.argmax(-1))
