"""The grid of a weight: its scales and zeros, fitted before any code is chosen, and rounding onto it.

    2 to 4 bits   symmetric    scale = max|w| / (c / 2), zero = (c + 1) / 2
    c = 2^bits-1  asymmetric   scale = (max(w, 0) - min(w, 0)) / c, zero = round(-min(w, 0) / scale)
    int8   scale = max|w| / 127       fp8   scale = max|w| / 448

each over one group of columns, one row or one tile, as the scheme says. Codes are rounded (to nearest,
ties to even) against the scale as it is stored, so the scale's own rounding costs no accuracy twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quantkit.errors import QuantKitError
from quantkit.packing import QuantizedTensor, expand_groups, pack_codes
from quantkit.scheme import Scheme

LARGEST = {"int8": 127.0, "fp8": 448.0}  # what max|w| / scale becomes
SCALE_DTYPES = (torch.bfloat16, torch.float16)  # of 2 to 4 bits; the other schemes store float32
SHRINKS = tuple(1 - i / 32 for i in range(13))  # 1 ... 0.625, tried by `search_clip`


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of a weight [N, K], in the dtypes and shapes that `QuantizedTensor` stores."""

    scheme: Scheme
    shape: tuple[int, int]
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def expand(
        self, dtype: torch.dtype, columns: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """(scale, zero) of every weight in these columns (int64 [C], all of them by default).

        Both broadcast over [N, C] and are of `dtype`; a zero common to all codes is a float.
        """
        N, K = self.shape
        scheme = self.scheme
        if columns is None and scheme.bits < 8:
            scale = expand_groups(self.scales.to(dtype), scheme.group_size, K)
            if self.zeros is None:
                return scale, float(scheme.symmetric_zero)
            return scale, expand_groups(self.zeros.to(dtype), scheme.group_size, K)
        if columns is None:
            columns = torch.arange(K, device=self.scales.device)
        if scheme.bits < 8:
            group = columns // (scheme.group_size or K)
            zero = float(scheme.symmetric_zero) if self.zeros is None else self.zeros[:, group].to(dtype)
            return self.scales[:, group].to(dtype), zero
        if scheme.block_size is None:
            return self.scales.to(dtype), 0.0
        rows = torch.arange(N, device=self.scales.device) // scheme.block_size
        return self.scales.to(dtype)[rows][:, columns // scheme.block_size], 0.0

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest codes of weight [N, K], ties to even: uint8 0..2^bits-1, int8 -127..127 or float8_e4m3fn."""
        w = at_least_float32(weight)
        scale, zero = self.expand(w.dtype)
        if self.scheme.bits < 8:
            return (w / scale + zero).round_().clamp_(0, self.scheme.largest_code).to(torch.uint8)
        # a scale at the smallest float32 can leave w / scale above the largest code
        largest = LARGEST[self.scheme.weight]
        q = (w / scale).clamp_(-largest, largest)
        return q.round_().to(torch.int8) if self.scheme.weight == "int8" else q.to(torch.float8_e4m3fn)

    def dequantize(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [N, K] that unpacked codes [N, K] stand for."""
        scale, zero = self.expand(dtype)
        return (codes.to(dtype) - zero) * scale

    def pack(self, codes: torch.Tensor) -> QuantizedTensor:
        """Unpacked codes [N, K] and this grid -> the neutral layout."""
        packed = pack_codes(codes, self.scheme.bits) if self.scheme.bits < 8 else codes
        return QuantizedTensor(self.scheme, self.shape, packed, self.scales, self.zeros)


def at_least_float32(weight: torch.Tensor) -> torch.Tensor:
    """float64 stays float64; every other dtype becomes float32."""
    return weight if weight.dtype == torch.float64 else weight.to(torch.float32)


def split_groups(w: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """[N, K] -> [N, groups, G]; a last group that is shorter is filled up with zeros."""
    N, K = w.shape
    G = group_size or K
    return pad(w, (0, -K % G)).view(N, -1, G)


def storable(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales in the stored dtype: positive and finite whatever the weights are.

    A group of zeros gets the scale 1. float16 goes down to its subnormals, because weights below 4e-4
    would otherwise lose codes; the other dtypes stop at their smallest normal number.
    """
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    scale = torch.where(scale == 0, 1.0, scale.clamp(smallest, info.max))
    return scale.to(dtype)


def fit_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype = torch.bfloat16,
    shrink: float | torch.Tensor = 1.0,
) -> Grid:
    """Grid that covers the range of the weight, or `shrink` times that range.

    Args:
        weight: any floating dtype [N, K]; computed in float64 if it is that, else in float32.
        scheme: what a code is, and which weights share a scale.
        scale_dtype: of the stored scales of 2 to 4 bits, bfloat16 or float16.
        shrink: clips the range, 0 < shrink <= 1: a number, or one for each scale.

    Raises:
        QuantKitError: the weight has NaN or infinite entries, or scale_dtype is not one of the two.
    """
    if scale_dtype not in SCALE_DTYPES:
        raise QuantKitError(f"scales of 2 to 4 bits are stored as bfloat16 or float16, not {scale_dtype}")
    w = at_least_float32(weight)
    if not torch.isfinite(w).all():
        bad = int((~torch.isfinite(w)).sum())
        raise QuantKitError(f"{bad} of {w.numel()} weights are NaN or infinite; the checkpoint is damaged")
    N, K = w.shape
    zeros = None
    if scheme.bits < 8:
        groups = split_groups(w, scheme.group_size)
        low, high = groups.amin(2).clamp(max=0) * shrink, groups.amax(2).clamp(min=0) * shrink
        if scheme.symmetric:
            scales = storable(torch.maximum(-low, high) / (scheme.largest_code / 2), scale_dtype)
        else:
            scales = storable((high - low) / scheme.largest_code, scale_dtype)
            zeros = (-low / scales.to(w.dtype)).round_().clamp_(0, scheme.largest_code).to(torch.uint8)
    elif block := scheme.block_size:
        tiles = pad(w.abs(), (0, -K % block, 0, -N % block)).view(
            -(-N // block), block, -(-K // block), block
        )
        scales = storable(tiles.amax((1, 3)) * shrink / LARGEST[scheme.weight], torch.float32)
    else:
        scales = storable(w.abs().amax(1, keepdim=True) * shrink / LARGEST[scheme.weight], torch.float32)
    return Grid(scheme, (N, K), scales, zeros)


def search_clip(
    weight: torch.Tensor,
    scheme: Scheme,
    hessian: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    shrinks: Sequence[float] = SHRINKS,
) -> Grid:
    """Grid of 2 to 4 bits whose range is shrunk, group by group, to the least output error of rounding to nearest.

    The error of row n in group g is e H_g e^T, e = w[n, g] - rounded and H_g the diagonal block of the
    Hessian X^T X that belongs to the group: the clip search of AWQ (arXiv:2306.00978, section 3 and its
    code), with the errors of different groups taken as uncorrelated.

    Args:
        weight: [N, K].
        scheme: of 2 to 4 bits.
        hessian: X^T X up to a factor [K, K]; its diagonal or other weights of the columns
            [K] for a cheaper search; or None, which
            minimises the squared error of the weights themselves.
        scale_dtype: see `fit_grid`.
        shrinks: factors tried; the first of equally good ones wins, so put 1 first.

    Returns:
        Grid, never worse in that error than `fit_grid(weight, scheme, scale_dtype)`.
    """
    w = at_least_float32(weight)
    blocks = None if hessian is None else diagonal_blocks(hessian.to(w.dtype), scheme.group_size)
    best = best_shrink = None
    for shrink in shrinks:
        grid = fit_grid(w, scheme, scale_dtype, shrink)
        e = split_groups(w - grid.dequantize(grid.round(w), w.dtype), scheme.group_size)  # [N, groups, G]
        if blocks is None:
            loss = e.square().sum(2)
        elif blocks.dim() == 2:
            loss = (e.square() * blocks).sum(2)
        else:
            loss = (torch.einsum("ngi,gij->ngj", e, blocks) * e).sum(2)
        if best is None or best_shrink is None:
            best, best_shrink = loss, torch.full_like(loss, shrink)
        else:
            best_shrink = torch.where(loss < best, shrink, best_shrink)
            best = torch.minimum(loss, best)
    return fit_grid(w, scheme, scale_dtype, 1.0 if best_shrink is None else best_shrink)


def diagonal_blocks(hessian: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """[K, K] -> its diagonal blocks [groups, G, G], or a diagonal [K] -> [groups, G]; padded with zeros."""
    if hessian.dim() == 1:
        return split_groups(hessian[None], group_size)[0]
    K = len(hessian)
    G = group_size or K
    padded = pad(hessian, (0, -K % G, 0, -K % G))
    return torch.stack([padded[k : k + G, k : k + G] for k in range(0, K, G)])
