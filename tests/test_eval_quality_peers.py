import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantkit.calibration.rtn import rtn
from quantkit.eval import quality_peers
from quantkit.eval.quality_peers import (
    FP8,
    OURS,
    RECIPES,
    ROWS,
    SETTINGS,
    TOOLS,
    W4,
    W8A8,
    Failed,
    Protocol,
    Row,
    Setting,
    Tool,
    block_linears,
    chosen,
    installed,
    round_inputs,
    run_table,
    stored_bits,
    with_weights,
)
from quantkit.eval.records import read_records
from quantkit.eval.tables import markdown, tables
from quantkit.linear import QuantLinear, replace_module
from quantkit.load import load_model
from quantkit.recipe import CalibrationSpec
from quantkit.scheme import parse_scheme

WORDS = 60
FAKE = Tool("fake", "1.0")
FAKE_DRIVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("peer_driver", {driver!r})
driver = sys.modules["peer_driver"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)

def fake(job, tokens):
    if job.method == "broken":
        raise ValueError("no kernel for a toaster (/home/somebody/toast.py)")
    weights = {{f"{{n}}.weight": m.weight * (1 + 0.01 * (1 + job.seed)) for n, m in driver.block_linears(driver.load(job.model)).items()}}
    if job.method == "lazy":
        weights.popitem()
    assert tokens.shape == (3, 8), tokens.shape
    return weights

driver.PEERS["fake"] = ("json", fake)
driver.main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory with a tiny Llama and a tokenizer of words w0, w1, ..."""
    folder = tmp_path_factory.mktemp("originals") / "tiny"
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=WORDS + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def table(model, tmp_path, monkeypatch):
    """Runs rows on the tiny model with the fake tool: returns what was said and the records."""
    driver = tmp_path / "driver.py"
    driver.write_text(FAKE_DRIVER.format(driver=str(quality_peers.DRIVER)))
    monkeypatch.setattr(quality_peers, "DRIVER", driver)
    monkeypatch.setitem(TOOLS, "fake", FAKE)
    monkeypatch.setattr(quality_peers, "installed", lambda *_: Path(sys.executable))
    drawn = torch.randint(0, WORDS, (400,), generator=torch.Generator().manual_seed(0))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in drawn.tolist()))
    protocol = Protocol(str(text), 2, CalibrationSpec(str(text), samples=3, seq_len=8))

    def run(*rows, seeds=(0,), records="records.jsonl"):
        said = []
        file = tmp_path / records
        run_table(rows, [model], seeds, protocol, tmp_path / "peers", file, said.append)
        return said, read_records(file) if file.exists() else []

    return run


def test_a_tool_runs_once_a_seed_and_its_weights_are_kept(table, monkeypatch):
    row = Row(W4, "fake", "scaling")
    _, records = table(row, seeds=(0, 1))
    assert [r["seed"] for r in records] == [0, 1]
    assert 0 < records[0]["kl"] < records[1]["kl"], "the second run's weights are further off"
    assert {"seconds", "cpu_seconds", "peer_torch", "commit", "device", "date"} <= records[0].keys()
    assert records[0]["calibration"] == "3 x 8 tokens of text.txt"

    said, again = table(row, seeds=(0, 1))
    assert again == records
    assert all("measured before" in line for line in said)

    monkeypatch.setattr(quality_peers, "DRIVER", Path("gone.py"))
    _, evaluated = table(row, records="others.jsonl")
    assert evaluated[0]["kl"] == records[0]["kl"]
    assert evaluated[0]["seconds"] == records[0]["seconds"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [("broken", "no kernel for a toaster (toast.py)"), ("lazy", "left 1 of 14 weights as they were")],
)
def test_a_tool_that_fails_leaves_its_reason(table, method, reason):
    said, records = table(Row(W4, "fake", method, seeded=False))
    assert reason in records[0]["reason"]
    assert records[0]["perplexity"] is None
    assert reason in said[0]
    assert reason in markdown(tables(records)[0])


def test_what_this_quantkit_does_not_know_is_said_and_not_recorded(table, monkeypatch):
    monkeypatch.setitem(RECIPES, "utter", {"utterly": "new"})
    unknown = Setting("W9", "w9a9", 9)
    said, records = table(Row(unknown, OURS, "rtn", seeded=False), Row(W8A8, OURS, "utter"))
    assert "skipped" in said[0]
    assert "w9a9" in said[0]
    assert "utterly" in said[1]
    assert records == []


def test_our_row_is_that_of_the_loaded_checkpoint(table):
    _, records = table(Row(W8A8, OURS, "rtn", seeded=False))
    assert records[0]["seed"] is None
    assert 0 < records[0]["kl"] < 0.1
    assert 8 < records[0]["bits_per_weight"] < 10
    assert records[0]["reason"] is None


@pytest.mark.parametrize("setting", [W8A8, FP8], ids=lambda s: s.name)
@torch.no_grad()
def test_rounded_inputs_are_those_of_the_runtime(model, setting):
    packed = load_model(model, "cpu", dtype=torch.float32)
    simulated = load_model(model, "cpu", dtype=torch.float32)
    for name, linear in block_linears(simulated).items():
        quantized = rtn(linear.weight, parse_scheme(setting.scheme))
        replace_module(packed, name, QuantLinear.from_quantized(quantized))
        linear.weight.copy_(quantized.dequantize())
    round_inputs(simulated, setting.activation)
    generator = torch.Generator().manual_seed(0)
    for name, linear in block_linears(simulated).items():
        x = torch.randn(2, 5, linear.in_features, generator=generator)
        # a float32 product of K terms, each a product of four roundings at most
        K = linear.in_features
        bound = (K + 4) * torch.finfo(torch.float32).eps * (2 * x.abs() @ linear.weight.abs().t())
        error = (linear(x) - packed.get_submodule(name)(x)).abs()
        assert (error <= bound).all()
        plain = torch.nn.functional.linear(x, linear.weight)
        assert ((linear(x) - plain).abs() > bound).any(), "x was not rounded"


def test_weights_of_another_model_are_refused(model):
    weights = {f"{n}.weight": m.weight for n, m in block_linears(load_model(model, "cpu")).items()}
    changed = with_weights(model, {n: w * 2 for n, w in weights.items()})
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(changed.get_parameter(name), weights[name] * 2)
    with pytest.raises(Failed, match=r"stranger \[1\], the model has no such tensor"):
        with_weights(model, {**weights, "stranger": torch.ones(1)})
    with pytest.raises(Failed, match=r"the model has \[64, 32\]"):
        with_weights(model, {**weights, name: torch.ones(3, 3)})
    with pytest.raises(Failed, match="left 14 of 14"):
        with_weights(model, {})


def test_bits_count_scales_and_zeros(model):
    original = load_model(model, "cpu")
    groups_of_32 = Setting("W4 g32", "w4a16-g32", 4, 32)
    assert stored_bits(original, Row(groups_of_32, "hqq", "hqq", zero_bits=4)) == 4 + 20 / 32
    # down_proj has K = 64, the others 32, one scale a row
    N, K = 32, 64
    others = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 64 * 32
    scales = 16 * (N + others // 32)
    row = Row(Setting("W4", "w4a16-channel", 4), "hqq", "hqq")
    assert stored_bits(original, row) == pytest.approx(4 + scales / (N * K + others))


def fake_environment(monkeypatch, code):
    """`venv.create` that makes a 'python' which writes down its arguments and exits with `code`."""

    def create(home, with_pip):
        (home / "bin").mkdir(parents=True)
        python = home / "bin" / "python"
        python.write_text(f"#!/bin/sh\necho \"$@\"\necho 'ERROR: no matching distribution'\nexit {code}\n")
        python.chmod(0o755)

    monkeypatch.setattr(quality_peers.venv, "create", create)


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    fake_environment(monkeypatch, 0)
    tool = Tool("fake", "1.0", beside=("before==2",), options=("--no-deps",))
    said = []
    python = installed(tool, tmp_path, said.append)
    commands = [
        line for line in (python.parents[1] / "install.log").read_text().splitlines() if "ERROR" not in line
    ]
    assert [line.removeprefix("-I -m pip install ") for line in commands] == [
        quality_peers.TORCH,
        "before==2",
        "--no-deps fake==1.0",
    ]
    assert installed(tool, tmp_path, said.append) == python
    assert len(said) == 1


def test_an_environment_that_pip_cannot_make_says_why(tmp_path, monkeypatch):
    fake_environment(monkeypatch, 1)
    with pytest.raises(Failed, match=r"pip cannot install fake==1.0: ERROR: no matching distribution"):
        installed(FAKE, tmp_path, lambda _: None)


def record(setting="W4 g128", tool="hqq", seed=None, kl=0.1, **changes):
    figures = dict(perplexity=17.0, reference_perplexity=15.764, kl=kl, bits_per_weight=4.25, cpu_seconds=3.0)
    made = dict(device="a CPU", torch="2.13.0", commit="abc1234", date="2026-11-25T10:00:00+00:00")
    where = dict(kind="quality-peers", model="lm-27m", text="wikitext2-valid.txt", protocol="20 windows")
    return {
        **where,
        **figures,
        **made,
        "calibration": "128 x 512 tokens of calibration.txt",
        "setting": setting,
        "tool": tool,
        "method": "a method",
        "version": "1.0",
        "seed": seed,
        "reason": None,
        **changes,
    }


def test_the_table_gives_mean_and_deviation_over_seeds():
    seeds = [record(tool="gptqmodel", seed=seed, kl=0.03 + 0.01 * seed) for seed in range(3)]
    made = tables([record(), record("FP8"), *seeds])[0]
    assert [row[:3] for row in made.rows] == [
        ("W4 g128", "hqq 1.0", "a method"),
        ("W4 g128", "gptqmodel 1.0", "a method"),
        ("FP8", "hqq 1.0", "a method"),
    ]
    of = dict(zip(made.header, made.rows[1], strict=True))
    assert of["KL, nats"] == "0.0400 ± 0.0100"
    assert of["perplexity"] == "17.000 ± 0.000"
    assert of["seeds"] == "3"
    assert dict(zip(made.header, made.rows[0], strict=True))["KL, nats"] == "0.1000"
    assert "15.764" in made.caption
    assert "128 x 512 tokens of calibration.txt" in made.caption


def test_a_tool_measured_at_last_is_no_longer_missing():
    failed = record(perplexity=None, kl=None, reason="pip cannot install it")
    assert "pip cannot install it" in tables([failed])[0].caption
    assert "pip cannot install it" not in tables([failed, record()])[0].caption


def test_rows_are_chosen_by_tool_setting_and_method():
    assert list(chosen(None, None, None)) == list(ROWS)
    rows = list(chosen([OURS], ["w4a16-g128"], ["gptq", "best"]))
    assert [(row.setting, row.method) for row in rows] == [(W4, "gptq"), (W4, "best")]


def test_every_row_can_be_run():
    for row in ROWS:
        assert row.setting.scheme in SETTINGS
        if row.tool == OURS:
            assert row.method in RECIPES
        else:
            assert row.tool in TOOLS
            assert row.tool in quality_peers.peer_driver.PEERS
