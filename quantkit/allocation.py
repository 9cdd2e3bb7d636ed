"""What a recipe's `target_bpw` does: measure the linears' groups, choose their schemes, write them as rules."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from quantkit.calibration.allocate import (
    CANDIDATES,
    WINDOW,
    WINDOWS,
    Choice,
    measure,
    shared_inputs,
    spend,
)
from quantkit.calibration.pipeline import not_finite
from quantkit.errors import QuantKitError
from quantkit.linear import tensor_specs
from quantkit.models import decoder_blocks
from quantkit.recipe import ModulePlan, Recipe, Rule, fit_scheme, plan_modules
from quantkit.scheme import Scheme, parse_scheme


@dataclass(frozen=True)
class GroupChoice:
    """What one group of linears gets: the scheme, its KL in nats, and its stored bits of how many weights."""

    names: tuple[str, ...]
    scheme: str
    kl: float
    bits: int
    weights: int


@dataclass(frozen=True)
class Allocation:
    """The outcome, and what is predicted of it.

    Attributes:
        groups: the linears whose scheme was chosen.
        target_bpw: what was asked for, over all packed linears.
        bits, weights: of all packed linears, those too to which the recipe gives a scheme.
        kl: sum over the groups, nats.
        uniform: the scheme that the prediction is compared with.
        uniform_bits, uniform_kl: bits and kl if every group had that one.
    """

    groups: tuple[GroupChoice, ...]
    target_bpw: float
    bits: int
    weights: int
    kl: float
    uniform: str
    uniform_bits: int
    uniform_kl: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Allocation":
        groups = tuple(GroupChoice(**{**g, "names": tuple(g["names"])}) for g in content["groups"])
        return cls(**{**content, "groups": groups})

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with the choices as rules before its own, which gives the same plan without measuring."""
        rules = []
        for group in self.groups:
            by_method: dict[str | None, list[str]] = {}
            for name in group.names:
                rule = recipe.rule_for(name)
                by_method.setdefault(rule.method if rule else None, []).append(re.escape(name))
            rules += [
                Rule(f"^({'|'.join(names)})$", group.scheme, method) for method, names in by_method.items()
            ]
        return replace(recipe, rules=(*rules, *recipe.rules), target_bpw=None)


@dataclass(frozen=True)
class Budget:
    """What there is to choose from: plans by linear; bits and weights of the linears whose scheme is given."""

    candidates: dict[str, list[ModulePlan]]
    given_bits: int
    given_weights: int


def read_budget(model: PreTrainedModel, recipe: Recipe) -> Budget:
    """The linears whose scheme a recipe leaves open, of a model that may be on the meta device.

    Raises:
        QuantKitError: the recipe leaves none open, its own scheme is no candidate, or no choice meets its target.
    """
    assert recipe.target_bpw is not None
    if parse_scheme(recipe.scheme).label not in CANDIDATES:
        raise QuantKitError(
            f"recipe: target_bpw chooses among {', '.join(CANDIDATES)} and says what {recipe.scheme} in every linear "
            "would do; make the recipe's scheme one of these"
        )
    prefix, _ = decoder_blocks(model)
    tries = [plan_modules(model, replace(recipe, scheme=label)) for label in CANDIDATES]
    candidates, given_bits, given_weights = {}, 0, 0
    cheapest = dearest = 0
    cheapest_labels, dearest_labels = set(), set()
    for name, plan in plan_modules(model, recipe).items():
        rule = recipe.rule_for(name)
        if (rule and rule.scheme) or not name.startswith(f"{prefix}."):
            given_bits += stored_bits(plan.scheme, *shape_of(model, name))
            given_weights += math.prod(shape_of(model, name))
            continue
        N, K = shape_of(model, name)
        distinct = {
            plans[name].scheme: plans[name] for plans in tries
        }  # groups may be smaller than asked for
        candidates[name] = list(distinct.values())
        by_bits = sorted(distinct, key=lambda scheme: stored_bits(scheme, N, K))
        cheapest += stored_bits(by_bits[0], N, K)
        dearest += stored_bits(by_bits[-1], N, K)
        cheapest_labels.add(by_bits[0].label)
        dearest_labels.add(by_bits[-1].label)
    if not candidates:
        raise QuantKitError(
            "recipe: target_bpw has nothing to choose, since rules give every linear a scheme"
        )
    weights = given_weights + sum(math.prod(shape_of(model, name)) for name in candidates)
    # rounded so that what is printed can be asked for
    least = math.ceil((given_bits + cheapest) / weights * 1000) / 1000
    most = math.floor((given_bits + dearest) / weights * 1000) / 1000
    if not least <= recipe.target_bpw <= most:
        raise QuantKitError(
            f"target_bpw {recipe.target_bpw:g}: this model takes from {least:g} bits a weight "
            f"({', '.join(sorted(cheapest_labels))} throughout) to {most:g} "
            f"({', '.join(sorted(dearest_labels))}); choose a target in between, or one --scheme"
        )
    return Budget(candidates, given_bits, given_weights)


def shape_of(model: PreTrainedModel, name: str) -> tuple[int, int]:
    N, K = model.get_submodule(name).weight.shape  # type: ignore[union-attr, misc]
    return N, K


def stored_bits(scheme: Scheme, N: int, K: int) -> int:
    """Bits of the codes, scales and zeros of a packed weight [N, K]."""
    return sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in tensor_specs(scheme, N, K).values())


def check_room(model: PreTrainedModel, tokens: torch.Tensor, device: torch.device) -> None:
    """Refuses, before it is loaded, a model that the device cannot hold whole; it may be on the meta device."""
    itemsize = 4 if device.type == "cpu" else model.dtype.itemsize  # on a CPU it is loaded in float32
    vocabulary: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, union-attr, assignment]
    needed = itemsize * model.num_parameters() + 4 * vocabulary * tokens[:WINDOWS, :WINDOW].numel()
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > room:
        raise QuantKitError(
            f"target_bpw: measuring holds the whole model and its output, {needed / 1e9:.1f} GB, and {device} has "
            f"{room / 1e9:.1f} GB; measure on a device that holds it: the recipe in the config.json "
            "that this writes serves here too"
        )


def allocate(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: torch.Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Allocation:
    """Chooses schemes for the linears to which the recipe gives none, within its `target_bpw`.

    Args:
        model: the whole original model; the same again afterwards.
        tokens: int64 [samples, seq_len] to calibrate on.
        progress: called with (decoder blocks run so far, in all).

    Raises:
        QuantKitError: a weight is not finite; see also `read_budget` and `quantkit.calibration.allocate.measure`.
    """
    assert recipe.target_bpw is not None
    budget = read_budget(model, recipe)
    for name, parameter in model.named_parameters():
        if bad := not_finite(parameter):
            raise QuantKitError(
                f"{name}: {bad} of {parameter.numel()} values are NaN or infinite; mend the source checkpoint"
            )
    groups = shared_inputs(model, list(budget.candidates), tokens)
    tries = [list(zip(*(budget.candidates[name] for name in names), strict=True)) for names in groups]
    kls = measure(model, tries, tokens, progress)
    choices, uniform = [], []
    for names, found in zip(groups, kls, strict=True):
        schemes = [plan.scheme for plan in budget.candidates[names[0]]]
        choices.append(
            [
                Choice(scheme.label, sum(stored_bits(scheme, *shape_of(model, n)) for n in names), kl)
                for scheme, kl in zip(schemes, found, strict=True)
            ]
        )
        fitted, _ = fit_scheme(parse_scheme(recipe.scheme), shape_of(model, names[0])[1])
        uniform.append(choices[-1][schemes.index(fitted)])
    sizes = [sum(math.prod(shape_of(model, name)) for name in names) for names in groups]
    weights = budget.given_weights + sum(sizes)
    chosen = spend(choices, math.floor(recipe.target_bpw * weights) - budget.given_bits)
    return Allocation(
        tuple(
            GroupChoice(names, choice.scheme, choice.kl, choice.bits, size)
            for names, choice, size in zip(groups, chosen, sizes, strict=True)
        ),
        recipe.target_bpw,
        budget.given_bits + sum(choice.bits for choice in chosen),
        weights,
        sum(choice.kl for choice in chosen),
        parse_scheme(recipe.scheme).label,
        budget.given_bits + sum(choice.bits for choice in uniform),
        sum(choice.kl for choice in uniform),
    )
