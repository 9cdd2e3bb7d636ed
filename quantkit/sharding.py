"""How a packed weight [N, K] is cut over the ranks of tensor parallelism: pure arithmetic, from shapes alone.

By columns of the model ('colwise') a rank holds N / ranks rows of codes; by rows ('rowwise') K / ranks columns:

    part             colwise                              rowwise
    codes            rows                                 columns: whole words, so whole runs of `packing.run_of`
    scales, zeros    rows; fp8-block: tiles               groups or tiles; one a row: whole on every rank
    channel_scales   whole                                the rank's columns of x
    input_order      whole                                the rank's columns of the codes; x is gathered for it
    bias             rows                                 whole, added once the ranks' sums are added
    input_scale      whole                                whole

Where a rank's columns begin or end inside a group, its groups are made shorter: of gcd(K / ranks, group_size) columns, each
with the scale of the group that it is a piece of. The numbers stay the same, and only scales and zeros take more room.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Literal

import torch

from quantkit.packing import QuantizedTensor, run_of
from quantkit.scheme import GROUP_SIZES, Scheme

Along = Literal["colwise", "rowwise"]
MOST_RANKS = 64  # tried for what would work


@dataclass(frozen=True)
class Shape:
    """What can be known of a packed linear from its headers: its name, scheme, and weight [N, K]."""

    name: str
    scheme: Scheme
    N: int
    K: int


def fault(shape: Shape, along: Along, ranks: int) -> str:
    """Why a weight cannot be cut so; '' where it can."""
    whole, letter = (shape.N, "N") if along == "colwise" else (shape.K, "K")
    scheme = shape.scheme
    if whole % ranks:
        return f"{letter} = {whole} is no multiple of {ranks}"
    part, found = whole // ranks, f"{letter} / {ranks} = {whole // ranks}"
    block = scheme.block_size
    if along == "colwise":
        if block and part % block and block % part:
            return f"{found} rows, of which {block} share a scale"
        return ""
    if block:
        return f"{found} columns, of which {block} share a scale" if part % block else ""
    if scheme.group_size and shared(part, scheme.group_size) not in GROUP_SIZES:
        return f"{found} columns, in groups of {scheme.group_size}: expected a multiple of {GROUP_SIZES[0]}"
    if scheme.bits < 8 and part % run_of(scheme.bits)[0]:
        return f"{found} columns, of which {run_of(scheme.bits)[0]} are packed together"
    return ""


def shared(columns: int, group_size: int) -> int:
    """Columns of the largest groups that fit both into a rank's columns and into the groups of the whole weight."""
    return gcd(columns, group_size)


def cut_dimensions(shape: Shape, along: Along, ranks: int) -> dict[str, int]:
    """The dimension along which each stored part is read in pieces, by its suffix; parts not named are read whole."""
    scheme = shape.scheme
    if along == "colwise":
        cut = {"codes": 0, "bias": 0}
        if not scheme.block_size or not (shape.N // ranks) % scheme.block_size:
            cut |= {"scales": 0, "zeros": 0}
        return cut
    cut = {"codes": 1, "channel_scales": 0, "input_order": 0}
    columns = scheme.block_size or scheme.group_size
    if columns and not (shape.K // ranks) % columns:
        cut |= {"scales": 1, "zeros": 1}
    return cut


def local_part(read: QuantizedTensor, along: Along, rank: int, ranks: int) -> QuantizedTensor:
    """A rank's weight from what it has read of the whole one.

    Args:
        read: its parts cut as `cut_dimensions` says; `shape` is of the whole weight.
    """
    N, K = read.shape
    scheme, scales, zeros = read.scheme, read.scales, read.zeros
    block = scheme.block_size
    if along == "colwise":
        n = N // ranks
        if block and n % block:  # a tile is shared by ranks
            scales = scales[rank * n // block, None]
        return replace(read, shape=(n, K), scales=scales)
    k = K // ranks
    if scheme.group_size and k % scheme.group_size:
        size = shared(k, scheme.group_size)
        first_columns = torch.arange(rank * k, (rank + 1) * k, size, device=scales.device)
        groups = first_columns // scheme.group_size
        scales = scales.index_select(1, groups)
        zeros = None if zeros is None else zeros.index_select(1, groups)
        scheme = replace(scheme, group_size=size)
    return replace(read, scheme=scheme, shape=(N, k), scales=scales, zeros=zeros)


def heads_fault(config: Any, ranks: int) -> str:
    """Why attention heads cannot be dealt to so many ranks; '' where they can."""
    text = config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, key, None)
        if isinstance(heads, int) and heads % ranks:
            return f"{key} = {heads} is no multiple of {ranks}"
    return ""


def faults(
    config: Any, cuts: Iterable[tuple[Shape, Along]], ranks: int, heads_are_cut: bool = True
) -> list[str]:
    """Why a model cannot be cut over so many ranks, a line each: heads first, then linears. Empty: it can.

    Args:
        config: of the model.
        cuts: its packed linears, and how each is cut.
        heads_are_cut: attention runs on a share of the heads.
    """
    found = [heads_fault(config, ranks)] if heads_are_cut else []
    found += [f"{shape.name}: {why}" for shape, along in cuts if (why := fault(shape, along, ranks))]
    return [line for line in found if line]


def working_ranks(config: Any, cuts: list[tuple[Shape, Along]], heads_are_cut: bool = True) -> list[int]:
    """Numbers of ranks, up to 64, over which a model can be cut."""
    distinct = {(s.scheme, s.N, s.K, along): (s, along) for s, along in cuts}  # layers are alike
    return [
        ranks
        for ranks in range(2, MOST_RANKS + 1)
        if not faults(config, distinct.values(), ranks, heads_are_cut)
    ]


def refusal(found: list[str], ranks: int, working: list[int]) -> str:
    """One line on why a model cannot be cut over so many ranks, and which numbers of them would do."""
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    fits = f"use {' or '.join(map(str, working))} processes" if working else "load it on one device"
    return f"cannot be cut over {ranks} processes: {'; '.join(found[:3])}{more}; {fits}"
