"""Bit allocation: the scheme of each group of linears, so that the model changes least at a given size.

    minimise  sum over groups g of KL(g, c_g)   where   sum over g of bits(g, c_g) <= budget            (1)

    KL(g, c) = mean over tokens of sum over v of p[v] (log p[v] - log q[v]),  in nats                   (2)

p are the model's next-token probabilities, q those of the model with the linears of group g alone packed in
scheme c. KL at the output as a layer's sensitivity is ZeroQ's (Cai et al. 2020, arXiv:2001.00281); that
sensitivities add up, and that (1) then finds the mixture, is HAWQ-V3's (Yao et al. 2021, arXiv:2011.10680).

The KL of one rounding of a few matrices depends on luck by some percent, as much as lies between a group size and
the next, and (1) would pick the lucky. The mean squared error e of the group's outputs depends on it less, and to
second order KL is in proportion to it. So schemes of one width share one factor:

    KL(g, c) = e(g, c) * sum of KL / sum of e, over the schemes of g with codes as wide as c's             (3)

(1) is a knapsack with one choice a group. At a price of L nats a bit its minimum falls apart into groups, each
of which takes the corner of the lower convex hull of its points (bits, KL) where the slope passes -L. Lowering L
walks through solutions that are optimal for the bits they take (Everett 1963, Operations Research 11(3);
Shoham and Gersho 1988, IEEE Transactions on ASSP 36(9)). What the last whole step leaves is spent greedily.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from quantkit.calibration.pipeline import Stop, quantize_linear
from quantkit.calibration.statistics import InputStatistics, output_error
from quantkit.errors import QuantKitError
from quantkit.models import decoder_blocks
from quantkit.recipe import ModulePlan
from quantkit.stand_in import StandIn, standing_in

CANDIDATES = (
    "w2a16-g128",
    "w3a16-g128",
    "w4a16-channel",
    "w4a16-g128",
    "w4a16-g64",
    "w4a16-g32",
    "w8a16",
)
WINDOWS, WINDOW = 8, 512  # calibration sequences, and tokens of each, that KL is measured on
FITTED = 32  # calibration sequences that methods get statistics of
WINDOWS_AT_ONCE = 4
PROBE = 16  # tokens enough to see which linears are fed by one tensor


@dataclass(frozen=True)
class Choice:
    """One scheme for a group of linears: its label, its stored bits, and (3) in nats."""

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


class Skip(StandIn):
    """Gives `state["output"]`, in whatever form blocks give theirs."""

    def __init__(self, block: nn.Module, state: dict[str, Any]) -> None:
        super().__init__(block)
        self.state = state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.state["output"]


@torch.no_grad()
def measure(
    model: nn.Module,
    groups: Sequence[Sequence[Sequence[ModulePlan]]],
    tokens: torch.Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """(3) of every group for each of its schemes, each packed by the method that is planned.

    A group in block i leaves the blocks before it as they are, so their output is kept and they are not run.

    Args:
        model: a whole causal language model; the same again afterwards.
        groups: for each group, for each scheme to try, the plans of the group's linears; see `shared_inputs`.
        tokens: int64 [samples, seq_len]. KL is taken over the first `WINDOWS` samples, methods get the statistics
            of as many as `FITTED` others, where there are any: on its own tokens GPTQ looks better than it is.
        progress: called with (decoder blocks run so far, in all) after each scheme.

    Raises:
        QuantKitError: what the model gives is not finite.
    """
    prefix, blocks = decoder_blocks(model)
    tokens = tokens[:, :WINDOW].to(model.device)  # type: ignore[arg-type]
    judged, fitted = tokens[:WINDOWS], tokens[WINDOWS : WINDOWS + FITTED]
    windows, others = (
        judged.split(WINDOWS_AT_ONCE),
        (fitted if len(fitted) else judged).split(WINDOWS_AT_ONCE),
    )
    block_of = [int(tries[0][0].name.removeprefix(f"{prefix}.").split(".")[0]) for tries in groups]
    total = sum((len(blocks) - i) * len(tries) for i, tries in zip(block_of, groups, strict=True))
    done = 0
    state: dict[str, Any] = {}
    kls: list[list[float]] = [[] for _ in groups]
    with evaluating(model), standing_in(blocks):
        log_p = [model(window, use_cache=False).logits.float().log_softmax(-1) for window in windows]
        before: list[Any] = [None] * len(windows)  # outputs of the block before the one at work
        before_others: list[Any] = [None] * len(others)
        for i, block in enumerate(list(blocks)):
            mine = [g for g, its_block in enumerate(block_of) if its_block == i]
            fed = {groups[g][0][0].name: [plan.name for plan in groups[g][0]] for g in mine}
            statistics, before_others = run_to(model, block, others, before_others, state, fed)
            for g in mine:
                errors = []
                for plans in groups[g]:
                    nats = 0.0
                    with packed(model, plans, statistics) as error:
                        for j, window in enumerate(windows):
                            state["output"] = before[j]
                            nats += divergence(log_p[j], model(window, use_cache=False).logits)
                    if not math.isfinite(nats):
                        raise QuantKitError(
                            f"{plans[0].name}: with {plans[0].scheme.label} the model's output is not finite; see whether "
                            "the original's is in its dtype, or name a scheme"
                        )
                    kls[g].append(nats / judged.numel())
                    errors.append(error)
                    done += len(blocks) - i
                    progress(done, total)
                kls[g] = without_luck(kls[g], errors, [plans[0].scheme.bits for plans in groups[g]])
            _, before = run_to(model, block, windows, before, state)
            blocks[i] = Skip(block, state)
    return kls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode, so that nothing in it is random."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def run_to(
    model: nn.Module,
    block: nn.Module,
    windows: Sequence[torch.Tensor],
    before: Sequence[Any],
    state: dict[str, Any],
    fed: dict[str, list[str]] | None = None,
) -> tuple[dict[str, InputStatistics], list[Any]]:
    """Takes windows through the first block that is not skipped.

    Args:
        before: output of the block before it, for each batch of windows.
        fed: linear -> linears that share its input, for which statistics are wanted.

    Returns:
        Statistics by linear, those that share an input with one object; the block's output for each batch.
    """
    statistics: dict[str, InputStatistics] = {}
    after: list[Any] = []

    def note(names: list[str]) -> Any:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if names[0] not in statistics:
                statistics.update(dict.fromkeys(names, InputStatistics(x.shape[-1], x.device)))
            statistics[names[0]].add(x)

        return add

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        after.append(output)
        raise Stop

    handles = [
        model.get_submodule(name).register_forward_pre_hook(note(names))
        for name, names in (fed or {}).items()
    ]
    handles.append(block.register_forward_hook(stop))
    try:
        for window, output in zip(windows, before, strict=True):
            state["output"] = output
            with suppress(Stop):
                model(window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return statistics, after


@contextmanager
def packed(
    model: nn.Module, plans: Sequence[ModulePlan], statistics: dict[str, InputStatistics]
) -> Iterator[float]:
    """Within it the planned linears compute with what their packed weights stand for.

    Yields:
        Mean over tokens of the squared error of their outputs, summed over them; 0 where no token arrived.
    """
    linears: list[Any] = [model.get_submodule(plan.name) for plan in plans]
    originals = [linear.weight.data for linear in linears]
    squared_error = 0.0
    try:
        for plan, linear in zip(plans, linears, strict=True):
            inputs = statistics.get(plan.name)
            quantized = quantize_linear(linear.weight.data, plan, inputs).quantized
            if inputs is not None:
                squared_error += output_error(
                    linear.weight.data.float() - quantized.dequantize(), inputs.hessian
                )
            linear.weight.data = quantized.dequantize(linear.weight.dtype)
        yield squared_error
    finally:
        for linear, original in zip(linears, originals, strict=True):
            linear.weight.data = original


def without_luck(kls: list[float], errors: list[float], widths: list[int]) -> list[float]:
    """(3) from (2), the squared errors of the outputs, and the bits of a code, of each scheme of one group."""
    out = []
    for kl, error, width in zip(kls, errors, widths, strict=True):
        alike = [i for i, other in enumerate(widths) if other == width]
        total = sum(errors[i] for i in alike)
        out.append(error * sum(kls[i] for i in alike) / total if total else kl)
    return out


def divergence(log_p: torch.Tensor, logits: torch.Tensor) -> float:
    """Sum over tokens of KL(p || softmax(logits)), in nats: float32 [b, S, V] and any floating dtype [b, S, V]."""
    total = 0.0
    for p, q in zip(log_p, logits, strict=True):  # a window at a time: a vocabulary's float32 is large
        terms = p.exp() * (p - q.float().log_softmax(-1))
        # a token that both rule out is nan and contributes nothing
        total += terms.masked_fill_(p.isneginf(), 0.0).sum(-1).double().sum().item()
    return total
