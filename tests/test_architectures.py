"""Every supported architecture, small and with random weights, from directory to packed directory and back."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from quantkit import QuantizedTensor, QuantLinear, Recipe, Rule, Scheme, parse_scheme, quantize_checkpoint
from quantkit.calibration import pipeline
from quantkit.errors import QuantKitError
from quantkit.packing import PARTS
from quantkit.quantize import Job
from quantkit.recipe import CalibrationSpec

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
INT4_METHODS = ["rtn", "gptq", "awq"]
WEIGHT_ONLY = ["fp8-w8a16", "w4a16-g64-asym", "w4a16-channel", "w4a16-g32-asym"]
WEIGHT_ONLY += ["w3a16-g32-asym", "w3a16-channel", "w2a16-g64", "w2a16-channel-asym"]
ROUNDED = ["w8a8", "fp8", "fp8-static", "fp8-block", "w4a8-g32-asym"]
UNTIED = {"mistral", "qwen3", "phi3"}  # the others keep their embeddings tied


def text(length: int = 24) -> torch.Tensor:
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(text()).logits.float()


def original(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stored_modules(folder) -> dict[str, QuantizedTensor]:
    """The packed weights of a checkpoint, read without quantkit's loader."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    return {
        name: QuantizedTensor(
            Scheme(**config["schemes"][entry["scheme"]]),
            tuple(tensors[f"{name}.weight"].tolist()),
            *(tensors.get(f"{name}.{part}") for part in PARTS),
        )
        for name, entry in config["modules"].items()
    }


def unpacked_tensors(folder) -> dict[str, torch.Tensor]:
    packed = tuple(f"{name}." for name in stored_modules(folder))
    return {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not name.startswith(packed) or name.endswith(".bias")
    }


def dequantized(source, folder):
    """The original model with the packed weights in the place of its own, and all else as the checkpoint has it."""
    model = original(source)
    state = unpacked_tensors(folder) | {
        f"{name}.weight": quantized.effective_weight() for name, quantized in stored_modules(folder).items()
    }
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied
    return model


def rounding_noise(model) -> float:
    """How far float32 logits are from float64 ones: what another order of the same sums may cost."""
    single = logits(model)
    noise = (single - logits(model.double())).abs().max().item()
    model.float()
    return noise


def check_equals_the_dequantized_model(source, folder):
    expected = dequantized(source, folder)
    error = (logits(original(folder)) - logits(expected)).abs().max().item()
    bound = 4 * rounding_noise(expected)
    assert error <= bound, f"logits are {error:.2e} off, float32 rounding explains {bound:.2e}"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_w8a16_gives_the_dequantized_model_and_is_near_the_original(architecture, tied, source, packed):
    folder = packed(architecture, "w8a16", tie_word_embeddings=tied)
    check_equals_the_dequantized_model(source(architecture, tie_word_embeddings=tied), folder)
    model = original(folder)
    # a row's largest weight, about 3 sigma, is 127 steps: 0.7% of noise a linear, through 2 x 7 linears
    assert relative(logits(model), logits(original(source(architecture, tie_word_embeddings=tied)))) < 0.03
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert any(name == "lm_head.weight" for name in unpacked_tensors(folder)) is not tied


@pytest.mark.parametrize("method", INT4_METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_w4a16_gives_the_dequantized_model(architecture, method, source, packed):
    tied = dict(tie_word_embeddings=architecture not in UNTIED)
    folder = packed(architecture, "w4a16-g32", method, **tied)
    check_equals_the_dequantized_model(source(architecture, **tied), folder)
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    assert {entry["method"] for entry in modules.values()} == {method}


@pytest.mark.parametrize("label", WEIGHT_ONLY)
def test_every_weight_only_scheme_gives_the_dequantized_model(label, source, packed):
    check_equals_the_dequantized_model(source("llama"), packed("llama", label))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_not_packed_is_the_original_bit_for_bit(architecture, method, source, packed):
    tied = dict(tie_word_embeddings=architecture not in UNTIED)
    before = load_file(source(architecture, **tied) / "model.safetensors")
    after = unpacked_tensors(packed(architecture, "w4a16-g32", method, **tied))
    packed_weights = {
        f"{name}.weight" for name in stored_modules(packed(architecture, "w4a16-g32", method, **tied))
    }
    assert set(before) == set(after) | packed_weights
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert any(name.endswith("q_proj.bias") for name in after) is (architecture == "qwen2")


@pytest.mark.parametrize("label", ROUNDED)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2"])
def test_activations_are_rounded_as_the_scheme_says(architecture, label, source, packed):
    folder = packed(architecture, label)
    expected = dequantized(source(architecture), folder)
    plain = logits(expected)
    for name, quantized in stored_modules(folder).items():
        hook = lambda module, args, quantized=quantized: (rounded(args[0], quantized),)
        expected.get_submodule(name).register_forward_pre_hook(hook)
    model = original(folder)
    error = (logits(model) - logits(expected)).norm()
    # a sum in another order can tip one activation over to the next code; that is rare
    assert error < 0.1 * (logits(expected) - plain).norm()
    # 4-bit weights in groups of 32: half of a step of max|w| / 7.5, a tenth of noise a linear
    assert relative(logits(model), logits(original(source(architecture)))) < (0.5 if "w4" in label else 0.15)


def rounded(x: torch.Tensor, quantized: QuantizedTensor) -> torch.Tensor:
    top, dtype = {"int8": (127, torch.int8), "fp8": (448, torch.float8_e4m3fn)}[quantized.scheme.activation]
    pieces = x.split(128, -1) if quantized.scheme.activation_scale == "group" else [x]
    out = []
    for piece in pieces:
        scale = quantized.input_scale
        if scale is None:
            scale = piece.abs().amax(-1, keepdim=True) / top
        code = (piece / scale).clamp(-top, top)
        out.append((code.round() if dtype == torch.int8 else code).to(dtype).float() * scale)
    return torch.cat(out, -1)


def test_one_checkpoint_may_hold_every_scheme(source, packed):
    rules = (
        Rule("q_proj", "w8a16"),
        Rule("k_proj", "fp8-w8a16"),
        Rule("v_proj", "w4a16-g64-asym", "gptq"),
        Rule("gate_proj", "fp8-w8a16"),
        Rule("up_proj", "w4a16-channel"),
        Rule(r"layers\.1.*down_proj", "keep"),
        Rule("lm_head", "w8a16"),
    )
    changes = dict(tie_word_embeddings=False)
    folder = packed("llama", "w4a16-g32", "rtn", rules, **changes)
    check_equals_the_dequantized_model(source("llama", **changes), folder)
    model = original(folder)
    assert isinstance(model.lm_head, QuantLinear)
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert model.model.layers[0].mlp.up_proj.scheme == parse_scheme("w4a16-channel")


@pytest.mark.parametrize("label", ["w4a16-g32", "w4a16-g128-asym", "w4a16-channel", "fp8-block", "w8a8"])
def test_widths_that_are_no_multiple_of_anything_work(label, source, packed):
    changes = dict(intermediate_size=77)
    folder = packed("llama", label, **changes)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    remark = config["modules"]["model.layers.0.mlp.down_proj"].get("remark", "")
    assert ("K=77" in remark) is ("-g" in label)
    if label.startswith("w4a16"):
        check_equals_the_dequantized_model(source("llama", **changes), folder)
    assert torch.isfinite(logits(original(folder))).all()


def test_calibration_may_be_sampled_from_the_model(source, tmp_path):
    calibration = CalibrationSpec(samples=4, seq_len=16)
    for name in ("one", "two"):
        recipe = Recipe("w4a16-g32", "gptq", calibration=calibration)
        quantize_checkpoint(source("llama"), tmp_path / name, recipe, "cpu")
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert config["calibration"].items() >= {"source": "self", "samples": 4, "seq_len": 16}.items()
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_gptq_errs_less_on_the_calibration_tokens_than_rounding(source, packed, tokens):
    exact = original(source("llama"))
    error = {}
    for method in ("rtn", "gptq"):
        model = original(packed("llama", "w4a16-g32", method))
        with torch.no_grad():
            a, b = (m.model(tokens).last_hidden_state for m in (model, exact))
        error[method] = relative(a, b)
    assert error["gptq"] < error["rtn"]


@dataclass
class AsItIs:
    """Stands for the result of packing a weight, and for the packed weight: has lost nothing."""

    weight: torch.Tensor
    targets: None = None

    @property
    def quantized(self) -> "AsItIs":
        return self

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.weight.to(dtype)


@pytest.mark.parametrize(
    ("label", "method"),
    [("w4a16-g32", "awq"), ("w8a8", "smooth"), ("w8a8", "awq+gptq"), ("w4a16-g32", "equalize")],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_scales_keeps_the_function(architecture, label, method, tiny, tokens, monkeypatch):
    model = tiny(architecture, torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("input_layernorm.weight"):
            parameter.data[::9] += 8  # outlying channels
    before, noise = logits(model), rounding_noise(model)
    norms = [p.clone() for name, p in model.named_parameters() if "norm" in name]
    job = Job(model, Recipe(label, method), torch.device("cpu"))
    job.capture(tokens)
    # weights stay as the folding leaves them, unrounded
    monkeypatch.setattr(pipeline, "quantize_linear", lambda weight, *rest: AsItIs(weight))
    for index in range(len(job.blocks)):
        job.begin(index)
        job.quantize_block(index)
        job.advance(index, {})
    error = (logits(model) - before).abs().max().item()
    # s and 1 / s round every weight twice more
    assert error <= 16 * noise, f"logits are {error:.2e} off, rounding explains {16 * noise:.2e}"
    after = [p for name, p in model.named_parameters() if "norm" in name]
    assert sum(not torch.equal(a, b) for a, b in zip(norms, after, strict=True)) >= len(job.blocks)


def test_gpt2_is_refused_with_a_word_on_conv1d(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(QuantKitError, match=r"GPT2LMHeadModel.*Conv1D layers .* are not supported"):
        quantize_checkpoint(tmp_path / "gpt2", tmp_path / "out", Recipe("w8a16"), "cpu")
    assert not list(tmp_path.glob("out*"))
