"""W4A16 on a CPU in the order that PyTorch's own kernel reads: `torch.ops.aten._weight_int4pack_mm_for_cpu`.

    w[n, k] = (q[n, k] - 8) * scales[n, k // G] + (8 - zeros[n, k // G]) * scales[n, k // G]          (1)

PyTorch packs rows in blocks of 16 to 64, two codes a byte, in an order that depends on the CPU; `unpack_cpu` finds that
order by packing the numbers of the places themselves, so that a weight can be held once, in this order, and saved in
the neutral layout. The kernel takes the second term of (1) as bfloat16, which is up to scale / 64 off and the same for
a whole group: what the rounding loses is kept as `residual` and added as (sum of x over the group) @ residual.
The kernel is fast for bfloat16 x only. Its time grows with M: for many rows the weight is unpacked and dequantized.
"""

from functools import lru_cache

import torch
from torch import Tensor

from quantkit.kernels.cpu import CODES_PER_WORD, SYMMETRIC_ZERO, int4_values, linear

ROWS = 64  # a multiple of every block of rows in PyTorch's packing
GROUP_SIZES = (32, 64, 128, 256)


def not_packable(
    N: int, K: int, group_size: int, x_dtype: torch.dtype, scales_dtype: torch.dtype
) -> str | None:
    """Why a weight [N, K] is better left in the neutral layout on a CPU; None: pack it."""
    if x_dtype != torch.bfloat16 or scales_dtype != torch.bfloat16:
        return f"needs bfloat16 x and scales, not {x_dtype} and {scales_dtype}"
    if N % 16:
        return f"needs N in multiples of 16, not {N}"
    if group_size not in GROUP_SIZES or K % group_size:
        return f"needs a group_size of {', '.join(map(str, GROUP_SIZES))} that divides K, not {group_size} for K = {K}"
    return None


def pack_cpu(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The neutral layout -> what `quantkit::w4a16_cpu` takes. Ask `not_packable` first.

    Args:
        codes: int32 [N, K/8].
        scales: bfloat16 [N, K/group_size].
        zeros: uint8 of the same shape, or None: every zero is 8.

    Returns:
        packed: uint8 [N, K/2], in an order of this CPU.
        scales_and_zeros: bfloat16 [K/group_size, N, 2].
        residual: float32 [K/group_size, N], what bfloat16 lost of (8 - zeros) * scales; None without zeros.

    Raises:
        ValueError: the weight is not packable.
    """
    N, K = codes.shape[0], codes.shape[1] * CODES_PER_WORD
    if reason := not_packable(N, K, group_size, torch.bfloat16, scales.dtype):
        raise ValueError(f"pack_cpu: {reason}")
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    packed = _pack((codes.unsqueeze(-1) >> shifts & 0xF).view(N, K))
    if zeros is None:
        return packed, torch.stack([scales.t(), torch.zeros_like(scales.t())], -1), None
    exact = ((SYMMETRIC_ZERO - zeros.float()) * scales.float()).t()
    rounded = exact.bfloat16()
    residual = (exact - rounded.float()).contiguous()
    return packed, torch.stack([scales.t(), rounded], -1), residual


def unpack_cpu(packed: Tensor) -> Tensor:
    """The codes of `pack_cpu`, in the neutral layout again: uint8 [N, K/2] -> int32 [N, K/8]."""
    words = []
    for start in range(0, len(packed), ROWS):
        q = _rows(packed[start : start + ROWS]).to(torch.int32) + SYMMETRIC_ZERO
        q = q.view(len(q), -1, CODES_PER_WORD)
        word = q[..., 0].clone()
        for i in range(1, CODES_PER_WORD):
            word |= q[..., i] << 4 * i
        words.append(word)
    return torch.cat(words)


def _pack(q: Tensor) -> Tensor:
    """Codes int32 [N, K] -> uint8 [N, K/2] in PyTorch's order."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)


@lru_cache(maxsize=32)
def _places(rows: int, K: int) -> Tensor:
    """int32 [rows * K]: where the code of (row, column) is among the packed codes, low half of a byte first."""
    index = torch.arange(rows * K, dtype=torch.int32).view(rows, K)
    held = torch.zeros(rows * K, dtype=torch.int32)  # the index of the code that is held at a place
    for shift in range(0, (rows * K).bit_length(), 4):
        digit = _pack((index >> shift) & 0xF).flatten()
        held |= torch.stack([digit & 0xF, digit >> 4], 1).flatten().to(torch.int32) << shift
    return held.argsort().to(torch.int32)


def _rows(packed: Tensor) -> Tensor:
    """Packed rows, at most ROWS of them and starting at a multiple of ROWS -> q - 8 as float32 [rows, K]."""
    rows, K = packed.shape[0], packed.shape[1] * 2
    return int4_values(packed.flatten()[None]).flatten().index_select(0, _places(rows, K)).view(rows, K)


def w4a16_int4pack(
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """y = x w^T + bias by PyTorch's kernel; x bfloat16 [M, K], the rest as `pack_cpu` returns it."""
    x = x.contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)
    if residual is None:
        return y if bias is None else y.add_(bias)
    rest = x.view(len(x), -1, group_size).sum(-1, dtype=torch.float32) @ residual
    return (rest.add_(y) if bias is None else rest.add_(y).add_(bias)).to(x.dtype)


def w4a16_int4pack_dequantize(
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """The same product for many rows: equation (1) is exact in float32, and the weight rounded once to x.dtype."""
    N = len(packed)
    scales, offsets = scales_and_zeros.float().permute(2, 1, 0).unsqueeze(-1)  # [N, K / group_size, 1] each

    def weight(rows: slice) -> Tensor:
        q = _rows(packed[rows])
        groups = q.view(len(q), -1, group_size).mul_(scales[rows])
        if residual is not None:
            groups.add_(offsets[rows] + residual.t()[rows].unsqueeze(-1))
        return groups.view(len(q), -1)

    return linear(x, N, bias, weight, step=ROWS)
