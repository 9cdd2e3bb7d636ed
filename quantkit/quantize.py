"""Quantizing a model in memory, and what that shares with quantizing from directory to directory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from quantkit.allocation import Allocation, allocate
from quantkit.calibration import data
from quantkit.calibration.pipeline import (
    TOKENS_PER_BATCH,
    Activations,
    BlockInputs,
    ModuleResult,
    advance,
    capture,
    needs_activations,
    needs_original,
    quantize_block,
    run_original,
    with_remark,
)
from quantkit.calibration.rotation import Rotation, random_rotations, rotate_block, rotate_outer, untie_head
from quantkit.errors import QuantKitError
from quantkit.experts import unfuse_experts
from quantkit.hf import QuantKitConfig, install
from quantkit.method import parse_method
from quantkit.models import FOLDS, NORMS_PLUS_ONE, decoder_blocks
from quantkit.packing import QuantizedTensor
from quantkit.peers import Peers
from quantkit.recipe import CalibrationSpec, ModulePlan, Recipe, plan_modules


@dataclass(frozen=True)
class Progress:
    """Called as the work goes on; the CLI draws with it.

    Attributes:
        sampled: tokens that the model has written for its own calibration, and how many it will.
        start: the number of steps to come (blocks, and one more for what is outside them).
        module: a packed linear.
        step: a finished step.
        measure: decoder blocks run so far, and in all, before the schemes are chosen (`target_bpw`).
        allocation: the schemes chosen.
        note: a line that the user should read.
    """

    sampled: Callable[[int, int], None] = lambda done, total: None
    start: Callable[[int], None] = lambda steps: None
    module: Callable[[dict[str, Any]], None] = lambda module: None
    step: Callable[[], None] = lambda: None
    measure: Callable[[int, int], None] = lambda done, total: None
    allocation: Callable[[Allocation], None] = lambda allocation: None
    note: Callable[[str], None] = lambda text: None


def calibration_tokens(
    spec: CalibrationSpec,
    tokenizer: PreTrainedTokenizerBase | None,
    model: Callable[[], PreTrainedModel],
    progress: Progress | None = None,
) -> torch.Tensor:
    """Tokens int64 [samples, seq_len] by the spec; `model` loads the whole model, and is called for 'self' alone."""
    if spec.source == "self":
        sampled = (progress or Progress()).sampled
        return data.sample_from_model(model(), spec.samples, spec.seq_len, spec.seed, on_token=sampled)
    if tokenizer is None:
        raise QuantKitError(f"calibration from {spec.source} needs a tokenizer; pass tokenizer=")
    text = data.text_source(spec.source, tokenizer)
    try:
        return data.pack_tokens(
            tokenizer, text, spec.samples, spec.seq_len, spec.seed, allow_short=spec.allow_short
        )
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
    """One model, its blocks and its plan: what both ways of quantizing share.

    With `peers` the work is divided among processes: each runs its share of the samples, and packs its share of a block.
    """

    def __init__(
        self, model: PreTrainedModel, recipe: Recipe, device: torch.device, peers: Peers | None = None
    ) -> None:
        self.model, self.device, self.peers = model, device, peers
        unfuse_experts(model)
        self.rotation: Rotation | None = None
        self.untied: dict[str, str] = {}  # tensor -> the tensor it was tied to, and is still stored as
        if recipe.rotates:
            self.rotation = random_rotations(model, recipe.calibration.seed, device)
            if self.rotation.residual is not None:
                self.untied = untie_head(model)
        self.follow(recipe)
        self.prefix, self.blocks = decoder_blocks(model)
        self.dtype = model.dtype  # before a block is loaded in another one to compute with
        self.activations: Activations | None = None
        self.watched = False  # blocks are run after they are packed, even if nothing is calibrated
        self.modules: dict[str, dict[str, Any]] = {}

    def follow(self, recipe: Recipe) -> None:
        """Plans by a recipe; called again once `target_bpw` has led to another."""
        self.recipe, self.plans = recipe, plan_modules(self.model, recipe)

    @property
    def needs_tokens(self) -> bool:
        """Whether the work needs calibration tokens; a recipe with a target does before its schemes are chosen."""
        return self.recipe.target_bpw is not None or any(map(needs_activations, self.plans.values()))

    def block_plans(self, index: int) -> dict[str, ModulePlan]:
        """The plans of a block's linears by their names in it."""
        prefix = f"{self.prefix}.{index}."
        kind = self.model.config.get_text_config().model_type
        plans = {
            self.inner_name(name, index): plan for name, plan in self.plans.items() if name.startswith(prefix)
        }
        if self.rotation is not None:
            remark = self.rotation.remark
            plans = {n: replace(plan, remark=with_remark(plan.remark, remark)) for n, plan in plans.items()}
        folded = {name for fold in FOLDS.get(kind, ()) for name in fold.linears}
        return {n: plan if n in folded else without_folds(plan, kind) for n, plan in plans.items()}

    def all_plans(self) -> list[ModulePlan]:
        """The plans of all linears, outer ones first."""
        blocks = [self.block_plans(index) for index in range(len(self.blocks))]
        return [plan for plans in (self.outer_plans(), *blocks) for plan in plans.values()]

    def inner_name(self, name: str, index: int) -> str:
        """A linear's name inside its block."""
        return name.removeprefix(f"{self.prefix}.{index}.")

    def outer_plans(self) -> dict[str, ModulePlan]:
        """The plans outside the blocks (an untied LM head): rounded to nearest, since nothing is captured there."""
        plans = {n: plan for n, plan in self.plans.items() if not n.startswith(f"{self.prefix}.")}
        return {
            name: plan_without_activations(plan) if needs_activations(plan) else plan
            for name, plan in plans.items()
        }

    def rotate_outer(self) -> None:
        """Readies the loaded outer part for capture; blocks are rotated as their turn comes."""
        if self.rotation is not None:
            rotate_outer(self.model, self.rotation, self.dtype)

    @property
    def runs_on(self) -> bool:
        return self.watched or self.activations is not None

    def capture(self, tokens: torch.Tensor) -> None:
        """Runs the calibration tokens, or this process's share of them, up to the first block."""
        at_once = TOKENS_PER_BATCH
        if self.peers is not None:
            tokens = self.peers.share(tokens)
            if any(parse_method(plan.method).learn for plan in self.plans.values()):
                at_once //= self.peers.count  # of each process, for a step of learning takes a batch of all
        self.activations = capture(self.model, self.blocks, tokens, self.device, at_once)
        if any(needs_original(plan) for plan in self.plans.values()):
            self.activations.original = list(self.activations.hidden)

    def begin(self, index: int) -> None:
        """What is done with a block before it is quantized, or its stored result put in its place."""
        if self.rotation is not None:
            rotate_block(self.blocks[index], self.rotation)
        if self.activations is not None:
            run_original(self.blocks[index], index, self.activations, self.device)

    def quantize_block(self, index: int) -> list[ModuleResult]:
        plans = self.block_plans(index)
        inputs = (
            None
            if self.activations is None
            else BlockInputs(index, self.activations, self.device, self.peers)
        )
        kind = self.model.config.get_text_config().model_type
        return quantize_block(
            self.blocks[index],
            plans,
            inputs,
            FOLDS.get(kind, ()),
            kind in NORMS_PLUS_ONE,
            self.dtype,
            runs_on=self.runs_on,
            peers=self.peers,
        )

    def quantize_outer(self) -> list[ModuleResult]:
        plans = self.outer_plans()
        return quantize_block(self.model, plans, runs_on=False) if plans else []

    def advance(self, index: int, input_scales: dict[str, torch.Tensor]) -> None:
        """Takes the calibration tokens through a block that holds its dequantized weights.

        Args:
            input_scales: the static activation scales of its linears, by their names inside the block.
        """
        if self.activations is None or index + 1 == len(self.blocks):
            return
        schemes = {name: plan.scheme for name, plan in self.block_plans(index).items()}
        advance(self.blocks[index], index, self.activations, self.device, schemes, input_scales)

    def config(self, calibration: dict[str, Any] | None) -> QuantKitConfig:
        schemes = {plan.scheme.label: plan.scheme.to_dict() for plan in self.plans.values()}
        order = {name: self.modules[name] for name in self.plans}
        return QuantKitConfig(schemes, order, self.recipe.to_dict(), calibration)


def without_folds(plan: ModulePlan, kind: str) -> ModulePlan:
    """The plan of a linear whose input channels have no known place for scales."""
    scaling = parse_method(plan.method).scaling
    if scaling is None:
        return plan
    if scaling != "equalize":  # which looks at the producer of the channels
        return replace(plan, channel_scales=True)
    return replace(
        plan, remark=with_remark(plan.remark, f"no place known for {scaling}'s scales in {kind}: left out")
    )


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
            tokens = calibration_tokens(recipe.calibration, tokenizer, lambda: model, progress)
        check_tokens(tokens, model)
        calibration = describe_calibration(recipe.calibration, tokens)
        if recipe.target_bpw is not None:
            allocation = allocate(model, recipe, tokens, progress.measure)
            progress.allocation(allocation)
            job.follow(allocation.recipe(recipe))
    job.rotate_outer()
    if tokens is not None and job.needs_tokens:
        job.capture(tokens)
    progress.start(len(job.blocks) + 1)
    packed: dict[str, QuantizedTensor] = {}

    def keep(results: list[ModuleResult]) -> None:
        for result in results:
            packed[result.plan.name] = result.quantized
            job.modules[result.plan.name] = result.entry()
            progress.module({"name": result.plan.name, **result.to_dict()})
        progress.step()

    keep(job.quantize_outer())
    for index in range(len(job.blocks)):
        job.begin(index)
        results = job.quantize_block(index)
        keep(results)
        job.advance(
            index,
            {
                job.inner_name(r.plan.name, index): s
                for r in results
                if (s := r.quantized.input_scale) is not None
            },
        )
    return install(model, packed, job.config(calibration))


def describe_calibration(spec: CalibrationSpec, tokens: torch.Tensor) -> dict[str, Any]:
    samples, seq_len = tokens.shape
    described = {"source": spec.source, "samples": samples, "seq_len": seq_len, "seed": spec.seed}
    return {**described, "sha256": data.tokens_sha256(tokens)}
