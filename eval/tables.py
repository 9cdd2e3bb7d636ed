"""Tables and plots from the records: the documents hold no figure that was typed by hand.

A markdown file marks where a table goes, and names the records' file (`docs/benchmarks/NAME.jsonl`):

    <!-- table:NAME -->
    ... replaced ...
    <!-- /table -->
"""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantKitError
from quantkit.eval.records import Record, read_records

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MARKED = re.compile(r"(<!-- table:(\S+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table:(\S+) -->")


@dataclass(frozen=True)
class Table:
    """Cells as text; `caption` states the conditions that all rows share."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str


def tables(records: Sequence[Record]) -> list[Table]:
    """The tables of records of one kind, the last record of each setting.

    Raises:
        QuantKitError: no records, several kinds together, or a kind without a table.
    """
    kinds = sorted({str(record.get("kind")) for record in records})
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise QuantKitError(
            f"records of kind {', '.join(kinds) or 'none'}; a table is of one of {', '.join(KINDS)}"
        )
    return KINDS[kinds[0]](records)


def quality_tables(records: Sequence[Record]) -> list[Table]:
    """One table a model and text."""
    out = []
    for (model, text), group in grouped(
        latest(records, "model", "text", "scheme", "method", "kv"), "model", "text"
    ).items():
        timed = any(r.get("tokens_per_s") for r in group)
        rows = [
            (
                str(r["scheme"]) + (f", {r['kv']} KV" if r.get("kv") else ""),
                r["method"] or "",
                number(r["bits_per_weight"], ".2f"),
                number(r["disk_bytes"], ".1f", 1e-6),
                number(r["perplexity"], ".3f"),
                number(r["ratio"], ".4f"),
                number(r["kl"], ".4f"),
                number(r["top1"], ".1%"),
                *([number(r.get("tokens_per_s"), ",.0f")] if timed else []),
            )
            for r in group
        ]
        header: tuple[str, ...] = (
            "scheme",
            "method",
            "bits/weight",
            "MB on disk",
            "perplexity",
            "ratio",
            "KL, nats",
            "top-1",
        )
        header += ("tokens/s",) if timed else ()
        out.append(Table(f"{model} on {text}", header, tuple(rows), conditions(group, "protocol")))
    return out


def linear_tables(records: Sequence[Record]) -> list[Table]:
    """One table a shape and device, those of the last measured device first: a row a scheme and below them a row a peer, a
    column an M."""
    out = []
    kept = latest(in_series(records), "device", "shape", "N", "K", "series", "M")
    newest = {device: max(r["date"] for r in group) for (device,), group in grouped(kept, "device").items()}
    kept.sort(key=is_peer)
    kept.sort(key=lambda r: newest[r["device"]], reverse=True)
    for (device, shape, N, K), group in grouped(kept, "device", "shape", "N", "K").items():
        Ms = sorted({r["M"] for r in group})
        by_series = grouped(group, "series")
        bf16 = {r["M"]: r["bf16_us"] for r in group}
        rows = [("bfloat16", *(number(bf16[M], ".1f") for M in Ms))]
        for (series,), measured in by_series.items():
            cells = {r["M"]: linear_cell(r) for r in measured}
            rows.append((str(series), *(cells.get(M, "") for M in Ms)))
        caption = "us / multiple of the limit / speed-up over bfloat16. " + conditions(group, "library")
        title = f"{shape} (N {N}, K {K})" + (f", {device}" if len(newest) > 1 else "")
        out.append(Table(title, ("scheme", *(f"M={M}" for M in Ms)), tuple(rows), caption))
    return out


def is_peer(record: Record) -> bool:
    """Whether the record of a linear is of another library's kernel."""
    return record.get("library") is not None


def in_series(records: Sequence[Record]) -> list[Record]:
    """The records of linears, each with the name of its row or line: the scheme, and the kernel if it is a peer's."""
    return [{**r, "series": series_of(r)} for r in records]


def series_of(record: Record) -> str:
    name = f"{record['scheme']} {record['kernel']}" if is_peer(record) else record["scheme"]
    return ", ".join(filter(None, (name, record.get("variant"))))


def linear_cell(record: Record) -> str:
    if record["us"] is None:
        return "wrong result"
    limit = record["us"] / record["limit_us"] if record["limit_us"] else None
    return f"{record['us']:.1f} / {number(limit, '.2f')} / {record['bf16_us'] / record['us']:.2f}"


def decode_tables(records: Sequence[Record]) -> list[Table]:
    """One table a model and device: a row a scheme and batch."""
    out = []
    keys = ("device", "model", "scheme", "optimized", "ranks", "batch", "prompt_len", "new_tokens")
    for (_, model), group in grouped(latest(records, *keys), "device", "model").items():
        rows = [
            (
                r["scheme"]
                + (f", optimized, {r['optimized']}" if r.get("optimized") else "")
                + (f", {r['ranks']} processes" if r.get("ranks") else ""),
                str(r["batch"]),
                f"{r['prompt_len']} + {r['new_tokens']}",
                number(r["memory_bytes"], ".2f", 1e-9),
                number(r.get("device_bytes"), ".2f", 1e-9),
                number(r["prefill_tokens_per_s"], ",.0f"),
                number(r["generate_tokens_per_s"], ",.0f"),
                number(r["generate_ms"], ".2f"),
                number(r["graph_tokens_per_s"], ",.0f"),
                number(r["graph_ms"], ".2f"),
                number(r["limit_ms"], ".2f"),
            )
            for r in group
        ]
        header = (
            "scheme",
            "batch",
            "prompt + new",
            "GB of tensors",
            "GB on device",
            "prefill tok/s",
            "generate tok/s",
            "ms/step",
            "graph tok/s",
            "ms/step",
            "limit ms",
        )
        out.append(Table(str(model), header, tuple(rows), conditions(group)))
    return out


def quality_peer_tables(records: Sequence[Record]) -> list[Table]:
    """One table a model and text: a row a setting, tool and method, mean and standard deviation over the seeds."""
    out = []
    kept = latest(records, "model", "text", "setting", "tool", "method", "seed")
    for (model, text), group in grouped(kept, "model", "text").items():
        rows = []
        measured = [r for r in group if r["reason"] is None]
        for (setting, tool, method), runs in grouped(in_order(measured), "setting", "tool", "method").items():
            rows.append(
                (
                    str(setting),
                    f"{tool} {' or '.join(dict.fromkeys(r['version'] for r in runs))}",
                    str(method),
                    number(statistics.fmean(r["bits_per_weight"] for r in runs), ".2f"),
                    spread([r["perplexity"] for r in runs], ".3f"),
                    spread([r["kl"] for r in runs], ".4f"),
                    spread([r["cpu_seconds"] for r in runs], ".0f"),
                    "any" if runs[0]["seed"] is None else str(len(runs)),
                )
            )
        header = (
            "setting",
            "tool",
            "method",
            "bits/weight",
            "perplexity",
            "KL, nats",
            "CPU seconds",
            "seeds",
        )
        failed = [
            f"Not measured: {r['setting']}, {r['tool']} {r['version']} {r['method']} ({r['reason']})."
            for r in group
            if r["reason"] is not None
        ]
        if measured:
            original = number(measured[0]["reference_perplexity"], ".3f")
            said = [
                f"The original has a perplexity of {original}.",
                conditions(measured, "protocol", "calibration"),
            ]
        caption = " ".join(dict.fromkeys([*(said if measured else []), *failed]))
        out.append(Table(f"{model} on {text}", header, tuple(rows), caption))
    return out


def in_order(records: Sequence[Record]) -> list[Record]:
    """Records of one setting together, settings in the order in which they first come."""
    return [record for group in grouped(records, "setting").values() for record in group]


def spread(values: Sequence[float], spec: str) -> str:
    """Mean, and the standard deviation of a sample if there are several."""
    mean = number(statistics.fmean(values), spec)
    return mean if len(values) == 1 else f"{mean} ± {number(statistics.stdev(values), spec)}"


def calibration_tables(records: Sequence[Record]) -> list[Table]:
    """One table a model and device: seconds and memory of quantizing it, a row a scheme and method."""
    out = []
    keys = ("device", "model", "layers", "scheme", "method", "samples", "seq_len", "ranks", "runs_before")
    for (_, model), group in grouped(latest(records, *keys), "device", "model").items():
        rows = [
            (
                r["scheme"] + (f", {r['ranks']} processes" if r.get("ranks") else ""),
                r["method"],
                f"{r['samples']} x {r['seq_len']}",
                str(r["layers"]),
                str(r.get("runs_before", 0)),
                number(r["source_bytes"], ".1f", 1e-9),
                number(r["seconds"], ".0f"),
                number(r["device_peak_bytes"], ".2f", 1e-9),
                number(r["process_peak_bytes"], ".1f", 1e-9),
            )
            for r in group
        ]
        header = (
            "scheme",
            "method",
            "calibration",
            "blocks",
            "runs before",
            "source GB",
            "seconds",
            "device peak GB",
            "process peak GB",
        )
        out.append(Table(f"{model}, random weights", header, tuple(rows), conditions(group)))
    return out


def attention_tables(records: Sequence[Record]) -> list[Table]:
    """One table an op: a row a kind of cache and a problem, PyTorch's own attention among them."""
    out = []
    keys = ("device", "op", "shape", "batch", "length", "kv", "kernel", "library", "page_size")
    for (_, op), group in grouped(latest(records, *keys), "device", "op").items():
        rows = [
            (
                r["shape"],
                f"{r['batch']} x {r['length']}",
                r.get("library") or f"{r['kv']} pages",
                number(r["us"], ".1f"),
                number(r["limit_us"], ".1f"),
                number(r["GB_per_s"], ",.0f"),
                number(r["TFLOP_per_s"], ".1f"),
                number(r["rel_error"], ".1e"),
            )
            for r in group
        ]
        header = ("shape", "sequences x tokens", "cache", "us", "limit us", "GB/s", "TFLOP/s", "error")
        out.append(Table(str(op), header, tuple(rows), conditions(group)))
    return out


def producer_tables(records: Sequence[Record]) -> list[Table]:
    """One table a device: a row a producer and rounding, a column an M; an empty kernel below them."""
    out = []
    kept = latest(records, "device", "producer", "rounding", "M", "K")
    for (_,), group in grouped(kept, "device").items():
        measured = [r for r in group if r["M"] is not None]
        Ms = sorted({r["M"] for r in measured})
        rows = []
        for (producer, rounding, K), of_it in grouped(measured, "producer", "rounding", "K").items():
            cells = {r["M"]: producer_cell(r) for r in of_it}
            rows.append((f"{producer}, {rounding}", str(K), *(cells.get(M, "") for M in Ms)))
        empty = [
            (r["producer"], "", number(r["us"], ".2f"), *([""] * (len(Ms) - 1)))
            for r in group
            if r["M"] is None
        ]
        caption = "us / share of the limit that bytes set. " + conditions(group)
        header = ("producer", "K", *(f"M={M}" for M in Ms))
        out.append(Table("activations rounded where they are made", header, (*rows, *empty), caption))
    return out


def producer_cell(record: Record) -> str:
    if record["us"] is None:
        return "wrong result"
    share = record["limit_us"] / record["us"] if record["limit_us"] else None
    return f"{record['us']:.2f} / {number(share, '.0%')}"


def collective_tables(records: Sequence[Record]) -> list[Table]:
    """One table a device and number of processes: a row a size and rounding, the kernel's time beside the library's."""
    out = []
    kept = latest(records, "device", "ranks", "M", "K", "rounding", "way")
    for (_, ranks), group in grouped(kept, "device", "ranks").items():
        rows = []
        for (M, K, rounding), ways in grouped(group, "M", "K", "rounding").items():
            us = {r["way"]: r["us"] for r in ways}
            one, two = us.get("one kernel"), us.get("library")
            rows.append(
                (
                    f"{M} x {K}",
                    number(ways[0]["bytes"], ",.0f", 1 / 1024),
                    str(rounding),
                    number(one, ".1f"),
                    number(two, ".1f"),
                    number(two / one if one and two else None, ".2f"),
                )
            )
        header = ("rows", "KiB", "rounded to", "one kernel, us", "library and norm, us", "times")
        title = f"all-reduce, residual and norm over {ranks} processes"
        out.append(Table(title, header, tuple(rows), conditions(group, "library")))
    return out


def parallel_tables(records: Sequence[Record]) -> list[Table]:
    """One table a device and number of processes: a row a model, dtype and scheme, its answers beside one process's."""
    out = []
    kept = latest(records, "device", "ranks", "new_tokens", "model", "dtype", "scheme")
    for (_, ranks, new_tokens), group in grouped(kept, "device", "ranks", "new_tokens").items():
        rows = [
            (
                f"{r['model']}, {r['scheme']}",
                r["dtype"],
                *(
                    str(r.get(count, "refused" if count == "equal" else "-"))
                    for count in ("equal", "tied", "wrong")
                ),
                r.get("sums", "-"),
            )
            for r in group
        ]
        header = ("model", "dtype", "equal", "tied", "wrong", "sums by")
        title = f"greedy answers of {new_tokens} tokens by {ranks} processes, beside one's"
        out.append(Table(title, header, tuple(rows), conditions(group)))
    return out


def soak_tables(records: Sequence[Record]) -> list[Table]:
    """One table a device: a row a model and cache."""
    out = []
    for (_,), group in grouped(latest(records, "device", "model", "scheme", "kv"), "device").items():
        rows = [
            (
                f"{r['model']}, {r['scheme']}, {r['kv']} KV",
                str(r["requests"]),
                str(r["equal"]),
                str(r["tied"]),
                str(r["wrong"]),
                number(r["grew_bytes"], "+.2f", 1e-6),
            )
            for r in group
        ]
        header = ("model", "requests", "equal", "tied", "wrong", "MB grown")
        out.append(
            Table("continuous batching against one request at a time", header, tuple(rows), conditions(group))
        )
    return out


def engine_tables(records: Sequence[Record]) -> list[Table]:
    """One table a device: a row an engine and checkpoint, its answers beside those of the dtype's first record."""
    out = []
    for (_,), group in grouped(latest(records, "device", "dtype", "engine", "model"), "device").items():
        rows = []
        for r in group:
            first = next(other for other in group if other["dtype"] == r["dtype"])
            found = parted(first, r)
            gaps = [gap for _, _, gap in found if gap is not None]
            rows.append(
                (
                    f"{r['engine']}, of {r['model']}",
                    str(r["dtype"]),
                    number(r["tokens_per_s"], ",.0f"),
                    f"{len(r['answers']) - len(found)} of {len(r['answers'])}",
                    number(max(gaps, default=None), ".4f"),
                )
            )
        header = ("engine", "dtype", "tokens/s", "equal answers", "gap where others part, at most")
        title = f"greedy answers, and tokens a second of {group[0]['rows']} sequences at once"
        out.append(Table(title, header, tuple(rows), conditions(group)))
    return out


def parted(first: Record, other: Record) -> list[tuple[int, int, float | None]]:
    """Where an engine's answers part from the first one's: the answer, its first other token, and how far apart the first
    one's two largest logits are there, if it says so."""
    out = []
    for answer, (a, b) in enumerate(zip(first["answers"], other["answers"], strict=True)):
        pairs = enumerate(zip(a["ids"], b["ids"], strict=False))  # as many tokens as both have
        token = next((token for token, (x, y) in pairs if x != y), None)
        if token is not None:
            out.append((answer, token, a["gaps"][token] if "gaps" in a else None))
    return out


KINDS: dict[str, Callable[[Sequence[Record]], list[Table]]] = {
    "calibration": calibration_tables,
    "quality": quality_tables,
    "linear": linear_tables,
    "decode": decode_tables,
    "attention": attention_tables,
    "producer": producer_tables,
    "collective": collective_tables,
    "parallel": parallel_tables,
    "soak": soak_tables,
    "engine": engine_tables,
    "quality-peers": quality_peer_tables,
}


def number(value: float | None, spec: str, unit: float = 1.0) -> str:
    return "-" if value is None else format(value * unit, spec)


def latest(records: Sequence[Record], *keys: str) -> list[Record]:
    """The last record of each combination of keys, in the order of the combinations' first; an absent key is None."""
    return list({tuple(record.get(key) for key in keys): record for record in records}.values())


def grouped(records: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def conditions(records: Sequence[Record], *more: str) -> str:
    """What the records were made with; values that differ among them are all listed."""
    fields = [*more, "device", "torch", "triton", "commit"]
    said = []
    for field in fields:
        values = dict.fromkeys(str(r[field]) for r in records if r.get(field) is not None)
        if values:
            label = f"{field} " if field in ("torch", "triton", "commit") else ""
            said.append(label + " or ".join(values))
    dates = sorted({str(r["date"])[:10] for r in records})
    said.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    return "; ".join(said) + "."


def markdown(table: Table) -> str:
    lines = [
        f"**{table.title}**",
        "",
        row(table.header),
        row(["---", *["---:"] * (len(table.header) - 1)]),
        *(row(cells) for cells in table.rows),
        "",
        table.caption,
    ]
    return "\n".join(lines) + "\n"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rich_table(table: Table) -> "RichTable":
    """The same for a terminal."""
    from rich.table import Table as RichTable

    out = RichTable(title=table.title, caption=table.caption)
    for i, name in enumerate(table.header):
        out.add_column(name, justify="right" if i else "left")
    for cells in table.rows:
        out.add_row(*cells)
    return out


def fill(text: str, folder: Path, name: str = "the document") -> str:
    """Puts the tables of `folder`/NAME.jsonl between the markers of a markdown text; the rest stays as it is.

    Raises:
        QuantKitError: a marker is never closed, or names records that are missing or have no table.
    """
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise QuantKitError(f"{name}: a '<!-- table:NAME -->' line has no '<!-- /table -->' after it")

    def replaced(match: re.Match[str]) -> str:
        opening, source, _, closing = match.groups()
        made = "\n".join(markdown(table) for table in tables(read_records(folder / f"{source}.jsonl")))
        return f"{opening}\n{made}\n{closing}"

    return MARKED.sub(replaced, text)


def update(document: Path, folder: Path, check: bool = False) -> bool:
    """Brings a markdown file's tables up to date; returns whether they were stale. `check` writes nothing."""
    old = document.read_text()
    new = fill(old, folder, str(document))
    if new != old and not check:
        document.write_text(new)
    return new != old
