"""Calibration by several processes: each has a share of the samples, and of a block's linears.

Statistics are means, so that those of all samples are the processes' means weighted by their tokens: the numbers of one
process, but for the order of the sums.
"""

from collections.abc import Callable, Sequence

import torch

from quantkit.calibration.statistics import InputStatistics
from quantkit.peers import Peers


def combined(
    statistics: dict[str, InputStatistics], widths: dict[str, int], device: torch.device, peers: Peers
) -> dict[str, InputStatistics]:
    """The statistics of all processes' samples, the same on each. Linears share them as they do on one process.

    Args:
        statistics: of this process's samples. It may lack experts that none of its tokens reached.
        widths: input channels of every linear that may have statistics.
    """
    doing = "statistics of a block"
    names: dict[int, str] = {}  # by the identity of statistics, the first linear that has them
    leaders = {name: names.setdefault(id(inputs), name) for name, inputs in statistics.items()}
    tokens = {leader: statistics[leader].tokens for leader in names.values()}
    drifts = any(inputs.drift is not None for inputs in statistics.values())
    found = peers.gather((leaders, tokens, drifts), doing)
    first_of: dict[str, str] = {}
    for theirs, _, _ in found:
        for name, leader in theirs.items():
            first_of.setdefault(name, leader)
    with_drift = any(drift for _, _, drift in found)
    whole = {
        leader: combine(
            statistics.get(leader),
            [counts.get(leader, 0) for _, counts, _ in found],
            widths[leader],
            with_drift and not is_expert(leader),
            device,
            peers,
        )
        for leader in dict.fromkeys(first_of.values())
    }
    return {name: whole[leader] for name, leader in first_of.items()}


def is_expert(name: str) -> bool:
    """Experts get other tokens in the original model, so that no drift is noted for them."""
    return ".experts." in f".{name}"


def combine(
    own: InputStatistics | None,
    tokens: list[int],
    K: int,
    drifts: bool,
    device: torch.device,
    peers: Peers,
) -> InputStatistics:
    """One linear's statistics of all samples.

    Args:
        own: of this process's; None where none of its tokens reached the linear.
        tokens: of each process.
    """
    doing = "statistics of a linear"
    own = own or InputStatistics(K, device)
    out = InputStatistics(0, device)
    out.tokens = sum(tokens)
    weight = tokens[peers.rank] / out.tokens if out.tokens else 0.0

    def mean(part: torch.Tensor) -> torch.Tensor:
        weighted = (part * weight).contiguous()
        peers.add(weighted, doing)
        return weighted

    out.hessian, out.mean_abs = mean(own.hessian), mean(own.mean_abs)
    if drifts:
        out.drift = mean(torch.zeros_like(own.hessian) if own.drift is None else own.drift)
    rows = own.rows() if own.sampled else torch.empty(0, K, device=device)
    found = peers.gather((own.max_abs, rows), doing)
    out.max_abs = torch.stack([largest for largest, _ in found]).amax(0)
    out.sampled = [theirs for _, theirs in found if len(theirs)]
    return out


def deal(
    shapes: dict[str, Sequence[int]], statistics: dict[str, InputStatistics], count: int
) -> dict[str, int]:
    """Which process packs which linear: those that share an input stay together.

    Args:
        shapes: [N, K] by name.
    """
    groups: dict[int, list[str]] = {}
    for i, name in enumerate(shapes):
        inputs = statistics.get(name)
        groups.setdefault(-i - 1 if inputs is None else id(inputs), []).append(name)

    def cost(names: list[str]) -> int:
        """Products of GPTQ: a factor of the Hessian [K, K], then an update of all columns for each one."""
        K = shapes[names[0]][1]
        return K * K * (K + sum(shapes[name][0] for name in names))

    ranks = deal_costs([cost(names) for names in groups.values()], count)
    return {name: rank for names, rank in zip(groups.values(), ranks, strict=True) for name in names}


def deal_costs(costs: list[int], count: int) -> list[int]:
    """A process for each piece of work: the costliest first, to the one that has least to do."""
    load, ranks = [0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: costs[i], reverse=True):
        ranks[i] = load.index(min(load))
        load[ranks[i]] += costs[i]
    return ranks


def divided(
    calls: Sequence[Callable[[], torch.Tensor | None]],
    costs: list[int],
    peers: Peers | None,
) -> list[torch.Tensor | None]:
    """What calls give, each made by one of the processes."""
    if peers is None:
        return [call() for call in calls]
    ranks = deal_costs(costs, peers.count)

    def own() -> dict[int, torch.Tensor | None]:
        return {i: call() for i, call in enumerate(calls) if ranks[i] == peers.rank}

    found = peers.exchange(own, "scales of a block")
    return [found[rank][i] for i, rank in enumerate(ranks)]
