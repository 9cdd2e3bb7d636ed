"""Random operands of a product, and the bound that its rounding errors keep: for the tests of the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
FP8 = torch.float8_e4m3fn


def triton_runs(dtype: torch.dtype) -> bool:
    return GPU or dtype != torch.bfloat16


@dataclass
class Random:
    """Fresh tensors from one seed on the test's device."""

    generator: torch.Generator

    def x(self, M: int, K: int, dtype: torch.dtype) -> Tensor:
        """Activations with one outlier column and, where there are several rows, a row of zeros."""
        x = torch.randn(M, K, generator=self.generator)
        x[:, K // 3] *= 50
        if M > 1:
            x[M // 2] = 0
        return x.to(DEVICE, dtype)

    def int4(self, N: int, K: int) -> Tensor:
        shape = (N, -(-K // 8))
        words = torch.randint(-(2**31), 2**31, shape, generator=self.generator).to(torch.int32)
        if K % 8:  # the neutral layout: columns past K hold the code 0
            words[:, -1] &= (1 << 4 * (K % 8)) - 1
        return words.to(DEVICE)

    def codes(self, N: int, K: int, bits: int) -> Tensor:
        """2, 3 or 4 bits in the neutral layout."""
        from quantkit.packing import pack_codes  # imports Triton, which conftest.py prepares after this file

        return pack_codes(torch.randint(0, 2**bits, (N, K), generator=self.generator), bits).to(DEVICE)

    def bytes8(self, N: int, K: int, dtype: torch.dtype) -> Tensor:
        """All codes but the NaNs of e4m3."""
        codes = torch.randint(-127, 128, (N, K), generator=self.generator).to(DEVICE, torch.int8)
        if dtype == torch.int8:
            return codes
        return (codes.abs().clamp(max=0x7E) | codes & -128).view(FP8)  # magnitude and sign bit

    def scales(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Those of 16 bits, which belong to 2 to 4 bits, have either sign."""
        scales = torch.rand(*shape, generator=self.generator) * 0.02 + 0.001
        if dtype != torch.float32:
            scales *= torch.randint(0, 2, shape, generator=self.generator) * 2 - 1
        return scales.to(DEVICE, dtype)

    def zeros(self, *shape: int, bits: int = 4) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=self.generator).to(DEVICE, torch.uint8)

    def bias(self, N: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(N, generator=self.generator).to(DEVICE, dtype)


def assert_within(
    y: Tensor, expected: Tensor, magnitude: Tensor, K: int, roundings: int = 0, lost: float = 0.0
) -> None:
    """|y - expected| <= u |expected| + ((K + 8) 2^-23 + roundings u + lost) magnitude, u the unit roundoff of y.

    The first term is the rounding of y itself; the second that of K float32 additions and of the scales; then what an
    implementation rounds before the product (`roundings` times to x.dtype), or a tensor core loses (`lost`).
    magnitude is |x| @ |w| + |bias|.
    """
    unit = torch.finfo(y.dtype).eps / 2
    smallest = torch.finfo(y.dtype).smallest_normal * unit  # half of the smallest subnormal
    bound = unit * expected.abs() + ((K + 8) * 2**-23 + roundings * unit + lost) * magnitude + smallest
    error = (y.double() - expected).abs()
    worst = (error / bound).max().item()
    assert worst <= 1, f"error is {worst:.2f}x the rounding bound"  # NaN fails too


def assert_rounded(
    codes: Tensor,
    scales: Tensor,
    low: Tensor,
    high: Tensor,
    input_scale: Tensor | None = None,
    group_size: int = 0,
) -> None:
    """Codes and scales are those of some y [M, K] between low and high, where that is all that is known of y.

    Scales do not fall when |y| grows, nor codes when y does: so the ends of an interval give the ends of the next, and where
    low is high the codes must be right to the bit.
    """
    from quantkit.kernels import cpu  # imports Triton, which conftest.py prepares after this file

    codes, scales, low, high = (t.cpu() for t in (codes, scales, low, high))
    static = None if input_scale is None else input_scale.cpu()
    nearest = torch.where((low <= 0) & (high >= 0), 0, torch.minimum(low.abs(), high.abs()))
    ends = [
        cpu.quantize_activations(t, codes.dtype, static, group_size)[1]
        for t in (nearest, torch.maximum(low.abs(), high.abs()))
    ]
    assert scales.shape == ends[0].shape
    assert ((ends[0] <= scales) & (scales <= ends[1])).all()  # a NaN fails
    if static is None:
        scales = scales.repeat_interleave(group_size or codes.shape[1], 1)[:, : codes.shape[1]]
    top = cpu.TOP[codes.dtype]

    def rounded(y: Tensor) -> Tensor:
        v = (y.float() / scales).clamp(-top, top)
        return v.round() if codes.dtype == torch.int8 else v.to(codes.dtype).float()

    assert ((rounded(low) <= codes.float()) & (codes.float() <= rounded(high))).all()
