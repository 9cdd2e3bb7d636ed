"""Quality of quantkit beside other tools: the same calibration tokens, the same windows, one evaluation.

Each tool runs `peer_driver.py` in an environment of its own, which is made when it is first needed, and hands back
dequantized weights. They are put into the original model and evaluated in float32; where the setting rounds
activations, every linear of the decoder blocks reads x rounded as quantkit's runtime rounds it. quantkit's own rows
run the packed checkpoint as a user would. LM head and embeddings stay as they are everywhere. All of it runs on the CPU.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import quantkit
from quantkit.demo import text_tokens
from quantkit.errors import QuantKitError
from quantkit.eval import peer_driver
from quantkit.eval.quality import evaluate
from quantkit.eval.records import Record, environment, read_records, write_records
from quantkit.eval.sizes import bits_per_weight
from quantkit.kernels.cpu import quantize_activations
from quantkit.load import load, load_model
from quantkit.models import decoder_blocks, linears
from quantkit.quantize import calibration_tokens
from quantkit.recipe import CalibrationSpec, Recipe
from quantkit.source import first_line, load_tokenizer
from quantkit.streaming import quantize_checkpoint

Activation = Literal["int8", "fp8"]
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SCALE_BITS = 16
FOLDERS = re.compile(r"/(?:[^\s/'\"()]+/)+")  # of an absolute path: they are of this machine alone
DRIVER = Path(peer_driver.__file__).resolve()
OURS = "quantkit"
FIGURES = ("perplexity", "reference_perplexity", "ratio", "kl", "top1")
SAME_RUN = ("model", "text", "calibration", "windows", "setting", "tool", "method", "seed", "version")


@dataclass(frozen=True)
class Setting:
    """What all tools of one part of the table quantize to.

    Attributes:
        scheme: quantkit's name of it.
        bits: of a weight.
        group_size: columns of a row that share a scale; None: the whole row.
        activation: what every token's x is rounded to, by one scale a token.
    """

    name: str
    scheme: str
    bits: int
    group_size: int | None = None
    activation: Activation | None = None


W4, W4_ASYMMETRIC, W4_CHANNEL, W3, W8A8, FP8, W4A8 = (
    Setting("W4 g128", "w4a16-g128", 4, 128),
    Setting("W4 g128, asymmetric", "w4a16-g128-asym", 4, 128),
    Setting("W4 per channel", "w4a16-channel", 4),
    Setting("W3 g128", "w3a16-g128", 3, 128),
    Setting("W8A8", "w8a8", 8, activation="int8"),
    Setting("FP8", "fp8", 8, activation="fp8"),
    Setting("W4A8", "w4a8", 4, 128, activation="int8"),
)
SETTINGS = {setting.scheme: setting for setting in (W4, W4_ASYMMETRIC, W4_CHANNEL, W3, W8A8, FP8, W4A8)}


@dataclass(frozen=True)
class Tool:
    """Another quantization tool.

    Attributes:
        name: of its package, and its key in `peer_driver.PEERS`.
        version: the one that is installed.
        beside: further packages, installed before it.
        options: of its own `pip install`.
        variables: of the environment that it runs in.
    """

    name: str
    version: str
    beside: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


TORCH = (
    "torch==2.13.0"  # first and alone, so that the build is the one that the index offers for this machine
)
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("llmcompressor", "0.14.0.1"),
        # Asks for torch >= 2.14.1 and runs on 2.13: installed without its requirements, which are named here instead.
        # With two cores its own choice of worker threads is none, and it stops.
        Tool(
            "gptqmodel",
            "7.7.0",
            beside=(
                "setuptools==84.2.1",
                "accelerate==1.15.0",
                "datasets==5.2.0",
                "defuser==0.0.28",
                "device-smi==0.5.7",
                "dill==0.4.1",
                "logbar==0.4.15",
                "maturin==1.16.0",
                "ninja==1.13.2",
                "pillow==13.0.0",
                "protobuf==7.36.2",
                "pypcre==0.6.4",
                "requests==2.34.2",
                "threadpoolctl==3.8.0",
                "tokenicer==0.0.14",
                "torchao==0.18.0",
                "transformers==5.23.0",
            ),
            options=("--no-deps", "--no-build-isolation"),
            variables={"GPTQMODEL_CPU_WORKERS": "2"},
        ),
        Tool("hqq", "0.2.8.post1"),
        # Archived; 4.51.3 is the last transformers that it was tested with.
        Tool("autoawq", "0.2.9", beside=("transformers==4.51.3", "datasets==3.6.0")),
        Tool("auto-round", "0.16.1"),
    )
}


@dataclass(frozen=True)
class Row:
    """One method of one tool at one setting.

    Attributes:
        method: quantkit's name of it, or the tool's in `peer_driver.py`.
        seeded: whether figures depend on the calibration or on a draw; a row that does not runs once.
        samples: calibration sequences, if fewer than all others get.
        zero_bits: stored for each zero point; 0: symmetric.
        iterations: of a method that trains.
    """

    setting: Setting
    tool: str
    method: str
    seeded: bool = True
    samples: int | None = None
    zero_bits: int = 0
    iterations: int | None = None

    @property
    def label(self) -> str:
        """The method with what sets it apart from its tool's other rows."""
        parts = [self.method]
        parts += ["asymmetric"] if self.zero_bits else []
        parts += [f"{self.samples} sequences"] if self.samples else []
        parts += [f"{self.iterations} iterations"] if self.iterations else []
        return ", ".join(parts)


# quantkit's methods, as what a recipe says of them
RECIPES = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
}
ROWS = (
    *(
        Row(setting, OURS, method, seeded=method != "rtn")
        for setting in SETTINGS.values()
        for method in RECIPES
        if setting.bits < 8 or method not in ("gptq", "awq")
    ),
    Row(W4, "llmcompressor", "gptq"),
    Row(W4, "llmcompressor", "awq", samples=16, zero_bits=4),
    Row(W4_CHANNEL, "llmcompressor", "gptq"),
    Row(W3, "llmcompressor", "gptq"),
    Row(W8A8, "llmcompressor", "smoothquant+gptq"),
    Row(FP8, "llmcompressor", "rtn", seeded=False),
    Row(W4A8, "llmcompressor", "gptq"),
    Row(W4A8, "llmcompressor", "smoothquant+gptq"),
    Row(W4, "hqq", "hqq", seeded=False, zero_bits=16),
    Row(W4_CHANNEL, "hqq", "hqq", seeded=False, zero_bits=16),
    Row(W3, "hqq", "hqq", seeded=False, zero_bits=16),
    Row(W4, "gptqmodel", "gptq"),
    Row(W4_CHANNEL, "gptqmodel", "gptq"),
    Row(W3, "gptqmodel", "gptq"),
    Row(W4, "autoawq", "awq", samples=16, zero_bits=4),
    Row(W4, "auto-round", "autoround", iterations=200),
    Row(W3, "auto-round", "autoround", iterations=200),
)


@dataclass(frozen=True)
class Protocol:
    """What all rows share.

    Attributes:
        text: evaluation text, tokenized whole; `windows` windows of 1024 tokens of it are read.
        calibration: of every tool; the seed is that of the run.
        device: where quantkit's own rows are made; other tools run on the CPU.
    """

    text: str
    windows: int
    calibration: CalibrationSpec
    device: str = "cpu"

    def calibration_of(self, row: Row, seed: int | None) -> CalibrationSpec:
        samples = min(row.samples or self.calibration.samples, self.calibration.samples)
        return replace(self.calibration, samples=samples, seed=seed or 0)


def run_table(
    rows: Sequence[Row],
    models: Sequence[Path],
    seeds: Sequence[int],
    protocol: Protocol,
    folder: Path,
    records: Path,
    say: Callable[[str], None],
) -> None:
    """Appends a record for every row, model and seed that has none yet, and says what it does.

    Args:
        rows: in the order in which they run.
        models: directories of the originals.
        folder: where environments and dequantized weights are kept, for a run that goes on from here.
        records: a file of JSON lines. A tool that cannot be installed or fails leaves a record with the reason;
            to try it again, remove the line. What this quantkit does not know is said, and leaves no record.
    """
    known = read_records(records) if records.is_file() else []
    done = {tuple(record[key] for key in SAME_RUN) for record in known}
    for model, row in ((model, row) for model in models for row in rows):
        for seed in seeds if row.seeded else (None,):
            record = header(row, model, seed, protocol)
            name = f"{model.name}, {row.setting.name}, {row.tool} {row.label}" + (
                f", seed {seed}" if row.seeded else ""
            )
            if tuple(record[key] for key in SAME_RUN) in done:
                say(f"{name}: measured before")
                continue
            measure = ours if row.tool == OURS else partial(peers, folder=folder, say=say)
            try:
                record |= measure(row, model, seed, protocol)
            except Unknown as error:
                say(f"{name}: skipped, {error}")
                continue
            where = protocol.device if row.tool == OURS else "cpu"
            write_records(records, [{**record, **environment(where)}])
            say(f"{name}: {outcome(record)}")


def header(row: Row, model: Path, seed: int | None, protocol: Protocol) -> Record:
    """What a record says before anything is measured; `SAME_RUN` of it tells one run from another."""
    spec = protocol.calibration_of(row, seed)
    return {
        "kind": "quality-peers",
        "model": model.name,
        "text": Path(protocol.text).name,
        "calibration": f"{spec.samples} x {spec.seq_len} tokens of {Path(spec.source).name}",
        "windows": protocol.windows,
        "setting": row.setting.name,
        "tool": row.tool,
        "method": row.label,
        "seed": seed,
        "version": code_version() if row.tool == OURS else TOOLS[row.tool].version,
    }


@cache
def code_version() -> str:
    """The package's version and a hash of what decides the packed weights."""
    root = Path(quantkit.__file__).parent
    files = [*root.glob("*.py"), *(root / "calibration").glob("*.py")]
    digest = sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
    return f"{quantkit.__version__}+{digest[:8]}"


def outcome(record: Record) -> str:
    if record["reason"]:
        return f"not measured: {record['reason']}"
    return f"perplexity {record['perplexity']:.3f}, KL {record['kl']:.4f}, {record['seconds']:.0f} s"


class Unknown(QuantKitError):
    """This quantkit has no such scheme or method."""


def ours(row: Row, model: Path, seed: int | None, protocol: Protocol) -> Record:
    """Quantizes with this very quantkit, loads the checkpoint and evaluates it as it runs, in float32."""
    spec = protocol.calibration_of(row, seed)
    try:
        recipe = Recipe(row.setting.scheme, calibration=spec, **RECIPES[row.method])  # type: ignore[arg-type]
    except (
        QuantKitError,
        TypeError,
    ) as error:  # an unknown scheme or method; a field that recipes do not have
        raise Unknown(f"this quantkit does not know it: {first_line(error)}") from error
    tokens = calibration(model, spec)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "model"
        processor = peer_driver.processor_seconds()
        summary = quantize_checkpoint(model, out, recipe, protocol.device, tokens)
        used = {"seconds": summary.seconds, "cpu_seconds": peer_driver.processor_seconds() - processor}
        quantized = load(out, protocol.device, dtype=torch.float32)
        return judged(quantized, model, protocol, bits_per_weight(quantized)) | used


def peers(
    row: Row, model: Path, seed: int | None, protocol: Protocol, folder: Path, say: Callable[[str], None]
) -> Record:
    """Runs the tool in its environment, unless its weights are in `folder`, and evaluates what it made."""
    spec = protocol.calibration_of(row, seed)
    size = f"{spec.samples}x{spec.seq_len}"
    out = (
        folder
        / "weights"
        / f"{model.name}-{size}"
        / row.setting.scheme
        / f"{row.tool}-{row.method}-{row.iterations or 0}-seed{seed}"
    )
    try:
        if not (out / "run.json").is_file():
            python = installed(TOOLS[row.tool], folder / "environments", say)
            drive(row, model, calibration(model, spec), spec.seed, out, python)
        quantized = with_weights(model, load_file(out / "weights.safetensors"))
    except Failed as error:
        return {
            **dict.fromkeys(FIGURES),
            "reason": str(error),
        }
    run = json.loads((out / "run.json").read_text())
    if row.setting.activation:
        round_inputs(quantized, row.setting.activation)
    figures = judged(quantized, model, protocol, stored_bits(quantized, row))
    used = ("seconds", "cpu_seconds", "peer_torch", "peer_transformers")
    return {**figures, **{key: run[key] for key in used}}


class Failed(QuantKitError):
    """A tool cannot be installed, or stopped with an error."""


def installed(tool: Tool, folder: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of the tool's environment, which is made if there is none.

    Raises:
        Failed: pip cannot install it.
    """
    home = folder / f"{tool.name}-{tool.version}"
    python = home / "bin" / "python"
    log, finished = home / "install.log", home / "installed"
    if finished.is_file():
        return python
    say(f"{tool.name} {tool.version}: being installed into {home}")
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    package = f"{tool.name}=={tool.version}"
    for wanted in ([TORCH], tool.beside, [*tool.options, package]):
        if not wanted:
            continue
        command = [str(python), "-I", "-m", "pip", "install", *wanted]
        if reason := failure(command, log, os.environ):
            raise Failed(f"pip cannot install {package}: {reason}")
    finished.touch()
    return python


def drive(row: Row, model: Path, tokens: Tensor, seed: int, out: Path, python: Path) -> None:
    """Runs the tool on a model; leaves `weights.safetensors` and `run.json` in `out`.

    Raises:
        Failed: it stopped with an error, or changed no weight.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.save(tokens, out / "tokens.pt")
    job = {
        "peer": row.tool,
        "model": str(model.absolute()),
        "tokens": str((out / "tokens.pt").absolute()),
        "out": str(out.absolute()),
        "seed": seed,
        "bits": row.setting.bits,
        "group_size": row.setting.group_size,
        "activation": row.setting.activation,
        "method": row.method,
        "symmetric": not row.zero_bits,
        "iterations": row.iterations,
    }
    (out / "job.json").write_text(json.dumps(job))
    # isolated: the folder of the script, full of names such as 'records', stays off the module path
    command = [
        str(python),
        "-I",
        str(DRIVER),
        str((out / "job.json").absolute()),
    ]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **TOOLS[row.tool].variables}
    if reason := failure(command, out / "log.txt", variables):
        raise Failed(f"{row.tool} stopped: {reason}")


def failure(command: Sequence[str], log: Path, variables: "os._Environ[str] | dict[str, str]") -> str | None:
    """Runs a command with its output in `log`; if it fails, the last line that speaks of an error, without paths."""
    with log.open("a") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=variables, cwd=log.parent).returncode
    if not code:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    if code < 0 or not telling:  # a signal leaves no message
        telling = [f"exit code {code}, its last line: {lines[-1] if lines else ''}"]
    return FOLDERS.sub("", telling[-1])


def calibration(model: Path, spec: CalibrationSpec) -> Tensor:
    """The tokens of a text, int64 [samples, seq_len]: the very same for quantkit and for every other tool."""
    return calibration_tokens(spec, load_tokenizer(model), lambda: load_model(model, "cpu"))


def with_weights(model: Path, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The original in float32 with these of its tensors replaced.

    Raises:
        Failed: there are none, or the model has none of that name and shape.
    """
    original = load_model(model, "cpu", dtype=torch.float32)
    state = original.state_dict()
    for name, tensor in weights.items():
        if name not in state or state[name].shape != tensor.shape:
            expected = f"{list(state[name].shape)}" if name in state else "no such tensor"
            raise Failed(f"its weights have {name} {list(tensor.shape)}, the model has {expected}")
    packed = [f"{name}.weight" for name in block_linears(original)]
    if missing := [name for name in packed if name not in weights]:
        raise Failed(f"it left {len(missing)} of {len(packed)} weights as they were, {missing[0]} first")
    original.load_state_dict(weights, strict=False)
    return original


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the decoder blocks by name: those that every tool quantizes."""
    prefix, blocks = decoder_blocks(model)
    return linears(blocks, f"{prefix}.")


def round_inputs(model: nn.Module, activation: Activation) -> None:
    """From here on, the linears of a model's decoder blocks read x rounded to 8 bits, one scale a token."""
    for linear in block_linears(model).values():
        linear.register_forward_pre_hook(partial(round_input, CODES[activation]))


def round_input(dtype: torch.dtype, linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = inputs
    codes, scales = quantize_activations(x.flatten(0, -2), dtype)
    return (codes.float() * scales).view_as(x).to(x.dtype), *rest


def stored_bits(model: nn.Module, row: Row) -> float:
    """Bits a weight of codes, scales of 16 bits and zeros, averaged over the quantized linears."""
    weights = bits = 0
    for linear in block_linears(model).values():
        N, K = linear.weight.shape
        groups = N * -(-K // (row.setting.group_size or K))
        weights += N * K
        bits += N * K * row.setting.bits + groups * (SCALE_BITS + row.zero_bits)
    return bits / weights


def judged(quantized: PreTrainedModel, model: Path, protocol: Protocol, bits: float | None) -> Record:
    """Figures of a model against its original in float32."""
    original = load_model(model, quantized.device, dtype=torch.float32)
    tokens = text_tokens(load_tokenizer(model), protocol.text)
    quality = evaluate(quantized, tokens, against=original, limit=protocol.windows)
    found = quality.to_dict()
    return {
        "bits_per_weight": bits,
        "protocol": quality.protocol,
        **{key: found[key] for key in FIGURES},
        "reason": None,
    }


def chosen(
    tools: Iterable[str] | None, settings: Iterable[str] | None, methods: Iterable[str] | None
) -> Iterator[Row]:
    """The rows of these tools, settings and methods; None: of all."""
    for row in ROWS:
        wanted = ((tools, row.tool), (settings, row.setting.scheme), (methods, row.method))
        if all(choice is None or name in choice for choice, name in wanted):
            yield row
