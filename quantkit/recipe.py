"""Recipe: which scheme and method each linear gets, and what it is calibrated on."""

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from quantkit.errors import QuantKitError
from quantkit.method import QUALITIES, Level, default_method, parse_method
from quantkit.models import decoder_blocks, linears, packable
from quantkit.scheme import GROUP_SIZES, Scheme, parse_scheme

KEEP = "keep"  # in the place of a scheme: leave the module as it is


@dataclass(frozen=True)
class Rule:
    """What the linears whose name contains a match of the regular expression get; None: the recipe's default."""

    match: str
    scheme: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class CalibrationSpec:
    """The calibration tokens: `samples` sequences of `seq_len` tokens.

    Args:
        source: 'self' (sampled from the model itself), a text or .jsonl file, or a name for `datasets`.
        samples, seq_len: how many sequences of how many tokens.
        seed: of the sampling, or of the choice of windows.
        allow_short: go on with fewer sequences where the text is too short for them.
    """

    source: str = "self"
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    allow_short: bool = False


@dataclass(frozen=True)
class Recipe:
    """Scheme, method, exceptions and calibration of one run.

    Args:
        scheme: a preset or label, see `quantkit.scheme.parse_scheme`.
        method: steps joined by '+', see `quantkit.method`; None: what `quality` chooses for each scheme. 'rotate'
            is for the whole model and stands here alone.
        rules: exceptions, the first that matches a name decides.
        calibration: what is fed to the model where the method or the scheme needs activations.
        quality: 'fast', 'balanced' or 'best', where no method is named.
        target_bpw: choose the schemes of the linears to which no rule gives one, within this many bits a weight
            over all packed linears (`quantkit.allocation`); `scheme` is then what the outcome is compared with.
    """

    scheme: str
    method: str | None = None
    rules: tuple[Rule, ...] = ()
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    quality: Level = "balanced"
    target_bpw: float | None = None

    def __post_init__(self) -> None:
        for scheme in (self.scheme, *(rule.scheme for rule in self.rules)):
            if scheme not in (None, KEEP):
                parse_scheme(scheme)
        if self.quality not in QUALITIES:
            raise QuantKitError(f"recipe: unknown quality {self.quality!r}; expected {', '.join(QUALITIES)}")
        for method in (self.method, *(rule.method for rule in self.rules)):
            try:
                parsed = parse_method(method) if method is not None else None
            except QuantKitError as error:
                raise QuantKitError(f"recipe: {error}") from error
            if parsed and parsed.rotate and method is not self.method:
                raise QuantKitError(
                    f"recipe: rule with method {method!r}: a rotation is of the whole model; name it in the recipe's method"
                )
        for rule in self.rules:
            try:
                re.compile(rule.match)
            except re.error as error:
                raise QuantKitError(f"recipe: {rule.match!r} is not a regular expression: {error}") from error
        spec = self.calibration
        if not 0 <= spec.seed < 2**63:
            raise QuantKitError(f"recipe: seed {spec.seed}; expected a number from 0 to 2^63 - 1")
        if spec.samples < 1 or spec.seq_len < 2:
            raise QuantKitError(
                f"recipe: calibration of {spec.samples} x {spec.seq_len} tokens; needs at least 1 x 2"
            )

    @property
    def rotates(self) -> bool:
        return self.method is not None and parse_method(self.method).rotate

    def rule_for(self, name: str) -> Rule | None:
        """The rule that decides for the linear of this name; None: the recipe's defaults do."""
        return next((rule for rule in self.rules if re.search(rule.match, name)), None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rules": [asdict(rule) for rule in self.rules]}


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file with the keys of `Recipe`.

    Raises:
        QuantKitError: the file is absent, is not YAML, or has a key that no recipe has.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise QuantKitError(f"recipe {path}: not found") from error
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise QuantKitError(
            f"recipe {path}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from error
    content = checked(content, Recipe, str(path))
    rules = content.get("rules") or []
    if not isinstance(rules, list):
        raise QuantKitError(f"recipe {path}: rules is {rules!r}, expected a list of mappings")
    content["rules"] = tuple(Rule(**checked(rule, Rule, f"{path}, rules")) for rule in rules)
    if "calibration" in content:
        content["calibration"] = CalibrationSpec(
            **checked(content["calibration"], CalibrationSpec, f"{path}, calibration")
        )
    try:
        return Recipe(**content)
    except QuantKitError as error:
        raise QuantKitError(f"recipe {path}: {str(error).removeprefix('recipe: ')}") from error


def checked(content: Any, kind: type, where: str) -> dict[str, Any]:
    """The mapping, if it has the fields of the dataclass `kind`, no others, and values of their types."""
    if not isinstance(content, dict):
        raise QuantKitError(
            f"recipe {where}: found {type(content).__name__}, expected a mapping of names to values"
        )
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for name, value in content.items():
        if name not in fields:
            raise QuantKitError(f"recipe {where}: unknown name {name!r}; known: {', '.join(fields)}")
        if value is None and fields[name].default is None:
            continue
        if fields[name].type is int and type(value) is not int:
            raise QuantKitError(f"recipe {where}: {name} is {value!r}, expected a whole number")
        if fields[name].type is bool and type(value) is not bool:
            raise QuantKitError(f"recipe {where}: {name} is {value!r}, expected true or false")
        if fields[name].type == float | None and type(value) not in (int, float):
            raise QuantKitError(f"recipe {where}: {name} is {value!r}, expected a number")
        if fields[name].type in (str, str | None) and not isinstance(value, str):
            raise QuantKitError(f"recipe {where}: {name} is {value!r}, expected a word")
    for name in ("scheme", "match"):
        if name in fields and kind in (Recipe, Rule) and fields[name].type is str and name not in content:
            raise QuantKitError(f"recipe {where}: {name} is missing")
    return dict(content)


@dataclass(frozen=True)
class ModulePlan:
    """What one linear gets, and a remark where that is not what the recipe asked for.

    channel_scales: the method's scales of input channels can be folded into nothing; keep them beside the weight.
    """

    name: str
    scheme: Scheme
    method: str
    remark: str = ""
    channel_scales: bool = False


def plan_modules(model: nn.Module, recipe: Recipe) -> dict[str, ModulePlan]:
    """The plan of every linear that will be packed, by name.

    Linears outside the decoder blocks (the LM head) are packed only where a rule matches them; routers of experts
    and vision towers never are.

    Raises:
        QuantKitError: nothing is left to quantize, a rule matches no linear, or it asks for a tied LM head.
    """
    block_name, blocks = decoder_blocks(model)
    for name, parameter in blocks.named_parameters(block_name):
        if parameter.dim() == 3:
            raise QuantKitError(
                f"{name}: {list(parameter.shape)} is a stack of experts of a kind that is not supported"
            )
    inside = linears(blocks, f"{block_name}.")
    unused = {rule.match for rule in recipe.rules}
    tied = tied_linears(model)
    plans = {}
    for name, linear in packable(model).items():
        rule = recipe.rule_for(name)
        unused -= {rule.match for rule in recipe.rules if re.search(rule.match, name)}
        if rule is None and name not in inside:
            continue
        label = (rule and rule.scheme) or recipe.scheme
        if label == KEEP:
            continue
        if name in tied:
            raise QuantKitError(
                f"{name} shares its weight with the embedding: packing would untie them; leave it out"
            )
        scheme, remark = fit_scheme(parse_scheme(label), linear.in_features)
        method = (rule and rule.method) or recipe.method or default_method(scheme, recipe.quality)
        if parse_method(method).rounding == "hqq" and scheme.bits == 8:
            method, remark = method.replace("hqq", "rtn"), remark or "hqq is for 2 to 4 bits"
        if parse_method(method).learn and scheme.weight == "fp8":
            method, remark = (
                method.removesuffix("learn").removesuffix("+") or "gptq",
                remark or "learn is for integer codes",
            )
        plans[name] = ModulePlan(name, scheme, method, remark)
    if unused:
        raise QuantKitError(f"recipe: no linear of {type(model).__name__} matches {sorted(unused)[0]!r}")
    if not plans:
        raise QuantKitError(f"{type(model).__name__}: the recipe leaves no linear to quantize")
    return plans


def fit_scheme(scheme: Scheme, K: int) -> tuple[Scheme, str]:
    """The scheme with a group size that divides K, where there is one, and a remark if that changed it.

    Where none divides K the last group is shorter: kernels and format take any K.
    """
    group_size = scheme.group_size
    if group_size is None or K % group_size == 0:
        return scheme, ""
    smaller = [g for g in GROUP_SIZES if g < group_size and K % g == 0]
    if smaller:
        return replace(
            scheme, group_size=max(smaller)
        ), f"group size {max(smaller)}, since {group_size} does not divide K={K}"
    return (
        scheme,
        f"K={K} is no multiple of {group_size}: the last group of each row has {K % group_size} columns",
    )


def tied_linears(model: nn.Module) -> set[str]:
    """Names of linears whose weight another module owns too."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {name.removesuffix(".weight") for names in owners.values() if len(names) > 1 for name in names}
