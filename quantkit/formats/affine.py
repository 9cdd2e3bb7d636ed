"""Codes with scales and zeros as other formats have them, and whether quantkit's own format holds the same numbers.

    w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g]        g = group_of[k], or k div group_size

quantkit holds such a weight bit for bit if its codes have 2, 3 or 4 bits, its zeros are codes, its scales are
numbers of float16 or bfloat16 and its groups are any multiple of 32 columns, or whole rows; with 8 bits
if each row has one scale and its zero is 128.
"""

from dataclasses import dataclass, replace

import torch

from quantkit.errors import QuantKitError
from quantkit.packing import QuantizedTensor, pack_codes, unpack_codes
from quantkit.scheme import GROUP_SIZES, PRESETS

HALVES = (torch.bfloat16, torch.float16)  # of scales of 2 to 4 bits


@dataclass(frozen=True)
class Linear:
    """What a source holds of one linear [N, K].

    Attributes:
        quantized: it in quantkit's layout, the same codes and scales; None where quantkit has no place for them.
        reason: why not.
        weight: then the weight that the source's numbers stand for, float32 [N, K].
    """

    quantized: QuantizedTensor | None
    reason: str = ""
    weight: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What x is multiplied by [N, K]."""
        if self.quantized is not None:
            return self.quantized.effective_weight(dtype)
        assert self.weight is not None, "a linear that is not quantized has its weight"
        return self.weight.to(dtype)


@dataclass(frozen=True)
class Affine:
    """A weight [N, K] by the formula above.

    Attributes:
        bits: of a code.
        codes: uint8 [N, K], 0 .. 2^bits - 1.
        scales: any floating dtype [N, G].
        zeros: [N, G], whole numbers or not; None: every one is 2^(bits - 1).
        group_size: columns that share a scale; K or None: the whole row.
        group_of: int64 [K], where groups are not runs of neighbours.
        activation: what x is rounded to, as in `Scheme`; int8 alone.
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_size: int | None
    group_of: torch.Tensor | None = None
    activation: str | None = None

    @property
    def columns(self) -> torch.Tensor:
        """The group of each column, int64 [K]."""
        K = self.codes.shape[1]
        if self.group_of is not None:
            return self.group_of
        return torch.arange(K, device=self.codes.device) // (self.group_size or K)

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        middle = torch.tensor(2.0 ** (self.bits - 1))
        zeros = middle if self.zeros is None else self.zeros.float()[:, self.columns]
        return (self.codes.float() - zeros) * self.scales.float()[:, self.columns]

    def linear(self) -> Linear:
        """It in quantkit's layout, or its weight and the reason."""
        affine = self
        if self.bits == 8 and bool((self.scales == self.scales[:, :1]).all()) and self.zeros is None:
            affine = replace(
                self, scales=self.scales[:, :1], group_size=None, group_of=None
            )  # a scale a row after all
        reason = affine.unfit()
        if reason:
            return Linear(None, reason, self.dequantize())
        return Linear(affine.packed())

    def unfit(self) -> str:
        """Why quantkit's format cannot hold these numbers; '' if it can."""
        K = self.codes.shape[1]
        if self.bits not in (2, 3, 4, 8):
            return f"codes of {self.bits} bits, and quantkit has 2, 3, 4 and 8"
        if self.activation and self.bits < 4:
            return (
                f"codes of {self.bits} bits beside {self.activation} activations, and quantkit has none such"
            )
        if self.bits == 8:
            if self.scales.shape[1] > 1:
                return f"8-bit codes in groups of {self.group_size}, and quantkit's have one scale a row"
            if self.zeros is not None and not bool((self.zeros == 128).all()):
                return "8-bit codes with zeros, and quantkit's are symmetric"
            return ""
        zeros = self.zeros
        if zeros is not None and not bool(
            ((zeros >= 0) & (zeros < 2**self.bits) & (zeros == zeros.round())).all()
        ):
            return f"zeros that are not whole numbers from 0 to {2**self.bits - 1}"
        size = self.group_size or K
        if size < K and all(size % known for known in GROUP_SIZES):
            return f"groups of {size}, and quantkit's are of {', '.join(map(str, GROUP_SIZES))} or whole rows"
        if storable_dtype(self.scales) is None:
            return f"scales of {str(self.scales.dtype)[6:]} that neither float16 nor bfloat16 holds exactly"
        counts = self.columns.bincount()
        if self.group_of is not None and bool((counts[:-1] != size).any() | (counts[-1] > size)):
            return "an order of columns whose groups differ in size"
        return ""

    def packed(self) -> QuantizedTensor:
        """It in quantkit's layout; `unfit` must have had nothing to say."""
        N, K = self.codes.shape
        codes, scales, zeros, size = self.codes, self.scales, self.zeros, self.group_size or K
        if zeros is not None and bool((zeros == 2 ** (self.bits - 1)).all()):
            zeros = None
        order = None
        if self.group_of is not None and bool((self.group_of.diff() < 0).any()):
            order = self.group_of.argsort(stable=True)
            codes, order = codes[:, order], order.to(torch.int32)
        # a group without a scale is a group of zeros, which quantkit writes with the scale 1
        if bool((scales == 0).any()):
            middle = torch.tensor(2 ** (self.bits - 1), dtype=torch.uint8)
            columns = torch.arange(K) // size
            empty = (scales == 0)[:, columns]
            nothing = middle if zeros is None else zeros.to(torch.uint8)[:, columns]
            codes, scales = torch.where(empty, nothing, codes), scales.where(scales != 0, 1.0)
        if self.bits == 8:
            signed = (codes.to(torch.int16) - 128).to(torch.int8)
            scheme = PRESETS["w8a8" if self.activation else "w8a16"]
            return QuantizedTensor(scheme, (N, K), signed, scales.float(), input_order=order)
        group_size = self.group_size
        if group_size is not None and group_size >= K and group_size not in GROUP_SIZES:
            group_size = None
        if group_size is not None and group_size not in GROUP_SIZES:  # each scale for several smaller groups
            group_size = max(known for known in GROUP_SIZES if size % known == 0)
            repeats, groups = size // group_size, -(-K // group_size)
            scales = scales.repeat_interleave(repeats, 1)[:, :groups]
            zeros = None if zeros is None else zeros.repeat_interleave(repeats, 1)[:, :groups]
        dtype = storable_dtype(scales)
        assert dtype is not None, "unfit() has looked"
        name = f"w{self.bits}a{8 if self.activation else 16}"
        return QuantizedTensor(
            replace(PRESETS[name], group_size=group_size, symmetric=zeros is None),
            (N, K),
            pack_codes(codes, self.bits),
            scales.to(dtype).contiguous(),
            None if zeros is None else zeros.to(torch.uint8).contiguous(),
            input_order=order,
        )


def affine_of(quantized: QuantizedTensor) -> Affine:
    """The codes of a QuantizedTensor of 2, 3, 4 or (INT) 8 bits, unpacked; channel scales stay behind."""
    K, scheme = quantized.shape[1], quantized.scheme
    if scheme.bits == 8:
        codes = (quantized.codes.to(torch.int16) + 128).to(torch.uint8)
    else:
        codes = unpack_codes(quantized.codes, K, scheme.bits)
    group_of = None
    if quantized.input_order is not None:
        group_of = torch.empty(K, dtype=torch.int64)
        order = quantized.input_order.long()
        group_of[order] = torch.arange(K) // (scheme.group_size or K)
        codes = codes[:, order.argsort()]
    size = scheme.group_size
    return Affine(scheme.bits, codes, quantized.scales, quantized.zeros, size, group_of, scheme.activation)


def exactly(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The same numbers in another dtype; None where it does not have them all."""
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.double(), tensor.double()) else None


def storable_dtype(scales: torch.Tensor) -> torch.dtype | None:
    """Of float16 and bfloat16 the one that holds these scales exactly: their own, if it is one of the two."""
    if scales.dtype in HALVES:
        return scales.dtype
    return next((dtype for dtype in HALVES if exactly(scales, dtype) is not None), None)


def check_finite(name: str, **tensors: torch.Tensor) -> None:
    """Refuses NaN and infinity among a linear's tensors."""
    for suffix, tensor in tensors.items():
        if tensor.is_floating_point():
            bad = int((~tensor.float().isfinite()).sum())
            if bad:
                raise QuantKitError(
                    f"{name}.{suffix}: {bad} of {tensor.numel()} values are NaN or infinite; mend the source checkpoint"
                )
