"""Quantizing a model in memory, and what that shares with quantizing from directory to directory."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from quantkit.allocation import Allocation, allocate
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
from quantkit.errors import QuantKitError
from quantkit.hf import QuantKitConfig, install
from quantkit.models import FOLDS, NORMS_PLUS_ONE, decoder_blocks
from quantkit.packing import QuantizedTensor
from quantkit.recipe import CalibrationSpec, ModulePlan, Recipe, plan_modules


@dataclass(frozen=True)
class Progress:
    """Called as the work goes on; the CLI draws with it.

    Attributes:
        start: the number of steps to come (blocks, and one more for what is outside them).
        module: a packed linear.
        step: a finished step.
        measure: decoder blocks run so far, and in all, before the schemes are chosen (`target_bpw`).
        allocation: the schemes chosen.
    """

    start: Callable[[int], None] = lambda steps: None
    module: Callable[[dict[str, Any]], None] = lambda module: None
    step: Callable[[], None] = lambda: None
    measure: Callable[[int, int], None] = lambda done, total: None
    allocation: Callable[[Allocation], None] = lambda allocation: None


def calibration_tokens(
    spec: CalibrationSpec, tokenizer: PreTrainedTokenizerBase | None, model: Callable[[], PreTrainedModel]
) -> torch.Tensor:
    """Tokens int64 [samples, seq_len] by the spec; `model` loads the whole model, and is called for 'self' alone."""
    if spec.source == "self":
        return data.sample_from_model(model(), spec.samples, spec.seq_len, spec.seed)
    if tokenizer is None:
        raise QuantKitError(f"calibration from {spec.source} needs a tokenizer; pass tokenizer=")
    text = data.text_source(spec.source)
    try:
        return data.pack_tokens(tokenizer, text, spec.samples, spec.seq_len, spec.seed)
    except QuantKitError as error:
        if spec.source in str(error):
            raise
        raise QuantKitError(f"{spec.source}: {error}") from error


def check_context(seq_len: int, config: PretrainedConfig) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and seq_len > context:
        raise QuantKitError(
            f"calibration sequences of {seq_len} tokens exceed the model's context of {context}; lower seq_len"
        )


def check_tokens(tokens: torch.Tensor, model: PreTrainedModel) -> None:
    """Refuses calibration tokens that are not int64 [samples, seq_len] of the model's vocabulary and context."""
    if tokens.dim() != 2 or not tokens.numel() or tokens.dtype != torch.int64 or int(tokens.min()) < 0:
        raise QuantKitError(
            f"calibration tokens are {tokens.dtype} {list(tokens.shape)}; expected int64 [samples, seq_len], none negative"
        )
    check_context(tokens.shape[1], model.config)
    largest, vocabulary = int(tokens.max()), model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    if largest >= vocabulary:
        raise QuantKitError(
            f"{model.config.name_or_path}: its tokenizer gives token {largest}, but the model has a vocabulary "
            f"of {vocabulary}; the tokenizer belongs to another model"
        )


class Job:
    """One model, its blocks and its plan: what both ways of quantizing share."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe, device: torch.device) -> None:
        self.model, self.device = model, device
        self.follow(recipe)
        self.prefix, self.blocks = decoder_blocks(model)
        self.dtype = model.dtype  # before a block is loaded in another one to compute with
        self.activations: Activations | None = None
        self.modules: dict[str, dict[str, Any]] = {}

    def follow(self, recipe: Recipe) -> None:
        self.recipe, self.plans = recipe, plan_modules(self.model, recipe)

    @property
    def needs_tokens(self) -> bool:
        """Whether the work needs calibration tokens; a recipe with a target does before its schemes are chosen."""
        return self.recipe.target_bpw is not None or any(map(needs_activations, self.plans.values()))

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
        if kind not in FOLDS:
            plans = {name: without_folds(plan, kind) for name, plan in plans.items()}
        return quantize_block(
            block,
            plans,
            statistics,
            FOLDS.get(kind, ()),
            kind in NORMS_PLUS_ONE,
            self.dtype,
            runs_on=self.activations is not None,
        )

    def quantize_outer(self) -> list[ModuleResult]:
        """Linears outside the blocks (an untied LM head): rounded to nearest, since nothing is captured there."""
        plans = {}
        for name, plan in self.outer_plans().items():
            if needs_activations(plan):
                plan = plan_without_activations(plan)
            plans[name] = plan
        return quantize_block(self.model, plans, {}, runs_on=False) if plans else []

    def advance(self, index: int) -> None:
        if self.activations is not None and index + 1 < len(self.blocks):
            advance(self.blocks[index], index, self.activations, self.device)

    def config(self, calibration: dict[str, Any] | None) -> QuantKitConfig:
        schemes = {plan.scheme.label: plan.scheme.to_dict() for plan in self.plans.values()}
        order = {name: self.modules[name] for name in self.plans}
        return QuantKitConfig(schemes, order, self.recipe.to_dict(), calibration)


def without_folds(plan: ModulePlan, kind: str) -> ModulePlan:
    if plan.method != "awq":
        return plan
    return replace(plan, remark=f"no place known for AWQ's scales in {kind}: its clip search alone")


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
            blocks so far may hold dequantized weights: load it anew.
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
            check_context(recipe.calibration.seq_len, model.config)
            tokens = calibration_tokens(recipe.calibration, tokenizer, lambda: model)
        check_tokens(tokens, model)
        calibration = describe_calibration(recipe.calibration, tokens)
        if recipe.target_bpw is not None:
            allocation = allocate(model, recipe, tokens, progress.measure)
            progress.allocation(allocation)
            job.follow(allocation.recipe(recipe))
    if job.needs_tokens and tokens is not None:
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
