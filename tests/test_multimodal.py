"""Models with a vision tower: the language tower is packed, all else stays as it was."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SIZES
from safetensors.torch import load_file
from test_architectures import relative, stored_modules
from transformers import AutoModelForImageTextToText

import quantkit
from quantkit import QuantLinear, Recipe, Rule, quantize_checkpoint
from quantkit.checkpoint import WEIGHTS
from quantkit.errors import QuantKitError
from quantkit.load import verify
from quantkit.models import decoder_blocks

IMAGE = 120  # the token that an image's patches stand for
TEXT = {key: value for key, value in SIZES.items() if not key.endswith("token_id")}
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)  # fmt: skip


def config_of(kind: str):
    if kind == "gemma3":
        text = {**TEXT, "head_dim": 16, "sliding_window": 8}
        tokens = dict(
            image_token_index=IMAGE, boi_token_index=121, eoi_token_index=122, mm_tokens_per_image=4
        )
        return transformers.Gemma3Config(text_config=text, vision_config=VISION, **tokens)
    if kind == "llava":
        text = dict(model_type="llama", **TEXT)
        vision = dict(model_type="clip_vision_model", **VISION)
        return transformers.LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1
        )
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
    vision = dict(depth=3, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=14)
    return transformers.Qwen2VLConfig(text_config=dict(**TEXT, rope_parameters=rope), vision_config=vision)


KINDS = ["gemma3", "llava", "qwen2_vl"]


def made(kind: str, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(kind), dtype=dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def opened(folder: Path, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @cache
    def save(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / "source"
        made(kind).save_pretrained(folder)
        return folder

    return save


def text(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 119, (8, 24), generator=torch.Generator().manual_seed(seed))


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Text alone, or for the kinds whose images are one tensor, text with an image in it."""
    ids = text()[:2]
    if kind == "qwen2_vl":
        return dict(input_ids=ids)
    ids[:, 4:8] = IMAGE
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    return dict(input_ids=ids, pixel_values=pixels)


def logits(model, kind: str) -> torch.Tensor:
    with torch.no_grad():
        inputs_of = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs(kind).items()}
        return model(**inputs_of).logits


@pytest.mark.parametrize(("label", "method"), [("w8a16", "rtn"), ("w4a16-g32", "gptq"), ("w4a16-g32", "awq")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_tower_is_packed(kind, label, method, saved, tmp_path):
    quantize_checkpoint(saved(kind), tmp_path / "out", Recipe(label, method), "cpu", text(0))
    packed = stored_modules(tmp_path / "out")
    assert len(packed) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    assert verify(tmp_path / "out") == []

    model, expected = opened(tmp_path / "out", dtype=torch.float32), opened(saved(kind), dtype=torch.float32)
    exact = logits(expected, kind)
    state = load_file(tmp_path / "out" / WEIGHTS)
    for name, parameter in expected.named_parameters():
        module = name.removesuffix(".weight")
        if module in packed:
            parameter.data = packed[module].dequantize()
        else:
            # AWQ divides the outputs of norms and of value projections
            folded = method == "awq" and re.search(r"language_model.*(norm\.weight|v_proj\.bias)", name)
            assert folded or torch.equal(parameter.data, state[name].float()), name
            parameter.data = state[name].float()
    single, double = logits(expected, kind), logits(expected.double(), kind)
    error, noise = (logits(model, kind) - single).abs().max(), (single - double).abs().max()
    assert error <= 4 * noise, f"logits are {error:.2e} off, float32 rounding explains {4 * noise:.2e}"
    assert relative(single, exact) < (0.05 if label == "w8a16" else 0.4)

    opened(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_multimodal_model_in_memory(kind, tmp_path):
    made(kind, torch.float32).save_pretrained(tmp_path / "source")
    recipe = Recipe("w4a16-g32", "gptq", (Rule("self_attn", "w8a16"),))
    quantize_checkpoint(tmp_path / "source", tmp_path / "files", recipe, "cpu", text(0))
    model = quantkit.quantize(opened(tmp_path / "source"), recipe, tokens=text(0))
    model.save_pretrained(tmp_path / "memory")
    for name in (WEIGHTS, "config.json", "quantkit_manifest.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "files" / name).read_bytes()
    # the rule's name is also that of linears in the vision tower
    vision = [
        name for name, m in model.named_modules() if isinstance(m, QuantLinear) and "language" not in name
    ]
    assert vision == []
    out = quantkit.load(tmp_path / "files", "cpu").generate(text()[:1, :5], max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 8)


def test_the_processor_comes_along(saved, tmp_path):
    (saved("llava") / "preprocessor_config.json").write_text(json.dumps({"size": 28}))
    quantize_checkpoint(saved("llava"), tmp_path / "out", Recipe("w8a16"), "cpu")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"size": 28}


def test_a_rule_for_the_vision_tower_matches_nothing(saved, tmp_path):
    recipe = Recipe("w8a16", rules=(Rule("vision_tower", "w8a16"),))
    with pytest.raises(
        QuantKitError, match="no linear of LlavaForConditionalGeneration matches 'vision_tower'"
    ):
        quantize_checkpoint(saved("llava"), tmp_path / "out", recipe, "cpu")


def test_a_model_whose_language_tower_is_no_module_is_refused():
    class Blended(torch.nn.Module):
        config = config_of("llava")

        def get_decoder(self):
            return self

    with pytest.raises(QuantKitError, match=r"Blended: its text model has no module of its own"):
        decoder_blocks(Blended())
