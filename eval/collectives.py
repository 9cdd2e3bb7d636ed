"""Time of what follows o and down under tensor parallelism: all-reduce, residual, norm and rounding, in one kernel or by the library.

    torchrun --nproc-per-node 2 -m quantkit.eval.collectives --records docs/benchmarks

A graph holds many such sums one after another, as a decode step does. As in `linears.py`, a time is reported only with the
error of the very call that was timed; a time is that of the slowest process, and the first process writes.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from quantkit.errors import as_one_line
from quantkit.eval.linears import time_text, two_sizes, withhold
from quantkit.eval.records import Record, environment, write_records
from quantkit.eval.timing import Timing, time_launches
from quantkit.exchange import Exchange, open_exchange
from quantkit.kernels.cpu import FP8
from quantkit.processes import gather, start

EPS = 1e-5
# M, K: Llama-3-8B's and 70B's rows at batches of 1 to 128, 8 KiB to 2 MiB of bfloat16
PROBLEMS = tuple((M, 4096) for M in (1, 4, 8, 32, 128)) + tuple((M, 8192) for M in (1, 4, 16, 32, 64, 128))
ROUNDINGS: dict[str, torch.dtype | None] = {"bfloat16": None, "int8": torch.int8, "fp8": FP8}
# ||y - exact|| / ||exact||: parts, their sum, h and y in bfloat16, and then codes of 8 bits
ERROR_BOUNDS = {"bfloat16": 0.01, "int8": 0.02, "fp8": 0.05}
PARTS = 4  # of x, that a graph takes in turn


def bench_collectives(
    problems: Sequence[tuple[int, int]],
    device: torch.device,
    group: Any = None,
    roundings: Sequence[str] = ("bfloat16", "int8"),
    *,
    dtype: torch.dtype = torch.bfloat16,
    replays: int = 20,
    commit: str | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Times one kernel (`way` "one kernel") and the library's all-reduce with the norm's kernel after it ("library").

    All processes of the group call it.

    Args:
        problems: rows M and values of each, K.
        roundings: of the result, see `ROUNDINGS`.
        replays, commit, on_record: as in `linears.bench_linears`.

    Returns:
        One record a (problem, rounding, way); of the library alone where there is no memory that all processes see: `why_not`
        then says so.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    made_with = environment(device, commit)
    exchanges = {K: open_exchange(group, K, dtype, device) for K in dict.fromkeys(K for _, K in problems)}
    records = []
    for M, K in problems:
        ours = exchanges[K]
        ways = {"one kernel": ours} if ours.mailbox is not None and ours.mailbox.rows >= M else {}
        for rounding in roundings:
            for way, exchange in (ways | {"library": Exchange(group)}).items():
                timing, error = time_sum(exchange, M, K, dtype, rounding, device, rank, ranks, replays)
                found = gather((timing, error), "times", group)
                slowest = max((one for one, _ in found), key=lambda one: one.us)
                record = {
                    "kind": "collective",
                    "way": way,
                    "ranks": ranks,
                    "M": M,
                    "K": K,
                    "bytes": M * K * dtype.itemsize,
                    "dtype": str(dtype).removeprefix("torch."),
                    "rounding": rounding,
                    "library": library_of(device),
                    "us": slowest.us,
                    "p20_us": slowest.p20_us,
                    "p80_us": slowest.p80_us,
                    "rel_error": max(one for _, one in found),
                    **({} if ways or way != "library" else {"why_not": ours.why_not or "too many rows"}),
                    **made_with,
                }
                records.append(withhold(record, ERROR_BOUNDS[rounding]))
                if on_record is not None and rank == 0:
                    on_record(records[-1])
    return records


def time_sum(
    exchange: Exchange,
    M: int,
    K: int,
    dtype: torch.dtype,
    rounding: str,
    device: torch.device,
    rank: int,
    ranks: int,
    replays: int,
) -> tuple[Timing, float]:
    """Time and relative error of one way on this process."""
    parts = [part_of(r, M, K, dtype) for r in range(ranks)]
    common = torch.Generator().manual_seed(ranks)
    residual = torch.randn(M, K, generator=common).to(device, dtype)
    weight = (1 + 0.1 * torch.randn(K, generator=common)).to(device, dtype)
    h = torch.stack(parts).double().sum(0).to(device) + residual.double()
    exact = h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return exchange.norm(x, None, weight, EPS, residual, ROUNDINGS[rounding])

    codes, scales, _ = run(parts[rank].to(device))
    y = codes.double() if ROUNDINGS[rounding] is None else codes.double() * scales
    error = ((y - exact).norm() / exact.norm()).item()
    if exchange.mailbox is None:  # its sums stay where x was, and would not be finite for long
        xs = [torch.zeros(M, K, dtype=dtype, device=device) for _ in range(PARTS)]
    else:
        xs = [parts[rank].to(device) for _ in range(PARTS)]
    return time_launches([partial(run, x) for x in xs], device, replays, sample=math.inf), error


def part_of(rank: int, M: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(rank)).to(dtype)


def library_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "gloo"
    return "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, help="append to RECORDS/collectives.jsonl")
    parser.add_argument("--problem", action="append", type=two_sizes, help="ROWSxVALUES, such as 16x8192")
    parser.add_argument(
        "--rounding", action="append", choices=ROUNDINGS, help="of the result; bfloat16 and int8"
    )
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    start(arguments.device)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())

    def keep(record: Record) -> None:
        size = f"{record['M']} x {record['K']} ({record['bytes'] / 1024:.0f} KiB)"
        why_not = f" ({record['why_not']})" if "why_not" in record else ""
        print(
            f"{size} {record['rounding']}, {record['way']}: {time_text(record)}, error {record['rel_error']:.1e}{why_not}",
            flush=True,
        )
        if arguments.records:
            write_records(arguments.records / "collectives.jsonl", [record])

    bench_collectives(
        arguments.problem or PROBLEMS,
        device,
        None,
        arguments.rounding or ("bfloat16", "int8"),
        replays=arguments.replays,
        on_record=keep,
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with as_one_line():
        main()
