"""Bit allocation: the scheme of each group of linears, so that the model changes least at a given size.

    minimise  sum over groups g of KL(g, c_g)   where   sum over g of bits(g, c_g) <= budget            (1)

    KL(g, c) = mean over tokens of sum over v of p[v] (log p[v] - log q[v]),  in nats                   (2)

p are the model's next-token probabilities, q those of the model with the linears of group g alone rounded to
scheme c. KL at the output as a layer's sensitivity is ZeroQ's (Cai et al. 2020, arXiv:2001.00281); that
sensitivities add up, and that (1) then finds the mixture, is HAWQ-V3's (Yao et al. 2021, arXiv:2011.10680).

(1) is a knapsack with one choice a group. At a price of L nats a bit its minimum falls apart into groups, each
of which takes the corner of the lower convex hull of its points (bits, KL) where the slope passes -L. Lowering L
walks through solutions that are optimal for the bits they take (Everett 1963, Operations Research 11(3);
Shoham and Gersho 1988, IEEE Transactions on ASSP 36(9)). What the last whole step leaves is spent greedily.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from quantkit.calibration.grid import search_clip
from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.models import decoder_blocks
from quantkit.recipe import ModulePlan

CANDIDATES = ("w4a16-channel", "w4a16-g128", "w4a16-g64", "w4a16-g32", "w8a16")
WINDOWS, WINDOW = 8, 512  # calibration sequences, and tokens of each, that KL is measured on
WINDOWS_AT_ONCE = 4
PROBE = 16  # tokens enough to see which linears are fed by one tensor
AT_A_TIME = 1 << 22  # weights rounded at a time; the search holds several float32 copies of them


@dataclass(frozen=True)
class Choice:
    """One scheme for a group of linears: its label, its stored bits, and (2) in nats."""

    scheme: str
    bits: int
    kl: float


def spend(groups: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice a group by (1); the budget must pay for the cheapest ones.

    Optimal where the budget is what a corner of the groups' hulls together costs, else within one step of it.
    """
    hulls = [lower_hull(choices) for choices in groups]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(choice.bits for choice in chosen)
    assert left >= 0, f"the cheapest choices take {-left} bits more than the budget"

    # along a hull slopes only fall, so this order never takes a group's second step before its first
    steps = [(slope(here, there), g, there) for g, hull in enumerate(hulls) for here, there in pairwise(hull)]
    for _, g, there in sorted(steps, key=lambda step: -step[0]):
        if there.bits - chosen[g].bits > left:
            break
        left -= there.bits - chosen[g].bits
        chosen[g] = there

    def affordable() -> list[tuple[float, int, Choice]]:
        return [
            (slope(chosen[g], choice), g, choice)
            for g, choices in enumerate(groups)
            for choice in choices
            if choice.kl < chosen[g].kl and 0 < choice.bits - chosen[g].bits <= left
        ]

    while found := affordable():
        _, g, choice = max(found, key=lambda step: step[0])
        left -= choice.bits - chosen[g].bits
        chosen[g] = choice
    return chosen


def slope(here: Choice, there: Choice) -> float:
    """Nats saved for each bit spent."""
    return (here.kl - there.kl) / (there.bits - here.bits)


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The corners of the lower convex hull of (bits, KL): bits rise, KL falls, and falls ever less steeply."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.bits, choice.kl)):
        if hull and choice.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


@torch.no_grad()
def shared_inputs(model: nn.Module, names: Sequence[str], tokens: torch.Tensor) -> list[tuple[str, ...]]:
    """The named linears in groups that are fed by one tensor, such as q, k and v, or gate and up.

    Kernels may run such a group as one product, for which it needs one scheme. Linears that the tokens, int64
    [samples, seq_len], do not reach are groups of their own.
    """
    inputs: dict[str, torch.Tensor] = {}  # held until the end, so that no two have the same id

    def hook(name: str) -> Any:
        return lambda module, args: inputs.setdefault(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        model(tokens[:1, :PROBE].to(model.device), use_cache=False)  # type: ignore[arg-type]
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int | str, list[str]] = {}
    for name in names:
        groups.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return [tuple(group) for group in groups.values()]


class Skip(nn.Module):
    """Stands for a decoder block that is not to run: gives `state["output"]`, in whatever form blocks give theirs."""

    def __init__(self, block: nn.Module, state: dict[str, Any]) -> None:
        super().__init__()
        self.__dict__.update(block=block, state=state)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # models ask a block for its attention type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["state"]["output"]


@torch.no_grad()
def measure(
    model: nn.Module,
    groups: Sequence[Sequence[Sequence[ModulePlan]]],
    tokens: torch.Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """(2) of every group for each of its schemes.

    Weights are rounded to nearest: that costs little, and what counts is how groups and schemes rank. A group in
    block i leaves the blocks before it as they are, so their output is kept and they are not run.

    Args:
        model: a whole causal language model; the same again afterwards.
        groups: for each group, for each scheme to try, the plans of the group's linears; see `shared_inputs`.
        tokens: int64 [samples, seq_len].
        progress: called with (decoder blocks run so far, in all) after each scheme.

    Raises:
        QuantKitError: what the model gives is not finite.
    """
    prefix, blocks = decoder_blocks(model)
    originals = list(blocks)
    windows = tokens.to(model.device).split(WINDOWS_AT_ONCE)  # type: ignore[arg-type]
    block_of = [int(tries[0][0].name.removeprefix(f"{prefix}.").split(".")[0]) for tries in groups]
    total = sum((len(blocks) - i) * len(tries) for i, tries in zip(block_of, groups, strict=True))
    done = 0
    state: dict[str, Any] = {}
    kls: list[list[float]] = [[] for _ in groups]
    training = model.training
    model.eval()
    try:
        log_p, outputs = run_original(model, blocks, windows)
        for i, block in enumerate(originals):
            for tries, found, its_block in zip(groups, kls, block_of, strict=True):
                for plans in tries if its_block == i else ():
                    nats = 0.0
                    with rounded(model, plans):
                        for j, window in enumerate(windows):
                            state["output"] = outputs[i - 1][j] if i else None
                            nats += divergence(log_p[j], model(window, use_cache=False).logits)
                    if not math.isfinite(nats):
                        raise QuantKitError(
                            f"{plans[0].name}: with {plans[0].scheme.label} the model's output is not finite; see whether "
                            "the original's is in its dtype, or name a scheme"
                        )
                    found.append(nats / tokens.numel())
                    done += len(blocks) - i
                    progress(done, total)
            blocks[i] = Skip(block, state)
    finally:
        model.train(training)
        for i, block in enumerate(originals):
            blocks[i] = block
    return kls


def run_original(
    model: nn.Module, blocks: nn.ModuleList, windows: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[list[Any]]]:
    """Log-probabilities of each batch of windows, float32 [b, seq_len, V], and each block's outputs for it."""
    outputs: list[list[Any]] = [[] for _ in blocks]

    def hook(kept: list[Any]) -> Any:
        return lambda module, args, output: kept.append(output)

    handles = [block.register_forward_hook(hook(kept)) for block, kept in zip(blocks, outputs, strict=True)]
    try:
        log_p = [model(window, use_cache=False).logits.float().log_softmax(-1) for window in windows]
    finally:
        for handle in handles:
            handle.remove()
    return log_p, outputs


@contextmanager
def rounded(model: nn.Module, plans: Sequence[ModulePlan]) -> Iterator[None]:
    """Within it the planned linears compute with their weights rounded to nearest."""
    linears: list[Any] = [model.get_submodule(plan.name) for plan in plans]
    originals = [linear.weight.data for linear in linears]
    try:
        for plan, linear in zip(plans, linears, strict=True):
            linear.weight.data = rounded_weight(linear.weight.data, plan)
        yield
    finally:
        for linear, original in zip(linears, originals, strict=True):
            linear.weight.data = original


def rounded_weight(weight: torch.Tensor, plan: ModulePlan) -> torch.Tensor:
    """The weight [N, K] that its nearest codes stand for, in its dtype.

    Where a better method is planned than rounding to nearest, the grid is first clipped to the least squared error:
    without it whole rows, which have the most to gain from such a method, would look worse than they will be.
    """
    pieces = []
    for piece in weight.split(max(1, AT_A_TIME // weight.shape[1])):
        grid = None if plan.method == "rtn" else search_clip(piece, plan.scheme)
        pieces.append(rtn(piece, plan.scheme, grid=grid).dequantize(weight.dtype))
    return torch.cat(pieces)


def divergence(log_p: torch.Tensor, logits: torch.Tensor) -> float:
    """Sum over tokens of KL(p || softmax(logits)), in nats: float32 [b, S, V] and any floating dtype [b, S, V]."""
    total = 0.0
    for p, q in zip(log_p, logits, strict=True):  # a window at a time: a vocabulary's float32 is large
        terms = p.exp() * (p - q.float().log_softmax(-1))
        # a token that both rule out is nan and contributes nothing
        total += terms.masked_fill_(p.isneginf(), 0.0).sum(-1).double().sum().item()
    return total
