"""What would otherwise give a wrong model in silence, or take something of the user's, is refused."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTJConfig, GptOssConfig

import quantkit
from quantkit import QuantKitError, Recipe, quantize_checkpoint
from quantkit.checkpoint import WEIGHTS
from quantkit.linear import kernel_of
from quantkit.load import read_quantized_config


@pytest.fixture
def copied(source, tmp_path) -> Path:
    return shutil.copytree(source("llama", tie_word_embeddings=True), tmp_path / "source")


def test_a_tied_head_with_weights_of_its_own(copied, tmp_path):
    tensors = load_file(copied / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    quantize_checkpoint(copied, tmp_path / "same", Recipe("w8a16"), "cpu")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(QuantKitError, match="two different tensors; set tie_word_embeddings to false"):
        quantize_checkpoint(copied, tmp_path / "out", Recipe("w8a16"), "cpu")


def test_layers_that_the_config_does_not_have(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(QuantKitError, match=r"holds model\.layers\.1\..*config\.json does not have"):
        quantize_checkpoint(copied, tmp_path / "out", Recipe("w8a16"), "cpu")


def test_a_folder_of_the_users_where_the_stage_would_be(source, tmp_path):
    stage = tmp_path / "out.partial"
    stage.mkdir()
    (stage / "precious").write_text("x")
    with pytest.raises(QuantKitError, match="holds files that no quantkit run left"):
        quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16"), "cpu")
    assert [path.name for path in stage.iterdir()] == ["precious"]


def test_stacks_of_experts_of_another_kind():
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    with pytest.raises(
        QuantKitError, match=r"experts\.\w+: .* is a stack of experts of a kind that is not supp"
    ):
        quantkit.quantize(AutoModelForCausalLM.from_config(config), Recipe("w8a16"))


def test_blocks_that_pass_something_else_than_hidden_states():
    config = GPTJConfig(vocab_size=64, n_embd=32, n_layer=3, n_head=2, rotary_dim=8, n_positions=32)
    tokens = torch.randint(3, 64, (2, 8))
    with pytest.raises(QuantKitError, match=r"cannot be calibrated.*use --method rtn"):
        quantkit.quantize(
            AutoModelForCausalLM.from_config(config), Recipe("w4a16-g32", "gptq"), tokens=tokens
        )


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (torch.zeros(2, 65, dtype=torch.int64), "65 tokens exceed the model's context of 64"),
        (torch.zeros(0, 4, dtype=torch.int64), "expected int64"),
        (torch.zeros(4, dtype=torch.int64), "expected int64"),
        (torch.full((2, 4), -1), "none negative"),
        (torch.zeros(2, 4), "expected int64"),
    ],
)
def test_calibration_tokens_that_the_model_cannot_read(tiny, tokens, why):
    with pytest.raises(QuantKitError, match=why):
        quantkit.quantize(tiny("llama"), Recipe("w4a16-g32", "gptq"), tokens=tokens)


@pytest.mark.parametrize(
    "change", [{"weight": "int3"}, {"activation": "fp8"}, {"name": "w2a16"}, {"block_size": 64}]
)
def test_a_scheme_that_is_not_its_preset(packed, tmp_path, change):
    folder = shutil.copytree(packed("llama", "w8a16"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["schemes"]["w8a16"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantKitError, match="not one that this quantkit knows"):
        read_quantized_config(folder).scheme_of("model.layers.0.mlp.up_proj")


def test_a_gpu_that_runs_no_kernel_of_the_scheme(packed, monkeypatch):
    scheme = quantkit.parse_scheme("w8a16")
    with pytest.raises(QuantKitError, match=r"sm_75.*use --device cpu"):
        kernel_of(scheme, "sm_75", 1, 64, 64, torch.bfloat16)
    monkeypatch.setattr(sys.modules["quantkit.load"], "target_of", lambda device: "sm_75")
    with pytest.raises(QuantKitError, match="no kernel for w8a16 on sm_75"):
        quantkit.load(packed("llama", "w8a16"), "cpu")


def test_equalization_says_where_it_knows_no_place_for_its_scales(tiny, monkeypatch):
    monkeypatch.setattr(sys.modules["quantkit.quantize"], "FOLDS", {})
    model = quantkit.quantize(tiny("llama"), Recipe("w4a16-g32", "equalize"))
    remarks = {entry["remark"] for entry in model.config.quantization_config.modules.values()}
    assert remarks == {"no place known for equalize's scales in llama: left out"}


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("quantkit.eval.parallel", ["/nowhere", "--device", "cpu"], "start with torchrun"),
        ("quantkit.eval.attention", ["--device", "cpu", "--records", __file__], "File exists"),
        ("quantkit.eval.engines", ["compare", "/nowhere", "/x"], "/nowhere: no such file of records"),
        ("soak.py", ["/nowhere", "--device", "cpu"], "/nowhere"),
        ("tables.py", ["/nowhere"], "/nowhere: No such file"),
    ],
)
def test_scripts_say_in_one_line_what_is_wrong(script, arguments, words, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    run, where = runpy.run_module, script
    if script.endswith(".py"):
        run, where = runpy.run_path, str(Path(__file__).parents[1] / "scripts" / script)
    with pytest.raises(SystemExit) as ended:
        run(where, run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert words in said[0]
