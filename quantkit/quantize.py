"""Quantizing a model: from directory to directory one block at a time, or in memory."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quantkit.calibration import data
from quantkit.calibration.pipeline import (
    Activations,
    ModuleResult,
    advance,
    capture,
    collect,
    needs_activations,
    quantize_block,
)
from quantkit.checkpoint import INDEX, CheckpointReader, CheckpointWriter, read_json
from quantkit.errors import QuantKitError
from quantkit.hf import QuantKitConfig, install, linear_called, packed_twin
from quantkit.linear import replace_module
from quantkit.models import FOLDS, NORMS_PLUS_ONE, decoder_blocks
from quantkit.packing import QuantizedTensor
from quantkit.recipe import CalibrationSpec, ModulePlan, Recipe, plan_modules

# What a checkpoint takes over from its source beside weights and config: the tokenizer and its like.
COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
)
OUTER = "outer"  # the part that holds what lies outside the decoder blocks


@dataclass(frozen=True)
class Progress:
    """Called as the work goes on; the CLI draws with it.

    Attributes:
        start: the number of steps to come (blocks, and one more for what is outside them).
        module: a packed linear.
        step: a finished step.
    """

    start: Callable[[int], None] = lambda steps: None
    module: Callable[[dict[str, Any]], None] = lambda module: None
    step: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Summary:
    """What a run did: modules as in config.json, weights packed, their bits, bytes of weights before and after."""

    modules: dict[str, dict[str, Any]]
    packed_weights: int
    bits_per_weight: float
    source_bytes: int
    packed_bytes: int
    seconds: float


def resolve(model: str | Path) -> Path:
    """A local directory, or the snapshot of a hub name.

    Raises:
        QuantKitError: there is no such directory and the hub does not give such a model.
    """
    path = Path(model)
    if path.is_dir():
        return path
    name = str(model)
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise QuantKitError(f"{model}: no such model directory")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", *COPIED]))
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated, malformed
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QuantKitError(
            f"{model}: no such directory, and the hub gives no such model ({reason})"
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    """config.json of a model that is not quantized yet."""
    content = read_json(folder / "config.json")
    if content.get("quantization_config"):
        found = content["quantization_config"].get("quant_method", "?")
        raise QuantKitError(f"{folder}: is quantized already ({found}); quantize the original model")
    return auto_config(folder)


def auto_config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise QuantKitError(
            f"{folder / 'config.json'}: transformers cannot read it: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of a config with its parameters on the meta device, its buffers real."""
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    except ValueError as error:
        raise QuantKitError(f"no causal language model: {first_line(error)}") from error
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise QuantKitError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)})") from error


def calibration_tokens(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase | None, model: Callable[[], PreTrainedModel]
) -> torch.Tensor:
    """Tokens int64 [samples, seq_len] by the spec; `model` loads the whole model, and is called for 'self' alone."""
    if spec.source == "self":
        return data.sample_from_model(model(), spec.samples, spec.seq_len, spec.seed)
    if tokenizer is None:
        raise QuantKitError(f"calibration from {spec.source} needs a tokenizer; pass tokenizer=")
    return data.pack_tokens(tokenizer, data.text_source(spec.source), spec.samples, spec.seq_len, spec.seed)


class Job:
    """One model, its blocks and its plan: what both ways of quantizing share."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, device: torch.device) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.plans = plan_modules(model, recipe)
        self.prefix, self.blocks = decoder_blocks(model)
        self.activations: Activations | None = None
        self.modules: dict[str, dict[str, Any]] = {}

    @property
    def needs_tokens(self) -> bool:
        return any(needs_activations(plan) for plan in self.plans.values())

    def block_plans(self, index: int) -> dict[str, ModulePlan]:
        prefix = f"{self.prefix}.{index}."
        return {
            name.removeprefix(prefix): plan for name, plan in self.plans.items() if name.startswith(prefix)
        }

    def outer_plans(self) -> dict[str, ModulePlan]:
        return {name: plan for name, plan in self.plans.items() if not name.startswith(f"{self.prefix}.")}

    def quantize_block(self, index: int) -> list[ModuleResult]:
        block, plans = self.blocks[index], self.block_plans(index)
        statistics = {}
        if self.activations is not None:
            wanted = [name for name, plan in plans.items() if needs_activations(plan)]
            statistics = collect(block, wanted, index, self.activations, self.device)
        kind = self.model.config.model_type
        return quantize_block(block, plans, statistics, FOLDS.get(kind, ()), kind in NORMS_PLUS_ONE)

    def quantize_outer(self) -> list[ModuleResult]:
        """Linears outside the blocks (an untied LM head): rounded to nearest, since nothing is captured there."""
        plans = {}
        for name, plan in self.outer_plans().items():
            if needs_activations(plan):
                plan = plan_without_activations(plan)
            plans[name] = plan
        return quantize_block(self.model, plans, {}) if plans else []

    def advance(self, index: int) -> None:
        if self.activations is not None and index + 1 < len(self.blocks):
            advance(self.blocks[index], index, self.activations, self.device)

    def config(self, calibration: dict[str, Any] | None) -> QuantKitConfig:
        schemes = {plan.scheme.label: plan.scheme.to_dict() for plan in self.plans.values()}
        order = {name: self.modules[name] for name in self.plans}
        return QuantKitConfig(schemes, order, self.recipe.to_dict(), calibration)


def plan_without_activations(plan: ModulePlan) -> ModulePlan:
    if plan.scheme.activation_scale == "static":
        raise QuantKitError(
            f"{plan.name}: a static activation scale is not calibrated outside the decoder blocks; use fp8"
        )
    return ModulePlan(plan.name, plan.scheme, "rtn", "outside the decoder blocks: rounded to nearest")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quantize(
    model: PreTrainedModel,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Packs the linears of a model in memory, in place.

    Args:
        model: a causal language model, on any device; changed and returned. If the work breaks off, its
            blocks so far hold dequantized weights: load it anew.
        recipe: what to do.
        tokenizer: for calibration from a text.
        tokens: int64 [samples, seq_len] to calibrate on, in the place of the recipe's calibration.

    Raises:
        QuantKitError: the recipe does not fit the model, a weight is not finite, the text is too short.
    """
    progress = progress or Progress()
    job = Job(model, recipe, model.device)
    calibration = None
    if job.needs_tokens:
        if tokens is None:
            tokens = calibration_tokens(recipe.calibration, tokenizer, lambda: model)
        calibration = describe_calibration(recipe.calibration, tokens)
        job.activations = capture(model, job.blocks, tokens, job.device)
    progress.start(len(job.blocks) + 1)
    packed: dict[str, QuantizedTensor] = {}

    def keep(results: list[ModuleResult]) -> None:
        for result in results:
            packed[result.plan.name] = result.quantized
            job.modules[result.plan.name] = result.to_dict()
            progress.module({"name": result.plan.name, **result.to_dict()})
        progress.step()

    keep(job.quantize_outer())
    for index in range(len(job.blocks)):
        keep(job.quantize_block(index))
        job.advance(index)
    return install(model, packed, job.config(calibration))


def describe_calibration(spec: CalibrationSpec, tokens: torch.Tensor) -> dict[str, Any]:
    samples, seq_len = tokens.shape
    return {**asdict(spec), "samples": samples, "seq_len": seq_len, "sha256": data.tokens_sha256(tokens)}


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Quantizes a model directory (or hub name) into `out`, one decoder block in memory at a time.

    A run that was killed leaves `out`.partial; the same call continues it and gives the same bytes.

    Raises:
        QuantKitError: the model or the recipe is at fault, or `out` exists.
    """
    started = time.monotonic()
    progress = progress or Progress()
    device = torch.device(device) if device is not None else default_device()
    out = Path(out)
    if out.exists():
        raise QuantKitError(f"{out}: exists already; remove it or name another directory")
    folder = resolve(source)
    config = read_config(folder)
    reader = CheckpointReader(folder)
    model = empty_model(config)
    job = Job(model, recipe, device)
    loader = BlockLoader(job, reader, device)

    tokens, calibration = None, None
    if job.needs_tokens:
        needs_text = recipe.calibration.source != "self"
        tokens = calibration_tokens(
            recipe.calibration,
            load_tokenizer(folder) if needs_text else None,
            lambda: whole_model(folder, device),
        )
        calibration = describe_calibration(recipe.calibration, tokens)
    fingerprint = {
        "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in reader.files],
        "recipe": recipe.to_dict(),
        "calibration": calibration,
    }
    packed_weights = packed_code_bytes = packed_bytes = 0

    with CheckpointWriter(out, fingerprint) as writer:

        def write(
            name: str, module: nn.Module, prefix: str, results: Callable[[], list[ModuleResult]]
        ) -> None:
            nonlocal packed_weights, packed_code_bytes, packed_bytes
            stored = writer.read_part(name)
            if stored is None:
                stored = loader.pack(module, prefix, results())
                writer.write_part(name, *stored)
            else:
                loader.restore(module, prefix, stored[0])
            tensors, notes = stored
            packed_bytes += sum(tensor.nbytes for tensor in tensors.values())
            for note in notes:
                module_name = note.pop("name")
                job.modules[module_name] = note
                packed_weights += int(tensors[f"{module_name}.weight"].prod())
                packed_code_bytes += sum(
                    tensors[key].nbytes
                    for suffix in ("codes", "scales", "zeros", "input_scale")
                    if (key := f"{module_name}.{suffix}") in tensors
                )
                progress.module({"name": module_name, **note})
            progress.step()

        progress.start(len(job.blocks) + 1)
        loader.load_outer()
        if tokens is not None:
            job.activations = capture(model, job.blocks, tokens, device)
        write(OUTER, model, "", job.quantize_outer)
        loader.unload_outer()
        for index, block in enumerate(job.blocks):
            with loader.loaded(index) as prefix:
                write(f"block-{index:05d}", block, prefix, lambda index=index: job.quantize_block(index))
                job.advance(index)
        finish(writer, job, folder, calibration)
    return Summary(
        job.modules,
        packed_weights,
        8 * packed_code_bytes / packed_weights,
        sum(t.stop - t.start for t in reader.tensors.values()),
        packed_bytes,
        time.monotonic() - started,
    )


def whole_model(folder: Path, device: torch.device) -> PreTrainedModel:
    dtype = torch.float32 if device.type == "cpu" else "auto"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


class BlockLoader:
    """Brings parts of an empty model to life from a checkpoint, and back to nothing."""

    def __init__(self, job: Job, reader: CheckpointReader, device: torch.device) -> None:
        self.job, self.reader, self.device = job, reader, device
        tied = getattr(job.model, "all_tied_weights_keys", {})
        self.names = [name for name in job.model.state_dict() if name not in tied]
        self.dtypes: dict[str, torch.dtype] = {}  # as stored, of the part that is loaded

    def load(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        tensors = self.reader.load(names)
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        shapes = {name: parameter.shape for name, parameter in module.state_dict().items()}
        for name, tensor in tensors.items():
            if tensor.shape != shapes[name.removeprefix(prefix)]:
                raise QuantKitError(
                    f"{self.reader.tensors[name].file}: {name} is {list(tensor.shape)}, "
                    f"config.json makes it {list(shapes[name.removeprefix(prefix)])}; they belong to different models"
                )
        # half precision is slow on a CPU, and adds its own rounding to the statistics
        upcast = self.device.type == "cpu" and self.job.needs_tokens
        ready = {
            name.removeprefix(prefix): tensor.to(
                self.device, torch.float32 if upcast and tensor.is_floating_point() else None
            )
            for name, tensor in tensors.items()
        }
        module.load_state_dict(ready, strict=False, assign=True)

    def load_outer(self) -> None:
        """What lies outside the decoder blocks: embeddings, last norm, LM head."""
        self.outer = [name for name in self.names if not name.startswith(f"{self.job.prefix}.")]
        self.load(self.job.model, "", self.outer)
        self.job.model.tie_weights()
        for module in self.job.model.modules():  # rotary frequencies and the like
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def unload_outer(self) -> None:
        for module in self.job.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    @contextmanager
    def loaded(self, index: int) -> Iterator[str]:
        prefix = f"{self.job.prefix}.{index}."
        block = self.job.blocks[index]
        self.load(block, prefix, [name for name in self.names if name.startswith(prefix)])
        try:
            yield prefix
        finally:
            block.to("meta")

    def pack(
        self, module: nn.Module, prefix: str, results: list[ModuleResult]
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """The tensors to store for a loaded part: packed weights in the place of the planned ones."""
        state = module.state_dict()
        packed = {f"{result.plan.name}.weight" for result in results}
        tensors = {
            name: state[name.removeprefix(prefix)].to("cpu", dtype)
            for name, dtype in self.dtypes.items()
            if name not in packed
        }
        for result in results:
            name = result.plan.name
            tensors[f"{name}.weight"] = torch.tensor(result.quantized.shape)
            for suffix, tensor in result.quantized.tensors().items():
                tensors[f"{name}.{suffix}"] = tensor.cpu()
        return tensors, [{"name": result.plan.name, **result.to_dict()} for result in results]

    def restore(self, module: nn.Module, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        """Makes a loaded part what it was after `pack`, from the stored tensors."""
        state = module.state_dict()
        for name, current in state.items():
            full = prefix + name
            plan = self.job.plans.get(full.removesuffix(".weight"))
            if plan is not None and full.endswith(".weight"):
                stem = full.removesuffix(".weight")
                parts = {s: tensors.get(f"{stem}.{s}") for s in ("codes", "scales", "zeros", "input_scale")}
                quantized = QuantizedTensor(plan.scheme, tuple(tensors[full].tolist()), **parts)  # type: ignore[arg-type]
                current.copy_(quantized.dequantize(current.dtype))
            elif full in tensors:
                current.copy_(tensors[full])


def finish(writer: CheckpointWriter, job: Job, folder: Path, calibration: dict[str, Any] | None) -> None:
    """Turns the empty model into the one that will be loaded, for the order of its tensors, and closes the run."""
    model = job.model
    for name, plan in job.plans.items():
        replace_module(model, name, packed_twin(linear_called(model, name), plan.scheme))
    tied = getattr(model, "all_tied_weights_keys", {})
    order = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    model.config.quantization_config = job.config(calibration)
    model.config.architectures = [type(model).__name__]

    def add_files(out: Path) -> None:
        model.config.save_pretrained(out)
        save_generation_config(model, folder, out)
        for pattern in COPIED:
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and file.name != INDEX:
                    shutil.copyfile(file, out / file.name)

    writer.finish(order, sum(parameter.numel() for parameter in model.parameters()), add_files)


def save_generation_config(model: PreTrainedModel, folder: Path, out: Path) -> None:
    """As `save_pretrained` of the loaded model would write it; a file that transformers refuses is copied."""
    name = "generation_config.json"
    if not (folder / name).exists():
        model.generation_config.save_pretrained(out)
        return
    try:
        GenerationConfig.from_pretrained(folder).save_pretrained(out)
    except (ValueError, OSError):
        shutil.copyfile(folder / name, out / name)
