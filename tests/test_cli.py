"""The command: what it prints, what it writes, and one clear line for every kind of bad input."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from quantkit import checkpoint, cli, streaming
from quantkit.calibration import pipeline
from quantkit.checkpoint import INDEX, MANIFEST, WEIGHTS, read_header
from quantkit.kernels import dispatch
from quantkit.scheme import PRESETS

VERBS = ("quantize", "convert", "inspect", "verify", "eval", "bench", "tune", "demo")
QUICK = ("--scheme", "w8a16", "--method", "rtn", "--device", "cpu")
GPTQ = ("--scheme", "w4a16-g32", "--method", "gptq", "--device", "cpu", "--samples", "2", "--seq-len", "16")


@pytest.fixture
def model(source, tmp_path) -> Path:
    return shutil.copytree(source("llama", tie_word_embeddings=False), tmp_path / "model")


@pytest.fixture
def quantized(packed, tmp_path) -> Path:
    return shutil.copytree(packed("llama", "w8a16"), tmp_path / "quantized")


def add_tokenizer(folder: Path, words: int) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder
    )


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_config(folder: Path, **changes) -> None:
    edit_json(folder / "config.json", **changes)


# what it prints and writes


def test_quantize_ends_with_a_word_on_experts(run, source, tmp_path):
    code, out, _ = run("quantize", source("qwen3_moe"), tmp_path / "out", *GPTQ)
    assert code == 0
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    fewest = min(entry["tokens"] for name, entry in modules.items() if ".experts." in name)
    assert re.search(
        rf"^experts: \d+ of 10 calibrated, fewest tokens {fewest} \(model\.layers\.\d\.mlp\.experts\.\d\)$",
        out,
        re.M,
    )
    assert "experts:" not in run("quantize", source("qwen3_moe"), tmp_path / "plain", *QUICK)[1]


def test_quantize_prints_a_line_a_module_and_a_summary(run, model, tmp_path):
    code, out, err = run("quantize", model, tmp_path / "out", *QUICK, "--json", tmp_path / "summary.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert sum(" w8a16  rtn  weight error " in " " + line for line in lines) == 2 * 7
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["modules"]) == 2 * 7
    assert {"scheme": "w8a16", "method": "rtn", "error_of": "weight"}.items() <= summary["modules"][
        "model.layers.0.mlp.up_proj"
    ].items()
    assert 8 < summary["bits_per_weight"] < 9
    assert summary["packed_bytes"] < summary["source_bytes"]
    assert any(f"14 linears, {summary['bits_per_weight']:.3f} bits a weight" in line for line in lines)
    assert summary["verdict"]["severity"] == "ok"
    assert summary["verdict"]["sentence"] in out
    assert (tmp_path / "out" / "report.html").exists()
    code, shown, err = run(
        "inspect", tmp_path / "out", "--device", "cpu", "--json", tmp_path / "inspect.json"
    )
    assert (code, err) == (0, "")
    assert summary["verdict"]["sentence"] in shown
    assert "max |w|" in shown
    assert len(json.loads((tmp_path / "inspect.json").read_text())["report"]["modules"]) == 2 * 7


def test_inspect_shows_the_modules_and_the_kernels(run, packed, tmp_path):
    folder = packed("llama", "w4a16-g64-asym")
    code, out, err = run("inspect", folder, "--device", "cpu", "--json", tmp_path / "inspect.json")
    assert (code, err) == (0, "")
    assert "model.layers.1.mlp.down_proj" in out
    assert "kernel on cpu" in out
    content = json.loads((tmp_path / "inspect.json").read_text())
    assert len(content["modules"]) == 2 * 7
    by_name = {row["name"]: row for row in content["modules"]}
    row = by_name["model.layers.0.mlp.down_proj"]
    assert (row["N"], row["K"], row["scheme"]) == (64, 96, "w4a16-g32-asym")
    assert row["bytes"] == 64 * (96 // 2 + 3 * (2 + 1))
    assert set(row["kernels"]) == {"1", "16", "256", "4096"}
    assert content["bytes"] == sum(t.stop - t.start for t in read_header(folder / WEIGHTS).values())


@pytest.mark.parametrize(
    ("scheme", "kernel", "nbytes"),  # of down_proj [64, 96] in 3 groups: codes, scales and zeros
    [
        ("w3a16", "wna16_dequantize", 64 * (3 * 3 * 4 + 3 * 3)),
        ("w2a16", "wna16_dequantize", 64 * (6 * 4 + 3 * 3)),
        ("w4a8", "w4a8_cpu", 64 * (12 * 4 + 3 * 3)),
    ],
)
def test_groups_and_zeros_are_for_every_scheme_of_2_to_4_bits(run, source, tmp_path, scheme, kernel, nbytes):
    options = ("--scheme", scheme, "--group-size", "32", "--asymmetric", "--method", "rtn", "--device", "cpu")
    assert run("quantize", source("llama"), tmp_path / "out", *options)[0] == 0
    code, out, err = run("inspect", tmp_path / "out", "--device", "cpu", "--json", tmp_path / "inspect.json")
    assert (code, err) == (0, "")
    assert kernel in out
    rows = {row["name"]: row for row in json.loads((tmp_path / "inspect.json").read_text())["modules"]}
    row = rows["model.layers.0.mlp.down_proj"]
    assert (row["scheme"], row["bytes"]) == (f"{scheme}-g32-asym", nbytes)
    assert set(row["kernels"].values()) == {kernel}


def test_verify_says_what_is_whole_and_what_is_not(run, quantized, tmp_path):
    code, out, err = run("verify", quantized, "--json", tmp_path / "verify.json")
    assert (code, err) == (0, "")
    assert "49 tensors, all as written" in out
    assert json.loads((tmp_path / "verify.json").read_text())["findings"] == []

    edit(quantized, lambda tensors: [tensors.pop("model.norm.weight"), tensors.update(extra=torch.ones(1))])
    code, _, err = run("verify", quantized, "--json", tmp_path / "verify.json")
    assert code == 2
    assert len(err.splitlines()) == 2
    assert len(json.loads((tmp_path / "verify.json").read_text())["findings"]) == 2


def test_a_smaller_group_or_a_ragged_last_one_is_announced(run, source, tmp_path):
    folder = source("llama", intermediate_size=77)
    arguments = ("--scheme", "w4a16", "--method", "rtn", "--device", "cpu")
    code, out, _ = run("quantize", folder, tmp_path / "out", *arguments)
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("model.")}
    assert "(group size 64, since 128 does not divide K=64)" in lines["model.layers.0.mlp.up_proj"]
    ragged = "(K=77 is no multiple of 128: the last group of each row has 77 columns)"
    assert ragged in lines["model.layers.0.mlp.down_proj"]


def test_a_target_prints_the_schemes_chosen_and_goes_with_a_recipe(run, model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: w4a16-g32\nmethod: rtn\ncalibration: {samples: 2, seq_len: 16}\ntarget_bpw: 4.4"
    )
    arguments = (
        "--recipe",
        recipe,
        "--device",
        "cpu",
        "--target-bpw",
        "5",
        "--json",
        tmp_path / "summary.json",
    )
    code, out, err = run("quantize", model, tmp_path / "out", *arguments)
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for i in range(2):
        assert f"model.layers.{i}.self_attn.{{q_proj,k_proj,v_proj}}" in lines
        assert f"model.layers.{i}.mlp.{{gate_proj,up_proj}}" in lines
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 4.4 < summary["bits_per_weight"] <= 5
    kl, uniform_kl = (summary["allocation"][name] for name in ("kl", "uniform_kl"))
    assert f"{summary['bits_per_weight']:.3f} bits a weight (target 5), KL by the sum of the" in out
    assert f"own {kl:.4f}; w4a16-g32 throughout 4.500, {uniform_kl:.4f}" in out


def test_calibration_may_come_from_a_text_file(run, model, tmp_path):
    add_tokenizer(model, 100)
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + i % 90}" for i in range(200)))
    code, out, err = run("quantize", model, tmp_path / "out", *GPTQ, "--calibration", tmp_path / "text.txt")
    assert (code, err) == (0, "")
    assert "gptq  output error" in out
    assert (tmp_path / "out" / "tokenizer.json").exists()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"scheme: w4a16-g32\nmethod: gptq\ncalibration: {{source: {tmp_path}/text.txt, samples: 2, seq_len: 16}}"
    )
    assert run("quantize", model, tmp_path / "again", "--recipe", recipe, "--device", "cpu")[0] == 0
    names = (WEIGHTS, "config.json", MANIFEST)
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS)], ids=" ".join)
def test_help_works(run, verb):
    code, out, err = run(*verb, "--help")
    assert (code, err) == (0, "")
    assert "Usage" in out
    if not verb:
        assert all(name in out for name in VERBS)


def test_without_arguments_it_shows_its_help(run):
    assert run() == run("--help")


def test_the_command_as_a_process_ends_in_one_line_and_exit_code_2(source, tmp_path):
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "quantkit.cli", "quantize", str(source()), "out", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: out: exists already; remove it or name another directory\n"


# bad input


def test_a_missing_model_is_named(refused, tmp_path):
    for name in ("absent", "file"):
        (tmp_path / "file").touch()
        refused(
            "quantize", tmp_path / name, tmp_path / "out", *QUICK, words=(str(tmp_path / name), "no such")
        )
    for verb in ("inspect", "verify"):
        refused(verb, tmp_path / "absent", words=(str(tmp_path / "absent"), "no such directory"))


def test_a_hub_name_that_cannot_be_had_is_named(refused, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr("quantkit.source.snapshot_download", offline)
    words = ("some/model", "no such directory, and the hub gives no such model (cannot reach)")
    refused("quantize", "some/model", tmp_path / "out", *QUICK, words=words)


def test_a_folder_that_is_no_model_is_named(refused, tmp_path, model):
    (tmp_path / "empty").mkdir()
    refused(
        "quantize", tmp_path / "empty", tmp_path / "out", *QUICK, words=("empty/config.json", "not found")
    )
    (model / WEIGHTS).unlink()
    refused("quantize", model, tmp_path / "out", *QUICK, words=(str(model / WEIGHTS), "not found"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "no-such-thing"}', "transformers cannot read it"),
        ("{}", "transformers cannot read it"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot read it"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}', "config.json"),
        ('{"model_type": "vit"}', "no causal language model"),
    ],
)
def test_a_config_that_is_no_language_models_is_named(refused, model, tmp_path, text, word):
    (model / "config.json").write_text(text)
    refused("quantize", model, tmp_path / "out", *QUICK, words=(str(model), word))


def test_a_model_without_linears_is_refused(refused, tmp_path):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    words = ("GPT2LMHeadModel", "no linear to quantize", "Conv1D")
    refused("quantize", tmp_path / "gpt2", tmp_path / "out", *QUICK, words=words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("arguments", [QUICK, GPTQ], ids=["rtn", "gptq"])
def test_weights_that_are_not_finite_are_named(refused, model, tmp_path, arguments, value):
    edit(model, lambda tensors: tensors["model.layers.1.self_attn.o_proj.weight"][2].fill_(value))
    words = ("model.layers.1.self_attn.o_proj", "NaN or infinite", "mend")
    refused("quantize", model, tmp_path / "out", *arguments, words=words)


def test_weights_that_are_not_finite_are_named_outside_the_blocks_too(refused, model, tmp_path):
    edit(model, lambda tensors: tensors["lm_head.weight"][5].fill_(float("nan")))
    (tmp_path / "recipe.yaml").write_text("scheme: w8a16\nrules: [{match: lm_head, scheme: w8a16}]")
    arguments = ("--recipe", tmp_path / "recipe.yaml", "--device", "cpu")
    refused("quantize", model, tmp_path / "out", *arguments, words=("lm_head", "NaN or infinite"))
    edit(model, lambda tensors: tensors["model.embed_tokens.weight"][5:].fill_(float("nan")))
    refused("quantize", model, tmp_path / "gptq", *GPTQ, words=("NaN", "mend"))


def test_a_truncated_file_is_named(refused, model, quantized, tmp_path):
    for folder in (model, quantized):
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:-100])
    refused("quantize", model, tmp_path / "out", *QUICK, words=(str(model / WEIGHTS), "truncated"))
    for verb in ("inspect", "verify", "eval"):
        refused(verb, quantized, words=(str(quantized / WEIGHTS), "truncated", "copy it again"))


def test_a_flipped_bit_is_named(refused, model, quantized, tmp_path):
    raw = bytearray((model / WEIGHTS).read_bytes())
    raw[12] ^= 4
    (model / WEIGHTS).write_bytes(raw)
    refused("quantize", model, tmp_path / "out", *QUICK, words=(str(model),))
    tensor = read_header(quantized / WEIGHTS)["model.layers.0.mlp.up_proj.codes"]
    raw = bytearray((quantized / WEIGHTS).read_bytes())
    raw[tensor.start] ^= 4
    (quantized / WEIGHTS).write_bytes(raw)
    for verb in ("verify", "eval"):
        refused(verb, quantized, words=("up_proj.codes", str(quantized / WEIGHTS), "sha256 differs"))


def test_a_newer_format_is_named(refused, quantized):
    config = json.loads((quantized / "config.json").read_text())
    edit_config(quantized, quantization_config=config["quantization_config"] | {"format_version": 4})
    for verb in ("inspect", "verify", "eval"):
        refused(verb, quantized, words=(str(quantized / "config.json"), "format_version 4", "newer quantkit"))


def test_a_model_that_is_quantized_already_is_refused(refused, model, quantized, tmp_path):
    refused("quantize", quantized, tmp_path / "out", *QUICK, words=(str(quantized), "already (quantkit)"))
    edit_config(model, quantization_config={"quant_method": "awq", "bits": 4})
    refused(
        "quantize", model, tmp_path / "out", *QUICK, words=(str(model), "says awq", "no linear packed so")
    )
    edit_config(model, quantization_config={"quant_method": "quanto"})
    refused(
        "quantize", model, tmp_path / "out", *QUICK, words=(str(model), "quant_method 'quanto'", "gptq, awq")
    )
    edit_config(model, quantization_config="yes")
    refused("quantize", model, tmp_path / "out", *QUICK, words=(str(model), "'yes'", "expected an object"))


def test_a_model_that_is_not_quantized_is_refused_where_one_is_needed(refused, model):
    for verb in ("inspect", "verify"):
        refused(verb, model, words=(str(model), "not a quantkit checkpoint", "quantkit quantize"))


def test_an_existing_out_is_refused(refused, model, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file"):
        refused("quantize", model, tmp_path / name, *QUICK, words=(f"{tmp_path / name}: exists already",))


@pytest.mark.parametrize("arguments", [QUICK, GPTQ], ids=["rtn", "gptq"])
def test_an_out_below_a_file_is_refused(refused, model, tmp_path, arguments):
    (tmp_path / "file").touch()
    words = (str(tmp_path / "file"), "not a directory")
    for out in ("file/out", "file/deeper/out"):
        refused("quantize", model, tmp_path / out, *arguments, words=words)


def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(refused, model, tmp_path):
    arguments = (*QUICK, "--json", tmp_path / "absent" / "summary.json")
    refused("quantize", model, tmp_path / "out", *arguments, words=("absent",))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scheme: w4a16\nbits: 4", ("recipe.yaml", "unknown name 'bits'", "known: scheme")),
        ("scheme: w4a16\ncalibration: {allow_short: 1}", ("allow_short is 1", "expected true or false")),
        ("scheme: w5a16", ("recipe.yaml", "unknown scheme 'w5a16'", "known: w8a16")),
        ("scheme: [", ("recipe.yaml", "cannot be read as YAML")),
        ("scheme: w8a16\nrules: [{match: experts, scheme: fp8}]", ("no linear", "'experts'")),
        ("scheme: w8a16\nrules: [{match: ., scheme: keep}]", ("leaves no linear to quantize",)),
        (
            "scheme: fp8-static\nrules: [{match: lm_head}]\ncalibration: {samples: 2, seq_len: 16}",
            ("lm_head", "use fp8"),
        ),
    ],
)
def test_a_recipe_at_fault_is_named(refused, model, tmp_path, text, words):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    refused("quantize", model, tmp_path / "out", "--recipe", recipe, "--device", "cpu", words=words)


def test_an_unreadable_recipe_is_named(refused, model, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    for name in ("absent.yaml", "binary", "model"):
        refused(
            "quantize", model, tmp_path / "out", "--recipe", tmp_path / name, words=(str(tmp_path / name),)
        )


def test_a_tied_lm_head_in_a_recipe_is_refused(refused, source, tmp_path):
    (tmp_path / "recipe.yaml").write_text("scheme: w8a16\nrules: [{match: lm_head, scheme: w8a16}]")
    words = ("lm_head shares its weight with the embedding",)
    folder = source("llama", tie_word_embeddings=True)
    refused("quantize", folder, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scheme", "w5a16"), ("unknown scheme 'w5a16'", "known: w8a16")),
        (("--scheme", "w8a16", "--method", "best"), ("unknown method 'best'", "known steps", "awq+gptq")),
        (("--scheme", "w8a16", "--device", "tpu9"), ("--device tpu9",)),
        (("--scheme", "w8a16", "--device", "meta"), ("--device meta", "cpu and cuda")),
        (("--scheme", "w8a16", "--device", "cuda:99"), ("--device cuda:99", "use cpu")),
        (("--scheme", "w8a16", "--group-size", "32"), ("--group-size", "schemes of 2 to 4 bits")),
        (("--scheme", "w4a16", "--group-size", "48"), ("48", "32, 64, 128")),
        (("--scheme", "w2a16", "--group-size", "16"), ("16", "32, 64, 128")),
        (("--scheme", "w4a16", "--group-size", "many"), ("--group-size many", "or channel")),
        (("--scheme", "fp8", "--asymmetric"), ("only schemes of 2 to 4 bits can be asymmetric",)),
        ((), ("give one of --scheme, --target-bpw and --recipe",)),
        (("--scheme", "w4a16", "--target-bpw", "4.5"), ("give one of --scheme, --target-bpw",)),
        (("--target-bpw", "4.5", "--group-size", "64"), ("--target-bpw chooses the groups",)),
        (
            ("--target-bpw", "2"),
            ("target_bpw 2: this model takes from 2.", "w2a16-g", "to 8.", "w8a16"),
        ),
        (
            ("--target-bpw", "16"),
            ("target_bpw 16: this model takes from 2.", "w2a16-g", "to 8.", "w8a16"),
        ),
        (("--target-bpw", "many"), ("number", "--target-bpw")),
        (("--scheme", "w8a16", "--samples", "none"), ("--samples", "integer")),
        (("--scheme", "w4a16", "--samples", "0"), ("calibration of 0 x",)),
        (("--scheme", "w8a16", "--no-such-option"), ("--no-such-option",)),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_wrong_option_is_named(refused, model, tmp_path, arguments, words):
    refused("quantize", model, tmp_path / "out", *arguments, words=words)


def test_a_wrong_verb_or_a_missing_argument_is_named(refused, model):
    refused("quantise", model, words=("quantise",))
    refused("quantize", model, "--scheme", "w8a16", words=("OUT",))


def test_calibration_text_at_fault_is_named(refused, model, tmp_path):
    add_tokenizer(model, 100)
    (tmp_path / "short.txt").write_text("w5 w6 w7")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "empty.txt").touch()
    cases = {
        "absent.txt": ("absent.txt", "text file"),
        "short.txt": ("short.txt", "has 4 tokens, but 2 sequences of 16 need 32", "longer text"),
        "half.txt": (
            "half.txt",
            "has 21 tokens, but 2 sequences of 16 need 32",
            "the 1 that",
            "--allow-short",
        ),
        "latin.txt": ("latin.txt", "not UTF-8"),
        "binary.txt": ("binary.txt", "NUL", "no text file"),
        "empty.txt": ("empty.txt", "no text in it"),
        "strange.txt": ("strange.txt", "of the text's tokens are <unk>", "another model"),
        "chats.jsonl": ("chats.jsonl, line 1", "no chat template"),
        "broken.jsonl": ("broken.jsonl, line 1", "not JSON"),
    }
    (tmp_path / "half.txt").write_text(" ".join(["w5"] * 20))
    (tmp_path / "binary.txt").write_bytes(b"\0w5 " * 100)
    (tmp_path / "strange.txt").write_text("ein anderes Deutsch als w5 " * 20)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "w5"}]}')
    (tmp_path / "broken.jsonl").write_text("{")
    for name, words in cases.items():
        arguments = (*GPTQ, "--calibration", tmp_path / name)
        refused("quantize", model, tmp_path / "out", *arguments, words=words)


def test_a_short_text_may_be_allowed(run, model, tmp_path):
    add_tokenizer(model, 100)
    (tmp_path / "half.txt").write_text(" ".join(["w5"] * 20))
    text = ("--calibration", tmp_path / "half.txt")
    note = "note: the text gives 1 of the 2 sequences asked for"
    code, out, err = run("quantize", model, tmp_path / "out", *GPTQ, *text, "--allow-short")
    assert (code, err) == (0, "")
    assert note in out.splitlines()
    (tmp_path / "recipe.yaml").write_text(
        f"scheme: w4a16-g32\ncalibration: {{source: {text[1]}, samples: 2, seq_len: 16, allow_short: true}}"
    )
    code, out, _ = run("quantize", model, tmp_path / "again", "--recipe", tmp_path / "recipe.yaml")
    assert (code, note in out.splitlines()) == (0, True)
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (config["calibration"]["samples"], config["recipe"]["calibration"]["samples"]) == (1, 2)


def test_calibration_may_come_from_chats(run, model, tmp_path):
    add_tokenizer(model, 100)
    edit_json(
        model / "tokenizer_config.json",
        chat_template="{% for m in messages %}w3 {{ m.content }} {% endfor %}",
    )
    chat = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 10)
    (tmp_path / "text.txt").write_text("<|endoftext|>\n".join(["w3 w5 w6 w3 w7\n"] * 10))
    for name, text in (("chats", "chats.jsonl"), ("text", "text.txt")):
        assert run("quantize", model, tmp_path / name, *GPTQ, "--calibration", tmp_path / text)[0] == 0
    assert (tmp_path / "chats" / WEIGHTS).read_bytes() == (tmp_path / "text" / WEIGHTS).read_bytes()


def test_a_dry_run_shows_what_a_run_would_do_and_does_nothing(run, tree, model, tmp_path):
    before = tree(model)
    file = tmp_path / "dry.json"
    code, out, err = run("quantize", model, tmp_path / "out", *GPTQ, "--dry-run", "--json", file)
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "dry.json"}
    assert tree(model) == before
    lines = [line.split() for line in out.splitlines()]
    assert ["model.layers.1.mlp.down_proj", "64", "96", "w4a16-g32", "gptq", "4.50", "3,456"] in lines
    content = json.loads(file.read_text())
    assert len(content["modules"]) == 2 * 7
    assert f"14 linears, 4.500 bits a weight; weights 0.2 MB -> {content['packed_bytes'] / 1e6:.1f} MB" in out
    assert f"memory: about {content['peak_host'] / 1e6:.1f} MB on the host, beside Python and PyTorch" in out
    assert f"time: about {content['seconds']:.0f} s at " in out
    assert {"sampling", "gptq"} <= {work["what"] for work in content["work"]}
    assert run("quantize", model, tmp_path / "out", *GPTQ)[0] == 0
    stored = read_header(tmp_path / "out" / WEIGHTS).values()
    assert content["packed_bytes"] == sum(tensor.stop - tensor.start for tensor in stored)


def test_a_dry_run_refuses_what_the_run_would(refused, model, tmp_path):
    words = ("no linear", "'experts'")
    (tmp_path / "recipe.yaml").write_text("scheme: w8a16\nrules: [{match: experts, scheme: fp8}]")
    recipe = ("--recipe", tmp_path / "recipe.yaml", "--dry-run")
    refused("quantize", model, tmp_path / "out", *recipe, words=words)
    edit_config(model, intermediate_size=128)
    refused("quantize", model, tmp_path / "out", *QUICK, "--dry-run", words=("config.json makes it",))


@pytest.mark.parametrize(
    ("function", "calls", "file", "parts"),
    [
        ("join_safetensors", 0, f"out/{WEIGHTS}", ["block-00000", "block-00001", "outer"]),
        ("save_file", 2, "block-00001.tmp", ["block-00000", "outer"]),
    ],
)
def test_a_full_disk_is_one_line_and_the_same_command_continues(
    run, model, tmp_path, monkeypatch, function, calls, file, parts
):
    written, write = [], getattr(checkpoint, function)

    def full(*args, **more):
        if len(written) == calls:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[-1]))
        written.append(args[-1])
        return write(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, full)
        code, _, err = run("quantize", model, tmp_path / "out", *QUICK)
    partial = tmp_path / "out.partial"
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {partial}/{file}: cannot be written (No space left on dev")
    assert "the same command continues" in err
    assert sorted(path.stem for path in partial.glob("*.safetensors")) == parts
    assert run("quantize", model, tmp_path / "out", *QUICK)[0] == 0


def test_a_disk_that_is_too_small_is_named(refused, model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    words = (f"{tmp_path}: 0.0 MB free", "needs about 0.2 MB")
    refused("quantize", model, tmp_path / "out", *QUICK, words=words)


def test_a_tokenizer_that_is_missing_or_of_another_model_is_named(refused, model, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in range(3, 400)))
    arguments = (*GPTQ, "--calibration", tmp_path / "text.txt")
    refused("quantize", model, tmp_path / "out", *arguments, words=(str(model), "tokenizer"))
    add_tokenizer(model, 500)
    words = (str(model), "tokenizer", "vocabulary of 128")
    refused("quantize", model, tmp_path / "out", *arguments, words=words)


def test_a_shard_or_an_index_at_fault_is_named(refused, source, tmp_path):
    whole = transformers.AutoModelForCausalLM.from_pretrained(source())
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shard = sorted((tmp_path / "sharded").glob("model-*"))[1]
    raw = shard.read_bytes()
    shard.unlink()
    refused("quantize", tmp_path / "sharded", tmp_path / "out", *QUICK, words=(str(shard), "not found"))
    shard.write_bytes(raw)
    (tmp_path / "sharded" / INDEX).write_text("[]")
    refused("quantize", tmp_path / "sharded", tmp_path / "out", *QUICK, words=(INDEX, "copy it again"))


@pytest.mark.parametrize("text", ["{}", "nonsense", '{"manifest_version": 7, "tensors": {}}'])
def test_a_manifest_at_fault_is_named(refused, quantized, text):
    (quantized / MANIFEST).write_text(text)
    refused("verify", quantized, words=(str(quantized / MANIFEST),))


def test_a_quantization_config_at_fault_is_named(refused, quantized):
    good = json.loads((quantized / "config.json").read_text())["quantization_config"]
    for changes in ({"schemes": {}}, {"modules": 5}):
        edit_config(quantized, quantization_config=good | changes)
        for verb in ("inspect", "verify", "eval"):
            refused(verb, quantized, words=(str(quantized / "config.json"),))
    edit_config(quantized, quantization_config=good | {"modules": {"model.norm": {"scheme": "w8a16"}}})
    for verb in ("inspect", "eval"):
        refused(verb, quantized, words=("model.norm.codes", "missing"))


def test_the_bar_counts_tokens_while_the_model_writes_its_own(run, model, tmp_path):
    code, out, err = run("quantize", model, tmp_path / "out", *GPTQ)
    assert (code, err) == (0, "")
    assert any("tokens sampled" in line and "32/32" in line for line in out.splitlines())
    code, out, err = run("quantize", model, tmp_path / "rtn", *QUICK)
    assert "tokens sampled" not in out


def test_ctrl_c_keeps_the_finished_blocks_and_says_so(run, source, tmp_path, monkeypatch):
    original, done = cli.module_line, []

    def interrupt_in_the_second_block(module):
        done.append(module["name"])
        if ".layers.1." in module["name"]:
            raise KeyboardInterrupt
        return original(module)

    monkeypatch.setattr(cli, "module_line", interrupt_in_the_second_block)
    code, _, err = run("quantize", source(), tmp_path / "out", *QUICK)
    assert code == 130
    assert err.splitlines() == [
        f"{tmp_path / 'out.partial'} keeps the finished blocks; the same command continues",
        "interrupted",
    ]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(cli, "module_line", original)
    assert run("quantize", source(), tmp_path / "out", *QUICK)[0] == 0


def exhaust(*args: object, **kwargs: object) -> None:
    torch.empty(1 << 60)  # more than any machine has: the error is the allocator's own


def test_the_end_of_the_memory_is_one_line_and_keeps_the_finished_blocks(run, source, tmp_path, monkeypatch):
    original = streaming.Job.quantize_block
    second = lambda job, index: exhaust() if index else original(job, index)
    monkeypatch.setattr(streaming.Job, "quantize_block", second)
    code, _, err = run("quantize", source(), tmp_path / "out", *QUICK)
    partial = tmp_path / "out.partial"
    assert (code, err.count("\n")) == (2, 1)
    assert "out of memory ([enforce fail" in err
    assert f"{partial} keeps the finished blocks" in err
    assert "a smaller --samples needs less" in err
    assert (partial / "block-00000.safetensors").exists()
    done: list[int] = []
    monkeypatch.setattr(
        streaming.Job, "quantize_block", lambda job, index: done.append(index) or original(job, index)
    )
    assert run("quantize", source(), tmp_path / "out", *QUICK)[0] == 0
    assert done == [1]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried")])
def test_other_memory_errors_are_one_line_too(refused, monkeypatch, model, tmp_path, error):
    def raise_it(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(cli, "quantize_checkpoint", raise_it)
    refused("quantize", model, tmp_path / "out", *QUICK, words=("out of memory (", "a smaller --samples"))


def test_memory_that_ends_while_calibration_text_is_captured_is_not_laid_to_the_model(
    run, model, tmp_path, monkeypatch
):
    add_tokenizer(model, 128)
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + i % 100}" for i in range(200)))
    monkeypatch.setattr(pipeline.Recorder, "forward", exhaust)
    code, _, err = run("quantize", model, tmp_path / "out", *GPTQ, "--calibration", tmp_path / "text.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert "out of memory" in err
    assert (tmp_path / "out.partial").exists()


def test_other_runtime_errors_are_not_hidden(monkeypatch, model, tmp_path):
    def raise_it(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(cli, "quantize_checkpoint", raise_it)
    monkeypatch.setattr(sys, "argv", ["quantkit", "quantize", str(model), str(tmp_path / "out"), *QUICK])
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main()


# tuning


def tuned_entry(N: int, K: int, group_size: int, M: int, kernel: str) -> dict:
    key = {"op": "w4a16_tiles", "N": N, "K": K, "group_size": group_size, "M": M, "least_M": 1}
    key |= {"scheme": "w4a16-g128"}
    return key | {"kernel": kernel, "launch": {}, "us": 2.0, "default_us": 3.0, "rel_error": 0.002}


@pytest.fixture
def tables(monkeypatch, tmp_path) -> Path:
    """The folder of the user's tables, made and empty."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    monkeypatch.setenv("QUANTKIT_TUNED", str(folder))
    dispatch.forget()
    yield folder
    dispatch.forget()


@pytest.fixture
def on_a_gpu(monkeypatch, tables):
    """A device that says it is one, and a tuner that measures nothing; returns the calls of the latter."""
    calls = []

    def tune(weights, Ms, device, *, say, on_start, on_candidate, on_entry):
        calls.append((weights, list(Ms)))
        for N, K, scheme in weights:
            for M in Ms:
                on_start(f"({N}, {K})", 2)
                say(f"w4a16_wide M = {M} left out: [out of resource]")
                on_candidate()
                on_entry(tuned_entry(N, K, scheme.group_size or 0, M, "w4a16_wide"))
            if N == 666:
                raise KeyboardInterrupt

    monkeypatch.setattr(cli, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(cli, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(cli, "environment", lambda device: {"device": "NVIDIA H200"})
    monkeypatch.setattr(cli, "tune", tune)
    return calls


def test_tune_prints_and_writes_what_was_chosen(run, on_a_gpu, tables, tmp_path):
    arguments = ("--shape", "64,128", "--m", "1", "--m", "16", "--json", tmp_path / "tune.json")
    code, out, err = run("tune", *arguments)
    assert (code, err) == (0, "")
    assert on_a_gpu == [([(64, 128, PRESETS["w4a16"])], [1, 16])]
    assert "w4a16_wide M = 16 left out: [out of resource]" in out
    assert any(
        line.split() == ["(64,", "128)", "w4a16-g128", "16", "w4a16_wide", "2.0", "3.0", "1.50"]
        for line in out.splitlines()
    )
    path = tables / "sm_90.json"
    assert f"{path}: 2 entries written" in out
    table = json.loads(path.read_text())
    assert table["device"] == "NVIDIA H200"
    assert [(e["N"], e["M"]) for e in table["entries"]] == [(64, 1), (64, 16)]
    content = json.loads((tmp_path / "tune.json").read_text())
    assert (content["file"], content["entries"]) == (str(path), table["entries"])
    # a second run adds to the first
    assert run("tune", "--shape", "32,128", "--m", "1")[0] == 0
    assert len(json.loads(path.read_text())["entries"]) == 3


def test_tune_takes_shapes_by_name_by_number_and_of_a_model(run, on_a_gpu, packed, tmp_path):
    folder = packed("llama", "w4a16-g64-asym")
    file = ("--out", tmp_path / "deeper" / "table.json")
    assert run("tune", "--shapes", "llama-3-8b", "--shape", "4096,4096", "--m", "1", *file)[0] == 0
    assert run("tune", "--model", folder, "--m", "1", *file)[0] == 0
    assert (
        run("tune", "--model", folder, "--group-size", "channel", "--group-size", "32", "--m", "1", *file)[0]
        == 0
    )
    llama = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    tiny = [(64, 64), (32, 64), (96, 64)]
    by_name, of_model, with_groups = (
        {(N, K, scheme.label) for N, K, scheme in weights} for weights, _ in on_a_gpu
    )
    assert by_name == {(N, K, "w4a16-g128") for N, K in llama}
    assert len(on_a_gpu[0][0]) == 4
    assert of_model == {*((N, K, "w4a16-g64") for N, K in tiny), (64, 96, "w4a16-g32")}
    assert with_groups == {
        (N, K, f"w4a16-{group}") for N, K in [*tiny, (64, 96)] for group in ("channel", "g32")
    }
    assert (tmp_path / "deeper" / "table.json").is_file()


def test_tune_takes_schemes_by_name_and_of_a_model(run, on_a_gpu, packed, tmp_path):
    static, file = packed("llama", "w8a8-static"), ("--m", "1", "--out", tmp_path / "table.json")
    schemes = ("--scheme", "w8a8", "--scheme", "fp8-static", "--scheme", "fp8", "--scheme", "w4a16-g64")
    assert run("tune", "--shape", "64,128", "--shape", "32,128", *schemes, *file)[0] == 0
    assert run("tune", "--model", static, *file)[0] == 0
    assert run("tune", "--model", static, "--scheme", "fp8-block", *file)[0] == 0
    groups = ("--scheme", "w4a16", "--group-size", "32", "--group-size", "channel")
    assert run("tune", "--shape", "64,128", *groups, *file)[0] == 0
    found = [[(N, K, scheme.label) for N, K, scheme in weights] for weights, _ in on_a_gpu]
    tiny = [(64, 64), (32, 64), (96, 64), (64, 96)]
    # what static scales take is what scales found at run time take: once
    assert found[0] == [(N, 128, label) for N in (64, 32) for label in ("w8a8", "fp8", "w4a16-g64")]
    assert sorted(found[1]) == sorted((N, K, "w8a8") for N, K in tiny)
    assert sorted(found[2]) == sorted((N, K, "fp8-block") for N, K in tiny)
    assert found[3] == [(64, 128, "w4a16-g32"), (64, 128, "w4a16-channel")]


def test_ctrl_c_keeps_what_was_tuned(run, on_a_gpu, tables):
    code, _, err = run("tune", "--shape", "64,128", "--shape", "666,128", "--shape", "32,128", "--m", "1")
    assert code == 130
    assert err.splitlines() == [f"{tables / 'sm_90.json'} keeps the 2 entries measured so far", "interrupted"]
    assert len(json.loads((tables / "sm_90.json").read_text())["entries"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("give at least one of --shapes, --shape and --model",)),
        (("--shapes", "llama-9"), ("--shapes llama-9", "llama-3-8b, llama-3-70b")),
        (("--shape", "4096"), ("--shape 4096", "expected N,K", "28672,4096")),
        (("--shape", "4096,0"), ("--shape 4096,0", "expected N,K")),
        (("--shape", "8,8", "--group-size", "48"), ("group_size 48", "32, 64, 128")),
        (
            ("--shape", "8,8", "--scheme", "w3a16"),
            ("scheme w3a16-g128", "w4a16, w4a8, fp8, fp8-static", "fp8-block"),
        ),
        (("--shape", "8,8", "--scheme", "w8"), ("unknown scheme 'w8'", "fp8-block")),
        (("--shape", "8,8", "--scheme", "w8a8", "--group-size", "64"), ("w8a8 has no groups",)),
        (("--shape", "8,8", "--m", "0"), ("--m", "greater than or equal to 1")),
        (("--model", "absent"), ("absent", "no such directory")),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_wrong_options_of_tune_are_named(refused, on_a_gpu, arguments, words):
    refused("tune", *arguments, words=words)
    assert not on_a_gpu


def test_tune_needs_a_gpu_linears_with_launches_and_a_file(
    refused, on_a_gpu, packed, tables, tmp_path, monkeypatch
):
    folder = packed("llama", "w3a16")
    refused("tune", "--model", folder, words=(str(folder), "no linear of 8 bits or w4a8, nor of w4a16"))
    refused("tune", "--shape", "8,8", "--out", tables, words=(str(tables), "is a directory"))
    (tmp_path / "file").touch()
    refused(
        "tune", "--shape", "8,8", "--out", tmp_path / "file" / "table.json", words=(str(tmp_path / "file"),)
    )
    refused("tune", "--shape", "8,8", "--out", tmp_path / "file", words=("file is no table", "delete it"))
    monkeypatch.setattr(cli, "pick_device", lambda name: torch.device("cpu"))
    refused("tune", "--shape", "8,8", words=("needs a GPU",))
    assert not on_a_gpu


def test_inspect_shows_the_kernel_that_a_table_chooses(run, packed, tables, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "target_of", lambda device: "sm_90")
    folder, file = packed("llama", "w4a16-g64-asym"), tmp_path / "inspect.json"

    def kernels() -> dict[str, str]:
        assert run("inspect", folder, "--json", file)[0] == 0
        rows = {row["name"]: row for row in json.loads(file.read_text())["modules"]}
        return rows["model.layers.0.mlp.up_proj"]["kernels"]

    default = {"1": "w4a16_decode", "16": "w4a16_decode", "256": "w4a16_hopper", "4096": "w4a16_hopper"}
    assert kernels() == default
    entries = [
        tuned_entry(96, 64, 64, 16, "w4a16_hopper"),
        tuned_entry(96, 64, 64, 256, "w4a16_tiles_vendor"),
    ]
    (tables / "sm_90.json").write_text(json.dumps({"entries": entries}))
    dispatch.forget()
    assert kernels() == default | {"1": "w4a16_hopper", "16": "w4a16_hopper", "256": "w4a16_tiles_vendor"}


def test_a_broken_table_is_named(refused, packed, tables):
    folder = packed("llama", "w8a16")
    (tables / "cpu.json").write_text("{")
    words = (str(tables / "cpu.json"), "is no table of kernels", "delete it and run quantkit tune")
    for arguments in (("inspect", folder), ("eval", folder), ("bench", folder), ("demo", "--windows", "1")):
        refused(*arguments, "--device", "cpu", words=words)
        dispatch.forget()


@pytest.mark.parametrize("verb", [["eval", "nowhere"], ["bench", "--shapes", "llama-3-8b", "--no-decode"]])
def test_a_mode_of_accumulation_that_there_is_not_is_refused_before_the_work(run, verb):
    code, _, err = run(*verb, "--fp8-accumulation", "quick")
    assert code == 2
    assert "fp8 accumulation: found 'quick', expected 'auto', 'accurate' or 'fast'" in err
