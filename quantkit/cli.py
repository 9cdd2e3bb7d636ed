"""The `quantkit` command: one function a verb. Bad input ends in one line on stderr and exit code 2."""

import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from quantkit import __version__
from quantkit.allocation import Allocation, GroupChoice
from quantkit.checkpoint import CheckpointReader, megabytes, staging_folder
from quantkit.convert import convert
from quantkit.demo import EXAMPLE, ROWS, record_of, run_demo, text_tokens
from quantkit.dry_run import DryRun, dry_run
from quantkit.errors import QuantKitError, of_a_file, out_of_memory
from quantkit.eval.decode import bench_decode
from quantkit.eval.linears import SHAPES, bench_linears, model_shapes
from quantkit.eval.peers import PEERS
from quantkit.eval.quality import evaluate
from quantkit.eval.random_model import CONFIGS, random_model
from quantkit.eval.records import environment, write_records
from quantkit.eval.tables import number, quality_tables, rich_table, tables
from quantkit.eval.tune import BUCKETS, OPS, Weight, chosen_rows, save, tunable, tune, writable
from quantkit.experts import describe_experts
from quantkit.formats.gguf import gguf_of
from quantkit.formats.writers import WRITERS
from quantkit.kernels.dispatch import target_of
from quantkit.kernels.kv_pages import KINDS
from quantkit.kernels.tuned import TableError, user_table
from quantkit.linear import QuantLinear, kernel_of, set_fp8_accumulation
from quantkit.load import is_foreign, is_quantized, load, load_model, read_quantized_config, verify
from quantkit.method import QUALITIES, STEPS, Level
from quantkit.optimize import optimize
from quantkit.packing import PARTS
from quantkit.peers import join
from quantkit.processes import launched, start
from quantkit.quantize import Progress
from quantkit.recipe import CalibrationSpec, Recipe, read_recipe
from quantkit.report import HTML, ModuleReport, Verdict, read_report
from quantkit.scheme import GROUP_SIZES, PRESETS, Scheme, parse_scheme
from quantkit.shares import Shares, shares
from quantkit.source import first_line, load_tokenizer, resolve
from quantkit.streaming import quantize_checkpoint

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
out = Console()
if not out.is_terminal:
    out = Console(width=200)  # a pipe has no width of its own: leave no name cut off
err = Console(stderr=True)
UsageError: Any = typer.BadParameter.__base__  # from click, or from the copy of it that newer typers carry
INTERRUPTED = 130  # what typer returns for Ctrl-C
TILED_SCALES = ("F16", "BF16")  # as safetensors names what `kernels/int4tiles.py` takes
INSPECTED_M = (1, 16, 256, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNIFORM = "w4a16-g128"  # what --target-bpw compares its choice with
DEFAULT_BENCHED = ("w4a16-g128", "w8a16", "fp8-w8a16", "w8a8", "fp8", "fp8-block")


def in_a_directory(path: Path | None) -> Path | None:
    """Refuses a file that cannot be written, before the work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        fault = "is a directory" if path.is_dir() else f"{path.absolute().parent} is no directory"
        raise QuantKitError(f"--json {path}: {fault}; name a file in one that exists")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON too.", callback=in_a_directory),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one, by default.")
]

Dtype = Annotated[
    str | None,
    typer.Option(help="To compute in: float32 (default on a CPU), bfloat16, float16; else the model's."),
]


def an_accumulation(mode: str) -> str:
    """Refuses a mode that there is not, before the work."""
    set_fp8_accumulation(torch.nn.Module(), mode)
    return mode


Accumulation = Annotated[
    str,
    typer.Option(
        help="Sums of e4m3 products on Hopper while a model runs: accurate (float32 every 128 columns), fast (14 bits) "
        "or auto: fast from 1024 rows of x on.",
        callback=an_accumulation,
    ),
]


def a_kind_of_kv(kind: str | None) -> str | None:
    if kind is not None and kind not in KINDS:
        raise QuantKitError(f"--kv {kind}: expected one of {', '.join(KINDS)}")
    return kind


def a_head(label: str | None) -> str | None:
    if label is not None:
        parse_scheme(label)
    return label


Kv = Annotated[
    str | None,
    typer.Option(help=f"Keys and values in pages of {', '.join(KINDS)}.", callback=a_kind_of_kv),
]
Head = Annotated[
    str | None,
    typer.Option(help="Scheme to round the LM head to, such as w8a16; left as it is.", callback=a_head),
]


def main() -> None:
    """The console script."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (QuantKitError, TableError) as error:
        fail(str(error))
    except UsageError as error:
        fail(error.format_message())
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail(
            f"out of memory ({first_line(error)}); use a smaller --samples or --window, or --device cpu where a GPU is full"
        )
    except OSError as error:
        fail(of_a_file(error))
    if code == INTERRUPTED:
        err.print("interrupted", style="red")
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str) -> None:
    err.print(f"error: {escape(' '.join(message.split()))}", style="red", soft_wrap=True, highlight=False)
    sys.exit(2)


def save_json(path: Path | None, content: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")


def pick_device(name: str | None) -> torch.device:
    """The device that the user names, or the best there is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise QuantKitError(f"--device {name}: no such kind of device; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise QuantKitError(f"--device {name}: quantkit runs on cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QuantKitError(
            f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs to torch; use cpu"
        )
    return device


def version(show: bool) -> None:
    if show:
        out.print(f"quantkit {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def about(show: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False) -> None:
    """Quantize Hugging Face language models to INT8, INT4 or FP8, run them, and see what it cost."""


def read_scheme(text: str, group_size: str | None, asymmetric: bool) -> Scheme:
    scheme = parse_scheme(text)
    if group_size is not None:
        if group_size != "channel" and not group_size.isdecimal():
            raise QuantKitError(
                f"--group-size {group_size}: expected {', '.join(map(str, GROUP_SIZES))} or channel"
            )
        if scheme.bits == 8:
            raise QuantKitError(
                f"--group-size: {scheme.name} has no groups; it is for schemes of 2 to 4 bits"
            )
        scheme = replace(scheme, group_size=None if group_size == "channel" else int(group_size))
    return replace(scheme, symmetric=False) if asymmetric else scheme


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A model directory, or a name on the Hugging Face hub.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    scheme: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRESETS)}, or in one word w4a16-g64-asym.")
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(QUALITIES)}: how the method is chosen where none is named; balanced."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"Steps joined by +, in this order: {', '.join(STEPS)}.")
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(help="Bits a weight: measures the model and chooses a scheme for each linear."),
    ] = None,
    group_size: Annotated[str | None, typer.Option(help="32, 64, 128 or channel (2 to 4 bits only).")] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="With zero points (2 to 4 bits only).")
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="YAML with scheme, method, rules, calibration.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="self (sampled from the model), a text or .jsonl file, or a datasets name; default self."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences; default 128.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a calibration sequence; default 512.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the calibration tokens; default 0.")] = None,
    allow_short: Annotated[
        bool, typer.Option("--allow-short", help="Go on where the text gives fewer sequences.")
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Show modules, sizes, memory and time; load and write nothing.")
    ] = False,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Quantize MODEL into the directory OUT."""
    if sum((recipe is not None, scheme is not None, recipe is None and target_bpw is not None)) != 1:
        raise QuantKitError(
            "give one of --scheme, --target-bpw and --recipe; of these only the last two go together"
        )
    if recipe is not None:
        if method or quality or group_size or asymmetric:
            raise QuantKitError(
                "--method, --quality, --group-size and --asymmetric go with --scheme; write them in the recipe"
            )
        plan = read_recipe(recipe)
    elif method and quality:
        raise QuantKitError("give one of --method and --quality; a quality chooses the method")
    elif target_bpw is not None and (group_size or asymmetric):
        raise QuantKitError("--group-size and --asymmetric go with --scheme; --target-bpw chooses the groups")
    else:
        label = read_scheme(scheme or UNIFORM, group_size, asymmetric).label
        plan = Recipe(label, method, quality=cast(Level, quality or "balanced"))
    if target_bpw is not None:
        plan = replace(plan, target_bpw=target_bpw)
    given: dict[str, Any] = {"source": calibration, "samples": samples, "seq_len": seq_len, "seed": seed}
    given["allow_short"] = allow_short or None
    spec = replace(plan.calibration, **{name: value for name, value in given.items() if value is not None})
    plan = replace(plan, calibration=spec)
    if dry:
        found = dry_run(model, out_dir, plan, pick_device(device))
        print_dry_run(found)
        if plan.target_bpw is not None:
            out.print(
                f"the schemes are chosen after measuring; what stands here is {plan.scheme} throughout, not "
                f"{plan.target_bpw:g} bits a weight",
                highlight=False,
                soft_wrap=True,
            )
        save_json(json_file, asdict(found) | {"seconds": found.seconds})
        return
    where = pick_device(device)
    peers = join(where) if launched() > 1 else None
    if peers is not None and not peers.first:
        quantize_checkpoint(model, out_dir, plan, where, peers=peers)
        return
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=out,
    ) as bar:
        sampling = bar.add_task("tokens sampled", total=None, visible=False)
        task = bar.add_task("blocks", total=None)
        progress = Progress(
            sampled=lambda done, total: bar.update(sampling, completed=done, total=total, visible=True),
            measure=lambda done, total: bar.update(
                task, description="measuring", completed=done, total=total
            ),
            allocation=lambda allocation: print_allocation(allocation, bar.console),
            start=lambda steps: bar.reset(task, description="blocks", total=steps),
            module=lambda module: bar.console.print(module_line(module), highlight=False, soft_wrap=True),
            step=lambda: bar.advance(task),
            note=lambda text: bar.console.print(f"note: {escape(text)}", highlight=False, soft_wrap=True),
        )
        try:
            summary = quantize_checkpoint(model, out_dir, plan, where, None, progress, True, peers)
        except KeyboardInterrupt:
            bar.stop()
            if (staging := staging_folder(out_dir)).exists():
                err.print(f"{staging} keeps the finished blocks; the same command continues", soft_wrap=True)
            raise
    if summary.calibration and summary.calibration["samples"] < spec.samples:
        out.print(
            f"note: the text gives {summary.calibration['samples']} of the {spec.samples} sequences asked for",
            highlight=False,
        )
    if experts := describe_experts(summary.modules):
        out.print(experts, highlight=False, soft_wrap=True)
    worst = max(summary.modules, key=lambda name: summary.modules[name]["error"])
    out.print(
        f"{out_dir}: {len(summary.modules)} linears, {summary.bits_per_weight:.3f} bits a weight; "
        f"weights {megabytes(summary.source_bytes)} -> {megabytes(summary.packed_bytes)}; "
        f"largest error {summary.modules[worst]['error']:.2%} ({worst}); {summary.seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    if summary.verdict is not None:
        print_verdict(summary.verdict)
    save_json(json_file, asdict(summary))


def print_verdict(verdict: Verdict) -> None:
    color = {"ok": "green", "warning": "yellow", "alarm": "red"}
    lines = [f"[{color[f.severity]}]{f.severity:7}[/]  {escape(f.text)}" for f in verdict.findings]
    text = "\n".join([f"[bold]{escape(verdict.sentence)}[/]", "", *lines])
    out.print(
        Panel(text, title="verdict", title_align="left", border_style=color[verdict.severity]),
        highlight=False,
    )


def print_dry_run(found: DryRun) -> None:
    table = Table(Column("module", overflow="fold"), "N", "K", "scheme", "method", "bits", "bytes", box=None)
    for row in found.modules:
        bits, size = f"{row['bits']:.2f}", f"{row['bytes']:,}"
        table.add_row(row["name"], str(row["N"]), str(row["K"]), row["scheme"], row["method"], bits, size)
    out.print(table)
    for remark in dict.fromkeys(row["remark"] for row in found.modules if row["remark"]):
        names = [row["name"] for row in found.modules if row["remark"] == remark]
        out.print(f"{len(names)} linears from {names[0]} on: {remark}", highlight=False, markup=False)
    table = Table("memory, by stage", "of what", "where", Column("size", justify="right"), box=None)
    for held in found.memory:
        table.add_row(held.stage, held.what, held.place, megabytes(held.bytes))
    out.print(table)
    table = Table("time, estimated", Column("FLOP", justify="right"), Column("s", justify="right"), box=None)
    for work in found.work:
        table.add_row(work.what, f"{work.products:.2g}", f"{work.seconds:.1f}")
    out.print(table)
    peak = f"{megabytes(found.peak_device)} on the device and " * bool(found.peak_device)
    for line in (
        f"{len(found.modules)} linears, {found.bits_per_weight:.3f} bits a weight; weights "
        f"{megabytes(found.source_bytes)} -> {megabytes(found.packed_bytes)}",
        f"disk: {megabytes(found.disk_needed)} until the parts are joined, {megabytes(found.disk_free)} free",
        f"memory: about {peak}{megabytes(found.peak_host)} on the host, beside Python and PyTorch",
        f"time: about {found.seconds:.0f} s at {found.rates.products / 1e9:.0f} GFLOP/s, without reading and writing files",
    ):
        out.print(line, highlight=False, soft_wrap=True)


def print_allocation(allocation: Allocation, console: Console) -> None:
    right = [Column(name, justify="right") for name in ("KL, nats", "bits/weight")]
    table = Table(Column("linears", overflow="fold"), "scheme", *right, box=None)
    for group in allocation.groups:
        bits = f"{group.bits / group.weights:.3f}"
        table.add_row(escape(short_names(group)), group.scheme, f"{group.kl:.2e}", bits)
    console.print(table)
    console.print(
        f"{allocation.bits / allocation.weights:.3f} bits a weight (target {allocation.target_bpw:g}), KL by the "
        f"sum of the linears' own {allocation.kl:.4f}; {allocation.uniform} throughout "
        f"{allocation.uniform_bits / allocation.weights:.3f}, {allocation.uniform_kl:.4f}",
        highlight=False,
        soft_wrap=True,
    )


def short_names(group: GroupChoice) -> str:
    """`model.layers.0.self_attn.{q_proj,k_proj,v_proj}`, if they are of one parent."""
    parents, children = zip(*(name.rpartition(".")[::2] for name in group.names), strict=True)
    if len(group.names) == 1 or len(set(parents)) > 1:
        return ", ".join(group.names)
    return f"{parents[0]}.{{{','.join(children)}}}"


def module_line(module: dict[str, Any]) -> str:
    remark = f"  ({module['remark']})" if module.get("remark") else ""
    return escape(
        f"{module['name']}  {module['scheme']}  {module['method']}  {module['error_of']} error {module['error']:.2%}{remark}"
    )


@app.command(name="convert")
def convert_command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A packed directory, a GGUF file, or a name on the hub.")
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(WRITERS)}.")],
    requantize: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help="Round linears anew that cannot stay the same numbers: a scheme, or for gguf q4_0, q8_0, q4_k.",
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Write SRC, packed in any format, in another one: the same codes and scales, or a refusal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=out) as bar:
        task = bar.add_task("blocks", total=None)
        progress = Progress(
            start=lambda steps: bar.reset(task, description="blocks", total=steps),
            module=lambda module: (
                None
                if module["exact"]
                else bar.console.print(rounded_line(module), highlight=False, soft_wrap=True)
            ),
            step=lambda: bar.advance(task),
        )
        try:
            done = convert(source, out_dir, to, requantize, progress)
        except KeyboardInterrupt:
            bar.stop()
            if (staging := staging_folder(out_dir)).exists():
                err.print(f"{staging} keeps the finished blocks; the same command continues", soft_wrap=True)
            raise
    for note in done.notes:
        out.print(f"note: {escape(note)}", highlight=False, soft_wrap=True)
    exact = len(done.modules) - len(done.rounded)
    out.print(
        f"{out_dir}: {done.source_format} to {done.target}; {exact} of {len(done.modules)} linears with the same numbers"
        + (f", {len(done.rounded)} rounded anew" if done.rounded else "")
        + f"; weights {megabytes(done.source_bytes)} -> {megabytes(done.packed_bytes)}",
        highlight=False,
        soft_wrap=True,
    )
    save_json(json_file, asdict(done))


def rounded_line(module: dict[str, Any]) -> str:
    return escape(
        f"{module['name']}  {module['scheme']}  weight error {module['error']:.2%}  ({module['reason']})"
    )


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `quantkit quantize` wrote.")],
    device: Device = None,
    tp: Annotated[
        int | None, typer.Option(metavar="N", help="Say what each of N processes holds with tp_plan='auto'.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Show scheme, method, sizes, every module, and the kernel that runs at each M."""
    config = read_quantized_config(folder)
    cut = None if tp is None else shares(folder, tp)
    reader = CheckpointReader(folder)
    stored, shapes = reader.tensors, reader.load([f"{name}.weight" for name in config.modules])
    target = target_of(pick_device(device))
    rows = []
    for name, entry in config.modules.items():
        scheme = config.scheme_of(name)
        tensors = {s: stored.get(f"{name}.{s}") for s in PARTS}
        codes = tensors["codes"]
        if codes is None:
            raise QuantKitError(f"{folder}: {name}.codes is missing; run quantkit verify {folder}")
        N, K = shapes[f"{name}.weight"].tolist()
        size = sum(t.stop - t.start for t in tensors.values() if t is not None)
        kernels = {M: kernel_of(scheme, target, M, N, K, torch.bfloat16) for M in INSPECTED_M}
        rows.append({"name": name, "N": N, "K": K, "bytes": size, **entry, "kernels": kernels})
    table = Table(Column("module", overflow="fold"), "N", "K", "scheme", "method", "error", "bits", box=None)
    for row in rows:
        bits = f"{8 * row['bytes'] / (row['N'] * row['K']):.2f}"
        error = f"{row['error']:.2%} {row['error_of']}" if "error" in row else "-"
        table.add_row(
            row["name"], str(row["N"]), str(row["K"]), row["scheme"], row.get("method", "-"), error, bits
        )
    out.print(table)
    packed = sum(row["bytes"] for row in rows)
    total = sum(t.stop - t.start for t in stored.values())
    weights = sum(row["N"] * row["K"] for row in rows)
    out.print(
        f"{', '.join(config.schemes)}: {len(rows)} packed linears, {8 * packed / weights:.3f} bits a weight"
    )
    out.print(
        f"packed {megabytes(packed)}, all tensors {megabytes(total)}, format version {config.format_version}"
    )
    if config.calibration:
        spec = config.calibration
        out.print(f"calibrated on {spec['samples']} x {spec['seq_len']} tokens of {spec['source']}")
    columns = [Column(f"M = {M}", overflow="fold") for M in INSPECTED_M]
    table = Table(f"kernel on {target}, bfloat16 x", *columns, box=None)
    for key in sorted({(row["scheme"], row["N"], row["K"]) for row in rows}):
        row = next(row for row in rows if (row["scheme"], row["N"], row["K"]) == key)
        table.add_row(f"{key[0]} ({key[1]}, {key[2]})", *row["kernels"].values())
    out.print(table)
    if cut is not None:
        print_shares(cut)
    report = read_report(folder)
    if report is not None:
        if len((table := report_table(report.modules)).columns) > 2:  # more than the error, which is above
            out.print(table)
        out.print(f"{folder / HTML} shows it all", highlight=False, soft_wrap=True)
        if report.verdict is not None:
            print_verdict(report.verdict)
    content = {"format_version": config.format_version, "target": target, "bytes": total, "modules": rows}
    content |= {} if cut is None else {"tensor_parallel": asdict(cut)}
    save_json(json_file, content if report is None else {**content, "report": asdict(report)})


def print_shares(cut: Shares) -> None:
    lines = [
        f"tensor parallel over {cut.ranks}: at most {megabytes(cut.most)} a process, {megabytes(cut.whole)} of it on all; "
        f"{cut.most / cut.total:.1%} of {megabytes(cut.total)}"
    ]
    if cut.regrouped:
        name, columns = next(iter(cut.regrouped.items()))
        lines.append(
            f"{len(cut.regrouped)} linears from {name} on get groups of {columns} columns, with the same numbers"
        )
    lines.append(f"it can be cut over {', '.join(map(str, cut.working))}")
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True)


def report_table(modules: Sequence[ModuleReport]) -> Table:
    """What calibration measured of each module, in the columns that hold anything, within 100 characters."""
    columns: list[tuple[str, Callable[[ModuleReport], str]]] = [
        ("error", lambda m: f"{m.error:.2%}"),
        ("nearest", lambda m: number(m.error_rtn, ".2%")),
        ("damping", lambda m: number(m.damp_percent, "g")),
        ("range", lambda m: number(m.clip, ".2f")),
        ("tokens", lambda m: number(m.tokens, ".0f")),
        ("max |w|", lambda m: number(m.weight_absmax, ".3g")),
        ("max |x|", lambda m: number(m.input_absmax, ".3g")),
    ]
    kept = [(name, text) for name, text in columns if any(text(module) != "-" for module in modules)]
    table = Table(
        Column("module", overflow="fold"), *(Column(name, justify="right") for name, _ in kept), box=None
    )
    for module in modules:
        table.add_row(module.name, *(text(module) for _, text in kept))
    return table


@app.command(name="verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `quantkit quantize` wrote.")],
    json_file: JsonFile = None,
) -> None:
    """Check every tensor's presence, shape, dtype and checksum."""
    findings = verify(folder)
    save_json(json_file, {"folder": str(folder), "findings": findings})
    for line in findings[:-1]:
        err.print(escape(line), highlight=False, soft_wrap=True)
    if findings:
        raise QuantKitError(findings[-1])
    out.print(f"{folder}: {len(CheckpointReader(folder).tensors)} tensors, all as written")


def open_model(name: str, device: torch.device, dtype: torch.dtype | str) -> transformers.PreTrainedModel:
    """A quantized directory (checked first), or any model that transformers loads."""
    path = Path(name)
    if path.exists() and gguf_of(path) is not None and not (path / "config.json").is_file():
        raise QuantKitError(
            f"{name}: a GGUF, whose tokenizer quantkit does not read; put the original model's config.json and tokenizer files "
            f"into its directory and name that, or into OUT after quantkit convert {name} OUT --to quantkit"
        )
    folder = resolve(name)
    if is_quantized(folder):
        read_quantized_config(folder)
        if findings := verify(folder):
            raise QuantKitError(
                f"{findings[0]} ({len(findings)} findings; quantkit verify {folder} lists them)"
            )
    if is_foreign(folder):
        return load(folder, device, dtype=dtype)
    return load_model(folder, device, dtype=dtype)


def compute_dtype(device: torch.device, name: str | None = None) -> torch.dtype | str:
    """The dtype that the user names, or what suits the device.

    A CPU computes in float32: faster there than bfloat16, and without its rounding. A GPU in the model's own.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise QuantKitError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


@app.command(name="eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A quantized directory, or any model.")],
    against: Annotated[
        str | None, typer.Option(help="The original: adds KL divergence and agreement.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A UTF-8 text file; prose of CPython's own, by default.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="wikitext, c4 or ORG/NAME[:CONFIG][:SPLIT].")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window; windows do not overlap.")] = 1024,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many windows.")] = None,
    kv: Kv = None,
    fp8_accumulation: Accumulation = "auto",
    dtype: Dtype = None,
    device: Device = None,
    json_file: JsonFile = None,
    records: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append the result to a .jsonl file.")
    ] = None,
) -> None:
    """Perplexity, and divergence from the original, with the protocol stated."""
    if text is not None and dataset is not None:
        raise QuantKitError("give one of --text and --dataset")
    if text is not None and not Path(text).is_file():
        raise QuantKitError(f"--text {text}: no such file")
    where = pick_device(device)
    computed = compute_dtype(where, dtype)
    subject = open_model(model, where, computed)
    set_fp8_accumulation(subject, fp8_accumulation)
    if kv is not None:
        optimize(subject, kv=kv)
    reference = open_model(against, where, computed) if against else None
    tokens = text_tokens(load_tokenizer(resolve(model)), text or dataset)
    with Bar(
        TextColumn("windows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=out
    ) as bar:
        task = bar.add_task("", total=None)
        quality = evaluate(
            subject,
            tokens,
            window,
            reference,
            limit,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    record = record_of(subject, resolve(model), quality, text or dataset, against or model)
    for note in quality.notes:
        out.print(f"note: {note}", highlight=False)
    for table in quality_tables([record]):
        out.print(rich_table(table))
    out.print(f"in memory {megabytes(record['memory_bytes'])}, on disk {megabytes(record['disk_bytes'])}")
    save_json(json_file, record)
    if records is not None:
        write_records(records, [record])


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A quantized directory, or any model.")],
    prompt: Annotated[
        list[str], typer.Argument(help="What to continue; several are generated side by side, - reads stdin.")
    ],
    new: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: always the likeliest token, else it is drawn.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Draws from the likeliest tokens of so much probability; 1."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn; 0.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put prompts into the model's chat template.")
    ] = False,
    kv: Kv = None,
    head: Head = None,
    fp8_accumulation: Accumulation = "auto",
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Continue a text with an optimized model; the text goes to stdout, what it took to stderr."""
    if temperature == 0 and (top_p is not None or seed is not None):
        raise QuantKitError("--top-p and --seed go with --temperature, without which nothing is drawn")
    where = pick_device(device)
    texts = [sys.stdin.read() if text == "-" else text for text in prompt]
    subject = open_model(model, where, compute_dtype(where, dtype))
    tokenizer = load_tokenizer(resolve(model))
    set_fp8_accumulation(subject, fp8_accumulation)
    try:
        optimize(subject, head, kv or "bf16")
    except QuantKitError as error:
        if kv or head:
            raise
        err.print(f"note: not optimized: {error}", highlight=False, soft_wrap=True)
    given = prompt_tokens(tokenizer, texts, chat).to(where)
    context = getattr(subject.config.get_text_config(), "max_position_embeddings", None)
    if context and given["input_ids"].shape[1] + new > context:
        raise QuantKitError(
            f"a prompt of {given['input_ids'].shape[1]} tokens and {new} new ones exceed the model's context of "
            f"{context}; lower --new"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed or 0)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p or 1.0, "top_k": 0}
    streamer = None
    if len(texts) == 1:
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    begun = time.monotonic()
    found = subject.generate(  # type: ignore[operator]
        **given, **sampling, max_new_tokens=new, pad_token_id=tokenizer.pad_token_id, streamer=streamer
    )
    made = found[:, given["input_ids"].shape[1] :]
    tokens, seconds = int((made != tokenizer.pad_token_id).sum()), time.monotonic() - begun
    if streamer is None:
        for prompted, text in zip(texts, tokenizer.batch_decode(made, skip_special_tokens=True), strict=True):
            out.print(f"{prompted}\n{text}\n", markup=False, highlight=False, soft_wrap=True)
    err.print(
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second, the prompt's time included"
    )


def prompt_tokens(tokenizer: Any, texts: list[str], chat: bool) -> transformers.BatchEncoding:
    """Prompts as tokens, padded on the left; a tokenizer without padding pads with its end of text."""
    if chat and not tokenizer.chat_template:
        raise QuantKitError("--chat: the tokenizer has no chat template; leave --chat out")
    if chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id or 0
    tokenizer.padding_side = "left"
    given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
    if given["input_ids"].shape[1] == 0 or not given["attention_mask"].any(1).all():
        raise QuantKitError("a prompt has no tokens; give some text")
    return given


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="A quantized directory, or any model.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The original, timed beside it.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help=f"Random weights in the shapes of {', '.join(SHAPES)}.")
    ] = None,
    scheme: Annotated[
        list[str] | None, typer.Option(help="With --shapes: schemes, one an option; all by default.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences at once, one an option; 1.")
    ] = None,
    m: Annotated[
        list[int] | None, typer.Option("--m", min=1, help="Rows of x for the linears; 1, 16, 256, 4096.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 32,
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs of which the median counts, after one that does not.")
    ] = 3,
    linears: Annotated[bool, typer.Option("--linears/--no-linears", help="Time the linears.")] = True,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers/--no-peers", help="With --shapes: also time vLLM's kernels and the like, if there."
        ),
    ] = True,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Time prefill and decode.")] = True,
    optimized: Annotated[
        bool, typer.Option("--optimize", help="Fuse the decoder blocks first, as quantkit.optimize does.")
    ] = False,
    kv: Kv = None,
    head: Head = None,
    fp8_accumulation: Accumulation = "auto",
    dtype: Dtype = None,
    device: Device = None,
    json_file: JsonFile = None,
    records: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Append to FOLDER/linears.jsonl and FOLDER/decode.jsonl."),
    ] = None,
) -> None:
    """Tokens per second, and the time of each linear against bfloat16 and the memory limit.

    Under torchrun, with --no-linears: of a model that is cut over the processes.
    """
    if (model is None) == (shapes is None):
        raise QuantKitError("give one of DIR and --shapes")
    if shapes is not None and shapes not in SHAPES:
        raise QuantKitError(f"--shapes {shapes}: known are {', '.join(SHAPES)}")
    if model is not None and scheme:
        raise QuantKitError("--scheme goes with --shapes; a directory has its scheme")
    if (kv or head) and not optimized:
        raise QuantKitError("--kv and --head go with --optimize, which gives a model its own cache and head")
    where, ranks = pick_device(device), launched()
    if ranks > 1:
        if linears:
            raise QuantKitError(f"linears are timed by one process, not {ranks}; give --no-linears")
        if against:
            raise QuantKitError(f"--against: the original is timed by one process, not {ranks}; leave it out")
        start(where.type)
        where = torch.device("cuda", torch.cuda.current_device()) if where.type == "cuda" else where
    group = torch.distributed.group.WORLD if ranks > 1 else None
    first = group is None or torch.distributed.get_rank() == 0
    if shapes is not None and decode and device is None and where.type == "cpu":
        raise QuantKitError(
            "--shapes: decode builds the whole model; give --no-decode, or --device cpu to do it here"
        )
    Ms, batches = m or list(INSPECTED_M), batch or [1]
    found: list[dict[str, Any]] = []

    def keep(record: dict[str, Any], file: str) -> None:
        found.append(record)
        if records is not None and first:
            write_records(records / file, [record])

    def time_linears(shape_list: list[Any], schemes: list[Scheme]) -> None:
        if linears:
            bench_linears(
                shape_list,
                schemes,
                Ms,
                where,
                peers=PEERS if peers and shapes is not None else (),
                say=lambda line: out.print(escape(line), highlight=False, soft_wrap=True),
                on_record=lambda r: keep(r, "linears.jsonl"),
            )

    def time_decode(subject: Any, name: str) -> None:
        for size in batches if decode else []:
            keep(bench_decode(subject, size, prompt, new, repeats=repeats, name=name), "decode.jsonl")

    if shapes is not None:
        schemes = [parse_scheme(label) for label in scheme or DEFAULT_BENCHED]
        time_linears(list(SHAPES[shapes]), schemes)
        why_not = unpacked_left_out(shapes, where, ranks) if decode and shapes in CONFIGS else None
        if why_not and first:
            out.print(f"note: without the model in bfloat16: {why_not}", highlight=False, soft_wrap=True)
        unpacked = [] if why_not else [None]
        for one in [*unpacked, *schemes] if decode and shapes in CONFIGS else []:
            made = random_model(shapes, one, device=where, group=group)
            if optimized:
                optimize(made, head, kv or "bf16")
            set_fp8_accumulation(made, fp8_accumulation)
            time_decode(made, shapes)
            del made  # before the next one is made
            if where.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    else:
        computed = compute_dtype(where, dtype)
        if ranks > 1:
            subject = load(str(model), tp_plan="auto", dtype=computed)
        else:
            subject = open_model(str(model), where, computed)
        set_fp8_accumulation(subject, fp8_accumulation)
        if optimized:
            optimize(subject, head, kv or "bf16")
        name = Path(against or str(model)).name
        time_decode(subject, name)
        head_of = subject.get_output_embeddings()
        packed = {q.scheme for q in subject.modules() if isinstance(q, QuantLinear) and q is not head_of}
        time_linears(model_shapes(subject), sorted(packed, key=lambda s: s.label))
        if against:
            time_decode(open_model(against, where, computed), name)
    if not first:
        return
    for kind in ("linear", "decode"):
        if chosen := [record for record in found if record["kind"] == kind]:
            for table in tables(chosen):
                out.print(rich_table(table))
    save_json(json_file, found)


def unpacked_left_out(shapes: str, device: torch.device, ranks: int) -> str | None:
    """Why a random model in bfloat16 is not timed beside the packed ones; None: it is."""
    if ranks > 1:
        return "it is not cut over processes"
    if device.type != "cuda":
        return None
    config = transformers.LlamaConfig(**CONFIGS[shapes])
    with torch.device("meta"):
        needed = 2 * sum(p.numel() for p in transformers.LlamaForCausalLM(config).parameters())
    free = torch.cuda.mem_get_info(device)[0]
    return None if needed < 0.9 * free else f"{needed * 1e-9:.0f} GB, and {free * 1e-9:.0f} are free"


@app.command(name="tune")
def tune_command(
    shapes: Annotated[
        list[str] | None, typer.Option(help=f"The linears of {', '.join(SHAPES)}, one an option.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="N,K", help="Output and input features, one an option.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The shapes and schemes of a directory's linears.")
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Schemes, one an option; w4a16, or the model's own, by default."),
    ] = None,
    m: Annotated[
        list[int] | None,
        typer.Option("--m", min=1, help=f"Rows of x, one an option; {', '.join(map(str, BUCKETS))}."),
    ] = None,
    group_size: Annotated[
        list[str] | None,
        typer.Option(help="32, 64, 128 or channel, one an option; 128, or the model's own, by default."),
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The table to add to; the one that quantkit reads, by default."
        ),
    ] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Time the kernels' launches on this GPU and keep the fastest for each shape, scheme and M."""
    weights = tuned_weights(shapes or [], shape or [], model, scheme or [], group_size or [])
    where = pick_device(device)
    if where.type != "cuda":
        raise QuantKitError(
            "tune: needs a GPU, and this would run on a CPU; run it on the machine that serves"
        )
    path = out_file or user_table(target_of(where))
    writable(path)
    found: list[dict[str, Any]] = []
    made_with = environment(where)

    def keep(entry: dict[str, Any]) -> None:
        found.append(entry)
        save(path, {**made_with, "entries": [entry]})

    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=out,
    ) as bar:
        task = bar.add_task("launches", total=None)
        try:
            tune(
                weights,
                m or BUCKETS,
                where,
                say=lambda line: bar.console.print(escape(line), highlight=False, soft_wrap=True),
                on_start=lambda name, total: bar.update(task, description=name, total=total),
                on_candidate=lambda: bar.advance(task),
                on_entry=keep,
            )
        except KeyboardInterrupt:
            bar.stop()
            if found:
                err.print(f"{path} keeps the {len(found)} entries measured so far", soft_wrap=True)
            raise
    right = [Column(name, justify="right") for name in ("us", "default us", "speed-up")]
    table = Table(
        "weight (N, K)", "scheme", "M", "kernel", Column("launch", overflow="fold"), *right, box=None
    )
    for cells in chosen_rows(found):
        table.add_row(*cells)
    out.print(table)
    out.print(f"{path}: {len(found)} entries written", highlight=False, soft_wrap=True)
    save_json(json_file, {**made_with, "file": str(path), "entries": found})


def tuned_weights(
    named: list[str], given: list[str], model: Path | None, schemes: list[str], group_sizes: list[str]
) -> list[Weight]:
    """(N, K, scheme) of what the options of `quantkit tune` name, each once."""
    if not named and not given and model is None:
        raise QuantKitError("give at least one of --shapes, --shape and --model")
    pairs: list[tuple[int, int]] = []
    for name in named:
        if name not in SHAPES:
            raise QuantKitError(f"--shapes {name}: known are {', '.join(SHAPES)}")
        pairs += [(N, K) for _, N, K in SHAPES[name]]
    for text in given:
        sizes = text.split(",")
        if len(sizes) != 2 or not all(size.strip().isdecimal() and int(size) for size in sizes):
            raise QuantKitError(f"--shape {text}: expected N,K, two positive numbers such as 28672,4096")
        pairs.append((int(sizes[0]), int(sizes[1])))
    labels = schemes or ["w4a16"]
    groups: list[str | None] = [*group_sizes] or [None]
    asked = [tunable(read_scheme(label, group, False)) for label in labels for group in groups]
    weights = [(N, K, scheme) for N, K in pairs for scheme in asked]
    if model is not None:
        packed = tunable_weights(model)
        for N, K, own in packed:
            regrouped = group_sizes and PRESETS[own.name].group_size is not None
            of_own = (
                [tunable(read_scheme(own.name, group, False)) for group in groups] if regrouped else [own]
            )
            weights += [(N, K, scheme) for scheme in (asked if schemes else of_own)]
    return list(dict.fromkeys(weights))


def tunable_weights(folder: Path) -> list[Weight]:
    """The distinct (N, K, scheme) of a directory's linears, of those whose kernels have launches to tune."""
    config = read_quantized_config(folder)
    reader = CheckpointReader(folder)
    stored = reader.tensors
    names = [name for name in config.modules if config.scheme_of(name).op in OPS]
    absent = [t for name in names for t in (f"{name}.scales", f"{name}.weight") if t not in stored]
    if absent:
        raise QuantKitError(f"{folder}: {absent[0]} is missing; run quantkit verify {folder}")

    def tiled(name: str) -> bool:
        return config.scheme_of(name).op != "w4a16" or stored[f"{name}.scales"].dtype in TILED_SCALES

    names = [name for name in names if tiled(name)]
    if not names:
        raise QuantKitError(
            f"{folder}: no linear of 8 bits or w4a8, nor of w4a16 with scales in float16 or bfloat16; only their "
            f"launches can be tuned"
        )
    shapes = reader.load([f"{name}.weight" for name in names])
    weights = [(*shapes[f"{name}.weight"].tolist(), tunable(config.scheme_of(name))) for name in names]
    return list(dict.fromkeys(weights))


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Argument(help="Another model than the one that comes with quantkit.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Evaluation text; prose of CPython's own, by default.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="self, a text file, or a datasets name.")] = "self",
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 32,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a calibration sequence.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Evaluation windows of 1024 tokens.")] = 4,
    dtype: Dtype = None,
    device: Device = None,
    json_file: JsonFile = None,
    records: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the records as JSON lines.")
    ] = None,
) -> None:
    """Quantize a small model to every scheme, load each, and say what it cost and gained."""
    where = pick_device(device)
    folder = resolve(model) if model else EXAMPLE
    spec = CalibrationSpec(calibration, samples, seq_len)
    with Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=out) as bar:
        task = bar.add_task("original", total=len(ROWS) + 1)

        def advance(name: str) -> None:
            bar.update(task, advance=1, description=name)

        found = run_demo(folder, text, spec, windows, where, compute_dtype(where, dtype), advance)
    for table in quality_tables(found):
        out.print(rich_table(table))
    save_json(json_file, found)
    if records is not None:
        records.unlink(missing_ok=True)
        write_records(records, found)


if __name__ == "__main__":
    main()
