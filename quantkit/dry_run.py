"""What `quantkit quantize --dry-run` says beforehand: sizes, memory and time. No weight is loaded, nothing written.

Sizes come from the files' headers and the plan, and are exact, unless `target_bpw` is to choose the schemes. Memory
and time are estimates:

    memory   the largest sum, over the stages of a run, of what is held at once; beside Python, PyTorch, the
             tokenizer and, on a GPU, its context. Pages of the source files that the system keeps mapped are
             not in it.
    time     (products / rate) + (passes over elements / rate) + (calls * latency), the three rates measured on
             the device for RATE_SECONDS each. Reading and writing files is not in it.

A method is the sum of its steps (`quantkit.method`); what each does to one weight [N, K] is a function of COSTS.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from quantkit.allocation import read_budget
from quantkit.block_loader import BlockLoader, packed_weight_bytes
from quantkit.calibration import hqq, learn, smooth
from quantkit.calibration.allocate import CANDIDATES, WINDOW, WINDOWS
from quantkit.calibration.awq import RATIOS
from quantkit.calibration.data import SAMPLED_AT_A_TIME
from quantkit.calibration.grid import AT_A_TIME as SEARCHED_AT_A_TIME
from quantkit.calibration.grid import SHRINKS, SHRINKS_8, fit_grid
from quantkit.calibration.pipeline import AT_A_TIME, batches, is_expert, needs_activations, needs_original
from quantkit.calibration.statistics import SAMPLED, tensor_cores
from quantkit.checkpoint import check_out, space
from quantkit.formats import open_original
from quantkit.hf import linear_called
from quantkit.method import LEARN, ROTATE, parse_method
from quantkit.models import head_dim_of, linears
from quantkit.names import model_names
from quantkit.quantize import Job, check_context, default_device
from quantkit.recipe import ModulePlan, Recipe
from quantkit.scheme import Scheme, parse_scheme
from quantkit.source import empty_model

RATE_SECONDS, TRIALS = 0.2, 10
FLOAT32, FLOAT64 = 4, 8  # bytes
CALLS = 60  # of small operations, when tokens go through a block

# passes over a weight's elements, counted in the code; one reads or writes every element once
ROUNDING = 24  # a grid fitted, weights rounded to it and read back: what the rate of passes is measured with
SEARCHING = 30  # one shrink of `search_clip`: a rounding and its loss
HALF_QUADRATIC = 120  # one step of `hqq`: two roundings and three powers, which are slow
SCALED = 36  # one candidate of `search_scales` or `smooth_scales`: a rounding of W s, divided by s
LEARNING = 80  # one step of `learn_rounding`, forward, backward and the move
JUDGED = 80  # the errors that are reported
COLUMN_LOOP = {
    "cpu": 300,
    "cuda": 40,
}  # of GPTQ: a block's later columns are changed for each, in registers on a GPU
COLUMN_CALLS = {"cpu": 12.0, "cuda": 0.1}  # of small operations a column
SHARING = re.compile(r"(?<![a-z])(q|k|v|gate|up)(?=_proj$)")  # names of linears that one tensor feeds
FACTORING = 5  # times as long as products of the same size: what LAPACK's and cuSOLVER's triangles take


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of products, passes over elements, calls of small operations, float32 bytes held."""

    products: float = 0
    passes: float = 0
    calls: float = 0
    held: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """One after the other."""
        products, passes = self.products + other.products, self.passes + other.passes
        return Cost(products, passes, self.calls + other.calls, max(self.held, other.held))


@dataclass(frozen=True)
class Weight:
    """What a step's cost depends on.

    Attributes:
        N, K, scheme: of the linear.
        measured: statistics of its inputs are there.
        shared: linears that share its input, and with it the factors of its Hessian.
        batches: of calibration tokens.
        hidden: the width of the residual stream.
        device: 'cpu' or 'cuda'.
        compensated: GPTQ rounds it, and its columns' costs rank the scales of input channels.
    """

    N: int
    K: int
    scheme: Scheme
    measured: bool = False
    shared: int = 1
    batches: int = 0
    hidden: int = 0
    device: str = "cpu"
    compensated: bool = False

    @property
    def size(self) -> int:
        return self.N * self.K

    @property
    def tries(self) -> int:
        """Shrinks that `search_clip` tries for it."""
        if self.scheme.bits == 8:
            return 0 if self.scheme.weight == "fp8" else len(SHRINKS_8)
        return len(SHRINKS) * (2 if self.scheme.symmetric else 1)

    def copies(self, count: int, at_a_time: int | None = None) -> int:
        """Bytes of float32 copies of it, or of so many elements at a time."""
        return FLOAT32 * count * min(self.size, at_a_time or self.size)


def searched(w: Weight) -> Cost:
    """`search_clip` by the weights alone, or by one cost a column."""
    return Cost(passes=(w.tries * SEARCHING + ROUNDING) * w.size, held=w.copies(6, SEARCHED_AT_A_TIME))


def rtn(w: Weight) -> Cost:
    return Cost(passes=1.5 * ROUNDING * w.size, held=w.copies(4, AT_A_TIME))


def clip(w: Weight) -> Cost:
    by_hessian = (
        2 * w.tries * (w.scheme.group_size or w.K) * w.size if w.measured and w.scheme.bits < 8 else 0
    )
    return searched(w) + Cost(by_hessian, ROUNDING * w.size, held=w.copies(5))


def half_quadratic(w: Weight) -> Cost:
    return searched(w) + Cost(passes=hqq.STEPS * HALF_QUADRATIC * w.size, held=w.copies(8))


def factorized(w: Weight) -> Cost:
    """A Cholesky factor of a Hessian, and the inverse of one triangle."""
    return Cost(FACTORING * 4 / 3 * w.K**3 / w.shared, held=5 * FLOAT32 * w.K**2)


def gptq(w: Weight) -> Cost:
    loop = Cost(w.N * w.K**2, COLUMN_LOOP[w.device] * w.size, COLUMN_CALLS[w.device] * w.K)
    return searched(w) + factorized(w) + loop + Cost(held=w.copies(4) + 5 * FLOAT32 * w.K**2)


def gptaq(w: Weight) -> Cost:
    """GPTQ, and W D H^-1 before it, solved for each linear."""
    solved = FACTORING * 7 / 3 * w.K**3 + 2 * w.N * w.K**2
    return gptq(w) + Cost(solved, 4 * w.size, held=w.copies(5) + 5 * FLOAT32 * w.K**2)


def awq(w: Weight) -> Cost:
    tried = 2 * RATIOS
    ranked = factorized(w) if w.compensated else Cost(2 * tried * w.N * w.K**2)
    return ranked + Cost(passes=tried * SCALED * w.size, held=w.copies(5))


def smoothed(w: Weight) -> Cost:
    tried, rows = len(smooth.EXPONENTS) + 1, SAMPLED * w.batches
    ranked = factorized(w) if w.compensated else Cost()
    return ranked + Cost(2 * tried * rows * w.size, tried * SCALED * w.size, held=w.copies(5))


def equalized(w: Weight) -> Cost:
    return Cost(passes=10 * w.size, held=w.copies(1))


def rotated(w: Weight) -> Cost:
    """A product with R1 in float64, which counts as two of float32."""
    return Cost(4 * w.size * w.hidden, 8 * w.size, held=2 * FLOAT64 * w.size)


def learned(w: Weight) -> Cost:
    """Fake rounding, forward and backward, and the errors anew; the block's own work is counted by the block."""
    if w.scheme.weight == "fp8":
        return Cost()
    return Cost(passes=learn.STEPS * LEARNING * w.size, calls=80 * learn.STEPS) + judged(w)


def judged(w: Weight) -> Cost:
    """tr(E H E^T) and tr(W H W^T) for the result and for rounding to nearest; |E| and |W| without a Hessian."""
    return Cost(8 * w.N * w.K**2 if w.measured else 0, JUDGED * w.size, held=w.copies(5))


COSTS: dict[str, Callable[[Weight], Cost]] = {
    ROTATE: rotated,
    "awq": awq,
    "smooth": smoothed,
    "equalize": equalized,
    "rtn": rtn,
    "clip": clip,
    "hqq": half_quadratic,
    "gptq": gptq,
    "gptaq": gptaq,
    LEARN: learned,
}
LEARNED_COPIES = 11  # float32 ones of all weights of a block: targets, moves, gradients, Adam's moments, what the graph keeps


def steps_of(plan: ModulePlan, w: Weight) -> dict[str, Cost]:
    """What is done with one weight, by step, and the report of its error."""
    method = parse_method(plan.method)
    w = replace(w, compensated=method.rounding in ("gptq", "gptaq"))
    steps = (ROTATE * method.rotate, method.scaling, method.rounding, LEARN * method.learn)
    costs = {step: COSTS[step](w) for step in steps if step}
    if w.measured or method.rounding != "rtn":
        costs["errors reported"] = judged(w)
    return costs


@dataclass(frozen=True)
class Held:
    """Bytes that a stage of the run holds on 'device' or 'host'."""

    stage: str
    what: str
    place: str
    bytes: int


@dataclass(frozen=True)
class Work:
    """A part of the run, its cost taken apart as in `Cost`, and the seconds that it takes."""

    what: str
    products: float
    passes: float
    calls: float
    seconds: float


@dataclass(frozen=True)
class Rates:
    """What the device does in a second, and the seconds that a call takes."""

    products: float
    passes: float
    latency: float

    def seconds(self, cost: Cost) -> float:
        return cost.products / self.products + cost.passes / self.passes + cost.calls * self.latency


@dataclass(frozen=True)
class DryRun:
    """What a run will do and need.

    Attributes:
        modules: name, N, K, scheme, method, bits (a weight), bytes and remark of every packed linear.
            With a `target_bpw` the schemes are those of the recipe, since the run is to choose others.
        bits_per_weight: their average.
        source_bytes, packed_bytes: all tensors of the two checkpoints.
        disk_needed, disk_free: bytes, until the parts of the checkpoint are joined.
        peak_device, peak_host: bytes; on a CPU everything is on the host.
        memory: what the peaks are made of.
        work: what the time is made of; rates: by which it was reckoned.
    """

    modules: list[dict[str, Any]]
    bits_per_weight: float
    source_bytes: int
    packed_bytes: int
    disk_needed: int
    disk_free: int
    peak_device: int
    peak_host: int
    memory: list[Held]
    work: list[Work]
    rates: Rates

    @property
    def seconds(self) -> float:
        return sum(work.seconds for work in self.work)


def dry_run(
    source: str | Path, out: str | Path, recipe: Recipe, device: torch.device | str | None = None
) -> DryRun:
    """What `quantize_checkpoint` with the same arguments would do and need.

    Raises:
        QuantKitError: as `quantize_checkpoint`, as far as it shows without weights and calibration text.
    """
    device = torch.device(device) if device is not None else default_device()
    out = Path(out)
    check_out(out)
    original = open_original(source)
    config, reader = original.config, original.reader
    job = Job(empty_model(config), recipe, device)
    reader.tensors = model_names(reader.tensors, job.model)
    if recipe.target_bpw is not None:
        read_budget(job.model, recipe)
    loader = BlockLoader(job, reader, device)
    if job.needs_tokens:
        check_context(recipe.calibration.seq_len, config)
    modules = planned_modules(job)
    packed_bytes = loader.packed_bytes()
    needed, free = space(out, packed_bytes)
    rates = measured_rates(device)
    size = Sizes(job, loader)
    memory = [held for held in size.memory() if held.bytes]
    peaks = {place: 0 for place in ("device", "host")}
    for stage in {held.stage for held in memory}:
        for place in peaks:
            here = sum(held.bytes for held in memory if (held.stage, held.place) == (stage, place))
            peaks[place] = max(peaks[place], here)
    weights = sum(module["N"] * module["K"] for module in modules)
    return DryRun(
        modules,
        8 * sum(module["bytes"] for module in modules) / weights,
        sum(tensor.stop - tensor.start for tensor in reader.tensors.values()),
        packed_bytes,
        needed,
        free,
        peaks["device"],
        peaks["host"],
        memory,
        [
            Work(what, cost.products, cost.passes, cost.calls, rates.seconds(cost))
            for what, cost in size.work().items()
        ],
        rates,
    )


def planned_modules(job: Job) -> list[dict[str, Any]]:
    rows = []
    for plan in job.all_plans():
        linear = linear_called(job.model, plan.name)
        N, K = linear.out_features, linear.in_features
        size = packed_weight_bytes(plan.scheme, N, K, plan.channel_scales)
        rows.append(
            {
                "name": plan.name,
                "N": N,
                "K": K,
                "scheme": plan.scheme.label,
                "method": plan.method,
                "bits": 8 * size / (N * K),
                "bytes": size,
                "remark": plan.remark,
            }
        )
    return rows


class Sizes:
    """The numbers that memory and time depend on, and the sums over them."""

    def __init__(self, job: Job, loader: BlockLoader) -> None:
        self.job, self.loader = job, loader
        self.spec = job.recipe.calibration
        self.config = job.model.config.get_text_config()
        self.place = "host" if job.device.type == "cpu" else "device"
        # blocks are computed with in float32 on a CPU, see BlockLoader.load
        self.value = FLOAT32 if self.place == "host" and job.needs_tokens else job.dtype.itemsize
        self.hidden = self.config.hidden_size
        self.tokens = self.batch = 0
        if job.needs_tokens:
            shape = torch.empty(self.spec.samples, self.spec.seq_len, device="meta")
            self.tokens, self.batch = shape.numel(), batches(shape)[0].numel()
        self.parameters = sum(parameter.numel() for parameter in job.model.parameters())

    def block(self, index: int) -> tuple[dict[str, tuple[int, int]], dict[str, ModulePlan]]:
        """(N, K) of all linears of a block, and its plans, by the names in it."""
        shapes = {n: (x.out_features, x.in_features) for n, x in linears(self.job.blocks[index]).items()}
        return shapes, self.job.block_plans(index)

    def fed(self, plans: dict[str, ModulePlan]) -> dict[str, list[str]]:
        """The linears of a block that statistics are kept for, by the input that they share."""
        fed: dict[str, list[str]] = {}
        for name, plan in plans.items():
            if needs_activations(plan):
                fed.setdefault(SHARING.sub("", name), []).append(name)
        return fed

    def tokens_at(self, name: str, plans: dict[str, ModulePlan]) -> float:
        """Calibration tokens that a linear of a block gets: an expert its share of them."""
        if name not in plans or not is_expert(plans[name]):
            return self.tokens
        experts = getattr(self.config, "num_experts", None) or self.config.num_local_experts
        return self.tokens * self.config.num_experts_per_tok / experts

    def weight(self, plan: ModulePlan, N: int, K: int, shared: int = 1, inside: bool = True) -> Weight:
        batches = self.tokens // self.batch if self.batch else 0
        measured = inside and needs_activations(plan)
        return Weight(N, K, plan.scheme, measured, shared, batches, self.hidden, self.job.device.type)

    def block_weights(self, index: int) -> list[tuple[ModulePlan, Weight]]:
        shapes, plans = self.block(index)
        shared = {name: len(names) for names in self.fed(plans).values() for name in names}
        return [(plan, self.weight(plan, *shapes[n], shared.get(n, 1))) for n, plan in plans.items()]

    def stored(self, prefix: str | None) -> tuple[int, int]:
        """Parameters and stored bytes of a block, or (None) of what lies outside the blocks."""
        inside = f"{self.job.prefix}."
        names = [
            n for n in self.loader.names if (n.startswith(prefix) if prefix else not n.startswith(inside))
        ]
        state = self.job.model.state_dict()
        tensors = [self.loader.find(name) for name in names]
        return sum(state[name].numel() for name in names), sum(t.stop - t.start for t in tensors)

    def memory(self) -> list[Held]:
        place, value = self.place, self.value
        found: list[Held] = []
        rotation = self.job.rotation
        turning = FLOAT64 * self.hidden**2 if rotation is not None and rotation.residual is not None else 0

        def held(stage: str, what: str, size: int, where: str = place) -> None:
            found.append(Held(stage, what, where, size))

        # what is loaded is then there twice for a while
        copied = place == "device" or value != self.job.dtype.itemsize
        states = self.tokens * self.hidden * value
        if any(map(needs_original, self.job.plans.values())):
            states *= 3  # those of the original model, and what its block gives, beside them
        if self.tokens and self.spec.source == "self":
            rows, config = min(SAMPLED_AT_A_TIME, self.spec.samples), self.config
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            head_dim = head_dim_of(config)
            cache = 2 * len(self.job.blocks) * rows * self.spec.seq_len * heads * head_dim * value
            stage = "sampling"
            held(stage, "whole model", self.parameters * value)
            whole = sum(tensor.stop - tensor.start for tensor in self.loader.reader.tensors.values())
            held(stage, "whole model as stored", whole * copied, "host")
            held(stage, "keys and values", cache)
            held(stage, "logits", 4 * rows * config.vocab_size * FLOAT32)

        if self.job.recipe.target_bpw is not None:
            tokens = WINDOWS * WINDOW
            held("measuring", "whole model", self.parameters * value)
            outputs = tokens * (self.config.vocab_size * FLOAT32 + len(self.job.blocks) * self.hidden * value)
            held("measuring", "its outputs and its blocks'", outputs)

        numel, stored = self.stored(None)
        stage = "embeddings and head"
        held(stage, "weights", numel * value)
        held(stage, "weights as stored", stored * copied, "host")
        held(stage, "hidden states", states, "host")
        held(stage, "batch at work", 3 * self.batch * self.hidden * value)
        if turning:  # pieces of the embedding or the head, and what they are put together to
            held(stage, "rotation", turning + 2 * self.config.vocab_size * self.hidden * value)

        prefixes = [f"{self.job.prefix}.{index}." for index in range(len(self.job.blocks))]
        index = max(range(len(prefixes)), key=lambda i: self.stored(prefixes[i])[1])
        numel, stored = self.stored(prefixes[index])
        shapes, plans = self.block(index)
        methods = [parse_method(plan.method) for plan in plans.values()]
        squares = [FLOAT32 * shapes[names[0]][1] ** 2 for names in self.fed(plans).values()]
        learns, drifts = any(m.learn for m in methods), any(m.rounding == "gptaq" for m in methods)
        outputs = sum(N for N, _ in shapes.values()) + 2 * self.hidden
        widest = max(K for _, K in shapes.values())
        passing = self.batch * (outputs * value + 2 * widest * FLOAT32)
        planned = FLOAT32 * sum(shapes[name][0] * shapes[name][1] for name in plans)
        for stage in ("largest block, passed", "largest block, packed", "largest block, learned")[
            : 2 + learns
        ]:
            held(stage, "weights", numel * value)
            held(stage, "weights as stored", stored * copied, "host")
            held(stage, "hidden states", states, "host")
            held(stage, "Hessians", sum(squares))
            held(stage, "rotation", turning)
            if drifts:  # of all inputs where learning follows, else of one, and its Hessian anew
                held(stage, "original block", numel * value)
                held(stage, "drifts", sum(squares) if learns else 2 * max(squares, default=0))
            if any(m.scaling for m in methods) and not stage.endswith("passed"):
                held(stage, "scaled weights", planned)
            if not stage.endswith("packed"):  # what goes backward has all of its way kept
                held(
                    stage,
                    "batch at work",
                    passing * (2 if stage.endswith("learned") else 1) if self.tokens else 0,
                )
            if not stage.endswith("passed"):
                packed = sum(packed_weight_bytes(plan.scheme, *shapes[name]) for name, plan in plans.items())
                held(stage, "packed weights", packed, "host")
            if stage.endswith("packed"):
                costs = [cost for plan, w in self.block_weights(index) for cost in steps_of(plan, w).values()]
                held(stage, "working copies", max((cost.held for cost in costs), default=0))
            if stage.endswith("learned"):
                held(stage, "targets, moves, gradients", LEARNED_COPIES * planned)
        return found

    def work(self) -> dict[str, Cost]:
        """The parts of a run."""
        found: dict[str, Cost] = {}

        def add(what: str, cost: Cost) -> None:
            found[what] = found.get(what, Cost()) + cost

        layers, vocabulary = len(self.job.blocks), self.config.vocab_size
        if self.tokens and self.spec.source == "self":
            rows = min(SAMPLED_AT_A_TIME, self.spec.samples)
            steps = ceil(self.spec.samples / rows) * self.spec.seq_len
            passes = steps * (self.parameters + 6 * rows * vocabulary)
            add("sampling", Cost(2 * self.parameters * self.tokens, passes, CALLS * steps * layers))
        for index in range(layers):
            shapes, plans = self.block(index)
            fed = self.fed(plans)
            if self.job.recipe.target_bpw is not None:
                runs = len(CANDIDATES) * len(fed) * (layers - index)  # blocks from this one on
                weights = sum(N * K for N, K in shapes.values())
                head = self.hidden * vocabulary * len(CANDIDATES) * len(fed)
                add("measuring", Cost(2 * WINDOWS * WINDOW * (runs * weights + head), calls=CALLS * runs))
            if self.tokens:
                times, collected = self.runs(index, plans)
                add("tokens through the blocks", self.through(shapes, plans, times))
                if any(parse_method(plan.method).learn for plan in plans.values()):
                    batches = 3 * learn.STEPS  # a step's is taken forward and, at twice the cost, backward
                    times = batches * self.batch / self.tokens + 2  # and all tokens before and after
                    add(LEARN, self.through(shapes, plans, times))
                for names in fed.values():
                    K, tokens = shapes[names[0]][1], self.tokens_at(names[0], plans)
                    add("Hessians", Cost(2 * collected * tokens * K * K, 6 * collected * tokens * K))
            for plan, weight in self.block_weights(index):
                for step, cost in steps_of(plan, weight).items():
                    add(step, cost)
        for name, plan in self.job.outer_plans().items():
            linear = linear_called(self.job.model, name)
            weight = self.weight(plan, linear.out_features, linear.in_features, inside=False)
            for step, cost in steps_of(plan, weight).items():
                add(step, cost)
        if self.job.rotation is not None:
            add(ROTATE, Cost(2 * 4 * vocabulary * self.hidden**2, 2 * 8 * vocabulary * self.hidden))
        return found

    def runs(self, index: int, plans: dict[str, ModulePlan]) -> tuple[float, int]:
        """How often all tokens go through a block, and how often moments [K, K] of its inputs are added up."""
        methods = [parse_method(plan.method) for plan in plans.values()]
        wanted = any(map(needs_activations, plans.values()))
        again = any(m.scaling for m in methods) and any(plan.scheme.activation for plan in plans.values())
        collected = int(wanted) + int(wanted and again)
        times = float(collected) + (index + 1 < len(self.job.blocks))
        times += any(map(needs_original, self.job.plans.values()))
        if any(m.rounding == "gptaq" for m in methods):
            # a stage for each input, on the average half of the block, and of the original
            times += len(self.fed(plans))
            collected += 2
        return times, collected

    def through(self, shapes: dict[str, tuple[int, int]], plans: dict[str, ModulePlan], times: float) -> Cost:
        """The calibration tokens that often through a block."""
        met = {name: self.tokens_at(name, plans) for name in shapes}
        weights = sum(2 * met[name] * N * K for name, (N, K) in shapes.items())
        outputs = sum(3 * met[name] * N for name, (N, _) in shapes.items())
        return Cost(
            times * (weights + 4 * self.tokens * self.spec.seq_len * self.hidden),
            times * (outputs + 20 * self.tokens * self.hidden),
            times * CALLS * (self.tokens // self.batch),
        )


def measured_rates(device: torch.device) -> Rates:
    """Rates of products (in TF32 on a GPU) and of passes over elements, and the latency of a call, on the device."""
    edge = 512 if device.type == "cpu" else 4096
    a = torch.ones(edge, edge, device=device)
    w = torch.ones(2 * edge, 2 * edge, device=device)
    one = torch.ones(1, device=device)
    scheme = parse_scheme("w4a16-g128")

    def rounding() -> torch.Tensor:
        grid = fit_grid(w, scheme)
        return grid.dequantize(grid.round(w))

    with tensor_cores():
        products = 2 * edge**3 / seconds_of(lambda: a @ a, device)
    return Rates(
        products,
        ROUNDING * w.numel() / seconds_of(rounding, device),
        seconds_of(lambda: one * 0.5, device),
    )


def seconds_of(operation: Callable[[], Any], device: torch.device) -> float:
    """Seconds that the operation takes: the median of TRIALS, RATE_SECONDS all together."""

    def timed(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / times

    timed(2)  # the first call sets things up
    times = max(1, int(RATE_SECONDS / TRIALS / timed(3)))
    return median(timed(times) for _ in range(TRIALS))
