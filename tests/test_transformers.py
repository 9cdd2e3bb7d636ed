"""A quantkit checkpoint as a transformers model: load, save, move, compile, generate, and refuse."""

import copy
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit import QuantKitError, QuantLinear, Recipe, Rule
from quantkit.calibration.learn import learn_rounding
from quantkit.checkpoint import MANIFEST, WEIGHTS
from quantkit.hf import is_offloaded
from quantkit.linear import tensor_specs
from quantkit.load import verify
from quantkit.packing import PARTS
from quantkit.quantize import Progress

LABELS = [
    "w8a16",
    "w8a8",
    "w4a16-g32",
    "w4a16-g64-asym",
    "w4a16-g128",
    "w4a16-channel",
    "w3a16-g64-asym",
    "w2a16-channel",
    "w4a8-g32-asym",
    "fp8",
    "fp8-static",
    "fp8-block",
    "fp8-w8a16",
]
MIXED = (  # every op, and every kind of stored tensor, in one small model
    Rule("q_proj", "w4a16-g32-asym"),
    Rule("k_proj", "fp8-static"),
    Rule("v_proj", "w8a8"),
    Rule("o_proj", "fp8-block"),
    Rule("up_proj", "w4a16-g32"),
)
INPUT = torch.arange(3, 27)[None]


@pytest.fixture
def mixed(packed) -> Path:
    return packed("qwen2", "w8a16", "rtn", MIXED)


def loaded(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def packed_state(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        for part, tensor in module.quantized().tensors().items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    as_bytes = lambda tensor: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).tolist())
    return a.keys() == b.keys() and all(as_bytes(a[name]) == as_bytes(b[name]) for name in a)


@pytest.mark.parametrize("label", LABELS)
def test_saving_a_loaded_model_gives_the_same_bytes(label, packed, tmp_path):
    folder = packed("llama", label)
    loaded(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_saving_gives_the_same_bytes_for_every_architecture(architecture, packed, tmp_path):
    folder = packed(architecture, "w8a16", tie_word_embeddings=True)
    loaded(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_saving_an_untied_packed_lm_head_gives_the_same_bytes(packed, tmp_path):
    folder = packed("llama", "w4a16-g32", "rtn", (Rule("lm_head", "w8a16"),), tie_word_embeddings=False)
    loaded(folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert verify(tmp_path / "again") == []


def test_the_state_dict_has_the_stored_tensors_under_their_names(packed):
    folder = packed("llama", "w4a16-g64-asym")
    state = loaded(folder).state_dict()
    stored = load_file(folder / WEIGHTS)
    assert set(state) == set(stored) | {"lm_head.weight"}
    name = "model.layers.0.mlp.down_proj"
    assert {key for key in state if key.startswith(name)} == {
        f"{name}.{part}" for part in ("weight", "codes", "scales", "zeros")
    }
    assert same({name: state[name] for name in stored}, stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_another_dtype_leaves_codes_and_scales_as_they_are_stored(dtype, mixed):
    model = loaded(mixed, dtype=dtype)
    stored = load_file(mixed / WEIGHTS)
    state = packed_state(model)
    assert same(state, {name: stored[name] for name in state})
    assert model.model.norm.weight.dtype == dtype
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == dtype
    assert logits(model).dtype == dtype


@pytest.mark.parametrize(
    "cast",
    [
        torch.nn.Module.half,  # transformers' own .half() and .float() refuse every quantized model
        lambda model: model.to(torch.float32),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.bfloat16().to(torch.float32),
        torch.nn.Module.double,
    ],
    ids=["half", "to dtype", "to device and dtype", "there and back", "double"],
)
def test_casting_a_model_leaves_codes_and_scales_as_they_are(cast, mixed):
    model = loaded(mixed)
    before = {name: tensor.clone() for name, tensor in packed_state(model).items()}
    model = cast(model)
    assert same(packed_state(model), before)
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == model.model.norm.weight.dtype == model.dtype


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_changes_nothing(device_map, mixed, tmp_path):
    model = loaded(mixed, device_map=device_map)
    assert torch.equal(logits(model).cpu(), logits(loaded(mixed)))
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(mixed)


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w8a8-static", "fp8-block"])
def test_a_block_on_the_disk_is_read_when_it_is_called(scheme, packed, tmp_path):
    """What accelerate does with blocks that a device has no room for; the others are laid out for their device."""
    folder = packed("llama", scheme)
    rest = ("embed_tokens", "rotary_emb", "layers.1", "norm")
    device_map = {**{f"model.{name}": "cpu" for name in rest}, "lm_head": "cpu", "model.layers.0": "disk"}
    model = loaded(folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "disk")
    assert model.model.layers[0].mlp.up_proj.codes.is_meta
    whole = loaded(folder, dtype=torch.float32)
    second = (m.model.layers[1].mlp.up_proj for m in (model, whole))
    assert len({linear.repacked_for for linear in second}) == 1
    # the order of the sums differs by kernel
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    saved, stored = load_file(tmp_path / "again" / WEIGHTS), load_file(folder / WEIGHTS)
    ours = [name for name in stored if name.rpartition(".")[2] in PARTS]
    assert same({name: saved[name] for name in ours}, {name: stored[name] for name in ours})


@pytest.mark.parametrize(
    ("name", "device_map", "offloaded"),
    [
        ("a.0.b", {}, False),
        ("a.0.b", {"": 0}, False),
        ("a.0.b", {"a.0": 0, "a.1": 1}, False),
        ("a.0.b", {"a.0": "cpu", "a.1": 0}, True),
        ("a.10.b", {"a.1": "cpu", "a.10": 0}, False),
        ("a.0.b", {"a": 0, "a.0": "disk"}, True),
        ("a.0.b", {"a.0": "cpu", "a.1": "disk"}, False),
    ],
)
def test_what_is_offloaded_is_told_from_the_device_map(name, device_map, offloaded):
    assert is_offloaded(name, device_map) == offloaded


def test_quantkit_load_is_from_pretrained(mixed):
    model = quantkit.load(mixed, "cpu", dtype=torch.float32)
    assert not model.training
    assert torch.equal(logits(model), logits(loaded(mixed, dtype=torch.float32)))


# refusals


def with_config(folder: Path, out: Path, **changes) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_a_newer_format_is_refused(packed, tmp_path):
    folder = with_config(packed("llama", "w8a16"), tmp_path / "newer", format_version=4)
    for load in (loaded, quantkit.load, verify):
        with pytest.raises(
            QuantKitError, match=r"format_version 4, .* reads up to 3; install a newer quantkit"
        ):
            load(folder)


def test_a_model_that_is_not_quantkits_is_refused_by_load(source):
    with pytest.raises(QuantKitError, match=r"not a quantkit checkpoint \(quant_method: none\)"):
        quantkit.load(source())


@pytest.mark.parametrize(
    "changes",
    [
        dict(schemes=[]),
        dict(schemes={"w8a16": {"bits": 8}}),
        dict(modules=5),
        dict(modules={"model.layers.0.mlp.up_proj": {}}),
        dict(modules={"model.layers.7.mlp.up_proj": {"scheme": "w8a16"}}),
        dict(modules={"model.norm": {"scheme": "w8a16"}}),
        dict(format_version="one"),
    ],
    ids=str,
)
def test_a_garbled_quantization_config_is_refused(changes, packed, tmp_path):
    folder = with_config(packed("llama", "w8a16"), tmp_path / "garbled", **changes)
    with pytest.raises(QuantKitError, match=r"config\.json"):
        quantkit.load(folder)


@pytest.mark.parametrize("part", ["codes", "scales", "weight"])
def test_a_packed_tensor_that_is_missing_is_an_error(part, packed, tmp_path):
    folder = shutil.copytree(packed("llama", "w8a16"), tmp_path / "copy")
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(QuantKitError, match=rf"up_proj\.{part} is missing"):
        loaded(folder)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("codes", torch.zeros(96, 63, dtype=torch.int8)),
        ("codes", torch.zeros(96, 64, dtype=torch.uint8)),
        ("scales", torch.ones(96)),
        ("scales", torch.ones(96, 1, dtype=torch.float16)),
    ],
    ids=["narrow codes", "unsigned codes", "flat scales", "half scales"],
)
def test_a_packed_tensor_of_another_shape_or_dtype_is_an_error(part, wrong, packed, tmp_path):
    folder = shutil.copytree(packed("llama", "w8a16"), tmp_path / "copy")
    tensors = load_file(folder / WEIGHTS)
    tensors[f"model.layers.1.mlp.up_proj.{part}"] = wrong
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(QuantKitError, match=rf"up_proj\.{part}: found .* scheme w8a16 expects"):
        loaded(folder)


WITHOUT_QUANTKIT = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print("refused:", type(error).__name__)
    else:
        print("loaded", folder)
assert not any(name.startswith("quantkit") for name in sys.modules)
"""


def test_without_importing_quantkit_no_scheme_loads(packed, mixed):
    folders = [packed("llama", label) for label in LABELS] + [mixed]
    command = [sys.executable, "-c", WITHOUT_QUANTKIT, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd="/")
    lines = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert lines == ["refused"] * len(folders)
    assert "Unknown quantization type, got quantkit" in done.stderr


# a model as an object


def through_a_file(model):
    file = io.BytesIO()  # torch's own pickling: the plain one of torch 2.13 does not know float8
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_a_file], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(duplicate, mixed, tmp_path):
    model = loaded(mixed)
    twin = duplicate(model)
    assert torch.equal(logits(twin), logits(model))
    twin.save_pretrained(tmp_path / "twin")
    assert contents(tmp_path / "twin") == contents(mixed)
    twin.model.norm.weight.data += 1
    twin.save_pretrained(tmp_path / "changed")
    assert verify(tmp_path / "changed") == []
    assert contents(tmp_path / "changed") != contents(mixed)
    model.save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model") == contents(mixed)


def test_dequantize_gives_an_ordinary_model(packed, tmp_path):
    folder = packed("qwen2", "w4a16-g32", "rtn", (Rule("o_proj", "w8a16"),))
    model = loaded(folder, dtype=torch.float32)
    expected = logits(model)
    plain = model.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in plain.modules())
    assert torch.allclose(logits(plain), expected, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not (tmp_path / "plain" / MANIFEST).exists()
    assert torch.equal(logits(loaded(tmp_path / "plain")), logits(plain))


@pytest.mark.parametrize("label", ["w8a16", "w8a8", "w4a16-g32", "fp8-block"])
def test_generate_agrees_with_plain_forward_passes(label, packed):
    model = loaded(packed("llama", label), dtype=torch.float32)
    generated = model.generate(INPUT[:, :4], max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokens = INPUT[:, :4]
    for _ in range(8):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("w8a16"),
        Recipe("w4a16-g32", "gptq"),
        Recipe("w4a16-g32", "awq"),
        Recipe("w4a16-g32", "awq+gptaq+learn"),
        Recipe("w8a8", "smooth+gptq"),
        Recipe("fp8-static", "rtn"),
        Recipe("w8a16", rules=MIXED),
    ],
    ids=["w8a16", "gptq", "awq", "learn", "smooth", "fp8-static", "mixed"],
)
def test_quantizing_in_memory_equals_quantizing_the_files(recipe, tiny, tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(learn_rounding.__kwdefaults__, "steps", 4)
    model = tiny("qwen2", torch.float32)
    model.save_pretrained(tmp_path / "source")
    quantkit.quantize_checkpoint(tmp_path / "source", tmp_path / "files", recipe, "cpu", tokens)
    steps, modules = [], []
    progress = Progress(start=steps.append, module=modules.append, step=lambda: steps.append(1))
    model = quantkit.quantize(model, recipe, tokens=tokens, progress=progress)
    assert steps == [3, 1, 1, 1]
    assert len(modules) == 2 * 7
    model.save_pretrained(tmp_path / "memory")
    assert contents(tmp_path / "memory") == contents(tmp_path / "files")
    assert torch.equal(logits(model), logits(loaded(tmp_path / "memory")))


def test_a_model_quantized_in_memory_loads_again(tiny, tmp_path):
    model = quantkit.quantize(tiny("gemma3"), Recipe("w4a16-g32", "rtn"))
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantLinear)
    model.save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved") == []
    assert torch.equal(logits(model), logits(loaded(tmp_path / "saved")))


def test_a_module_declares_the_tensors_that_it_stores(mixed):
    for module in loaded(mixed).modules():
        if isinstance(module, QuantLinear):
            specs = tensor_specs(module.scheme, module.out_features, module.in_features)
            found = {name: (tuple(t.shape), t.dtype) for name, t in module.quantized().tensors().items()}
            assert found == specs
            assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    "label", ["w8a16", "w8a8", "w4a16-g64-asym", "w3a16-g32", "w4a8-g32", "fp8-static", "fp8-block"]
)
def test_a_quantized_model_compiles_without_graph_breaks(label, packed, monkeypatch):
    monkeypatch.undo()  # conftest's poisoned allocations are not for the tracer
    torch._dynamo.reset()
    model = loaded(packed("llama", label), dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        result = compiled(INPUT, use_cache=False).logits
    noise = 1e-5 * logits(model).abs().max()  # aot_eager decomposes norms and softmax
    assert (result - logits(model)).abs().max() <= noise
