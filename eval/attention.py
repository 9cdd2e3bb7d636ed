"""Time of attention over pages, and of the write to them, beside PyTorch's attention and the device's limit.

    python -m quantkit.eval.attention --records docs/benchmarks

Keys and values are random. As in `linears.py`, a time is reported only with the error of the very kernel that was timed,
and withheld when that error is not of rounding's size; the launches of one graph go through more caches than L2 holds.
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from quantkit.errors import as_one_line
from quantkit.eval.linears import WORKING_SET, a_device, copies, time_text, two_sizes, withhold
from quantkit.eval.records import Record, environment, version, write_records
from quantkit.eval.roofline import Roof, roof
from quantkit.eval.timing import Timing, time_launches
from quantkit.kernels.attention_ops import kernel_of
from quantkit.kernels.kv_pages import KINDS, KVPages, dequantize, rotate

# ||y - exact|| / ||exact|| over the same rounded keys and values: probabilities and y are rounded to 16 bits.
ERROR_BOUND = 0.01
CHUNK = 512  # queries of a sequence in prefill
WRITES = 4  # caches that a graph's writes go to in turn: they are in L2, as what the kernel before wrote is


@dataclass(frozen=True)
class Heads:
    """The shape of a layer's attention."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


LLAMA_3_8B = Heads("llama-3-8b", 32, 8, 128)
PROBLEMS = ((1, 1024), (1, 4096), (1, 32768), (16, 4096), (64, 1024))  # sequences, tokens of each


@dataclass(frozen=True)
class Cache:
    """Pages that are full, in an order of their own, of sequences of one length."""

    pages: KVPages
    table: torch.Tensor
    lengths: torch.Tensor


def bench_attention(
    shapes: Sequence[Heads],
    problems: Sequence[tuple[int, int]],
    kinds: Sequence[str] = KINDS,
    device: torch.device | str = "cuda",
    *,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 64,
    replays: int = 20,
    working_set: int = WORKING_SET,
    seed: int = 0,
    commit: str | None = None,
    peer: bool = True,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Times decode attention of one query a sequence, prefill of a chunk, and the write of one token a sequence.

    Args:
        problems: sequences and tokens of each, the newest included.
        kinds: of pages, see `kv_pages.py`.
        dtype: of q, and of "bf16" pages.
        replays, working_set, commit, on_record: as in `linears.bench_linears`.
        peer: also time PyTorch's scaled_dot_product_attention over unquantized keys and values without pages.

    Returns:
        One record a (shape, problem, kind, op), and one of the peer, whose `library` is named. `limit_us` counts keys, values
        and scales once, or the operations of prefill; it is null on a CPU.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    limits, made_with = roof(device), environment(device, commit)
    records = []
    for shape in shapes:
        for batch, length in problems:
            for kind in kinds:
                first = full_cache(shape, batch, length, kind, dtype, page_size, generator)
                caches = [
                    first,
                    *(another(first) for _ in range(copies(first.pages.nbytes, working_set) - 1)),
                ]
                runs = [decode, prefill, write] if batch * length <= 2**16 else [decode, write]
                for run in runs:
                    op, timed = run(shape, caches, dtype, generator, replays, limits)
                    record = base(shape, batch, length, dtype) | dict(op=op, kv=kind, page_size=page_size)
                    records.append(withhold(record | timed | made_with, ERROR_BOUND))
                    if on_record is not None:
                        on_record(records[-1])
            if peer:
                timed = time_peer(shape, batch, length, dtype, generator, replays, working_set, limits)
                record = base(shape, batch, length, dtype) | dict(op="decode_attention", kv="bf16")
                records.append(withhold(record | timed | made_with, ERROR_BOUND))
                if on_record is not None:
                    on_record(records[-1])
    return records


def base(shape: Heads, batch: int, length: int, dtype: torch.dtype) -> Record:
    return {
        "kind": "attention",
        "shape": shape.name,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "batch": batch,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
    }


def full_cache(
    shape: Heads,
    batch: int,
    length: int,
    kind: str,
    dtype: torch.dtype,
    page_size: int,
    generator: torch.Generator,
) -> Cache:
    """Random keys and values of all tokens, written by the definition of the format, a sequence at a time."""
    device = generator.device
    each = -(-length // page_size)
    pages = KVPages.allocate(
        kind, batch * each, shape.kv_heads, shape.head_dim, page_size=page_size, dtype=dtype, device=device
    )
    table = torch.randperm(batch * each, generator=generator, device=device).view(batch, each)
    t = torch.arange(length, device=device)
    for row in table:
        k, v = (
            torch.randn(length, shape.kv_heads, shape.head_dim, generator=generator, device=device).to(dtype)
            for _ in range(2)
        )
        pages.write(k, v, row[t // page_size] * page_size + t % page_size)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    return Cache(pages, table.int(), lengths)


def another(cache: Cache) -> Cache:
    """The same content in other memory."""
    return Cache(deepcopy(cache.pages), cache.table, cache.lengths)


def speeds(timing: Timing, moved: int, operations: int, limits: Roof | None) -> Record:
    """The fields of a record that follow from a time."""
    return {
        "us": timing.us,
        "p20_us": timing.p20_us,
        "p80_us": timing.p80_us,
        "limit_us": limits.seconds(moved, operations) * 1e6 if limits else None,
        "limit_source": limits.source if limits else None,
        "GB_per_s": moved / timing.us * 1e-3,
        "TFLOP_per_s": operations / timing.us * 1e-6,
    }


def read_bytes(cache: Cache) -> int:
    """Of the keys, values and scales of all tokens."""
    return cache.pages.bytes_per_token * int(cache.lengths.sum())


def queries(rows: int, shape: Heads, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    size = (rows, shape.heads, shape.head_dim)
    return torch.randn(size, generator=generator, device=generator.device).to(dtype)


Timed = tuple[str, Record]


def decode(
    shape: Heads,
    caches: Sequence[Cache],
    dtype: torch.dtype,
    generator: torch.Generator,
    replays: int,
    limits: Roof | None,
) -> Timed:
    op, first = "decode_attention", caches[0]
    batch, scale = len(first.lengths), shape.head_dim**-0.5
    q = queries(batch, shape, dtype, generator)

    seen = (first.table, first.lengths)
    plan = torch.ops.quantkit.decode_plan(q, *first.pages, *seen)  # a model makes one for all of its layers

    def attend(cache: Cache) -> torch.Tensor:
        return torch.ops.quantkit.decode_attention(q, *cache.pages, *seen, scale, plan=plan)

    error = relative_error(attend(first), exact(q, first, 1, scale))
    timing = time_launches([partial(attend, cache) for cache in caches], q.device, replays)
    moved = read_bytes(first) + 2 * q.nbytes
    operations = 4 * q.numel() * int(first.lengths[0])
    name = kernel_of(op, q, first.pages, len(q), first.table.shape[1] * first.pages.page_size)
    return op, {"kernel": name, **speeds(timing, moved, operations, limits), "rel_error": error}


def prefill(
    shape: Heads,
    caches: Sequence[Cache],
    dtype: torch.dtype,
    generator: torch.Generator,
    replays: int,
    limits: Roof | None,
) -> Timed:
    op, first = "prefill_attention", caches[0]
    batch, length, scale = len(first.lengths), int(first.lengths[0]), shape.head_dim**-0.5
    chunk = min(CHUNK, length)
    q = queries(batch * chunk, shape, dtype, generator)
    starts = chunk * torch.arange(batch + 1, dtype=torch.int32, device=q.device)

    def attend(cache: Cache) -> torch.Tensor:
        return torch.ops.quantkit.prefill_attention(
            q, *cache.pages, cache.table, cache.lengths, starts, scale
        )

    error = relative_error(attend(first), exact(q, first, chunk, scale))
    timing = time_launches([partial(attend, cache) for cache in caches], q.device, replays)
    operations = 4 * q.numel() * (length - chunk + (chunk + 1) // 2)
    name = kernel_of(op, q, first.pages, len(q), first.table.shape[1] * first.pages.page_size)
    timed = {"chunk": chunk, "kernel": name, "rel_error": error}
    return op, timed | speeds(timing, read_bytes(first) + 2 * q.nbytes, operations, limits)


def write(
    shape: Heads,
    caches: Sequence[Cache],
    dtype: torch.dtype,
    generator: torch.Generator,
    replays: int,
    limits: Roof | None,
) -> Timed:
    """RoPE and the write of the newest token of each sequence; the error is that of q."""
    op, first, device = "rope_write", caches[0], generator.device
    batch, D = len(first.lengths), shape.head_dim
    heads = shape.heads + 2 * shape.kv_heads
    qkv = torch.randn(batch, heads * D, generator=generator, device=device).to(dtype)
    angles = torch.rand(batch, D // 2, generator=generator, device=device) * 6
    cos, sin = (f(torch.cat([angles, angles], 1)).to(dtype) for f in (torch.cos, torch.sin))
    page_size, newest = first.pages.page_size, first.lengths.long() - 1
    page = first.table.gather(1, (newest // page_size).unsqueeze(1)).squeeze(1).long()
    slots = page * page_size + newest % page_size

    def run(cache: Cache) -> torch.Tensor:
        return torch.ops.quantkit.rope_write(qkv, cos, sin, slots, *cache.pages)

    q = qkv.double().unflatten(1, (heads, D))[:, : shape.heads]
    half = torch.cat([-q[..., D // 2 :], q[..., : D // 2]], -1)
    expected = q * cos.double().unsqueeze(1) + half * sin.double().unsqueeze(1)
    error = relative_error(run(first), rotate(expected) if first.pages.kind == "int4" else expected)
    timing = time_launches([partial(run, cache) for cache in caches[:WRITES]], device, replays)
    moved = qkv.nbytes + 2 * cos.nbytes + qkv.nbytes * shape.heads // heads
    moved += batch * first.pages.bytes_per_token
    name = kernel_of(op, qkv, first.pages, batch, 1)
    return op, {"kernel": name, **speeds(timing, moved, 0, limits), "rel_error": error}


def exact(q: torch.Tensor, cache: Cache, chunk: int, scale: float) -> torch.Tensor:
    """Causal attention in float64 of `chunk` queries a sequence to what its pages stand for, one head at a time."""
    pages, group = cache.pages, q.shape[1] // cache.pages.kv_heads
    y = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for b, length in enumerate(cache.lengths.tolist()):
        rows = slice(b * chunk, (b + 1) * chunk)
        row = cache.table[b].long()
        ahead = torch.ones(chunk, length, dtype=torch.bool, device=q.device).triu(length - chunk + 1)
        for h in range(pages.kv_heads):
            k, v = (
                dequantize(codes[row, h], None if s is None else s[row, h], pages.kind)
                .flatten(0, 1)[:length]
                .double()
                for codes, s in ((pages.keys, pages.key_scales), (pages.values, pages.value_scales))
            )
            of_h = slice(h * group, (h + 1) * group)
            scores = q[rows, of_h].double().transpose(0, 1) @ k.T * scale  # [group, chunk, length]
            y[rows, of_h] = (scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return rotate(y) if pages.kind == "int4" else y


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


def time_peer(
    shape: Heads,
    batch: int,
    length: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    replays: int,
    working_set: int,
    limits: Roof | None,
) -> Record:
    """PyTorch's attention over keys and values without pages, with enable_gqa: the fields of a record."""
    size = (batch, shape.kv_heads, length, shape.head_dim)
    nbytes = 2 * dtype.itemsize * batch * shape.kv_heads * length * shape.head_dim
    caches = [
        tuple(torch.randn(size, generator=generator, device=generator.device).to(dtype) for _ in range(2))
        for _ in range(copies(nbytes, working_set))
    ]
    q = queries(batch, shape, dtype, generator).unsqueeze(2)
    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
    launches = [partial(sdpa, q, k, v) for k, v in caches]
    k, v = (t.double() for t in caches[0])
    group = shape.heads // shape.kv_heads
    scores = q.double().view(batch, shape.kv_heads, group, -1) @ k.transpose(2, 3) * shape.head_dim**-0.5
    expected = (scores.softmax(-1) @ v).view_as(q)
    error = relative_error(launches[0](), expected)
    timing = time_launches(launches, q.device, replays)
    return {
        "kernel": "scaled_dot_product_attention",
        "library": f"torch {version('torch')}",
        **speeds(timing, nbytes + 2 * q.nbytes, 4 * q.numel() * length, limits),
        "rel_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, help="append to RECORDS/attention.jsonl")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of pages; all by default")
    parser.add_argument(
        "--problem", action="append", type=two_sizes, help="SEQUENCESxTOKENS, such as 16x4096"
    )
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--device", type=a_device, default="cuda")
    arguments = parser.parse_args()

    def keep(record: Record) -> None:
        print(
            f"{record['op']} {record['batch']} x {record['length']} {record['kv']} {record['kernel']}: "
            f"{time_text(record)}, error {record['rel_error']:.1e}",
            flush=True,
        )
        if arguments.records:
            write_records(arguments.records / "attention.jsonl", [record])

    bench_attention(
        [LLAMA_3_8B],
        arguments.problem or PROBLEMS,
        arguments.kind or KINDS,
        arguments.device,
        page_size=arguments.page_size,
        on_record=keep,
    )


if __name__ == "__main__":
    with as_one_line():
        main()
