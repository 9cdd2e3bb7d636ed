"""Mixtures of experts: the same function from plain linears, packed, loaded, saved, and every expert accounted for."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_architectures import logits, original, rounding_noise, stored_modules
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import QuantLinear, Recipe, Rule, quantize_checkpoint
from quantkit.calibration.pipeline import FEW_TOKENS, Activations, BlockInputs, collect
from quantkit.checkpoint import WEIGHTS
from quantkit.errors import QuantKitError
from quantkit.experts import UnfusedExperts, describe_experts, fuse_experts, unfuse_experts
from quantkit.load import verify
from quantkit.models import decoder_blocks, packable
from quantkit.recipe import ModulePlan
from quantkit.scheme import parse_scheme

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
LAYER = "model.layers.{}.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def modules_of(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def eager(model):
    """The model with transformers' experts as a loop: its grouped product takes no float64."""
    model.set_experts_implementation("eager")
    return model


def routing(T: int, E: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of T tokens, float64; the last expert gets none."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(T, E - 1, generator=generator, dtype=torch.float64)
    weights, index = scores.topk(k)
    return index, weights


@pytest.mark.parametrize("architecture", MIXTURES)
def test_unfused_experts_compute_what_fused_ones_do(architecture, tiny):
    fused = eager(tiny(architecture, torch.float64)).model.layers[0].mlp.experts
    E, two_I, H = fused.gate_up_proj.shape
    x = torch.randn(50, H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index, weights = routing(50, E, 2)
    with torch.no_grad():
        expected = fused(x, index, weights)
        magnitude = torch.zeros_like(expected)  # the same sums of absolute values: |silu(z)| <= |z|
        for e in range(E):
            gate, up = fused.gate_up_proj[e].abs().chunk(2)
            y = ((x.abs() @ gate.T) * (x.abs() @ up.T)) @ fused.down_proj[e].abs().T
            magnitude += y * torch.where(index == e, weights, 0).sum(1, keepdim=True)
        y = UnfusedExperts(fused)(x, index, weights)
    # sums of H, H and I terms, and some ten more operations, each rounded once in either module
    bound = 2 * (2 * H + two_I // 2 + 10) * torch.finfo(torch.float64).eps / 2 * magnitude
    assert ((y - expected).abs() <= bound).all()
    assert y.dtype == x.dtype


def test_a_token_of_no_weight_and_one_token_alone(tiny):
    fused = tiny("mixtral", torch.float32).model.layers[0].mlp.experts
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    index, weights = torch.tensor([[2, 0]]), torch.tensor([[1.0, 0.0]])
    with torch.no_grad():
        expected = fused(x, index, weights)
        assert torch.allclose(UnfusedExperts(fused)(x, index, weights), expected, atol=1e-6)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_fuse_again(architecture, tiny):
    model = tiny(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unfuse_experts(model)
    assert not any(name.endswith("gate_up_proj") for name in model.state_dict())
    fuse_experts(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_blocks_and_linears_of_a_mixture(architecture, tiny):
    model = tiny(architecture)
    unfuse_experts(model)
    assert decoder_blocks(model)[0] == "model.layers"  # not the longer list of experts inside
    names = packable(model)
    experts = len(model.model.layers[0].mlp.experts)
    assert sum(".experts." in name for name in names) == 2 * 3 * experts
    assert not any(re.search(r"(mlp\.|expert_)gate$", name) for name in names)  # routers
    assert ("model.layers.0.mlp.shared_expert.up_proj" in names) is (architecture == "qwen2_moe")


def fused_reference(source: Path, folder: Path):
    """The original model, fused, with the stacks of the dequantized weights."""
    model = eager(original(source))
    weights = {name: quantized.effective_weight() for name, quantized in stored_modules(folder).items()}
    with torch.no_grad():
        for name, weight in weights.items():
            if (place := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name)) is None:
                model.get_submodule(name).weight.copy_(weight)
                continue
            fused, e, projection = model.get_submodule(place[1]), int(place[2]), place[3]
            if projection == "down_proj":
                fused.down_proj[e] = weight
            else:
                fused.gate_up_proj[e].chunk(2)[projection == "up_proj"].copy_(weight)
    return model


@pytest.mark.parametrize(
    ("architecture", "label", "method"),
    [(architecture, "w8a16", "rtn") for architecture in MIXTURES]
    + [("mixtral", "w4a16-g32", "gptq"), ("qwen3_moe", "w4a16-g32", "gptq")],
)
def test_a_packed_mixture_is_the_dequantized_model(architecture, label, method, source, packed, tmp_path):
    folder = packed(architecture, label, method)
    model, expected = original(folder), fused_reference(source(architecture), folder)
    assert isinstance(model.model.layers[1].mlp.experts[3].down_proj, QuantLinear)
    error = (logits(model) - logits(expected)).abs().max().item()
    bound = 4 * rounding_noise(expected)
    assert error <= bound, f"logits are {error:.2e} off, float32 rounding explains {bound:.2e}"
    if label == "w8a16":
        # of most tokens: rounding sends some that are near the border between two experts to the other one
        exact = logits(original(source(architecture)))
        assert ((logits(model) - exact).norm(dim=-1) / exact.norm(dim=-1)).median() < 0.03
    assert verify(folder) == []
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("recipe", [Recipe("w8a16"), Recipe("w4a16-g32", "gptq"), Recipe("fp8-static")])
def test_a_mixture_quantized_in_memory_equals_its_files(recipe, architecture, tiny, tokens, tmp_path):
    tiny(architecture, torch.float32).save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "files", recipe, "cpu", tokens)
    model = quantkit.quantize(tiny(architecture, torch.float32), recipe, tokens=tokens)
    model.save_pretrained(tmp_path / "memory")
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "files")


def test_a_mixture_loaded_by_transformers_is_saved_under_the_names_of_its_modules(source, packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source("mixtral"))  # from files with other names
    quantkit.quantize(model, Recipe("w8a16", "rtn")).save_pretrained(tmp_path / "memory")
    assert bytes_of(tmp_path / "memory") == bytes_of(packed("mixtral"))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_files_that_hold_stacks_give_the_same(architecture, source, packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source(architecture))
    model.config.save_pretrained(tmp_path / "stacked")
    save_file(model.state_dict(), tmp_path / "stacked" / WEIGHTS, metadata={"format": "pt"})
    assert f"{LAYER.format(0)}.gate_up_proj" in load_file(tmp_path / "stacked" / WEIGHTS)
    quantize_checkpoint(tmp_path / "stacked", tmp_path / "out", Recipe("w8a16", "rtn"), "cpu")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (packed(architecture) / WEIGHTS).read_bytes()


def test_more_experts_on_disk_than_in_the_config(source, tmp_path):
    content = json.loads((source("qwen3_moe") / "config.json").read_text())
    content |= {"num_experts": 4, "num_local_experts": 4}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(content))
    (tmp_path / "source" / WEIGHTS).symlink_to(source("qwen3_moe") / WEIGHTS)
    with pytest.raises(QuantKitError, match=r"holds .*experts\.4\..*config\.json does not have"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "out", Recipe("w8a16"), "cpu")


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_packed_mixture_generates(architecture, packed, tokens):
    model = original(packed(architecture, "w4a16-g32", "gptq"))
    out = model.generate(tokens[:2, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (2, 11)
    with torch.no_grad():
        step = model(out[:, :-1]).logits[:, -1].argmax(-1)
    assert torch.equal(step, out[:, -1])


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_dequantize_gives_a_mixture_that_transformers_opens(architecture, packed, tmp_path):
    model = original(packed(architecture, "w8a16"))
    expected = logits(model)
    plain = eager(model.dequantize())
    bound = 4 * rounding_noise(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert (logits(plain) - expected).abs().max() <= bound
    assert torch.equal(logits(eager(original(tmp_path / "plain"))), logits(plain))


def test_rules_reach_single_experts(packed):
    rules = (
        Rule(r"experts\.0\.", "w8a16"),
        Rule(r"layers\.1.*experts\.\d+\.down_proj", "keep"),
        Rule("self_attn", "keep"),
    )
    folder = packed("mixtral", "w4a16-g32", "rtn", rules)
    schemes = {name: entry["scheme"] for name, entry in modules_of(folder).items()}
    assert {name for name, label in schemes.items() if label == "w8a16"} == {
        f"{LAYER.format(layer)}.0.{projection}" for layer in (0, 1) for projection in PROJECTIONS
    }
    assert len(schemes) == 2 * 4 * 3 - 3
    layer = original(folder).model.layers[1]
    assert type(layer.mlp.experts[1].down_proj) is torch.nn.Linear
    assert type(layer.self_attn.q_proj) is torch.nn.Linear


def test_a_rule_for_routers_matches_nothing(source, tmp_path):
    recipe = Recipe("w8a16", rules=(Rule(r"shared_expert_gate$", "w8a16"),))
    with pytest.raises(QuantKitError, match=r"no linear .* matches 'shared_expert_gate"):
        quantize_checkpoint(source("qwen2_moe"), tmp_path / "out", recipe, "cpu")


@pytest.fixture(scope="module")
def lopsided(tiny, tmp_path_factory) -> Path:
    """A Mixtral whose experts 4 and 5 of each layer no token can reach.

    Its router has rows v, -v, u, -u, 0, 0: of every hidden state two of the first four logits are positive.
    """
    model = tiny("mixtral", torch.float32, num_local_experts=6)
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight.data
        gate[1], gate[3], gate[4:] = -gate[0], -gate[2], 0
    folder = tmp_path_factory.mktemp("lopsided") / "source"
    model.save_pretrained(folder)
    return folder


def test_an_expert_without_tokens_is_rounded_and_named(lopsided, tokens, tmp_path):
    quantize_checkpoint(lopsided, tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
    modules = modules_of(tmp_path / "out")
    for layer in (0, 1):
        for e in range(6):
            for projection in PROJECTIONS:
                entry = modules[f"{LAYER.format(layer)}.{e}.{projection}"]
                if e < 4:
                    assert (entry["method"], entry["error_of"]) == ("gptq", "output")
                    assert entry["tokens"] > 0
                else:
                    assert (entry["method"], entry["tokens"], entry["error_of"]) == ("rtn", 0, "weight")
                    assert entry["remark"] == "no calibration token reached it: rounded to nearest"
        counts = [modules[f"{LAYER.format(layer)}.{e}.up_proj"]["tokens"] for e in range(6)]
        assert sum(counts) == 2 * tokens.numel()  # two experts a token
    line = describe_experts(modules)
    assert line == "experts: 8 of 12 calibrated, fewest tokens 0 (model.layers.0.mlp.experts.4)"
    # the search for the clip is by the weights' own error: no worse than plain rounding
    quantize_checkpoint(lopsided, tmp_path / "plain", Recipe("w4a16-g32", "rtn"), "cpu")
    plain = modules_of(tmp_path / "plain")
    assert all(modules[name]["error"] <= plain[name]["error"] for name in modules if ".experts.5." in name)
    assert describe_experts(plain) == ""


def test_a_static_scale_without_tokens_is_the_largest_of_the_other_experts(lopsided, tokens, tmp_path):
    quantize_checkpoint(lopsided, tmp_path / "out", Recipe("fp8-static"), "cpu", tokens)
    modules, packed = modules_of(tmp_path / "out"), stored_modules(tmp_path / "out")
    for projection in PROJECTIONS:
        scales = [packed[f"{LAYER.format(0)}.{e}.{projection}"].input_scale for e in range(6)]
        assert scales[4] == scales[5] == max(scales[:4])
        remark = modules[f"{LAYER.format(0)}.4.{projection}"]["remark"]
        assert remark.endswith("activation scale from the other experts")
    assert torch.isfinite(logits(original(tmp_path / "out"))).all()


def test_experts_with_few_tokens_say_how_many(source, tmp_path):
    tokens = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(0))
    quantize_checkpoint(source("mixtral"), tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
    few = 0
    for name, entry in modules_of(tmp_path / "out").items():
        K = 96 if "down_proj" in name else 64
        expert_tokens = entry["tokens"]
        if 0 < expert_tokens < FEW_TOKENS * K:
            few += 1
            assert entry["method"] == "gptq"
            assert entry["remark"] == f"only {expert_tokens} calibration tokens for {K} input channels"
        elif expert_tokens:
            assert "remark" not in entry
    assert few


def test_statistics_of_an_expert_that_a_later_batch_reaches_first(monkeypatch):
    """Tensors of later batches may get the ids of earlier ones; they are other tensors all the same."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            (self.early if self.calls == 1 else self.late)(x)
            return x

    monkeypatch.setattr("builtins.id", lambda x: 0)
    plans = {name: ModulePlan(name, parse_scheme("w4a16"), "gptq") for name in ("early", "late")}
    block, one, two = Block(), torch.ones(1, 2, 4), torch.full((1, 3, 4), 2.0)
    activations = Activations([one, two], [((), {})])
    found = collect(block, plans, BlockInputs(0, activations, torch.device("cpu")))
    assert {name: (s.tokens, s.max_abs.max().item()) for name, s in found.items()} == {
        "early": (2, 1.0),
        "late": (3, 2.0),
    }
