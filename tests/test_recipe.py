import json

import pytest
import torch

from quantkit.errors import QuantKitError
from quantkit.recipe import CalibrationSpec, Recipe, Rule, fit_scheme, plan_modules, read_recipe
from quantkit.scheme import parse_scheme


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_yaml_file_gives_the_recipe_it_spells(tmp_path):
    path = written(
        tmp_path,
        """
        scheme: w4a16-g64-asym
        method: awq
        rules:
          - match: down_proj$
            scheme: w8a16
          - match: layers\\.0\\.
            scheme: keep
        calibration: {source: text.txt, samples: 16}
        """,
    )
    assert read_recipe(path) == Recipe(
        "w4a16-g64-asym",
        "awq",
        (Rule("down_proj$", "w8a16"), Rule("layers\\.0\\.", "keep")),
        CalibrationSpec("text.txt", 16),
    )


def test_a_recipe_survives_its_dictionary():
    recipe = Recipe("w4a16", "gptq", (Rule("o_proj", "fp8"),), CalibrationSpec(samples=3))
    content = recipe.to_dict()
    content["rules"] = tuple(Rule(**rule) for rule in content["rules"])
    content["calibration"] = CalibrationSpec(**content["calibration"])
    assert Recipe(**content) == recipe


def test_the_recipe_of_a_checkpoint_can_be_read_again(tmp_path):
    recipe = Recipe("w4a16", "gptq", (Rule("o_proj", "fp8"), Rule("up_proj", method="rtn")), target_bpw=5.0)
    assert read_recipe(written(tmp_path, json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheme: w4a16\nbits: 4", "unknown name 'bits'; known: scheme, method, rules, calibration"),
        ("scheme: w4a16\nrules: [{module: x}]", "rules: unknown name 'module'; known: match, scheme, method"),
        ("scheme: w4a16\ncalibration: {size: 4}", "calibration: unknown name 'size'"),
        ("scheme: w4a16\ncalibration: {samples: many}", "samples is 'many', expected a whole number"),
        ("scheme: w4a16\ncalibration: {samples: 0}", "calibration of 0 x 512 tokens"),
        ("scheme: w4a16\ncalibration: self", "found str, expected a mapping"),
        ("scheme: w4a16\nrules: [down_proj]", "rules: found str, expected a mapping"),
        ("scheme: w4a16\nrules: 5", "rules is 5, expected a list"),
        ("scheme: w4a16\nrules: {match: x}", "expected a list"),
        ("scheme: w4a16\nrules: [{scheme: fp8}]", "match is missing"),
        ("method: rtn", "scheme is missing"),
        ("scheme: 4", "scheme is 4, expected a word"),
        ("scheme: w5a16", "unknown scheme 'w5a16'"),
        ("scheme: w4a16\nmethod: best", "unknown method 'best'; known steps, joined by '+': rotate, awq"),
        (
            "scheme: w4a16\nmethod: gptq+awq",
            "method 'gptq+awq': expected at most one each of rotate, awq|smooth",
        ),
        ("scheme: w4a16\nquality: good", "unknown quality 'good'; expected fast, balanced, best"),
        ("scheme: w4a16\nquality: 3", "unknown quality 3; expected fast"),
        ("scheme: w4a16\nrules: [{match: '(', scheme: fp8}]", "'(' is not a regular expression"),
        ("- scheme", "found list, expected a mapping"),
        ("", "found NoneType, expected a mapping"),
        ("scheme: [", "cannot be read as YAML"),
        ("scheme: w4a16\ntarget_bpw: few", "target_bpw is 'few', expected a number"),
        ("scheme: w4a16\ntarget_bpw: true", "target_bpw is True, expected a number"),
    ],
)
def test_a_recipe_that_says_something_else_is_refused(tmp_path, text, message):
    with pytest.raises(QuantKitError) as error:
        read_recipe(written(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_in_a_recipe_file_names_the_file(tmp_path):
    for text in ("scheme: w5a16", "scheme: w4a16\nmethod: best", "scheme: w4a16\ncalibration: {samples: 0}"):
        with pytest.raises(QuantKitError, match=r"recipe\.yaml"):
            read_recipe(written(tmp_path, text))


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(QuantKitError, match=r"absent\.yaml: not found"):
        read_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.yaml", "."):
        with pytest.raises(QuantKitError, match="cannot be read as YAML"):
            read_recipe(tmp_path / name)


def test_every_linear_in_the_blocks_is_planned_and_the_lm_head_is_not(tiny):
    plans = plan_modules(tiny(tie_word_embeddings=False), Recipe("w8a16"))
    assert len(plans) == 2 * 7
    assert all(name.startswith("model.layers.") for name in plans)
    assert {plan.method for plan in plans.values()} == {"rtn"}


def test_the_first_rule_that_matches_decides(tiny):
    rules = (Rule(r"layers\.0\.mlp", "fp8"), Rule("mlp", "keep"), Rule("q_proj|mlp", "w8a16", "rtn"))
    plans = plan_modules(tiny(), Recipe("w4a16-g32", "awq", rules))
    assert plans["model.layers.0.mlp.up_proj"].scheme.label == "fp8"
    assert "model.layers.1.mlp.up_proj" not in plans
    assert plans["model.layers.1.self_attn.q_proj"].scheme.label == "w8a16"
    assert plans["model.layers.1.self_attn.k_proj"].scheme.label == "w4a16-g32"
    assert plans["model.layers.1.self_attn.k_proj"].method == "awq"


def test_a_rule_may_change_the_method_alone(tiny):
    plans = plan_modules(tiny(), Recipe("w4a16-g32", rules=(Rule("o_proj", method="rtn"),)))
    assert plans["model.layers.0.self_attn.o_proj"].method == "rtn"
    assert plans["model.layers.0.self_attn.o_proj"].scheme.label == "w4a16-g32"
    assert plans["model.layers.0.self_attn.q_proj"].method == "awq+gptq"


@pytest.mark.parametrize(("method", "instead"), [("hqq", "rtn"), ("awq+hqq", "awq+rtn")])
def test_a_method_that_a_scheme_does_not_have_becomes_rounding_and_says_so(tiny, method, instead):
    plan = plan_modules(tiny(), Recipe("w8a16", method))["model.layers.0.mlp.up_proj"]
    assert (plan.method, plan.remark) == (instead, "hqq is for 2 to 4 bits")


def test_quality_chooses_the_method_where_none_is_named(tiny):
    rules = (Rule("q_proj", "w8a16"), Rule("k_proj", "w8a8"), Rule("v_proj", method="rtn"))
    plans = plan_modules(tiny(), Recipe("w4a16-g32", rules=rules, quality="best"))
    chosen = {name.rpartition(".")[2]: plan.method for name, plan in plans.items()}
    assert [chosen[f"{x}_proj"] for x in "qkvo"] == ["gptq", "smooth+gptq", "rtn", "awq+gptaq+learn"]


def test_an_untied_lm_head_is_packed_when_named(tiny):
    recipe = Recipe("w8a16", rules=(Rule("lm_head", "fp8"),))
    assert plan_modules(tiny(tie_word_embeddings=False), recipe)["lm_head"].scheme.label == "fp8"


def test_a_tied_lm_head_is_refused(tiny):
    recipe = Recipe("w8a16", rules=(Rule("lm_head", "fp8"),))
    with pytest.raises(QuantKitError, match="lm_head shares its weight with the embedding"):
        plan_modules(tiny(tie_word_embeddings=True), recipe)
    keep = Recipe("w8a16", rules=(Rule("lm_head", "keep"),))
    assert "lm_head" not in plan_modules(tiny(tie_word_embeddings=True), keep)


def test_a_rule_that_matches_nothing_is_an_error(tiny):
    with pytest.raises(QuantKitError, match="no linear of LlamaForCausalLM matches 'experts'"):
        plan_modules(tiny(), Recipe("w8a16", rules=(Rule("experts", "fp8"),)))


def test_a_recipe_that_leaves_nothing_is_an_error(tiny):
    with pytest.raises(QuantKitError, match="leaves no linear to quantize"):
        plan_modules(tiny(), Recipe("keep"))
    with pytest.raises(QuantKitError, match="leaves no linear to quantize"):
        plan_modules(tiny(), Recipe("w8a16", rules=(Rule(".", "keep"),)))


@pytest.mark.parametrize(
    ("label", "K", "fitted", "remark"),
    [
        ("w4a16-g128", 256, "w4a16-g128", ""),
        ("w4a16-g128", 192, "w4a16-g64", "group size 64, since 128 does not divide K=192"),
        ("w4a16-g64-asym", 96, "w4a16-g32-asym", "group size 32, since 64 does not divide K=96"),
        ("w4a16-g128", 200, "w4a16-g128", "the last group of each row has 72 columns"),
        ("w4a16-channel", 77, "w4a16-channel", ""),
        ("w3a16-g128", 192, "w3a16-g64", "group size 64, since 128 does not divide K=192"),
        ("fp8-block", 77, "fp8-block", ""),
    ],
)
def test_a_group_size_that_does_not_divide_k_is_made_smaller_or_ragged_and_says_which(
    label, K, fitted, remark
):
    scheme, said = fit_scheme(parse_scheme(label), K)
    assert scheme.label == fitted
    assert said.endswith(remark)
    assert bool(said) == bool(remark)


def test_a_model_without_decoder_linears_is_refused():
    with pytest.raises(QuantKitError, match="no linear to quantize"):
        plan_modules(torch.nn.Sequential(torch.nn.Linear(4, 4)), Recipe("w8a16"))


@pytest.mark.parametrize("method", ["rtn+learn", "hqq+learn", "awq+clip+learn"])
def test_learning_goes_on_from_gptq_alone(method):
    with pytest.raises(QuantKitError, match=r"recipe: .* learn goes on from gptq or gptaq"):
        Recipe("w4a16", method)


@pytest.mark.parametrize(("method", "left"), [("learn", "gptq"), ("smooth+gptaq+learn", "smooth+gptaq")])
def test_codes_of_fp8_are_not_learned(method, left, tiny):
    plans = plan_modules(tiny(), Recipe("fp8", method))
    assert {(plan.method, plan.remark) for plan in plans.values()} == {(left, "learn is for integer codes")}
