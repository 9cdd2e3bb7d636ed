"""Calibration one decoder block at a time: capture what enters a block, pack its linears, run it on.

Each block sees what its already packed predecessors give ('sequential'), so later blocks can make up for
earlier errors. A block is on the device only while it is worked on; between blocks there are only the
hidden states of the calibration tokens, and for some methods those of the original model beside them.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from quantkit.calibration.activations import round_activations, rounded_inputs
from quantkit.calibration.awq import awq, search_scales
from quantkit.calibration.channels import ScaleInput, channel_scales, scale_input
from quantkit.calibration.equalize import equalizing_scales
from quantkit.calibration.folds import divide_source, fold_into_linear, heads, tie, untie
from quantkit.calibration.gptaq import correction
from quantkit.calibration.gptq import DAMP_PERCENT, Factor, HessianError, factorize, gptq
from quantkit.calibration.grid import Grid, fit_grid, search_clip
from quantkit.calibration.hqq import hqq
from quantkit.calibration.learn import learn_rounding
from quantkit.calibration.rtn import rtn
from quantkit.calibration.smooth import smooth_scales
from quantkit.calibration.statistics import InputStatistics, output_error, tensor_cores
from quantkit.calibration.together import combined, deal, divided
from quantkit.errors import QuantKitError, out_of_memory
from quantkit.method import parse_method
from quantkit.models import Fold
from quantkit.packing import QuantizedTensor
from quantkit.peers import Peers
from quantkit.recipe import ModulePlan
from quantkit.report import DIGITS
from quantkit.scheme import BLOCK, LARGEST_CODE, Scheme
from quantkit.stand_in import StandIn, standing_in

TOKENS_PER_BATCH = 4096  # calibration tokens that go through a block at a time
FEW_TOKENS = (
    0.25  # of the input channels: a Hessian from fewer tokens has most of its directions from damping
)
# weights rounded to nearest at a time: what that needs in between then stays below the 32 MB from which on
# the C library asks the system for every allocation anew, and a CPU spends most of its time on page faults
AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class ModuleResult:
    """A packed linear and what packing it cost.

    Attributes:
        plan: what was asked; `method` and `remark` below say what was done.
        quantized: the packed weight.
        error: relative error, the root of tr(E H E^T) / tr(W H W^T) over the calibration tokens where there
            are any ('output'), else |E| / |W| ('weight'); E = W - dequantized, Frobenius norms.
        error_rtn: the same error for plain rounding to nearest.
        tokens: calibration tokens that the linear got; None where none were needed.
        damp_percent: that GPTQ's Hessian needed.
        clip: mean over the scales of what the grid's range was shrunk to; 1: not at all.
        weight_min, weight_max: of the weight before it was packed.
        input_absmax: largest |x| of the calibration tokens.
        seconds: that packing took.
        targets: what GPTQ rounded [N, K], for a refinement; not kept.
    """

    plan: ModulePlan
    quantized: QuantizedTensor
    method: str
    error: float
    error_of: str
    remark: str = ""
    error_rtn: float | None = None
    tokens: int | None = None
    damp_percent: float | None = None
    clip: float | None = None
    weight_min: float | None = None
    weight_max: float | None = None
    input_absmax: float | None = None
    seconds: float = 0.0
    targets: torch.Tensor | None = None

    def entry(self) -> dict[str, Any]:
        """What config.json keeps of it."""
        return config_entry(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What the reports keep of it."""
        entry: dict[str, Any] = {
            "scheme": self.plan.scheme.label,
            "method": self.method,
            "error": float(f"{self.error:.{DIGITS}g}"),
            "error_of": self.error_of,
        }
        for name in ("error_rtn", "damp_percent", "clip", "weight_min", "weight_max", "input_absmax"):
            if (value := getattr(self, name)) is not None:
                entry[name] = float(f"{value:.{DIGITS}g}")
        if self.tokens is not None:
            entry["tokens"] = self.tokens
        if self.quantized.channel_scales is not None:
            entry["channel_scales"] = True
        if self.remark:
            entry["remark"] = self.remark
        return {**entry, "seconds": self.seconds}


IN_CONFIG = ("scheme", "method", "error", "error_of", "tokens", "channel_scales", "remark")


def config_entry(note: dict[str, Any]) -> dict[str, Any]:
    """What config.json keeps of a note on a module."""
    return {key: note[key] for key in IN_CONFIG if key in note}


class Recorder(StandIn):
    """Notes the arguments of a call and hands the hidden states on unchanged."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.hidden: list[torch.Tensor] = []
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.hidden.append(hidden)
        self.arguments = (args, kwargs)
        return hidden


@dataclass
class Activations:
    """What flows between blocks.

    Attributes:
        hidden: input of the next block, a tensor [batch, seq_len, hidden] a batch, on the CPU.
        arguments: for each block the rest of its arguments (masks, rotary embeddings), the same for every
            batch, since all sequences have one length and no padding.
        original: the same hidden states in the model that is not quantized; None if nobody asks for them.
        outputs: of the block at work in that model, between `run_original` and `advance`.
    """

    hidden: list[torch.Tensor]
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    original: list[torch.Tensor] | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)


def batches(tokens: torch.Tensor, at_once: int = TOKENS_PER_BATCH) -> tuple[torch.Tensor, ...]:
    """Tokens [samples, seq_len] in equal batches of about so many tokens."""
    samples, seq_len = tokens.shape
    size = max(b for b in range(1, samples + 1) if samples % b == 0 and (b == 1 or b * seq_len <= at_once))
    return tokens.split(size)


@torch.no_grad()
def capture(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: torch.Tensor,
    device: torch.device,
    at_once: int = TOKENS_PER_BATCH,
) -> Activations:
    """Runs the model around its blocks (which need not be loaded) and notes what would enter them.

    Args:
        tokens: int64 [samples, seq_len].
        at_once: of them, a batch.
    """
    recorders = [Recorder(block) for block in blocks]
    try:
        with standing_in(blocks, recorders):
            for batch in batches(tokens, at_once):
                model(batch.to(device), use_cache=False, logits_to_keep=1)
                for recorder in recorders[1:]:
                    recorder.hidden.clear()
                recorders[0].hidden[-1] = to_host(recorders[0].hidden[-1])
            wait(device)
    except QuantKitError:
        raise
    except Exception as error:  # whatever a model does with a block's output that is not what Llama does
        if out_of_memory(error):
            raise
        raise QuantKitError(
            f"{type(model).__name__}: cannot be calibrated, since its blocks pass something else than hidden states "
            f"({type(error).__name__}); use --method rtn"
        ) from error
    return Activations(recorders[0].hidden, [r.arguments for r in recorders if r.arguments is not None])


class Stop(Exception):
    """Ends a block's run once the wanted inputs were seen."""


@dataclass(frozen=True)
class BlockInputs:
    """The calibration tokens as they reach one decoder block."""

    index: int
    activations: Activations
    device: torch.device
    peers: Peers | None = None  # which have the other samples

    def run(self, block: nn.Module, hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        return run_block(block, self.index, self.activations, self.device, hidden)


@torch.no_grad()
def run_block(
    block: nn.Module,
    index: int,
    activations: Activations,
    device: torch.device,
    hidden: Sequence[torch.Tensor] | None = None,
) -> Iterator[torch.Tensor]:
    """The block's output for each batch of its input (`activations.hidden` by default), on the device."""
    args, kwargs = activations.arguments[index]
    for batch in activations.hidden if hidden is None else hidden:
        out = block(batch.to(device, non_blocking=True), *args, **kwargs)
        yield out[0] if isinstance(out, tuple) else out


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; from a GPU into locked memory, which it reaches at several times the speed.

    The copy goes on while the CPU works: synchronize before it is read there.
    """
    if x.device.type != "cuda":
        return x.cpu()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_original(block: nn.Module, index: int, activations: Activations, device: torch.device) -> None:
    """Notes the outputs of a block that is not quantized yet, where `activations.original` are wanted."""
    if activations.original is not None:
        runs = run_block(block, index, activations, device, activations.original)
        activations.outputs = [to_host(out) for out in runs]
        wait(device)


def advance(
    block: nn.Module,
    index: int,
    activations: Activations,
    device: torch.device,
    schemes: dict[str, Scheme] | None = None,
    input_scales: dict[str, torch.Tensor] | None = None,
) -> None:
    """Makes the block's outputs the next block's inputs; of the named linears' inputs, rounded as they will be.

    Raises:
        QuantKitError: an output is NaN or infinite.
    """
    seen = 0
    with rounded_inputs(block, schemes or {}, input_scales):
        for i, out in enumerate(run_block(block, index, activations, device)):
            finite = torch.isfinite(out).all(-1).all(-1)
            if not finite.all():
                sample = seen + int((~finite).nonzero()[0])
                raise QuantKitError(
                    f"decoder block {index}: its output is NaN or infinite for calibration sequence {sample}; the model "
                    f"overflows in {out.dtype}: leave such a block out by a recipe's rule (scheme: keep), or use --device cpu"
                )
            seen += len(out)
            activations.hidden[i] = to_host(out)
    wait(device)
    if activations.original is not None:
        activations.original, activations.outputs = activations.outputs, []


def collect(
    block: nn.Module,
    plans: dict[str, ModulePlan],
    inputs: "BlockInputs",
    *,
    rounded: bool = True,
    original: nn.Module | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of the planned linears, in the order in which the block calls them.

    Linears that multiply one tensor, rounded alike, share one object. Experts get other tokens in the original model, so that no drift
    can be noted for them.

    Args:
        rounded: what the linears multiply: x rounded, where a scheme rounds it; else x as it comes.
        original: the block that is not quantized, whose inputs are compared.
    """
    first_fed: dict[
        Any, str
    ] = {}  # id of an input tensor and its rounding -> the first linear that it reached
    alive: list[torch.Tensor] = []  # keeps those ids from being used again
    leader: dict[str, str] = {}
    statistics: dict[str, InputStatistics] = {}
    exact: dict[str, torch.Tensor] = {}  # inputs of one batch in the original model
    routed = {name for name, plan in plans.items() if is_expert(plan)}
    fired: set[str] = set()

    def rounding(name: str) -> Any:
        scheme = plans[name].scheme
        return (scheme.activation, scheme.activation_scale, scheme.block_size) if rounded else None

    def stop_after(name: str, wanted: set[str]) -> None:
        """Spares the rest of the block once all wanted linears were called; experts may never be."""
        fired.add(name)
        if not routed and fired >= wanted:
            raise Stop

    def note_original(name: str) -> Any:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            exact[name] = args[0]
            stop_after(name, plans.keys() - routed)

        return note

    def note_input(name: str) -> Any:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if name not in leader:
                leader[name] = first_fed.setdefault((id(x), rounding(name)), name)
                alive.append(x)
            if leader[name] == name:
                if name not in statistics:
                    statistics[name] = InputStatistics(x.shape[-1], x.device)
                x = round_activations(x, plans[name].scheme) if rounded else x
                statistics[name].add(x, exact.get(name))
            stop_after(name, set(plans))

        return note

    handles = [block.get_submodule(name).register_forward_pre_hook(note_input(name)) for name in plans]
    if original is not None:
        handles += [
            original.get_submodule(name).register_forward_pre_hook(note_original(name))
            for name in plans.keys() - routed
        ]
    schemes = {name: plan.scheme for name, plan in plans.items()} if rounded else {}
    activations = inputs.activations
    try:
        with rounded_inputs(block, schemes):
            for i, batch in enumerate(activations.hidden):
                if original is not None and activations.original is not None:
                    with suppress(Stop):
                        list(inputs.run(original, [activations.original[i]]))
                    fired.clear()
                with suppress(Stop):
                    list(inputs.run(block, [batch]))
                alive.clear()
                first_fed.clear()  # an expert may first be reached by a later batch, where other tensors have these ids
                exact.clear()
                fired.clear()
    finally:
        for handle in handles:
            handle.remove()
    found = {name: statistics[first] for name, first in leader.items()}
    if inputs.peers is None:
        return found
    widths = {name: linear_in(block, name).in_features for name in plans}
    return combined(found, widths, inputs.device, inputs.peers)


def needs_activations(plan: ModulePlan) -> bool:
    return parse_method(plan.method).needs_activations or plan.scheme.activation_scale == "static"


def needs_original(plan: ModulePlan) -> bool:
    return parse_method(plan.method).needs_original


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    plans: dict[str, ModulePlan],
    inputs: BlockInputs | None = None,
    folds: tuple[Fold, ...] = (),
    norms_plus_one: bool = False,
    stored_dtype: torch.dtype | None = None,
    runs_on: bool = True,
    peers: Peers | None = None,
) -> list[ModuleResult]:
    """Packs the planned linears of a block.

    Args:
        plans: by the linear's name inside the block.
        inputs: the calibration tokens; None where no plan needs them.
        folds: where scales of input channels can be put, for this architecture.
        norms_plus_one: the norms multiply by 1 + weight.
        stored_dtype: what the norms will be rounded to when they are stored; None: their own dtype.
        runs_on: leave the dequantized weights in the block, because it is to be run.
        peers: among which the linears are dealt; each gets the results of all.
    """
    weights = {name: finite_weight(block, plan, name) for name, plan in plans.items()}
    wanted = {name: plan for name, plan in plans.items() if needs_activations(plan)} if inputs else {}
    methods = {name: parse_method(plan.method) for name, plan in plans.items()}
    scaled = any(method.scaling for method in methods.values())
    refining = any(method.learn for method in methods.values())
    statistics: dict[str, InputStatistics] = {}
    channels: dict[str, torch.Tensor] = {}  # scales kept beside the weights
    if inputs and wanted:
        statistics = collect(block, wanted, inputs, rounded=not scaled)
        lend_ranges(statistics, plans)
    if scaled:
        weights = {name: weight.float() for name, weight in weights.items()}
        # all before the first is folded: a linear is searched before its rows are divided as another fold's source
        searches = [partial(fold_search, fold, block, plans, weights, statistics) for fold in folds]
        costs = [search_cost([weights[n] for n in fold.linears if n in weights]) for fold in folds]
        found = divided(searches, costs, peers)
        for fold, s in zip(folds, found, strict=True):
            fold_scale(fold, s, block, plans, weights, statistics, norms_plus_one, stored_dtype)
        channels = keep_scales(block, plans, weights, statistics, peers)
        rounds = {name: plan for name, plan in wanted.items() if plan.scheme.activation}
        if inputs and rounds:  # what is rounded has changed
            statistics.update(collect(block, rounds, inputs))
            lend_ranges(statistics, plans)

    results: dict[str, ModuleResult] = {}
    factors: dict[int, Factor] = {}  # by the identity of the statistics, which linears share

    originals: dict[str, torch.Tensor] = {}  # of those that will be refined

    def pack(name: str) -> ModuleResult:
        result = quantize_linear(weights[name], plans[name], statistics.get(name), factors)
        return with_channel_scales(result, channels[name]) if name in channels else result

    def pack_all(names: list[str]) -> None:
        """Packs linears one after the other, or the share of this process, and puts the results of all in place."""
        packed: Iterator[tuple[str, ModuleResult]] = ((name, pack(name)) for name in names)
        if peers is not None:
            dealt = deal({name: weights[name].shape for name in names}, statistics, peers.count)
            own = [name for name in names if dealt[name] == peers.rank]
            found = peers.exchange(lambda: {n: pack(n) for n in own}, "linears of a block")
            packed = ((n, found[dealt[n]][n]) for n in names)
        for name, result in packed:
            weight, results[name] = weights.pop(name), result
            if result.targets is not None:
                originals[name] = weight
            if runs_on:
                linear = linear_in(block, name)
                linear.weight.data = result.quantized.dequantize(linear.weight.dtype)

    original = None
    if inputs and any(method.rounding == "gptaq" for method in methods.values()):
        original = deepcopy(block)
    stages = fed_together(statistics) if original else [list(plans)]
    for stage in stages:
        if original and inputs:
            part = {name: plans[name] for name in stage}
            statistics.update(collect(block, part, inputs, original=original))
        pack_all(stage)
        factors.clear()
        for name in stage if original and not refining else ():
            del statistics[name]
    pack_all(list(weights))  # those that no token reached
    if inputs and originals:
        results.update(refine(block, results, originals, statistics, inputs))
    return [replace(results[name], targets=None) for name in plans]


def fed_together(statistics: dict[str, InputStatistics]) -> list[list[str]]:
    """Names of linears that share an input, in the order of the calls; all experts of a block in one list."""
    stages: dict[Any, list[str]] = {}
    for name, inputs in statistics.items():
        stages.setdefault("experts" if ".experts." in f".{name}" else id(inputs), []).append(name)
    return list(stages.values())


def linear_in(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is planned as a linear but is {type(module).__name__}"
    return module


def finite_weight(block: nn.Module, plan: ModulePlan, name: str) -> torch.Tensor:
    weight = linear_in(block, name).weight.detach()
    if bad := not_finite(weight):
        raise QuantKitError(
            f"{plan.name}: {bad} of {weight.numel()} weights are NaN or infinite; mend the source checkpoint"
        )
    return weight


def not_finite(tensor: torch.Tensor) -> int:
    """How many of a tensor's values are NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    # the extremes first: quicker than a mask, and in no memory, which a mask of a large embedding takes
    if all(map(torch.isfinite, tensor.aminmax())):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def searched_linears(fold: Fold, plans: dict[str, ModulePlan]) -> list[str]:
    """The linears of a fold that its scales are for, by their names in the block."""
    return [name for name in fold.linears if name in plans and parse_method(plans[name].method).scaling]


def search_cost(matrices: list[torch.Tensor]) -> int:
    """Products of one trial of a search: the error of each weight [N, K] under a Hessian [K, K]."""
    return sum(matrix.shape[0] * matrix.shape[1] ** 2 for matrix in matrices)


def fold_search(
    fold: Fold,
    block: nn.Module,
    plans: dict[str, ModulePlan],
    weights: dict[str, torch.Tensor],
    statistics: dict[str, InputStatistics],
) -> torch.Tensor | None:
    """AWQ's or SmoothQuant's scales [K] for one fold; None where it gets none, or such as need no search."""
    searched = searched_linears(fold, plans)
    if not searched or (inputs := statistics.get(searched[0])) is None:
        return None
    plan, matrices = plans[searched[0]], [weights[name] for name in searched]
    scaling, scheme = parse_method(plan.method).scaling, plan.scheme
    head_dim, repeats = heads(block, fold)
    if scaling == "equalize":
        return None
    if scaling == "awq":
        hessian = hessian_or_costs(plan, inputs)
        return search_scales(matrices, hessian, inputs.mean_abs, scheme, head_dim=head_dim, repeats=repeats)
    shared = partial(tie, head_dim=head_dim, repeats=repeats)
    return smooth_scales(matrices, inputs, scheme, shared, column_costs(plan, inputs))


def fold_scale(
    fold: Fold,
    s: torch.Tensor | None,
    block: nn.Module,
    plans: dict[str, ModulePlan],
    weights: dict[str, torch.Tensor],
    statistics: dict[str, InputStatistics],
    norms_plus_one: bool,
    stored_dtype: torch.dtype | None,
) -> None:
    """Scales of input channels for one fold: changes source and linears so that the block's function stays the same.

    `weights` (float32, by name) and `statistics` are brought up to date; both hold what the linears will see, and
    so do the weights in the block, in its dtype.

    Args:
        s: that `fold_search` has found.
    """
    searched = searched_linears(fold, plans)
    if not searched:
        return
    inputs = statistics.get(searched[0])
    head_dim, repeats = heads(block, fold)
    source = block.get_submodule(fold.source)
    if parse_method(plans[searched[0]].method).scaling == "equalize":
        s = tie(equalizing_scales(produced_range(source, fold, block, norms_plus_one)), head_dim, repeats)
    if s is None:
        return
    if fold.source in weights:  # kept in float32 besides, where it is to be packed itself
        rows = untie(s, head_dim, repeats) if head_dim is not None else s
        weights[fold.source], _ = fold_into_linear(weights[fold.source], None, rows)
    s = divide_source(block, fold, s, norms_plus_one, stored_dtype)
    after = None if inputs is None else inputs.scaled(1 / s)
    for name in fold.linears:
        linear = linear_in(block, name)
        wide = weights[name] if name in weights else linear.weight.float()
        linear.weight.data = (wide * s).to(linear.weight.dtype)
        if name in weights:
            weights[name] = wide * s
        if name in statistics and after is not None:
            statistics[name] = after


def column_costs(plan: ModulePlan, inputs: InputStatistics) -> torch.Tensor | None:
    """What an error in each input channel costs [K] where GPTQ makes up for it; None where it does not, or cannot."""
    if parse_method(plan.method).rounding not in ("gptq", "gptaq"):
        return None
    with suppress(HessianError):
        return factorize(inputs.hessian).costs
    return None


def hessian_or_costs(plan: ModulePlan, inputs: InputStatistics) -> torch.Tensor:
    costs = column_costs(plan, inputs)
    return inputs.hessian if costs is None else costs


def keep_scales(
    block: nn.Module,
    plans: dict[str, ModulePlan],
    weights: dict[str, torch.Tensor],
    statistics: dict[str, InputStatistics],
    peers: Peers | None = None,
) -> dict[str, torch.Tensor]:
    """Scales of input channels for the plans that no fold serves, bfloat16 [K] by name; x is multiplied by them.

    `weights` (float32, by name) and `statistics` are brought up to date, and the block computes with x and weights so
    scaled. Inputs of few tokens get none: the search would fit their noise.
    """
    groups: dict[int, list[str]] = {}  # by the identity of the statistics, which linears share
    for name, inputs in statistics.items():
        if plans[name].channel_scales and inputs.tokens >= FEW_TOKENS * weights[name].shape[1]:
            groups.setdefault(id(inputs), []).append(name)

    def search(names: list[str]) -> torch.Tensor:
        plan, inputs = plans[names[0]], statistics[names[0]]
        matrices = [weights[name] for name in names]
        if parse_method(plan.method).scaling == "awq":
            return search_scales(matrices, hessian_or_costs(plan, inputs), inputs.mean_abs, plan.scheme)
        return smooth_scales(matrices, inputs, plan.scheme, tie, column_costs(plan, inputs))

    shared = list(groups.values())
    costs = [search_cost([weights[name] for name in names]) for names in shared]
    found = divided([partial(search, names) for names in shared], costs, peers)
    kept = {}
    for names, s in zip(shared, found, strict=True):
        assert s is not None
        inputs = statistics[names[0]]
        if (c := channel_scales(s)) is None:
            continue
        after, hook = inputs.scaled(c.float()), ScaleInput(c)
        for name in names:
            linear = linear_in(block, name)
            weights[name] = weights[name] / c.float()
            linear.weight.data = weights[name].to(linear.weight.dtype)
            scale_input(linear, hook)
            statistics[name], kept[name] = after, c.clone()  # files hold no tensor twice
    return kept


def with_channel_scales(result: ModuleResult, c: torch.Tensor) -> ModuleResult:
    remark = with_remark(
        result.remark, "scales of input channels kept beside the weight (x is multiplied at run time)"
    )
    return replace(result, quantized=replace(result.quantized, channel_scales=c), remark=remark)


def produced_range(source: nn.Module, fold: Fold, block: nn.Module, norms_plus_one: bool) -> torch.Tensor:
    """Range of each channel [K] at its producer: the norm's factor, or the largest |weight| of the linear's row."""
    weight: torch.Tensor = source.weight.detach().float()  # type: ignore[operator, union-attr, assignment]
    if not isinstance(source, nn.Linear):
        return (weight + 1.0 if norms_plus_one else weight).abs()
    K = linear_in(block, fold.linears[0]).in_features
    head_dim, repeats = heads(block, fold)
    rows = weight[-(K // repeats) :].abs().amax(1)
    if head_dim is None:
        return rows
    return rows.view(-1, 1, head_dim).expand(-1, repeats, -1).reshape(-1)


def quantize_linear(
    weight: torch.Tensor,
    plan: ModulePlan,
    inputs: InputStatistics | None,
    factors: dict[int, Factor] | None = None,
) -> ModuleResult:
    """Packs one weight [N, K], of any floating dtype, by its plan.

    Falls back to rounding where GPTQ cannot, and says so.

    Args:
        factors: of Hessians, by the identity of their statistics; added to.
    """
    began = time.monotonic()
    scheme, method, name, remark = plan.scheme, parse_method(plan.method), plan.method, plan.remark
    tokens = inputs.tokens if inputs is not None else 0
    if needs_activations(plan):
        if not tokens:
            return quantize_untouched(weight, plan, inputs)
        if tokens < FEW_TOKENS * weight.shape[1]:
            remark = with_remark(
                remark, f"only {tokens} calibration tokens for {weight.shape[1]} input channels"
            )
    weight_error = damp = targets = None
    if method.rounding in ("gptq", "gptaq") and inputs is not None:
        try:
            factor = (factors if factors is not None else {}).get(id(inputs)) or factorize(inputs.hessian)
            if factors is not None:
                factors.clear()  # linears that share an input come one after the other
                factors[id(inputs)] = factor
            target = weight
            if method.rounding == "gptaq" and inputs.drift is not None:
                target = weight.to(inputs.hessian) + weight.to(inputs.hessian) @ correction(inputs)
            result = gptq(target, factor, scheme, keep_targets=method.learn and scheme.weight != "fp8")
            quantized, damp, targets = result.quantized, result.damp_percent, result.targets
            if damp > DAMP_PERCENT:
                remark = with_remark(remark, f"damping raised to {damp:g}")
        except HessianError as error:
            remark = with_remark(remark, f"{method.rounding} failed, rounded to nearest: {error}")
            name, quantized = "rtn", rtn(weight, scheme)
    elif method.rounding == "clip":
        if inputs is not None and tokens:
            quantized = awq(weight, inputs.hessian, scheme)
        else:
            grid = search_clip(weight, scheme)
            quantized = grid.pack(grid.round(weight))
    elif method.rounding == "hqq":
        quantized = hqq(weight, scheme)
    else:
        quantized, weight_error = round_to_nearest(weight, scheme)
    if scheme.activation_scale == "static" and inputs is not None:
        quantized = replace(quantized, input_scale=static_scale(inputs, scheme))
    return replace(
        judged(ModuleResult(plan, quantized, name, 0.0, "weight", remark), weight, inputs, weight_error),
        damp_percent=damp,
        targets=targets,
        seconds=time.monotonic() - began,
    )


def judged(
    result: ModuleResult,
    weight: torch.Tensor,
    inputs: InputStatistics | None,
    weight_error: float | None = None,
) -> ModuleResult:
    """The result with its errors against the weight [N, K], and what else there is to tell.

    Args:
        weight_error: |E| / |W|, where it is known and the weight was rounded to nearest a few rows at a time.
    """
    scheme = result.plan.scheme
    low, high = weight.aminmax()
    result = replace(result, weight_min=low.item(), weight_max=high.item())
    if weight_error is not None and (inputs is None or not inputs.tokens):
        return replace(result, error=weight_error)
    wide = weight.float()
    full = fit_grid(wide, scheme)
    clip = None
    if result.method != "rtn" and scheme.weight != "fp8":
        clip = (result.quantized.scales.float() / full.scales.float()).abs().mean().item()

    def relative(dequantized: torch.Tensor) -> float:
        if inputs is None or not inputs.tokens:
            size = wide.norm().item()
            return (wide - dequantized).norm().item() / size if size else 0.0
        with tensor_cores():
            signal = output_error(wide, inputs.hessian)
            return (output_error(wide - dequantized, inputs.hessian) / signal) ** 0.5 if signal > 0 else 0.0

    measured = inputs is not None and inputs.tokens
    return replace(
        result,
        error=relative(result.quantized.dequantize()),
        error_rtn=relative(full.dequantize(full.round(wide))),
        error_of="output" if measured else "weight",
        tokens=inputs.tokens if measured and inputs else None,
        input_absmax=inputs.max_abs.max().item() if measured and inputs else None,
        clip=clip,
    )


def with_remark(first: str, second: str) -> str:
    return "; ".join(filter(None, (first, second)))


def is_expert(plan: ModulePlan) -> bool:
    return re.search(r"\.experts\.\d+\.", plan.name) is not None


def quantize_untouched(
    weight: torch.Tensor, plan: ModulePlan, lent: InputStatistics | None = None
) -> ModuleResult:
    """Packs a weight [N, K] that no calibration token reached: rounded to nearest, few bits with a clip search.

    Args:
        lent: what `lend_ranges` gives a linear with a static activation scale.
    """
    scheme = plan.scheme
    remark = with_remark(plan.remark, "no calibration token reached it: rounded to nearest")
    grid = search_clip(weight, scheme)
    quantized = grid.pack(grid.round(weight))
    if scheme.activation_scale == "static":
        if lent is None:
            raise QuantKitError(
                f"{plan.name}: no calibration token reached it, a static activation scale needs some; use more text"
            )
        quantized = replace(quantized, input_scale=static_scale(lent, scheme))
        remark += ", activation scale from the other experts"
    result = judged(ModuleResult(plan, quantized, "rtn", 0.0, "weight", remark), weight, None)
    return replace(result, tokens=0)


def static_scale(inputs: InputStatistics, scheme: Scheme) -> torch.Tensor:
    """The one activation scale [1] that takes the largest |x| seen to the largest code."""
    assert scheme.activation is not None
    largest = inputs.max_abs.max().clamp(min=torch.finfo(torch.float32).tiny)
    return largest.view(1) / LARGEST_CODE[scheme.activation]


def lend_ranges(statistics: dict[str, InputStatistics], plans: dict[str, ModulePlan]) -> None:
    """For static activation scales of experts that no token reached: the largest |x| of the block's other experts.

    Adds statistics of 0 tokens, without a Hessian, under the names of such linears.
    """
    kin = lambda name: re.sub(r"\.\d+\.", ".*.", name)  # the same linear of every expert
    for name, plan in plans.items():
        if plan.scheme.activation_scale == "static" and name not in statistics:
            ranges = [s.max_abs for other, s in statistics.items() if kin(other) == kin(name) and s.tokens]
            if ranges:
                statistics[name] = InputStatistics(0, ranges[0].device)
                statistics[name].max_abs = torch.stack(ranges).amax(0)


def refine(
    block: nn.Module,
    results: dict[str, ModuleResult],
    originals: dict[str, torch.Tensor],
    statistics: dict[str, InputStatistics],
    inputs: BlockInputs,
) -> dict[str, ModuleResult]:
    """Learned rounding of the linears of a block that have targets; leaves their new weights in the block.

    Args:
        results: of all linears of the block, whose inputs are rounded meanwhile.
        originals: weights [N, K] of those that have targets.
    """
    activations = inputs.activations
    targets = {name: r.targets for name, r in results.items() if r.targets is not None}
    packed = {name: results[name].quantized for name in targets}
    grids = {name: Grid(q.scheme, q.shape, q.scales, q.zeros) for name, q in packed.items()}
    dtypes = {name: linear_in(block, name).weight.dtype for name in targets}
    args, kwargs = activations.arguments[inputs.index]

    def run(weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        named = {f"{name}.weight": weight.to(dtypes[name]) for name, weight in weights.items()}
        out = functional_call(block, named, (hidden, *args), kwargs)
        return out[0] if isinstance(out, tuple) else out

    scales = {name: s for name, r in results.items() if (s := r.quantized.input_scale) is not None}
    began = time.monotonic()
    with rounded_inputs(block, {name: r.plan.scheme for name, r in results.items()}, scales):
        learned = learn_rounding(
            run, targets, grids, activations.hidden, activations.outputs, peers=inputs.peers
        )
    took = (time.monotonic() - began) / len(learned)
    better = {}
    for name, (codes, grid) in learned.items():
        result, before = results[name], packed[name]
        quantized = replace(
            grid.pack(codes), input_scale=before.input_scale, channel_scales=before.channel_scales
        )
        linear_in(block, name).weight.data = quantized.dequantize(dtypes[name])
        result = replace(result, quantized=quantized, seconds=result.seconds + took)
        better[name] = judged(result, originals[name], statistics[name])
    return better


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> tuple[QuantizedTensor, float]:
    """`rtn` of a weight [N, K] a few rows at a time, and |W - dequantized| / |W|."""
    N, K = weight.shape
    rows = max(1, AT_A_TIME // K // BLOCK) * BLOCK
    pieces, lost, whole = [], 0.0, 0.0
    for piece in weight.split(rows):
        wide = piece.float()
        pieces.append(rtn(wide, scheme))
        lost += (wide - pieces[-1].dequantize()).norm().item() ** 2
        whole += wide.norm().item() ** 2
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    quantized = QuantizedTensor(
        scheme,
        (N, K),
        torch.cat([piece.codes for piece in pieces]),
        torch.cat([piece.scales for piece in pieces]),
        torch.cat(zeros) if zeros else None,
    )
    return quantized, (lost / whole) ** 0.5 if whole else 0.0
