"""Time of the kernels that round activations where they are made, beside an empty kernel and the device's limit.

    python -m quantkit.eval.producers --records docs/benchmarks

Residual, RMS norm and rounding; SwiGLU and rounding; rounding alone. As in `linears.py`, a time is reported only with the error
of the very kernel that was timed, and the launches of one graph go through more memory than L2 holds, if there are rows enough.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from quantkit.errors import as_one_line
from quantkit.eval.linears import WORKING_SET, a_device, copies, time_text, withhold
from quantkit.eval.records import Record, environment, write_records
from quantkit.eval.roofline import roof
from quantkit.eval.timing import Timing, time_launches
from quantkit.kernels.cpu import FP8
from quantkit.kernels.ops import round_activations

EPS = 1e-5
# dtype and group_size
ROUNDINGS = {"int8": (torch.int8, 0), "fp8": (FP8, 0), "fp8 by 128 columns": (FP8, 128)}
# ||y - exact|| / ||exact||, about twice what rounding gives normal values: to bfloat16, and to e4m3 or to int8 with one scale a
# row. Products of two have longer tails, and so a larger step beside the rest.
ERROR_BOUNDS = {"int8": 0.02, "fp8": 0.05, "fp8 by 128 columns": 0.05}
SWIGLU_INT8 = 0.06
HIDDEN, INTERMEDIATE = 4096, 14336  # Llama-3-8B's
PRODUCERS = {"residual + norm": HIDDEN, "swiglu": INTERMEDIATE, "rounding alone": HIDDEN}

Made = tuple[Tensor, Tensor]  # codes, scales


@triton.jit
def empty_kernel(x_ptr):
    pass


def bench_producers(
    Ms: Sequence[int],
    device: torch.device | str = "cuda",
    *,
    dtype: torch.dtype = torch.bfloat16,
    replays: int = 20,
    working_set: int = WORKING_SET,
    seed: int = 0,
    commit: str | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Times each producer with each rounding, and on a GPU a kernel that does nothing.

    Args:
        Ms: rows of x.
        replays, working_set, commit, on_record: as in `linears.bench_linears`.

    Returns:
        One record a (producer, rounding, M), K its values a row, and one of the empty kernel, whose other fields are null.
        `limit_us` counts each byte read or written once; it is null on a CPU.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    limits, made_with = roof(device), environment(device, commit)
    records: list[Record] = []

    def keep(timing: Timing, more: Record) -> None:
        times = {"us": timing.us, "p20_us": timing.p20_us, "p80_us": timing.p80_us}
        record = {
            "kind": "producer",
            "dtype": str(dtype).removeprefix("torch."),
            **more,
            **times,
            **made_with,
        }
        if record["rounding"] is not None:
            of_products = record["producer"] == "swiglu" and record["rounding"] == "int8"
            record = withhold(record, SWIGLU_INT8 if of_products else ERROR_BOUNDS[record["rounding"]])
        records.append(record)
        if on_record is not None:
            on_record(record)

    if device.type == "cuda":
        x = torch.zeros(1, device=device)
        nothing = dict.fromkeys(("rounding", "M", "K", "limit_us", "GB_per_s", "rel_error"))
        launch = empty_kernel[(1,)]
        keep(time_launches([partial(launch, x)], device, replays), {"producer": "empty kernel"} | nothing)
    for producer, K in PRODUCERS.items():
        for M in Ms:
            wide = K * (2 if producer == "swiglu" else 1)
            rows = partial(torch.randn, M, wide, generator=generator, device=device)
            read = M * wide * dtype.itemsize * (2 if producer == "residual + norm" else 1)
            inputs = [
                (rows().to(dtype), rows().to(dtype) if producer == "residual + norm" else None)
                for _ in range(copies(read, working_set))
            ]
            weight = (1 + 0.1 * torch.randn(K, generator=generator, device=device)).to(dtype)
            wanted = exact(producer, *inputs[0], weight)
            for rounding, (to, group_size) in ROUNDINGS.items():
                run = partial(produce, producer, weight, to, group_size)
                codes, scales = run(*inputs[0])
                y = codes.double() * scales.double().repeat_interleave(group_size or K, 1)[:, :K]
                moved = read + codes.nbytes + scales.nbytes
                if producer == "residual + norm":  # also their sum, and the norm's weight
                    moved += M * K * dtype.itemsize + weight.nbytes
                timing = time_launches([partial(run, *one) for one in inputs], device, replays)
                of_it = {"producer": producer, "rounding": rounding, "M": M, "K": K}
                speeds = {
                    "limit_us": limits.seconds(moved) * 1e6 if limits else None,
                    "GB_per_s": moved / timing.us * 1e-3,
                }
                keep(timing, of_it | speeds | {"rel_error": ((y - wanted).norm() / wanted.norm()).item()})
    return records


def produce(
    producer: str, weight: Tensor, to: torch.dtype, group_size: int, x: Tensor, residual: Tensor | None
) -> Made:
    """Codes [M, K] and scales of what a producer makes of x [M, K], or [M, 2 K] for swiglu."""
    ops = torch.ops.quantkit
    if producer == "residual + norm":
        return ops.rms_norm_quantize(x, weight, EPS, residual, to, None, group_size)[:2]  # type: ignore[no-any-return]
    if producer == "swiglu":
        return ops.swiglu_quantize(x, to, None, group_size)  # type: ignore[no-any-return]
    return round_activations(x, to, None, group_size)


def exact(producer: str, x: Tensor, residual: Tensor | None, weight: Tensor) -> Tensor:
    """What is rounded, in float64 [M, K]."""
    if residual is not None:
        h = x.double() + residual.double()
        return h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    if producer == "swiglu":
        gate, up = x.double().chunk(2, -1)
        return F.silu(gate) * up
    return x.double()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, help="append to RECORDS/producers.jsonl")
    parser.add_argument("--m", action="append", type=int, help="rows of x; 1, 64 and 4096")
    parser.add_argument("--device", type=a_device, default="cuda")
    arguments = parser.parse_args()

    def keep(record: Record) -> None:
        what = " ".join(
            str(record[key]) for key in ("producer", "rounding", "M", "K") if record[key] is not None
        )
        print(f"{what}: {time_text(record, 2)}", flush=True)
        if arguments.records:
            write_records(arguments.records / "producers.jsonl", [record])

    bench_producers(arguments.m or (1, 64, 4096), arguments.device, on_record=keep)


if __name__ == "__main__":
    with as_one_line():
        main()
