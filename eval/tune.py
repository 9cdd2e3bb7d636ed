"""Measures which kernel, launched how, is fastest for a weight and so many rows of x: tables for `kernels/tuned.py`.

A launch that does not compile, fails or gives a wrong product is left out and named. The others are timed twice, first
all of them briefly, then the best few and the default; the weights of one timing are together larger than the L2 cache.
Weights have no zeros: a table serves both kinds. Where a scheme rounds x to 8 bits, x is rounded beforehand: what is timed
is the product alone, and its error is that of the rounded x's product.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import QuantKitError
from quantkit.eval.linears import ERROR_BOUNDS, WORKING_SET, random_copies
from quantkit.eval.records import Record, environment
from quantkit.eval.timing import time_launches
from quantkit.kernels import tuned
from quantkit.kernels.cpu import quantize_activations
from quantkit.kernels.dispatch import KERNELS, Kernel, Problem, default, multiprocessors_of, target_of
from quantkit.kernels.int4tiles import pack_tiles
from quantkit.kernels.interleave import interleave, interleave_int4
from quantkit.linear import CODE_DTYPES, FAST_ROWS
from quantkit.packing import QuantizedTensor
from quantkit.scheme import PRESETS, Scheme
from quantkit.source import first_line

Weight = tuple[int, int, Scheme]  # N, K, and a scheme of `tunable`

# What a GPU runs for a scheme's op, where that has launches to choose from.
OPS = {
    "w4a16": "w4a16_tiles",
    "w4a8": "w4a8_interleaved",
    "w8a16": "w8a16_interleaved",
    "w8a8": "w8a8",
    "fp8_block": "fp8_block",
}
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
FINALISTS = 5
QUICK_REPLAYS = 3
# Largest |y - x w^T| beside the root mean square of x w^T. Rounding alone reaches a third of it in 10^8 elements; one
# wrong element among them would hide in the error of the whole.
WORST_ELEMENT = 0.1


@dataclass(frozen=True)
class Candidate:
    """A kernel with the parameters of one launch; none: the kernel has no choice."""

    kernel: Kernel
    launch: dict[str, int]

    def __str__(self) -> str:
        return " ".join([self.kernel.name, *(f"{name}={value}" for name, value in self.launch.items())])

    def run(self, x: Tensor, rest: Sequence[Any]) -> Tensor:
        """y [M, N]; rest: what the op's kernels take after x."""
        chosen = {"launch": self.launch} if self.launch else {}
        return self.kernel.run(x, *rest, **chosen)


def tunable(scheme: Scheme) -> Scheme:
    """The scheme that is measured for this one: zeros and static scales of x take the launches of those without.

    Raises:
        QuantKitError: its kernels have no launches to choose from.
    """
    if scheme.op not in OPS:
        those = ", ".join(name for name, preset in PRESETS.items() if preset.op in OPS)
        raise QuantKitError(
            f"scheme {scheme.label}: its kernels have no launches to tune; those of {those} have"
        )
    return replace(PRESETS[scheme.name.removesuffix("-static")], group_size=scheme.group_size)


def candidates(op: str, problem: Problem, multiprocessors: int) -> list[Candidate]:
    """What can run the problem, the default first.

    Raises:
        ValueError: nothing can; the message has every kernel's reason.
    """
    first = default(op, problem)
    # what launches depend on besides M, N, K: for 8 bits the bytes of x, and whether scales are of blocks
    given: tuple[int, ...] = (2 if op == "w8a16_interleaved" else 1, op == "fp8_block")
    if problem.codes_dtype == torch.int32:
        given = (problem.group_size,) if op == "w4a16_tiles" else ()
    found = []
    for kernel in (first, *(other for other in KERNELS[op] if other != first)):
        if kernel.unsupported(problem) is None:
            launches: list[dict[str, int]] = [{}]
            if kernel.parameters:
                of_kernel = import_module(f"quantkit.kernels.{kernel.module}").candidates
                launches = of_kernel(problem.M, problem.N, problem.K, *given, multiprocessors)
            found += [Candidate(kernel, launch) for launch in launches]
    return found


def plan(
    weights: Sequence[Weight],
    Ms: Sequence[int],
    device: torch.device,
    x_dtype: torch.dtype = torch.bfloat16,
    say: Callable[[str], None] = print,
) -> dict[Weight, dict[int, list[Candidate]]]:
    """The candidates by weight and M, every weight and M once. Weights that no kernel runs are left out and named.

    Raises:
        QuantKitError: none is left.
    """
    target, multiprocessors = target_of(device), multiprocessors_of(device)
    planned = {}
    for N, K, scheme in dict.fromkeys(weights):
        codes, group_size = CODE_DTYPES[scheme.weight], scheme.group_size or 0
        problems = [Problem(target, M, N, K, x_dtype, codes, group_size) for M in sorted(set(Ms))]
        try:
            of_M = {p.M: candidates(OPS[scheme.op], p, multiprocessors) for p in problems}
        except ValueError as error:
            say(f"({N}, {K}) {scheme.label} left out: {error}")
        else:
            planned[N, K, scheme] = of_M
    if not planned:
        raise QuantKitError(f"nothing to tune on {target}: it has no kernel for any of these weights")
    return planned


def pack(q: QuantizedTensor, x_dtype: torch.dtype) -> tuple[Any, ...]:
    """A weight as the kernels of its op in `OPS` take it, and what they take after it."""
    (N, K), group_size = q.shape, q.scheme.group_size or 0
    if q.scheme.op == "w4a16":
        return *pack_tiles(q.codes, q.scales, q.zeros, group_size, K), None, None, group_size, N, False
    if q.scheme.op == "w4a8":
        return *interleave_int4(q.codes, q.scales, q.zeros, K), None, group_size, x_dtype
    if q.scheme.op == "w8a16":
        return interleave(q.codes), q.scales, None, q.scheme.weight == "int8"
    return q.codes, q.scales, None, x_dtype


def rounded(x: Tensor, scheme: Scheme) -> tuple[Tensor, list[Tensor], Tensor]:
    """x [M, K] as the kernels of a scheme take it, its scales if it is rounded, and the numbers that it holds in float64."""
    if scheme.activation is None:
        return x, [], x.double()
    group_size = scheme.block_size or 0
    codes, scales = quantize_activations(x, CODE_DTYPES[scheme.activation], group_size=group_size)
    K = x.shape[1]
    return codes, [scales], codes.double() * scales.double().repeat_interleave(group_size or K, 1)[:, :K]


def tune(
    weights: Sequence[Weight],
    Ms: Sequence[int] = BUCKETS,
    device: torch.device | str = "cuda",
    *,
    replays: int = 20,
    working_set: int = WORKING_SET,
    seed: int = 0,
    x_dtype: torch.dtype = torch.bfloat16,
    commit: str | None = None,
    say: Callable[[str], None] = print,
    on_start: Callable[[str, int], None] | None = None,
    on_candidate: Callable[[], None] | None = None,
    on_entry: Callable[[Record], None] | None = None,
) -> Record:
    """A table of the fastest launches, as `kernels/tuned.py` reads it.

    Args:
        weights: (N, K, scheme), the scheme one that `tunable` returns.
        Ms: rows of x. An entry holds for fewer rows too, down to the next smaller of these and of `BUCKETS`.
        replays: samples of a time that decides.
        working_set, seed, commit: as in `bench_linears`.
        say: told what was left out, and why.
        on_start: called before each weight and M with its name and the candidates of the whole run.
        on_candidate: called after each candidate's brief timing.
        on_entry: called with each entry as it is found.

    Returns:
        `records.environment` and `entries`, each with `scheme`, `us`, `rel_error`, and `default_us`, the time without a
        table (None if that launch failed).

    Raises:
        QuantKitError: no kernel can run any of it on the device, or the GPU stopped working.
    """
    device = torch.device(device)
    planned = plan(weights, Ms, device, x_dtype, say)
    total = sum(len(of_M) for by_M in planned.values() for of_M in by_M.values())
    generator = torch.Generator(device).manual_seed(seed)
    entries: list[Record] = []
    for (N, K, scheme), by_M in planned.items():
        copies = random_copies(scheme, N, K, generator, working_set)
        exact = copies[0].dequantize(torch.float64)
        packed = [pack(q, x_dtype) for q in copies]
        del copies
        for M, of_M in by_M.items():
            where = f"({N}, {K}) {scheme.label} M = {M}"
            if on_start is not None:
                on_start(where, total)
            x = torch.randn(M, K, generator=generator, device=device).to(x_dtype)
            x, x_scales, numbers = rounded(x, scheme)
            fast = (M >= FAST_ROWS,) if scheme.name == "fp8" else ()  # as a linear sums by default
            trial = Trial(
                x, [(*x_scales, *weight, *fast) for weight in packed], numbers @ exact.T, where, say
            )
            found = trial.best(of_M, replays, on_candidate)
            if found is None:
                say(f"{where}: no launch worked, the table gets no entry")
                continue
            best, us, default_us = found
            codes = str(CODE_DTYPES[scheme.weight]).removeprefix("torch.")
            weight = {"N": N, "K": K, "group_size": scheme.group_size or 0}
            key = {"op": OPS[scheme.op], "codes": codes, **weight, "M": M, "least_M": least_M(M, Ms)}
            chosen = {"scheme": scheme.label, "kernel": best.kernel.name, "launch": best.launch}
            times = {"us": us, "default_us": default_us, "rel_error": trial.error(best)}
            entries.append({**key, **chosen, **times})
            if on_entry is not None:
                on_entry(entries[-1])
        del exact, packed
    return {**environment(device, commit), "entries": entries}


@dataclass
class Trial:
    """One x [M, K] with copies of a weight; `expected` is its product with the first, float64 [M, N].

    weights: what kernels take after x, for each copy.
    """

    x: Tensor
    weights: Sequence[Sequence[Any]]
    expected: Tensor
    where: str
    say: Callable[[str], None]

    def best(
        self,
        candidates: Sequence[Candidate],
        replays: int,
        on_candidate: Callable[[], None] | None = None,
    ) -> tuple[Candidate, float, float | None] | None:
        """The fastest candidate, its microseconds and those of the first one; None if not one works."""
        brief: list[tuple[float, int]] = []
        for i, candidate in enumerate(candidates):
            us = self.time(candidate, QUICK_REPLAYS)
            if us is not None:
                brief.append((us, i))
            if on_candidate is not None:
                on_candidate()
        kept = {i for _, i in sorted(brief)[:FINALISTS]} | {i for _, i in brief if i == 0}
        times = {i: us for i in sorted(kept) if (us := self.time(candidates[i], replays)) is not None}
        if not times:
            return None
        fastest = min(times, key=lambda i: times[i])
        return candidates[fastest], times[fastest], times.get(0)

    def time(self, candidate: Candidate, replays: int) -> float | None:
        """Microseconds a launch; None if it fails or gives a wrong product, before the timing or after it."""
        launches = [partial(candidate.run, self.x, weight) for weight in self.weights]
        fault, us = None, None
        try:
            fault = self.fault(candidate)
            if fault is None:
                us = time_launches(launches, self.x.device, replays).us
                fault = self.fault(candidate)
        except Exception as failure:  # of any kind: Triton's compiler and the driver raise many
            fault = f"{type(failure).__name__}: {first_line(failure)}"
        if fault is None:
            return us
        self.say(f"{self.where}: {candidate} left out: {fault}")
        self.check_device(candidate)
        return None

    def fault(self, candidate: Candidate) -> str | None:
        """What is wrong with the product, None if its error is of rounding's size."""
        error, worst = self.errors(candidate)
        bound = ERROR_BOUNDS[None]
        if not error <= bound:  # nor is nan
            return f"wrong product, rel_error {error:.3g} exceeds {bound}"
        if not worst <= WORST_ELEMENT:
            return f"wrong product, worst element off by {worst:.3g} root mean squares, at most {WORST_ELEMENT} expected"
        return None

    def error(self, candidate: Candidate) -> float:
        """||y - x w^T|| / ||x w^T||."""
        return self.errors(candidate)[0]

    @torch.no_grad()
    def errors(self, candidate: Candidate) -> tuple[float, float]:
        """The relative error, and the largest element's beside the root mean square."""
        off = candidate.run(self.x, self.weights[0]).double() - self.expected
        norm = self.expected.norm()
        worst = off.abs().max() / norm * self.expected.numel() ** 0.5
        return (off.norm() / norm).item(), worst.item()

    def check_device(self, candidate: Candidate) -> None:
        """After an illegal address the process gets nothing more from its GPU."""
        if self.x.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.x.device)
        except RuntimeError as error:
            raise QuantKitError(
                f"{self.where}: {candidate} stopped the GPU ({first_line(error)}); entries before it are kept, "
                f"tune the rest with --shape and --m, and report this launch"
            ) from error


def least_M(M: int, Ms: Sequence[int]) -> int:
    """The fewest rows that an entry for M holds for."""
    return max((other for other in (*Ms, *BUCKETS) if other < M), default=0) + 1


def merged(old: Record | None, new: Record) -> Record:
    """The new table with those entries of the old one that it has no other for. What it was made with is the new one's."""
    entries = {
        (*tuned.weight_of(entry), entry["M"]): entry
        for table in (old, new)
        if table is not None
        for entry in table["entries"]
    }
    return {**new, "entries": [entries[key] for key in sorted(entries)]}


def save(path: Path, table: Record) -> None:
    """Merges a table into the file, which is whole at every moment.

    Raises:
        TableError: what stands there is no table.
    """
    table = merged(tuned.read(path) if path.is_file() else None, table)
    head = "".join(f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in table.items() if k != "entries")
    lines = ",\n".join(json.dumps(entry, allow_nan=False) for entry in table["entries"])
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(f'{{\n{head}"entries": [\n{lines}\n]\n}}\n')
        os.chmod(name, 0o644)  # mkstemp's files are the owner's alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def writable(path: Path) -> None:
    """Refuses, before the work, a file that `save` could not write or merge into.

    Raises:
        QuantKitError: it is a directory, or its folder cannot be written to.
        TableError: what stands there is no table.
    """
    if path.is_dir():
        raise QuantKitError(f"{path}: is a directory, expected a file; name one in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise QuantKitError(f"{path.parent}: may not be written to; name another file with --out")
    if path.is_file():
        tuned.read(path)


def chosen_rows(entries: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Cells of a table: weight, scheme, M, what was chosen, its time, the default's, and how many times faster."""
    for e in entries:
        launch = " ".join(f"{name}={value}" for name, value in e["launch"].items())
        before = e["default_us"]
        yield (
            f"({e['N']}, {e['K']})",
            e["scheme"],
            str(e["M"]),
            e["kernel"],
            launch,
            f"{e['us']:.1f}",
            "-" if before is None else f"{before:.1f}",
            "-" if before is None else f"{before / e['us']:.2f}",
        )
