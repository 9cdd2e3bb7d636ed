"""The grammar of methods, and what each quality chooses."""

import pytest
import torch

from quantkit.errors import QuantKitError
from quantkit.method import (
    DEFAULT_ROUNDING,
    QUALITIES,
    ROUNDINGS,
    SCALINGS,
    STEPS,
    Method,
    default_method,
    describe,
    parse_method,
)
from quantkit.recipe import Recipe, plan_modules
from quantkit.scheme import PRESETS, parse_scheme


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("rtn", Method("rtn")),
        ("gptaq", Method("gptaq")),
        ("awq", Method("clip", "awq")),
        ("smooth", Method("rtn", "smooth")),
        ("equalize", Method("clip", "equalize")),
        ("awq+gptq", Method("gptq", "awq")),
        ("rotate", Method("gptq", rotate=True)),
        ("learn", Method("gptq", learn=True)),
        ("rotate+smooth+gptaq+learn", Method("gptaq", "smooth", True, True)),
    ],
)
def test_a_word_spells_its_steps(text, method):
    assert parse_method(text) == method
    assert describe(text).count(", then ") == text.count("+")


def test_every_scaling_has_a_rounding_of_its_own():
    assert DEFAULT_ROUNDING.keys() == SCALINGS.keys()
    assert set(DEFAULT_ROUNDING.values()) <= set(ROUNDINGS)


@pytest.mark.parametrize(
    "text",
    [
        "gptq+awq",
        "gptq+rotate",
        "learn+gptq",
        "awq+rotate",
        "rtn+gptq",
        "gptq+gptq",
        "awq+smooth+rtn",
        "hqq+equalize",
    ],
)
def test_steps_out_of_order_or_twice_are_refused(text):
    with pytest.raises(QuantKitError) as error:
        parse_method(text)
    assert str(error.value).startswith(
        f"method {text!r}: expected at most one each of rotate, awq|smooth|equalize"
    )


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("", ""),
        ("best", "best"),
        ("awq+", ""),
        ("awq+gptx", "gptx"),
        ("AWQ", "AWQ"),
        ("awq gptq", "awq gptq"),
    ],
)
def test_unknown_steps_are_named_beside_the_known(text, unknown):
    with pytest.raises(QuantKitError) as error:
        parse_method(text)
    assert str(error.value).startswith(
        f"unknown method {unknown!r}; known steps, joined by '+': {', '.join(STEPS)}"
    )


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("label", [*PRESETS, "w2a16-g32-asym", "w3a16-channel"])
def test_what_a_quality_chooses_can_be_planned(label, quality, tiny):
    method = default_method(parse_scheme(label), quality)
    parsed = parse_method(method)
    # 'fast' needs calibration tokens for the ranges of activations alone
    assert quality != "fast" or not parsed.needs_activations or parse_scheme(label).activation == "int8"
    with torch.device("meta"):
        plans = plan_modules(tiny(), Recipe(label, quality=quality))
    assert {plan.method for plan in plans.values()} == {method}
    assert all(plan.remark.startswith("group size") for plan in plans.values() if plan.remark)
