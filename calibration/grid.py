"""The grid of a weight: its scales and zeros, fitted before any code is chosen, and rounding onto it.

    2 to 4 bits   symmetric    scale = +-max|w| / (c / 2), zero = (c + 1) / 2
    c = 2^bits-1  asymmetric   scale = (max(w, 0) - min(w, 0)) / c, zero = round(-min(w, 0) / scale)
    int8   scale = max|w| / 127       fp8   scale = max|w| / 448

each over one group of columns, one row or one tile, as the scheme says. Codes are rounded (to nearest,
ties to even) against the scale as it is stored, so the scale's own rounding costs no accuracy twice.

A symmetric grid of few bits is lopsided: with 4 bits it has 8 steps below zero and 7 above. A negative scale
turns it over, so that the longer side can face the longer tail. `search_clip` tries both, which takes 8 % off
the squared error of 4-bit codes of normal weights in groups of 128, and 10 % with 3 bits, for no bit more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from quantkit.errors import QuantKitError
from quantkit.packing import QuantizedTensor, expand_groups, pack_codes
from quantkit.scheme import Scheme

SCALE_DTYPES = (torch.bfloat16, torch.float16)  # of 2 to 4 bits; the other schemes store float32
SHRINKS = tuple(1 - i / 32 for i in range(13))  # 1 ... 0.625, tried by `search_clip`
SHRINKS_8 = tuple(1 - i / 64 for i in range(7))  # of int8, whose steps are so fine that clipping rarely pays
AT_A_TIME = 1 << 24  # weights searched at a time, to bound what lies between


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of a weight [N, K], in the dtypes and shapes that `QuantizedTensor` stores."""

    scheme: Scheme
    shape: tuple[int, int]
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def expand(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | float]:
        """(scale, zero) of every weight; both broadcast over [N, K] and are of `dtype`.

        A zero common to all codes is a float.
        """
        N, K = self.shape
        scheme, scales = self.scheme, self.scales.to(dtype)
        if scheme.bits < 8:
            scale = expand_groups(scales, scheme.group_size, K)
            if self.zeros is None:
                return scale, float(scheme.symmetric_zero)
            return scale, expand_groups(self.zeros.to(dtype), scheme.group_size, K)
        if scheme.block_size is None:
            return scales, 0.0
        return scales.repeat_interleave(scheme.block_size, 0)[:N].repeat_interleave(scheme.block_size, 1)[
            :, :K
        ], 0.0

    def tables(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor]:
        """Scales [groups, N], zeros likewise or one for all, and the group of each column, int64 [K]."""
        N, K = self.shape
        scheme = self.scheme
        columns = torch.arange(K, device=self.scales.device)
        scales = self.scales.to(dtype)
        if scheme.block_size is not None:
            scales = scales.repeat_interleave(scheme.block_size, 0)[:N]
        zeros: torch.Tensor | float = self.common_zero
        if self.zeros is not None:
            zeros = self.zeros.to(dtype).T.contiguous()
        return scales.T.contiguous(), zeros, columns // (scheme.group_size or scheme.block_size or K)

    @property
    def common_zero(self) -> float:
        """The zero of all codes, where `zeros` is None."""
        return float(self.scheme.symmetric_zero) if self.scheme.bits < 8 else 0.0

    @property
    def code_range(self) -> tuple[float, float]:
        """Smallest and largest code, as numbers."""
        largest = self.scheme.largest_code
        return 0 if self.scheme.bits < 8 else -largest, largest

    def from_float(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [N, K] that are whole numbers in a floating dtype -> the dtype that `round` gives."""
        return codes.to(torch.uint8 if self.scheme.bits < 8 else torch.int8)

    def from_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 bits [N, K] -> codes in the dtype that `round` gives."""
        kinds = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
        return codes.contiguous().view(kinds.get(self.scheme.weight, torch.uint8))

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest codes of weight [N, K], ties to even: uint8 0..2^bits-1, int8 -127..127 or float8_e4m3fn."""
        w = at_least_float32(weight)
        scale, zero = self.expand(w.dtype)
        if self.scheme.bits < 8:
            return (w / scale + zero).round_().clamp_(0, self.scheme.largest_code).to(torch.uint8)
        # a scale at the smallest float32 can leave w / scale above the largest code
        q = (w / scale).clamp_(*self.code_range)
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
    """Scales in the stored dtype: finite and not zero whatever the weights are; their sign is kept.

    A group of zeros gets the scale 1. float16 goes down to its subnormals, because weights below 4e-4
    would otherwise lose codes; the other dtypes stop at their smallest normal number.
    """
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    size = torch.where(scale == 0, 1.0, scale.abs().clamp(smallest, info.max))
    return size.copysign(scale).to(dtype)


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
        shrink: clips the range, 0 < |shrink| <= 1: a number, or one for each scale. Negative ones turn a
            symmetric grid of 2 to 4 bits over.

    Raises:
        QuantKitError: the weight has NaN or infinite entries, or scale_dtype is not one of the two.
    """
    if scale_dtype not in SCALE_DTYPES:
        raise QuantKitError(f"scales of 2 to 4 bits are stored as bfloat16 or float16, not {scale_dtype}")
    w = at_least_float32(weight)
    return range_grid(scheme, w.shape, *weight_range(w, scheme), shrink, scale_dtype)


def weight_range(w: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest weight that share a scale, 0 included: [N, groups], [N, 1] or one for each tile.

    Raises:
        QuantKitError: NaN or infinite weights.
    """
    N, K = w.shape
    if scheme.bits < 8:
        low, high = split_groups(w, scheme.group_size).aminmax(dim=2)
    elif block := scheme.block_size:
        tiles = pad(w, (0, -K % block, 0, -N % block)).view(-(-N // block), block, -(-K // block), block)
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    else:
        low, high = w.aminmax(dim=1, keepdim=True)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        bad = int((~torch.isfinite(w)).sum())
        raise QuantKitError(f"{bad} of {w.numel()} weights are NaN or infinite; the checkpoint is damaged")
    return low.clamp(max=0), high.clamp(min=0)


def range_grid(
    scheme: Scheme,
    shape: Sequence[int],
    low: torch.Tensor,
    high: torch.Tensor,
    shrink: float | torch.Tensor,
    scale_dtype: torch.dtype,
) -> Grid:
    """The grid of a weight whose ranges are known; see `fit_grid`."""
    largest, zeros = torch.maximum(-low, high), None
    if scheme.bits == 8:
        scales = storable(largest * shrink / scheme.largest_code, torch.float32)
    elif scheme.symmetric:
        scales = storable(largest * shrink / (scheme.largest_code / 2), scale_dtype)
    else:
        low, high = low * shrink, high * shrink
        scales = storable((high - low) / scheme.largest_code, scale_dtype)
        zeros = (-low / scales.to(low.dtype)).round_().clamp_(0, scheme.largest_code).to(torch.uint8)
    return Grid(scheme, (shape[0], shape[1]), scales, zeros)


def search_clip(
    weight: torch.Tensor,
    scheme: Scheme,
    hessian: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    shrinks: Sequence[float] | None = None,
) -> Grid:
    """Grid whose range is shrunk, scale by scale, to the least output error of rounding to nearest.

    The error of row n in group g is e H_g e^T, e = w[n, g] - rounded and H_g the diagonal block of the
    Hessian X^T X that belongs to the group: the clip search of AWQ (arXiv:2306.00978, section 3 and its
    code), with the errors of different groups taken as uncorrelated.

    Args:
        weight: [N, K].
        scheme: any. The range of e4m3 codes is left whole: clipping costs their largest values, and shrinking
            the rest gains nothing, because their steps are relative.
        hessian: X^T X up to a factor [K, K]; its diagonal or other weights of the columns
            [K] for a cheaper search; or None, which
            minimises the squared error of the weights themselves.
        scale_dtype: see `fit_grid`.
        shrinks: factors tried, by default those that suit the scheme; the first of equally good ones wins, so
            put 1 first. Symmetric grids of 2 to 4 bits also try their negatives.

    Returns:
        Grid, never worse in that error than `fit_grid(weight, scheme, scale_dtype)`.
    """
    w = at_least_float32(weight)
    if scheme.weight == "fp8":
        return fit_grid(w, scheme, scale_dtype)
    if shrinks is None:
        shrinks = SHRINKS_8 if scheme.bits == 8 else SHRINKS
    if scheme.bits < 8 and scheme.symmetric:
        shrinks = [sign * shrink for shrink in shrinks for sign in (1, -1)]
    blocks = None if hessian is None else diagonal_blocks(hessian.to(w.dtype), scheme.group_size)
    rows = max(1, AT_A_TIME // w.shape[1])
    best = torch.cat([best_shrinks(part, scheme, blocks, scale_dtype, shrinks) for part in w.split(rows)])
    return fit_grid(w, scheme, scale_dtype, best)


def best_shrinks(
    w: torch.Tensor,
    scheme: Scheme,
    blocks: torch.Tensor | None,
    scale_dtype: torch.dtype,
    shrinks: Sequence[float],
) -> torch.Tensor:
    """The best shrink of every group [N, groups], in the error that `search_clip` describes."""
    groups = split_groups(w, scheme.group_size)  # [N, groups, G]
    low, high = weight_range(w, scheme)
    best: torch.Tensor | None = None
    chosen = torch.empty(0)
    for shrink in shrinks:
        grid = range_grid(scheme, w.shape, low, high, shrink, scale_dtype)
        scale = grid.scales.to(w.dtype)[:, :, None]
        zero: torch.Tensor | float = grid.common_zero
        if grid.zeros is not None:
            zero = grid.zeros.to(w.dtype)[:, :, None]
        e = (groups / scale).add_(zero).round_().clamp_(*grid.code_range).sub_(zero).mul_(scale).sub_(groups)
        if blocks is None:
            loss = e.square_().sum(2)
        elif blocks.dim() == 2:
            loss = e.square_().mul_(blocks).sum(2)
        else:
            loss = (torch.einsum("ngi,gij->ngj", e, blocks) * e).sum(2)
        if best is None:
            best, chosen = loss, torch.full_like(loss, shrink)
        else:
            chosen = torch.where(loss < best, shrink, chosen)
            best = torch.minimum(loss, best)
    return chosen


def diagonal_blocks(hessian: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """[K, K] -> its diagonal blocks [groups, G, G], or a diagonal [K] -> [groups, G]; padded with zeros."""
    if hessian.dim() == 1:
        return split_groups(hessian[None], group_size)[0]
    K = len(hessian)
    G = group_size or K
    padded = pad(hessian, (0, -K % G, 0, -K % G))
    return torch.stack([padded[k : k + G, k : k + G] for k in range(0, K, G)])
