"""What `quantkit quantize --dry-run` says beforehand: sizes, memory and time. No weight is loaded, nothing written.

Sizes come from the files' headers and the plan, and are exact. Memory and time are estimates:

    memory   the largest sum, over the stages of a run, of what is held at once; beside Python, PyTorch, the
             tokenizer and, on a GPU, its context. Pages of the source files that the system keeps mapped are
             not in it.
    time     (products / rate) + (passes over elements / rate) + (calls * latency), the three rates measured on
             the device for RATE_SECONDS each. Reading and writing files is not in it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from quantkit.calibration.data import SAMPLED_AT_A_TIME
from quantkit.calibration.pipeline import AT_A_TIME, batches, needs_activations
from quantkit.checkpoint import CheckpointReader, check_out, space
from quantkit.models import FOLDS, linears
from quantkit.quantize import Job, check_context, default_device
from quantkit.recipe import ModulePlan, Recipe
from quantkit.source import empty_model, read_config, resolve
from quantkit.streaming import BlockLoader, linear_called, packed_weight_bytes

RATE_SECONDS, TRIALS = 0.2, 10
FLOAT32 = 4  # bytes
CALLS = 60  # of small operations, when tokens go through a block


@dataclass(frozen=True)
class Cost:
    """What a method does with a weight [N, K]; counted in its code, a pass reads or writes every element once.

    Attributes:
        products: multiplications and additions, in units of N K^2.
        cubes: the same, in units of K^3.
        passes: over N K elements.
        calls: of small operations, in units of K.
        copies: float32 copies [N, K] that are alive at once.
        squares: float32 matrices [K, K] that are alive at once, beside the Hessian.
    """

    products: float
    cubes: float
    passes: float
    calls: float
    copies: int
    squares: int


COSTS = {  # a method that is not here counts as gptq
    "rtn": Cost(0, 0, 24, 0, 4, 0),
    "gptq": Cost(1, 2, 350, 13, 4, 5),
    "awq": Cost(80, 0, 900, 0, 5, 1),
}
ERROR_PRODUCTS = 4  # of the error that is reported, in units of N K^2: tr(E H E^T) and tr(W H W^T)


@dataclass(frozen=True)
class Held:
    """Bytes that a stage of the run holds on 'device' or 'host'."""

    stage: str
    what: str
    place: str
    bytes: int


@dataclass(frozen=True)
class Work:
    """A part of the run: floating-point operations, passes over elements, calls of small operations, seconds."""

    what: str
    products: float
    passes: float
    calls: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What the device does in a second, and the seconds that a call takes."""

    products: float
    passes: float
    latency: float

    def seconds(self, products: float, passes: float, calls: float) -> float:
        return products / self.products + passes / self.passes + calls * self.latency


@dataclass(frozen=True)
class DryRun:
    """What a run will do and need.

    Attributes:
        modules: name, N, K, scheme, method, bits (a weight), bytes and remark of every packed linear.
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
    folder = resolve(source)
    config = read_config(folder)
    reader = CheckpointReader(folder)
    job = Job(empty_model(config), recipe, device)
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
            Work(w.what, w.products, w.passes, w.calls, rates.seconds(w.products, w.passes, w.calls))
            for w in size.work()
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

    def inputs(self, plans: dict[str, ModulePlan], shapes: dict[str, tuple[int, int]]) -> list[int]:
        """K of every distinct input of a block that statistics are kept of: one for linears fed by one tensor."""
        folds = FOLDS.get(self.job.model.config.model_type, ())
        first = {name: fold.linears[0] for fold in folds for name in fold.linears}
        wanted = [name for name, plan in plans.items() if needs_activations(plan)]
        return list({first.get(name, name): shapes[name][1] for name in wanted}.values())

    def stored(self, prefix: str | None) -> tuple[int, int]:
        """Parameters and stored bytes of a block, or (None) of what lies outside the blocks."""
        inside = f"{self.job.prefix}."
        names = [
            n for n in self.loader.names if (n.startswith(prefix) if prefix else not n.startswith(inside))
        ]
        state = self.job.model.state_dict()
        tensors = [self.loader.reader.find(name) for name in names]
        return sum(state[name].numel() for name in names), sum(t.stop - t.start for t in tensors)

    def memory(self) -> list[Held]:
        place, value = self.place, self.value
        found: list[Held] = []

        def held(stage: str, what: str, size: int, where: str = place) -> None:
            found.append(Held(stage, what, where, size))

        # what is loaded is then there twice for a while
        copied = place == "device" or value != self.job.dtype.itemsize
        states = self.tokens * self.hidden * value
        if self.tokens and self.spec.source == "self":
            rows, config = min(SAMPLED_AT_A_TIME, self.spec.samples), self.config
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            head_dim = getattr(config, "head_dim", None) or self.hidden // config.num_attention_heads
            cache = 2 * len(self.job.blocks) * rows * self.spec.seq_len * heads * head_dim * value
            stage = "sampling"
            held(stage, "whole model", self.parameters * value)
            whole = sum(tensor.stop - tensor.start for tensor in self.loader.reader.tensors.values())
            held(stage, "whole model as stored", whole * copied, "host")
            held(stage, "keys and values", cache)
            held(stage, "logits", 4 * rows * config.vocab_size * FLOAT32)

        numel, stored = self.stored(None)
        stage = "embeddings and head"
        held(stage, "weights", numel * value)
        held(stage, "weights as stored", stored * copied, "host")
        held(stage, "hidden states", states, "host")
        held(stage, "batch at work", 3 * self.batch * self.hidden * value)

        prefixes = [f"{self.job.prefix}.{index}." for index in range(len(self.job.blocks))]
        index = max(range(len(prefixes)), key=lambda i: self.stored(prefixes[i])[1])
        numel, stored = self.stored(prefixes[index])
        shapes, plans = self.block(index)
        hessians = FLOAT32 * sum(K * K for K in self.inputs(plans, shapes))
        outputs = sum(N for N, _ in shapes.values()) + 2 * self.hidden
        widest = max(K for _, K in shapes.values())
        passing = self.batch * (outputs * value + 2 * widest * FLOAT32)
        for stage in ("largest block, passed", "largest block, packed"):
            held(stage, "weights", numel * value)
            held(stage, "weights as stored", stored * copied, "host")
            held(stage, "hidden states", states, "host")
            held(stage, "Hessians", hessians)
            if stage.endswith("passed"):
                held(stage, "batch at work", passing if self.tokens else 0)
            else:
                packed = sum(packed_weight_bytes(plan.scheme, *shapes[name]) for name, plan in plans.items())
                held(stage, "packed weights", packed, "host")
                held(stage, "working copies", self.working(plans, shapes))
        return found

    def working(self, plans: dict[str, ModulePlan], shapes: dict[str, tuple[int, int]]) -> int:
        """Bytes that packing takes beside the weights: the largest linear's, and float32 copies of all under AWQ."""
        sizes = [0]
        for name, plan in plans.items():
            N, K = shapes[name]
            cost = COSTS.get(plan.method, COSTS["gptq"])
            elements = min(N * K, AT_A_TIME) if plan.method == "rtn" else N * K
            sizes.append(FLOAT32 * (cost.copies * elements + cost.squares * K * K))
        scaled = any(plan.method == "awq" for plan in plans.values()) and self.value != FLOAT32
        return max(sizes) + scaled * FLOAT32 * sum(shapes[n][0] * shapes[n][1] for n in plans)

    def work(self) -> list[Work]:
        """The parts of a run, their seconds not reckoned yet."""
        found: list[Work] = []
        layers = len(self.job.blocks)
        if self.tokens and self.spec.source == "self":
            rows = min(SAMPLED_AT_A_TIME, self.spec.samples)
            steps = ceil(self.spec.samples / rows) * self.spec.seq_len
            passes = steps * (self.parameters + 6 * rows * self.config.vocab_size)
            found.append(Work("sampling", 2 * self.parameters * self.tokens, passes, CALLS * steps * layers))
        through, moments = [0, 0, 0], [0, 0, 0]  # products, passes, calls
        methods: dict[str, list[float]] = {}
        for index in range(layers):
            shapes, plans = self.block(index)
            times = 2 if index + 1 < layers else 1  # for the statistics, and on to the next block
            weights = sum(N * K for N, K in shapes.values())
            outputs = sum(N for N, _ in shapes.values())
            through[0] += times * self.tokens * (2 * weights + 4 * self.spec.seq_len * self.hidden)
            through[1] += times * self.tokens * (3 * outputs + 20 * self.hidden)
            through[2] += times * CALLS * (self.tokens // self.batch if self.batch else 0)
            for K in self.inputs(plans, shapes):
                moments[0] += 2 * self.tokens * K * K
                moments[1] += 6 * self.tokens * K
            for name, plan in plans.items():
                self.add(methods, plan, *shapes[name])
        for name, plan in self.job.outer_plans().items():
            linear = linear_called(self.job.model, name)
            self.add(methods, plan, linear.out_features, linear.in_features)
        if self.tokens:
            found += [Work("tokens through the blocks", *through), Work("Hessians", *moments)]
        found += [Work(method, *sums) for method, sums in methods.items()]
        return found

    def add(self, methods: dict[str, list[float]], plan: ModulePlan, N: int, K: int) -> None:
        cost = COSTS.get(plan.method, COSTS["gptq"])
        products = cost.products + ERROR_PRODUCTS * needs_activations(plan)
        sums = methods.setdefault(plan.method, [0.0, 0.0, 0.0])
        sums[0] += products * N * K * K + cost.cubes * K**3
        sums[1] += cost.passes * N * K
        sums[2] += cost.calls * K


def measured_rates(device: torch.device) -> Rates:
    """Rates of float32 products and of passes over elements, and the latency of a call, on the device."""
    edge = 512 if device.type == "cpu" else 4096
    a = torch.ones(edge, edge, device=device)
    x = torch.ones(1 << 20 if device.type == "cpu" else 1 << 26, device=device)
    one = torch.ones(1, device=device)
    return Rates(
        2 * edge**3 / seconds_of(lambda: a @ a, device),
        2 * x.numel() / seconds_of(lambda: x * 0.5, device),
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
