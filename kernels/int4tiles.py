"""W4A16 weights in the order in which a GPU's tensor cores take them: 16 x 64 tiles, a lane's codes side by side.

    tiles[s, t, g, c, kt], nibble 2 h + c8 + 4 e  =  q[16 s + 8 h + g, 64 t + 16 kt + 8 c8 + 2 c + e]       (1)

A tile is 512 bytes: lane 4 g + c of a warp reads 16 of them, which are its operands of four mma.m16n8k16 (or of one
warp's rows of four wgmma.m64k16): kt is the instruction, h and c8 the register, e the half of the register. So a warp
loads one contiguous line and needs no shared memory, and `(word >> 4 i) & 0x000f000f` is register i of 2 h + c8.
mma.sync and wgmma of every NVIDIA GPU from sm_80 on want this same order; on others it is as good as any.

Scales and zeros stand in the same order, one group after the other along a strip of 16 rows: [N/16, groups, g, h].
N is padded to a multiple of 16 and K to one of 128, with the code 0 and the scale 0. Plain PyTorch, on any device.
"""

import torch
from torch import Tensor

STRIP = 16  # rows of a tile
TILE_K = 64  # columns of a tile
PAD_K = 128  # columns are padded to a multiple of this, so that a group of 128 is never cut
WORD = 8  # codes of an int32
FLOATS = (torch.float16, torch.bfloat16)


def not_tileable(group_size: int, x_dtype: torch.dtype, scales_dtype: torch.dtype) -> str | None:
    """Why a weight is better left in the neutral layout on a GPU; None: tile it. group_size 0 is one scale a row."""
    if x_dtype not in FLOATS or scales_dtype not in FLOATS:
        return f"needs x and scales in float16 or bfloat16, not {x_dtype} and {scales_dtype}"
    if group_size % 32:
        return f"needs a group_size that is a multiple of 32, or 0, not {group_size}"
    return None


def tiled_shape(N: int, K: int, group_size: int) -> tuple[int, int, int]:
    """(strips, tiles of a strip, groups) of a weight [N, K]."""
    padded = -(-K // PAD_K) * PAD_K
    return -(-N // STRIP), padded // TILE_K, -(-padded // group_size) if group_size else 1


def pack_tiles(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, K: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The neutral layout -> what `quantkit::w4a16_tiles` takes.

    Args:
        codes: int32 [N, ceil(K/8)].
        scales: float16 or bfloat16 [N, ceil(K/group_size)], [N, 1] for group_size 0.
        zeros: uint8 of the same shape, or None: every zero is 8.

    Returns:
        tiles: int32 [strips, tiles, 8, 4, 4], equation (1).
        scales: [strips, groups, 8, 2] in its dtype.
        zeros: uint8 of the same shape, or None.

    Raises:
        ValueError: see `not_tileable`.
    """
    if reason := not_tileable(group_size, scales.dtype, scales.dtype):
        raise ValueError(f"pack_tiles: {reason}")
    N = codes.shape[0]
    strips, along_k, groups = tiled_shape(N, K, group_size)
    words = _pad(codes, strips * STRIP, along_k * TILE_K // WORD)
    words = words.view(strips, 2, 8, along_k, 4, 2)  # s h g t kt c8
    tiles = words.new_zeros(strips, along_k, 8, 4, 4)
    for c in range(4):
        for h in range(2):
            for c8 in range(2):
                pair = (
                    words[:, h, :, :, :, c8] >> 8 * c
                )  # the codes e = 0, 1 of lane c, low first: [s g t kt]
                spread = (pair & 0xF) | (pair & 0xF0) << 12
                tiles[:, :, :, c] |= (spread << 4 * (2 * h + c8)).transpose(1, 2)

    def by_strip(t: Tensor) -> Tensor:
        return _pad(t, strips * STRIP, groups).view(strips, 2, 8, groups).permute(0, 3, 2, 1).contiguous()

    return tiles, by_strip(scales), None if zeros is None else by_strip(zeros)


def unpack_tiles(
    tiles: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, N: int, K: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack_tiles`: codes, scales and zeros in the neutral layout."""
    strips, along_k = tiles.shape[:2]
    words = tiles.new_zeros(strips, 2, 8, along_k, 4, 2)
    for c in range(4):
        for h in range(2):
            for c8 in range(2):
                spread = tiles[:, :, :, c].transpose(1, 2) >> 4 * (2 * h + c8)
                words[:, h, :, :, :, c8] |= ((spread & 0xF) | (spread >> 12) & 0xF0) << 8 * c
    codes = words.view(strips * STRIP, -1)[:N, : -(-K // WORD)].contiguous()
    groups = -(-K // group_size) if group_size else 1

    def by_row(t: Tensor) -> Tensor:
        return t.permute(0, 3, 2, 1).reshape(strips * STRIP, -1)[:N, :groups].contiguous()

    return codes, by_row(scales), None if zeros is None else by_row(zeros)


def _pad(t: Tensor, rows: int, columns: int) -> Tensor:
    """t [n, k] with zeros below and to the right."""
    if t.shape == (rows, columns):
        return t
    out = t.new_zeros(rows, columns)
    out[: t.shape[0], : t.shape[1]] = t
    return out
