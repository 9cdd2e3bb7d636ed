"""Bit allocation: the knapsack against every combination, KL against a direct computation, and whole runs."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
import transformers

from quantkit import QuantKitError, Recipe, Rule, quantize, quantize_checkpoint, streaming
from quantkit import allocation as allocation_module
from quantkit.allocation import allocate, check_room, read_budget, stored_bits
from quantkit.calibration import allocate as allocate_module
from quantkit.calibration.allocate import (
    CANDIDATES,
    Choice,
    lower_hull,
    measure,
    shared_inputs,
    slope,
    spend,
    without_luck,
)
from quantkit.calibration.gptq import factorize, gptq
from quantkit.calibration.rtn import rtn
from quantkit.calibration.statistics import InputStatistics
from quantkit.models import decoder_blocks, linears
from quantkit.quantize import Progress
from quantkit.recipe import ModulePlan, fit_scheme, read_recipe
from quantkit.scheme import parse_scheme

ARCHITECTURES = ("llama", "gemma2", "qwen3", "phi3")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def random_groups(seed: int) -> list[list[Choice]]:
    """Up to five groups of up to four schemes; KL mostly falls with bits, but not always."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    groups = []
    for _ in range(draw(1, 5)):
        size = draw(1, 20)
        bits = [size * draw(2, 9) for _ in range(draw(1, 4))]
        groups.append([Choice(f"s{b}", b, draw(1, 100) / b) for b in bits])
    return groups


def cost(choices) -> int:
    return sum(choice.bits for choice in choices)


def loss(choices) -> float:
    return sum(choice.kl for choice in choices)


# the knapsack


@pytest.mark.parametrize("seed", range(60))
def test_what_is_spent_is_within_one_step_of_the_best_and_never_over_budget(seed):
    groups = random_groups(seed)
    hulls = [lower_hull(choices) for choices in groups]
    largest_step = max(
        (here.kl - there.kl for hull in hulls for here, there in itertools.pairwise(hull)), default=0.0
    )
    everything = [(cost(c), loss(c)) for c in itertools.product(*groups)]
    least = min(bits for bits, _ in everything)
    for budget in range(least, max(bits for bits, _ in everything) + 3):
        chosen = spend(groups, budget)
        assert cost(chosen) <= budget
        assert all(choice in choices for choice, choices in zip(chosen, groups, strict=True))
        best = min(kl for bits, kl in everything if bits <= budget)
        assert best - 1e-9 <= loss(chosen) <= best + largest_step + 1e-9


@pytest.mark.parametrize("seed", range(60))
def test_at_the_corners_of_the_hulls_it_is_the_best(seed):
    groups = random_groups(seed)
    hulls = [lower_hull(choices) for choices in groups]
    everything = [(cost(c), loss(c)) for c in itertools.product(*groups)]
    for price in torch.logspace(-3, 2, 40).tolist():
        corner = [min(hull, key=lambda c: c.kl + price * c.bits) for hull in hulls]
        best = min(kl for bits, kl in everything if bits <= cost(corner))
        assert loss(spend(groups, cost(corner))) == pytest.approx(best, abs=1e-9)


def test_with_room_for_all_every_group_gets_its_least_kl():
    groups = random_groups(7)
    assert loss(spend(groups, 10**6)) == pytest.approx(sum(min(c.kl for c in g) for g in groups))


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_is_convex_and_below_every_choice(seed):
    for choices in random_groups(seed):
        hull = lower_hull(choices)
        slopes = [slope(here, there) for here, there in itertools.pairwise(hull)]
        assert all(s > 0 for s in slopes)
        assert all(s > t for s, t in itertools.pairwise(slopes))
        assert hull[0].bits == min(c.bits for c in choices)
        assert hull[-1].kl == min(c.kl for c in choices)
        for choice in choices:
            for here, there in itertools.pairwise(hull):
                line = here.kl - slope(here, there) * (choice.bits - here.bits)
                assert choice.kl >= line - 1e-9


# what is measured


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("windows", [4, 8], ids=["statistics of others", "of the same"])
def test_kl_is_that_of_the_model_with_the_group_alone_packed(
    windows, method, architecture, tiny, tokens, monkeypatch
):
    monkeypatch.setattr(allocate_module, "WINDOWS", windows)
    monkeypatch.setattr(allocate_module, "WINDOWS_AT_ONCE", 3)
    judged, fitted = tokens[:windows].split(3), (tokens[windows:] if windows == 4 else tokens).split(3)
    model = tiny(architecture, torch.float32).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix, blocks = decoder_blocks(model)
    blocks_before = list(blocks)
    names = list(linears(blocks, f"{prefix}."))
    tries = ("w4a16-channel", "w4a16-g32", "w8a16")
    groups = [
        [
            [ModulePlan(name, parse_scheme(label), method if label != "w8a16" else "rtn") for name in group]
            for label in tries
        ]
        for group in shared_inputs(model, names, tokens)
    ]
    seen: list[tuple[int, int]] = []
    found = measure(model, groups, tokens, lambda done, total: seen.append((done, total)))

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(blocks) == blocks_before
    assert all(module.training for module in model.modules())
    assert len(seen) == 3 * len(groups)
    assert seen[-1][0] == seen[-1][1]

    @torch.no_grad()
    def log_probabilities() -> torch.Tensor:
        return torch.cat([model(batch, use_cache=False).logits for batch in judged]).double().log_softmax(-1)

    statistics = {name: InputStatistics(model.get_submodule(name).in_features, "cpu") for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: statistics[name].add(args[0])
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in fitted:
            model(batch)
    for handle in handles:
        handle.remove()
    p = log_probabilities()
    for plans_tried, kls in zip(groups, found, strict=True):
        exact, errors = [], []
        for plans in plans_tried:
            errors.append(0.0)
            for plan in plans:
                original, scheme = before[f"{plan.name}.weight"], plan.scheme
                hessian = statistics[plan.name].hessian
                made = rtn(original, scheme)
                if plan.method == "gptq":
                    made = gptq(original, factorize(hessian), scheme).quantized
                model.get_submodule(plan.name).weight.data = made.dequantize()
                e = (original - made.dequantize()).double()
                errors[-1] += (e @ hessian.double() @ e.T).trace().item()
            q = log_probabilities()
            exact.append((p.exp() * (p - q)).sum(-1).mean().item())
            for plan in plans:
                model.get_submodule(plan.name).weight.data = before[f"{plan.name}.weight"]
        factor = (exact[0] + exact[1]) / (errors[0] + errors[1])
        for kl, expected in zip(kls, (errors[0] * factor, errors[1] * factor, exact[2]), strict=True):
            # the softmaxes round each log-probability once in float32, and so does the Hessian's product its sums
            assert kl > 0
            assert abs(kl - expected) <= 2**-23 * float(p.abs().max()) + 1e-4 * expected
        assert kls[0] > kls[2]
        assert kls[1] > kls[2]


def test_schemes_of_one_width_share_one_factor_of_kl_to_error():
    kls, errors = [5.0, 3.0, 0.5, 7.0], [4.0, 2.0, 0.25, 0.0]
    found = without_luck(kls, errors, [4, 4, 8, 3])
    assert found == pytest.approx([8 * 4 / 6, 8 * 2 / 6, 0.5, 7.0])
    assert sum(found) == pytest.approx(sum(kls))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linears_fed_by_one_tensor_are_a_group(architecture, tiny, tokens):
    model = tiny(architecture)
    prefix, blocks = decoder_blocks(model)
    groups = shared_inputs(model, list(linears(blocks, f"{prefix}.")), tokens)
    of_a_block: list[tuple[str, ...]] = [
        QKV,
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    if architecture == "phi3":
        merged = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        of_a_block = [(name,) for name in merged]
    expected = {tuple(f"{prefix}.{i}.{name}" for name in names) for i in range(2) for names in of_a_block}
    assert set(groups) == expected


def test_a_linear_that_no_token_reaches_is_a_group_of_its_own(tiny, tokens):
    model = tiny()
    model.model.layers[0].spare = torch.nn.Linear(4, 4)
    names = ["model.layers.0.spare", "model.layers.0.mlp.down_proj"]
    assert shared_inputs(model, names, tokens) == [(name,) for name in names]


@pytest.mark.parametrize("label", [*CANDIDATES, "w4a16-g32-asym", "fp8-static", "fp8-block"])
@pytest.mark.parametrize("shape", [(7, 77), (130, 256)], ids=str)
def test_the_bits_are_those_that_are_stored(label, shape):
    scheme = parse_scheme(label)
    packed = rtn(torch.randn(shape, generator=torch.Generator().manual_seed(0)), scheme)
    extra = 32 if scheme.activation_scale == "static" else 0  # rtn leaves input_scale to its caller
    assert stored_bits(scheme, *shape) == 8 * packed.nbytes + extra


# whole runs


def run(source: Path, out: Path, recipe: Recipe, tokens: torch.Tensor, progress: Progress | None = None):
    return quantize_checkpoint(source, out, recipe, "cpu", tokens, progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe("w4a16-g128", "gptq", target_bpw=4.8)


def test_a_run_keeps_the_target_and_merges_stay_possible(source, recipe, tokens, tmp_path):
    shown = []
    summary = run(source(), tmp_path / "out", recipe, tokens, Progress(allocation=shown.append))
    assert summary.bits_per_weight <= recipe.target_bpw
    assert shown == [summary.allocation]
    chosen = summary.allocation
    assert chosen.bits / chosen.weights == pytest.approx(summary.bits_per_weight)
    assert summary.bits_per_weight > recipe.target_bpw - 0.3  # what is left is less than a step
    assert chosen.kl < chosen.uniform_kl
    assert chosen.uniform_bits < chosen.bits
    for group in chosen.groups:
        assert {summary.modules[name]["scheme"] for name in group.names} == {group.scheme}
    assert len({entry["scheme"] for entry in summary.modules.values()}) > 1
    assert {entry["method"] for entry in summary.modules.values()} >= {"gptq"}


def test_a_target_below_four_bits_is_kept_too(source, tokens, tmp_path):
    summary = run(source(), tmp_path / "out", Recipe("w4a16-g128", "rtn", target_bpw=3.0), tokens)
    assert 2.7 < summary.bits_per_weight <= 3.0
    assert {parse_scheme(entry["scheme"]).bits for entry in summary.modules.values()} >= {2, 3}


def test_its_recipe_gives_the_same_checkpoint_without_measuring(
    source, recipe, tokens, tmp_path, monkeypatch
):
    run(source(), tmp_path / "out", recipe, tokens)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "recipe.yaml").write_text(json.dumps(content["quantization_config"]["recipe"]))
    monkeypatch.setattr(streaming, "allocate", None)
    run(source(), tmp_path / "again", read_recipe(tmp_path / "recipe.yaml"), tokens)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_model_in_memory_gets_the_same_schemes(source, recipe, tokens, tmp_path):
    summary = run(source(), tmp_path / "out", recipe, tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(source(), dtype=torch.float32)
    quantize(model, recipe, tokens=tokens)
    modules = model.config.quantization_config.modules
    assert {name: entry["scheme"] for name, entry in modules.items()} == {
        name: entry["scheme"] for name, entry in summary.modules.items()
    }


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_with_the_schemes_it_chose(source, recipe, tokens, tmp_path, monkeypatch):
    run(source(), tmp_path / "whole", recipe, tokens)

    def kill(*args: object) -> None:
        raise Killed

    for progress in (Progress(measure=kill), Progress(allocation=kill), Progress(step=kill)):
        with pytest.raises(Killed):
            run(source(), tmp_path / "out", recipe, tokens, progress)
        # measured once, in the second run
        assert (tmp_path / "out.partial" / "allocation.json").exists() == (progress.measure is not kill)
    monkeypatch.setattr(streaming, "allocate", None)
    run(source(), tmp_path / "out", recipe, tokens)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_damaged_choices_are_made_again(source, recipe, tokens, tmp_path):
    run(source(), tmp_path / "whole", recipe, tokens)

    def kill(*args: object) -> None:
        (tmp_path / "out.partial" / "allocation.json").write_text('{"groups": [{}]}')
        raise Killed

    with pytest.raises(Killed):
        run(source(), tmp_path / "out", recipe, tokens, Progress(allocation=kill))
    run(source(), tmp_path / "out", recipe, tokens)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_rules_come_first_and_count(source, tokens, tmp_path):
    rules = (
        Rule("o_proj$", "keep"),
        Rule("layers\\.0.*down_proj$", "fp8"),
        Rule("v_proj$", method="rtn"),
        Rule("lm_head"),
    )
    recipe = Recipe("w4a16-g64", "gptq", rules, target_bpw=5.0)
    folder = source("llama", tie_word_embeddings=False)
    summary = run(folder, tmp_path / "out", recipe, tokens)
    modules = summary.modules
    assert not any("o_proj" in name for name in modules)
    assert modules["model.layers.0.mlp.down_proj"]["scheme"] == "fp8"
    assert modules["lm_head"]["scheme"] == "w4a16-g64"
    assert {modules[f"model.layers.{i}.self_attn.v_proj"]["method"] for i in range(2)} == {"rtn"}
    four_bit = [
        n for n, e in modules.items() if e["scheme"].startswith("w4") and n.endswith(("q_proj", "up_proj"))
    ]
    assert {modules[name]["method"] for name in four_bit} == {"gptq"}
    assert summary.bits_per_weight <= 5.0
    chosen = {name for group in summary.allocation.groups for name in group.names}
    assert chosen == set(modules) - {"lm_head", "model.layers.0.mlp.down_proj"}
    assert summary.allocation.bits / summary.allocation.weights == pytest.approx(summary.bits_per_weight)


def test_rtn_alone_runs_without_activations(source, tokens, tmp_path):
    summary = run(source(), tmp_path / "out", Recipe("w4a16-g128", "rtn", target_bpw=4.8), tokens)
    assert {entry["error_of"] for entry in summary.modules.values()} == {"weight"}


# what is refused


def limits(model) -> tuple[float, float]:
    shapes = [tuple(linear.weight.shape) for linear in linears(decoder_blocks(model)[1]).values()]
    weights = sum(N * K for N, K in shapes)
    schemes = [parse_scheme(label) for label in CANDIDATES]
    least = sum(min(stored_bits(fit_scheme(scheme, K)[0], N, K) for scheme in schemes) for N, K in shapes)
    most = sum(stored_bits(parse_scheme("w8a16"), *s) for s in shapes)
    return math.ceil(1000 * least / weights) / 1000, math.floor(1000 * most / weights) / 1000


def test_a_target_out_of_reach_names_both_ends(tiny, tokens):
    model = tiny()
    least, most = limits(model)
    for target in (least - 0.001, most + 0.001, 0.0, float("nan"), float("inf")):
        with pytest.raises(QuantKitError, match=r"w2a16.* throughout") as error:
            read_budget(model, Recipe("w4a16-g128", target_bpw=target))
        for word in (f"{least:g} bits a weight", f"{most:g} (w8a16)"):
            assert word in str(error.value)
    for target in (least, most):
        chosen = allocate(model, Recipe("w4a16-g128", target_bpw=target), tokens)
        assert chosen.bits <= target * chosen.weights


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("fp8", target_bpw=5.0), "make the recipe's scheme one of these"),
        (Recipe("w4a16-g64-asym", target_bpw=5.0), "w4a16-g64-asym in every linear"),
        (Recipe("w4a16", rules=(Rule(".", "w8a16"),), target_bpw=5.0), "nothing to choose"),
    ],
)
def test_a_recipe_that_leaves_nothing_to_choose_is_refused(recipe, message, tiny):
    with pytest.raises(QuantKitError, match=message):
        read_budget(tiny(tie_word_embeddings=False), recipe)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    source, recipe, tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(streaming, "whole_model", None)
    with pytest.raises(
        QuantKitError, match=r"holds the whole model and its output, .* GB, and cpu has 0\.0 GB"
    ):
        run(source(), tmp_path / "out", recipe, tokens)
    assert list(tmp_path.iterdir()) == []


def test_the_room_needed_is_weights_and_log_probabilities(tiny, tokens, monkeypatch):
    model = tiny()  # bfloat16, widened on a CPU
    needed = 4 * (sum(p.numel() for p in model.parameters()) + 128 * tokens.numel())
    monkeypatch.setattr(allocation_module.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed}.get)
    check_room(model, tokens, torch.device("cpu"))
    monkeypatch.setattr(allocation_module.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed - 1}.get)
    with pytest.raises(QuantKitError, match="measure on a device that holds it"):
        check_room(model, tokens, torch.device("cpu"))


def test_what_is_not_finite_is_named(tiny, tokens):
    model = tiny(dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).weight.data[0, 0] = math.inf
    with pytest.raises(
        QuantKitError, match=r"layers\.1\.mlp\.down_proj\.weight: 1 of .* NaN or infinite; mend"
    ):
        allocate(model, Recipe("w4a16-g128", target_bpw=5.0), tokens)
    broken = tiny(dtype=torch.float32)
    broken.model.norm.weight.data.fill_(math.nan)
    groups = [[[ModulePlan(name, parse_scheme("w8a16"), "rtn")]]]
    with pytest.raises(QuantKitError, match=r"down_proj: with w8a16 the model's output is not finite"):
        measure(broken, groups, tokens)
