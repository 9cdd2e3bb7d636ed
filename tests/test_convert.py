"""quantkit convert, loading and quantizing other tools' checkpoints: what it says, streaming, and the same numbers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import quantkit
from quantkit import QuantKitError, Recipe, Rule, convert, quantize_checkpoint
from quantkit.checkpoint import WEIGHTS, CheckpointReader
from quantkit.demo import EXAMPLE
from quantkit.formats import gguf_names, open_source
from quantkit.formats.gguf_file import read_gguf
from quantkit.formats.gguf_tokenizer import tokenizer_metadata
from quantkit.formats.reader import PackedReader
from quantkit.load import verify
from quantkit.quantize import Progress
from quantkit.source import whole_model

IDS = torch.arange(3, 19)[None]
EVERY = ("gptq", "gptq_v2", "awq", "compressed-tensors", "gguf")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def logits_of(folder: Path) -> torch.Tensor:
    return logits(quantkit.load(folder, "cpu", dtype=torch.float32))


def untied(packed, scheme: str, **changes) -> Path:
    return packed("llama", scheme, tie_word_embeddings=False, **changes)


# the same numbers, all the way


@pytest.mark.parametrize("first", EVERY)
def test_a_chain_of_formats_ends_where_it_began(packed, tmp_path, first):
    source = untied(packed, "w4a16-g32")
    expected = logits_of(source)
    convert(source, tmp_path / first, first)
    assert torch.equal(logits_of(tmp_path / first), expected)
    before = tmp_path / first
    for target in (*EVERY, "quantkit"):
        if target == first:
            continue
        done = convert(before, tmp_path / f"{before.name}-{target}", target)
        assert not done.rounded
        before = tmp_path / f"{before.name}-{target}"
    assert verify(before) == []
    assert torch.equal(logits_of(before), expected)
    ours, again = load_file(source / WEIGHTS), load_file(before / WEIGHTS)
    assert ours.keys() == again.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.double(), again[name].double()), name  # scales are float16 since GPTQ
        assert (
            tensor.dtype == again[name].dtype
            or name.endswith("scales")
            or first == "gguf"
            or tensor.dim() == 1
        )


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "fp8", "fp8-static", "fp8-block", "w4a8-g32"])
def test_compressed_tensors_keeps_activations_too(packed, tokens, source, tmp_path, scheme):
    made = untied(packed, scheme)
    convert(made, tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", "quantkit")
    ours, again = load_file(made / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(t.view(torch.uint8), again[n].view(torch.uint8)) for n, t in ours.items())
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["schemes"]
        == (json.loads((made / "config.json").read_text())["quantization_config"]["schemes"])
    )
    assert torch.equal(logits_of(tmp_path / "ct"), logits_of(made))


@pytest.mark.parametrize(
    "architecture", ["mistral", "qwen2", "qwen3", "gemma2", "phi3", "mixtral", "qwen3_moe"]
)
def test_architectures_come_through_gptq_and_compressed_tensors(packed, tmp_path, architecture):
    source = packed(architecture, "w4a16-g32")
    expected = logits_of(source)
    for target in ("gptq", "compressed-tensors"):
        convert(source, tmp_path / target, target)
        assert torch.equal(logits_of(tmp_path / target), expected)
        names = load_file(tmp_path / target / WEIGHTS)
        assert any("block_sparse_moe.experts.0.w1" in n for n in names) == (architecture == "mixtral")
        routers = {
            n.removesuffix(".weight") for n in names if n.endswith((".mlp.gate.weight", "_moe.gate.weight"))
        }
        assert bool(routers) == (architecture in ("mixtral", "qwen3_moe"))
        described = json.loads((tmp_path / target / "config.json").read_text())["quantization_config"]
        left = described.get("ignore") or [
            re.sub(r"[-:^$\\]", "", key) for key in described.get("dynamic", {})
        ]
        assert routers <= set(left)
        assert not any("norm" in name or "embed" in name for name in left)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_architectures_come_through_gguf(packed, tmp_path, architecture):
    """With llama.cpp's order of q and k, and without config.json: its metadata say it all."""
    source = packed(architecture, "w4a16-g32")
    convert(source, tmp_path / "out", "gguf")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    config = open_source(tmp_path / "out").config
    original = open_source(source).config
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, key, None) == getattr(original, key, None), key
    if architecture != "mistral":  # which is Llama there, without a sliding window
        assert torch.equal(logits_of(tmp_path / "out"), logits_of(source))


def test_turning_q_and_k_pairs_the_halves_of_a_head():
    rows = torch.arange(16)[:, None]
    turned = gguf_names.turn(rows, heads=2).flatten().tolist()
    assert turned[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(gguf_names.turn_back(gguf_names.turn(rows, 2), 2), rows)


def test_llama_3s_frequencies_are_stored(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    quantize_checkpoint(EXAMPLE, tmp_path / "q", Recipe("w4a16-g32", "rtn"), "cpu")
    content = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(content | {"rope_parameters": rope}))
    convert(tmp_path / "q", tmp_path / "out", "gguf")
    file = read_gguf(tmp_path / "out" / "model.gguf")
    stored = file.tensors["rope_freqs.weight"]
    data = stored.file.read_bytes()[stored.start : stored.stop]
    factors = torch.frombuffer(bytearray(data), dtype=torch.float32)
    config = open_source(tmp_path / "q").config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    head_dim = config.hidden_size // config.num_attention_heads
    plain = 1e4 ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    assert factors.unique().numel() > 2
    assert torch.allclose((plain / factors).float(), scaled, rtol=1e-6)
    with pytest.raises(QuantKitError, match=r"scaled rotations.*config\.json"):
        quantkit.load(tmp_path / "out", "cpu")
    shutil.copy(tmp_path / "q" / "config.json", tmp_path / "out")
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "q"))


def test_a_tokenizer_goes_into_the_gguf(tmp_path):
    quantize_checkpoint(EXAMPLE, tmp_path / "q", Recipe("w4a16-g32", "rtn"), "cpu")
    done = convert(tmp_path / "q", tmp_path / "out", "gguf")
    assert done.notes == []
    metadata = read_gguf(tmp_path / "out" / "model.gguf").metadata
    described = json.loads((EXAMPLE / "tokenizer.json").read_text())
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == open_source(EXAMPLE).config.vocab_size
    assert all(tokens[number] == text for text, number in described["model"]["vocab"].items())
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert len(metadata["tokenizer.ggml.merges"]) == len(described["model"]["merges"])
    assert metadata["general.file_type"] == 2


def example_tokenizer(folder: Path, change) -> tuple[dict, str]:
    """What goes into a GGUF of the example's tokenizer after a change to its tokenizer.json."""
    content = json.loads((EXAMPLE / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return tokenizer_metadata(folder, open_source(EXAMPLE).config)


def test_how_text_is_cut_is_named_by_the_expression_not_the_model(tmp_path):
    def cut(change) -> tuple[str | None, str]:
        values, note = example_tokenizer(tmp_path, lambda c: change(c["pre_tokenizer"]["pretokenizers"]))
        assert ("tokenizer.ggml.tokens" in values) == (note == "")
        return values.get("tokenizer.ggml.pre"), note

    def by(pattern: str):
        return lambda stages: stages[0].update(pattern={"Regex": pattern})

    expression = json.loads((EXAMPLE / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]
    expression = expression["pattern"]["Regex"]
    assert cut(lambda stages: None) == ("llama-bpe", "")
    assert cut(by(expression.replace("{1,3}", ""))) == ("qwen2", "")
    for change in (
        by(expression + "x"),
        lambda stages: stages.pop(0),
        lambda stages: stages[1].pop("use_regex"),
    ):
        name, note = cut(change)
        assert name is None
        assert "tokenizer.json: cuts text by a pattern" in note


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(added_tokens=[{"id": "x"}]),
        lambda c: c.update(added_tokens=[5]),
        lambda c: c.update(added_tokens=[{"id": 1, "content": 7}]),
        lambda c: c.update(model=[1]),
        lambda c: c["model"].update(vocab={"a": "b"}),
        lambda c: c["model"].update(vocab={"\ud800": 300}),
        lambda c: c["model"].update(merges=[[1]]),
    ],
)
def test_a_bad_tokenizer_is_named(tmp_path, change):
    with pytest.raises(QuantKitError, match=r"tokenizer\.json: cannot be read .*copy it again"):
        example_tokenizer(tmp_path, change)


def test_a_chat_template_that_is_no_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(QuantKitError, match=r"chat_template\.jinja: not UTF-8"):
        example_tokenizer(tmp_path, lambda content: None)


def test_the_type_of_a_gguf_is_the_first_of_those_that_are_as_frequent(tokens, source, tmp_path):
    rules = (Rule(r"layers\.0\.", "w4a16-g32"),)
    made = tmp_path / "mixed"
    plain = source("llama", tie_word_embeddings=False)
    quantize_checkpoint(plain, made, Recipe("w8a16", "rtn", rules), "cpu", tokens)
    done = convert(made, tmp_path / "out", "gguf", "q8_0")
    assert len(done.rounded) == len(done.modules) - len(done.rounded) == 7
    assert read_gguf(tmp_path / "out" / "model.gguf").metadata["general.file_type"] == 2  # Q4_0


def test_activations_that_gguf_does_not_name_are_refused():
    with pytest.raises(QuantKitError, match="hidden_act 'gelu', expected 'silu'"):
        gguf_names.metadata_of(LlamaConfig(hidden_act="gelu"), "m", "F16")


# desc_act


def test_an_order_of_columns_is_kept_and_runs(packed, tmp_path):
    """GPTQ's desc_act: columns are permuted once, and x at every call."""
    source = untied(packed, "w4a16-g32")
    convert(source, tmp_path / "gptq", "gptq")
    tensors = load_file(tmp_path / "gptq" / WEIGHTS)
    for name in [n for n in tensors if n.endswith("g_idx")]:
        g = torch.Generator().manual_seed(len(name))
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=g)]
    save_file(tensors, tmp_path / "gptq" / WEIGHTS, metadata={"format": "pt"})
    done = convert(tmp_path / "gptq", tmp_path / "back", "quantkit")
    assert not done.rounded
    config = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    assert all(entry["input_order"] for entry in config["modules"].values())
    assert verify(tmp_path / "back") == []
    expected = logits(whole_model(tmp_path / "gptq", torch.device("cpu")))
    for folder in ("gptq", "back"):
        model = quantkit.load(tmp_path / folder, "cpu", dtype=torch.float32)
        assert torch.allclose(logits(model), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(tmp_path / "saved"), logits(model))
    convert(tmp_path / "back", tmp_path / "again", "gptq")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["desc_act"]
    with pytest.raises(QuantKitError, match="an order of input channels"):
        convert(tmp_path / "back", tmp_path / "ct", "compressed-tensors")


# rounded anew


def test_what_cannot_be_the_same_is_refused_and_rounded_only_if_asked(packed, tmp_path):
    source = untied(packed, "w8a16")
    with pytest.raises(QuantKitError, match=r"down_proj: scheme w8a16.*--requantize w4a16-g128"):
        convert(source, tmp_path / "out", "awq")
    assert list(tmp_path.iterdir()) == []
    seen = []
    done = convert(source, tmp_path / "out", "awq", "w4a16-g32", Progress(module=seen.append))
    assert len(done.rounded) == len(done.modules) == len(seen) == 14
    assert all(0.01 < entry["error"] < 0.2 and "w8a16" in entry["reason"] for entry in done.modules.values())
    model = quantkit.load(tmp_path / "out", "cpu")
    assert {str(m.scheme.label) for m in model.modules() if hasattr(m, "scheme")} == {"w4a16-g32"}


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k"])
def test_rounding_to_a_type_of_gguf(packed, tmp_path, kind):
    source = untied(packed, "fp8", hidden_size=256)
    done = convert(source, tmp_path / "out", "gguf", kind)
    # 96 columns are no block of 256: down_proj falls back to Q8_0, as in llama.cpp
    kinds = {entry["scheme"] for entry in done.modules.values()}
    assert kinds == ({kind.upper()} if kind != "q4_k" else {"Q4_K", "Q8_0"})
    if kind == "q4_0":  # which is quantkit's int4 in groups of 32
        assert not convert(tmp_path / "out", tmp_path / "back", "quantkit").rounded
        return
    with pytest.raises(QuantKitError, match=r"down_proj: 8-bit codes in groups of 32.*--requantize"):
        convert(tmp_path / "out", tmp_path / "back", "quantkit")
    done = convert(tmp_path / "out", tmp_path / "back", "quantkit", "w8a16")
    assert max(entry["error"] for entry in done.modules.values()) < 0.02
    loaded = quantkit.load(tmp_path / "out", "cpu", "w8a16", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits_of(tmp_path / "back"))


def test_exact_linears_stay_exact_beside_rounded_ones(tokens, source, tmp_path):
    rules = (Rule(r"layers\.0\.", "w4a16-g32"),)
    quantize_checkpoint(source("llama"), tmp_path / "mixed", Recipe("fp8-block", "rtn", rules), "cpu", tokens)
    done = convert(tmp_path / "mixed", tmp_path / "out", "gptq", "w4a16-g32")
    assert len(done.rounded) == 7
    assert all(".layers.1." in name for name in done.rounded)
    theirs, original = open_source(tmp_path / "out").reader, open_source(tmp_path / "mixed").reader
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(theirs.linear(name).quantized.codes, original.linear(name).quantized.codes)


# quantizing what is packed


@pytest.mark.parametrize("target", ["fp8", "gptq", "gguf"])
def test_packed_models_are_quantized_by_dequantizing_said_aloud(packed, tmp_path, target):
    made = untied(packed, "fp8-block" if target == "fp8" else "w4a16-g32")
    convert(made, tmp_path / "source", target)
    notes = []
    quantize_checkpoint(
        tmp_path / "source",
        tmp_path / "out",
        Recipe("w8a16", "rtn"),
        "cpu",
        progress=Progress(note=notes.append),
    )
    assert any("its linears are dequantized" in note for note in notes)
    assert verify(tmp_path / "out") == []
    original, again = (
        logits(whole_model(tmp_path / "source", torch.device("cpu"))),
        logits_of(tmp_path / "out"),
    )
    assert (original - again).abs().max() < 0.1 * original.abs().max()
    if target != "gguf":
        weights = whole_model(tmp_path / "source", torch.device("cpu")).state_dict()
        name = "model.layers.1.mlp.up_proj"
        expected = open_source(made).reader.linear(f"{name}.weight").dequantize(torch.float32)
        assert torch.equal(weights[f"{name}.weight"], expected)


def test_quantizing_a_packed_model_with_calibration(packed, tokens, tmp_path):
    convert(untied(packed, "fp8-block"), tmp_path / "source", "compressed-tensors")
    quantize_checkpoint(tmp_path / "source", tmp_path / "out", Recipe("w4a16-g32", "gptq"), "cpu", tokens)
    assert verify(tmp_path / "out") == []


# streaming


def test_a_killed_conversion_continues_after_its_last_block(packed, tmp_path):
    source = untied(packed, "w4a16-g32", num_hidden_layers=3)
    convert(source, tmp_path / "whole", "gptq")
    steps = []

    def step() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "gptq", progress=Progress(step=step))
    assert not (tmp_path / "out").exists()
    loaded = []
    original = PackedReader.linear
    PackedReader.linear = lambda self, name: loaded.append(name) or original(self, name)
    try:
        convert(source, tmp_path / "out", "gptq")
    finally:
        PackedReader.linear = original
    assert len(loaded) == 7  # those of the last block
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_no_more_than_a_block_is_in_memory(packed, tmp_path, monkeypatch):
    source = untied(packed, "w4a16-g32", num_hidden_layers=3)
    held = []
    write = quantkit.checkpoint.CheckpointWriter.write_part

    def watch(self, name, tensors, notes):
        held.append((name, sum(t.nbytes for t in tensors.values())))
        write(self, name, tensors, notes)

    monkeypatch.setattr(quantkit.checkpoint.CheckpointWriter, "write_part", watch)
    convert(source, tmp_path / "out", "compressed-tensors")
    assert [name for name, _ in held] == ["outer", "block-00000", "block-00001", "block-00002"]
    total = sum(t.stop - t.start for t in CheckpointReader(tmp_path / "out").tensors.values())
    assert sum(size for _, size in held) == total


# the command


def test_the_command_says_what_stayed_and_what_was_rounded(run, packed, tmp_path):
    source = untied(packed, "w4a16-g32")
    code, out, _ = run("convert", source, tmp_path / "gptq", "--to", "gptq", "--json", tmp_path / "done.json")
    assert code == 0
    assert "quantkit to gptq; 14 of 14 linears with the same numbers; weights" in out
    assert json.loads((tmp_path / "done.json").read_text())["target"] == "gptq"
    code, out, _ = run("convert", tmp_path / "gptq", tmp_path / "out", "--to", "gguf")
    assert code == 0
    assert "holds no tokenizer" in out
    source = untied(packed, "w8a16")
    code, out, _ = run("convert", source, tmp_path / "awq", "--to", "awq", "--requantize", "w4a16-g32")
    assert code == 0
    assert "0 of 14 linears with the same numbers, 14 rounded anew" in out
    assert "model.layers.0.mlp.down_proj  w4a16-g32  weight error" in out
    code, out, _ = run("quantize", tmp_path / "gptq", tmp_path / "q", "--scheme", "w8a16", "--method", "rtn")
    assert code == 0
    assert "is packed (gptq): its linears are dequantized, and quantized anew" in out


def test_the_command_refuses_in_one_line(refused, packed, source, tmp_path):
    made = shutil.copytree(untied(packed, "w8a16"), tmp_path / "made")
    out = tmp_path / "out"
    refused("convert", made, out, "--to", "awq", words=("down_proj", "w8a16", "--requantize"))
    refused("convert", made, out, "--to", "onnx", words=("--to onnx", "compressed-tensors"))
    refused("convert", made, out, "--to", "quantkit", words=(str(made), "quantkit already"))
    refused("convert", made, out, "--to", "gguf", "--requantize", "w4a16", words=("w4a16", "q4_k"))
    refused("convert", made, out, "--to", "awq", "--requantize", "w9", words=("unknown scheme 'w9'",))
    refused(
        "convert", made, out, "--to", "gptq", "--requantize", "fp8-static", words=("fp8-static", "calibrated")
    )
    refused(
        "convert",
        made,
        out,
        "--to",
        "gptq",
        "--requantize",
        "fp8",
        words=("rounded to fp8", "another scheme"),
    )
    refused("convert", source("llama"), out, "--to", "gptq", words=("is not quantized", "quantkit quantize"))
    refused("convert", tmp_path / "none", out, "--to", "gptq", words=("none",))
    refused("convert", made, made, "--to", "gptq", words=(str(made), "exists already"))
    for nameless in ("", "."):
        refused("convert", made, nameless, "--to", "gptq", words=("no name of its own",))


def test_commands_for_quantkits_own_name_convert(refused, packed, tmp_path):
    made = untied(packed, "w4a16-g32")
    for target in ("gptq", "gguf"):
        convert(made, tmp_path / target, target)
    file = tmp_path / "gguf" / "model.gguf"
    for path in (tmp_path / "gptq", tmp_path / "gguf", file):
        for verb in ("inspect", "verify"):
            refused(verb, path, words=(str(path), f"quantkit convert {path} OUT --to quantkit"))
    for path in (tmp_path / "gguf", file):
        for arguments in (("eval", path), ("generate", path, "a")):
            refused(
                *arguments, words=(str(path), f"quantkit convert {path} OUT --to quantkit", "tokenizer files")
            )


@pytest.mark.parametrize("to", ["awq", "quantkit"])
def test_an_old_name_of_the_quantization_does_not_survive(packed, tmp_path, to):
    convert(untied(packed, "w4a16-g32"), tmp_path / "gptq", "gptq")
    file = tmp_path / "gptq" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"compression_config": content["quantization_config"]}))
    convert(tmp_path / "gptq", tmp_path / "out", to)
    assert "compression_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_rounding_of_outputs_is_left_out_and_said(packed, tmp_path):
    convert(untied(packed, "w4a16-g32"), tmp_path / "ct", "compressed-tensors")
    file = tmp_path / "ct" / "config.json"
    content = json.loads(file.read_text())
    (group,) = content["quantization_config"]["config_groups"].values()
    group["output_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    file.write_text(json.dumps(content))
    (note,) = convert(tmp_path / "ct", tmp_path / "out", "quantkit").notes
    assert "output_activations: the rounding of outputs is left out" in note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_transformers_keeps_in_float32_stays_so(packed, tmp_path, monkeypatch, dtype):
    convert(untied(packed, "w4a16-g32"), tmp_path / "gptq", "gptq")
    tensors = load_file(tmp_path / "gptq" / WEIGHTS)
    tensors["model.norm.weight"] = torch.full((64,), 1 + 2**-20)  # no number of 16 bits
    save_file(tensors, tmp_path / "gptq" / WEIGHTS, metadata={"format": "pt"})
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["model.norm"])
    model = quantkit.load(tmp_path / "gptq", "cpu", dtype=dtype)
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"])
    assert model.model.layers[0].input_layernorm.weight.dtype == dtype


def test_gguf_of_other_architectures_is_refused(packed, tmp_path):
    with pytest.raises(QuantKitError, match=r"model_type 'phi3', expected llama, mistral"):
        convert(packed("phi3", "w4a16-g32"), tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_load_refuses_what_it_cannot_hand_on(packed, tmp_path):
    made = untied(packed, "w4a16-g32")
    convert(made, tmp_path / "gptq", "gptq")
    with pytest.raises(QuantKitError, match="attn_implementation is for quantkit's own"):
        quantkit.load(tmp_path / "gptq", "cpu", attn_implementation="eager")
    with pytest.raises(QuantKitError, match="requantize is for checkpoints of other tools"):
        quantkit.load(made, "cpu", requantize="w8a16")
    with pytest.raises(QuantKitError, match="w8a8-static needs calibrated scales"):
        quantkit.load(tmp_path / "gptq", "cpu", requantize="w8a8-static")


def test_a_loaded_foreign_model_is_saved_as_quantkits(packed, tmp_path):
    convert(untied(packed, "w4a16-g32"), tmp_path / "awq", "awq")
    model = quantkit.load(tmp_path / "awq", "cpu")
    model.save_pretrained(tmp_path / "saved")
    assert verify(tmp_path / "saved") == []
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
