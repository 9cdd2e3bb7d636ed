"""Calibration one decoder block at a time: capture what enters a block, pack its linears, run it on.

Each block sees what its already packed predecessors give ('sequential'), so later blocks can make up for
earlier errors. A block is on the device only while it is worked on; between blocks there are only the
hidden states of the calibration tokens.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from quantkit.calibration.awq import awq, fold_into_linear, fold_into_norm, search_scales, untie
from quantkit.calibration.gptq import DAMP_PERCENT, HessianError, InputStatistics, gptq, output_error
from quantkit.calibration.grid import search_clip
from quantkit.calibration.rtn import rtn
from quantkit.errors import QuantKitError
from quantkit.models import Fold
from quantkit.packing import QuantizedTensor
from quantkit.recipe import ModulePlan
from quantkit.scheme import BLOCK, Scheme

TOKENS_PER_BATCH = 4096  # calibration tokens that go through a block at a time
FP8_MAX = 448.0
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
        tokens: calibration tokens that an expert's linear got; None for other linears, and where none were needed.
    """

    plan: ModulePlan
    quantized: QuantizedTensor
    method: str
    error: float
    error_of: str
    remark: str = ""
    tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the checkpoint's config.json keeps of it."""
        entry: dict[str, Any] = {
            "scheme": self.plan.scheme.label,
            "method": self.method,
            "error": float(f"{self.error:.4g}"),
            "error_of": self.error_of,
        }
        if self.tokens is not None:
            entry["tokens"] = self.tokens
        return {**entry, "remark": self.remark} if self.remark else entry


class Recorder(nn.Module):
    """Stands for a decoder block: notes the arguments of a call and hands the hidden states on unchanged."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its weights may not be loaded
        self.hidden: list[torch.Tensor] = []
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # models ask a block for its attention type

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
    """

    hidden: list[torch.Tensor]
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


def batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tokens [samples, seq_len] in equal batches of about TOKENS_PER_BATCH tokens."""
    samples, seq_len = tokens.shape
    size = max(
        b for b in range(1, samples + 1) if samples % b == 0 and (b == 1 or b * seq_len <= TOKENS_PER_BATCH)
    )
    return tokens.split(size)


@torch.no_grad()
def capture(
    model: nn.Module, blocks: nn.ModuleList, tokens: torch.Tensor, device: torch.device
) -> Activations:
    """Runs the model around its blocks (which need not be loaded) and notes what would enter them.

    Args:
        tokens: int64 [samples, seq_len].
    """
    originals = list(blocks)
    recorders = [Recorder(block) for block in originals]
    for i, recorder in enumerate(recorders):
        blocks[i] = recorder
    try:
        for batch in batches(tokens):
            model(batch.to(device), use_cache=False, logits_to_keep=1)
            for recorder in recorders[1:]:
                recorder.hidden.clear()
            recorders[0].hidden[-1] = recorders[0].hidden[-1].cpu()
    except QuantKitError:
        raise
    except Exception as error:  # whatever a model does with a block's output that is not what Llama does
        raise QuantKitError(
            f"{type(model).__name__}: cannot be calibrated, since its blocks pass something else than hidden states "
            f"({type(error).__name__}); use --method rtn"
        ) from error
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
    return Activations(recorders[0].hidden, [r.arguments for r in recorders if r.arguments is not None])


@torch.no_grad()
def run_block(
    block: nn.Module, index: int, activations: Activations, device: torch.device
) -> Iterable[torch.Tensor]:
    """The block's output for each batch of its input."""
    args, kwargs = activations.arguments[index]
    for hidden in activations.hidden:
        out = block(hidden.to(device), *args, **kwargs)
        yield (out[0] if isinstance(out, tuple) else out).cpu()


def advance(block: nn.Module, index: int, activations: Activations, device: torch.device) -> None:
    """Makes the block's outputs the next block's inputs."""
    for i, out in enumerate(run_block(block, index, activations, device)):
        activations.hidden[i] = out


def collect(
    block: nn.Module, names: Iterable[str], index: int, activations: Activations, device: torch.device
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of the named linears; linears fed by one tensor share one object."""
    first_fed: dict[int, str] = {}  # id of an input tensor -> the first linear that it reached
    alive: list[torch.Tensor] = []  # keeps those ids from being used again
    leader: dict[str, str] = {}
    statistics: dict[str, InputStatistics] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if name not in leader:
                leader[name] = first_fed.setdefault(id(x), name)
                alive.append(x)
            if leader[name] == name:
                statistics.setdefault(name, InputStatistics(x.shape[-1], x.device)).add(x)

        return note

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        for _ in run_block(block, index, activations, device):
            alive.clear()
            first_fed.clear()  # an expert may first be reached by a later batch, where other tensors have these ids
    finally:
        for handle in handles:
            handle.remove()
    return {name: statistics[first] for name, first in leader.items()}


def needs_activations(plan: ModulePlan) -> bool:
    return plan.method in ("gptq", "awq") or plan.scheme.activation_scale == "static"


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    plans: dict[str, ModulePlan],
    statistics: dict[str, InputStatistics],
    folds: tuple[Fold, ...] = (),
    norms_plus_one: bool = False,
    stored_dtype: torch.dtype | None = None,
    runs_on: bool = True,
) -> list[ModuleResult]:
    """Packs the planned linears of a block.

    Args:
        plans: by the linear's name inside the block.
        statistics: of the inputs of those linears, as `collect` gives them; may lack linears whose plan
            needs none.
        folds: where AWQ's scales can be put, for this architecture.
        norms_plus_one: the norms multiply by 1 + weight.
        stored_dtype: what the norms will be rounded to when they are stored; None: their own dtype.
        runs_on: leave the dequantized weights in the block, because it is to be run.
    """
    weights = {name: finite_weight(block, plan, name) for name, plan in plans.items()}
    if any(plan.method == "awq" for plan in plans.values()):
        weights = {name: weight.float() for name, weight in weights.items()}
        for fold in folds:
            fold_scale(fold, block, plans, weights, statistics, norms_plus_one, stored_dtype)
    results = []
    for name, plan in plans.items():
        result = quantize_linear(weights.pop(name), plan, statistics.get(name))
        if runs_on:
            linear = linear_in(block, name)
            linear.weight.data = result.quantized.dequantize(linear.weight.dtype)
        results.append(result)
    return results


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


def fold_scale(
    fold: Fold,
    block: nn.Module,
    plans: dict[str, ModulePlan],
    weights: dict[str, torch.Tensor],
    statistics: dict[str, InputStatistics],
    norms_plus_one: bool,
    stored_dtype: torch.dtype | None,
) -> None:
    """AWQ's scale search for one fold: changes source and linears so that the block's function stays the same.

    `weights` and `statistics` are brought up to date; both hold what the linears will see.
    """
    searched = [name for name in fold.linears if name in plans and plans[name].method == "awq"]
    if not searched or searched[0] not in statistics:
        return
    inputs, scheme = statistics[searched[0]], plans[searched[0]].scheme
    attention = getattr(block, "self_attn", None) if fold.per_head else None
    head_dim, repeats = (
        (attention.head_dim, attention.num_key_value_groups) if attention is not None else (None, 1)
    )
    s = search_scales(
        [weights[name] for name in searched],
        inputs.hessian,
        inputs.mean_abs,
        scheme,
        head_dim=head_dim,
        repeats=repeats,
    )
    source = block.get_submodule(fold.source)
    if isinstance(source, nn.Linear):
        rows = untie(s, head_dim, repeats) if head_dim is not None else s
        weight = weights.get(fold.source, source.weight.detach())
        weight, bias = fold_into_linear(weight, source.bias, rows)
        if fold.source in weights:
            weights[fold.source] = weight
        else:
            source.weight.data = weight
        if bias is not None:
            source.bias.data = bias
    else:
        norm: torch.Tensor = source.weight.detach()  # type: ignore[operator, assignment]
        folded, s = fold_into_norm(norm.to(stored_dtype or norm.dtype), s, norms_plus_one)
        source.weight.data = folded.to(norm.dtype)
    scaled = inputs.scaled(1 / s)
    for name in fold.linears:
        if name in weights:
            weights[name] = weights[name] * s
            if name in statistics:
                statistics[name] = scaled
        else:
            linear = linear_in(block, name)
            linear.weight.data = (linear.weight.float() * s).to(linear.weight.dtype)


def quantize_linear(weight: torch.Tensor, plan: ModulePlan, inputs: InputStatistics | None) -> ModuleResult:
    """Packs one weight [N, K], of any floating dtype, by its plan.

    Falls back to rounding where GPTQ cannot, and says so.
    """
    scheme, method, remark = plan.scheme, plan.method, plan.remark
    expert_tokens = None
    if needs_activations(plan):
        tokens = inputs.tokens if inputs is not None else 0
        if not tokens:
            return quantize_untouched(weight, plan, inputs)
        if tokens < FEW_TOKENS * weight.shape[1]:
            few = f"only {tokens} calibration tokens for {weight.shape[1]} input channels"
            remark = f"{remark}; " * bool(remark) + few
        expert_tokens = tokens if is_expert(plan) else None
    if method == "gptq" and inputs is not None:
        try:
            result = gptq(weight, inputs.hessian, scheme)
            quantized = result.quantized
            if result.damp_percent > DAMP_PERCENT:
                remark = f"{remark}; " * bool(remark) + f"damping raised to {result.damp_percent:g}"
        except HessianError as error:
            method, remark, quantized = (
                "rtn",
                f"gptq failed, rounded to nearest: {error}",
                rtn(weight, scheme),
            )
    elif method == "awq" and inputs is not None:
        quantized = awq(weight, inputs.hessian, scheme)
    else:
        quantized, weight_error = round_to_nearest(weight, scheme)
    if scheme.activation_scale == "static" and inputs is not None:
        quantized = replace(quantized, input_scale=static_scale(inputs))

    if inputs is not None and inputs.tokens:
        difference = weight - quantized.dequantize()
        signal = output_error(weight, inputs.hessian)
        relative = (output_error(difference, inputs.hessian) / signal) ** 0.5 if signal > 0 else 0.0
        return ModuleResult(plan, quantized, method, relative, "output", remark, expert_tokens)
    return ModuleResult(plan, quantized, method, weight_error, "weight", remark)


def is_expert(plan: ModulePlan) -> bool:
    return re.search(r"\.experts\.\d+\.", plan.name) is not None


def quantize_untouched(
    weight: torch.Tensor, plan: ModulePlan, lent: InputStatistics | None = None
) -> ModuleResult:
    """Packs a weight [N, K] that no calibration token reached: rounded to nearest, int4 with a clip search.

    Args:
        lent: what `lend_ranges` gives a linear with a static activation scale.
    """
    scheme = plan.scheme
    remark = f"{plan.remark}; " * bool(plan.remark) + "no calibration token reached it: rounded to nearest"
    if scheme.weight == "int4":
        grid = search_clip(weight, scheme)
        quantized = grid.pack(grid.round(weight))
    else:
        quantized, _ = round_to_nearest(weight, scheme)
    norm = weight.float().norm().item()
    lost = (weight.float() - quantized.dequantize()).norm().item()
    if scheme.activation_scale == "static":
        if lent is None:
            raise QuantKitError(
                f"{plan.name}: no calibration token reached it, a static activation scale needs some; use more text"
            )
        quantized = replace(quantized, input_scale=static_scale(lent))
        remark += ", activation scale from the other experts"
    tokens = 0 if is_expert(plan) else None
    return ModuleResult(plan, quantized, "rtn", lost / norm if norm else 0.0, "weight", remark, tokens)


def static_scale(inputs: InputStatistics) -> torch.Tensor:
    """The one activation scale [1] that takes the largest |x| seen to the largest fp8 number."""
    return inputs.max_abs.max().clamp(min=torch.finfo(torch.float32).tiny).view(1) / FP8_MAX


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
