"""Packed models cut over two processes answer as they do in one, each process with half of them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from packed_weights import packed_weight
from parallel import run_processes, server
from quantkit import QuantKitConfig, QuantLinear, Recipe, Rule, quantize_checkpoint
from quantkit.hf import install
from quantkit.shares import shares
from tensor_parallel_ranks import all_bytes, answers, gradient, linear_bytes

SMALL = {"intermediate_size": 128, "num_hidden_layers": 1}
WIDE = {**SMALL, "hidden_size": 256, "intermediate_size": 512}  # whole tiles of 128 a process
BIASED = {**SMALL, "attention_bias": True, "mlp_bias": True}
EXPERTS = {**SMALL, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Case:
    """A checkpoint to cut, and what else to do with it."""

    scheme: str
    architecture: str = "llama"
    changes: Any = None
    extras: tuple[str, ...] = ()
    method: str = "rtn"
    rules: tuple[Rule, ...] = ()
    dtype: str = "float32"

    def make(self, tiny: Any, tokens: torch.Tensor, folder: Path) -> Path:
        model = tiny(self.architecture, torch.float32, **(SMALL if self.changes is None else self.changes))
        model.save_pretrained(folder / "source")
        quantize_checkpoint(
            folder / "source", folder / "packed", Recipe(self.scheme, self.method, self.rules), "cpu", tokens
        )
        return folder / "packed"


CASES = {
    "w8a16": Case("w8a16", changes={"intermediate_size": 128}, extras=("gradient", "load", "save", "head")),
    "w8a8": Case("w8a8", changes=BIASED, extras=("optimize", "compile")),
    "w8a8-static": Case("w8a8-static", extras=("optimize",)),
    "w4a16-g32": Case("w4a16-g32", extras=("optimize",)),
    "w4a16-channel": Case("w4a16-channel-asym", changes=BIASED),
    "w4a8, groups cut": Case("w4a8-g64-asym", "qwen3", {**SMALL, "intermediate_size": 192}),
    "w3a16": Case("w3a16-g32", "qwen2"),
    "w2a16": Case("w2a16-channel", "mistral"),
    "fp8": Case("fp8", "qwen3"),
    "fp8-static": Case("fp8-static", changes={**SMALL, "vocab_size": 131}),
    "fp8-block, tiles cut": Case("fp8-block", changes=WIDE, extras=("optimize",)),
    "fp8-w8a16": Case("fp8-w8a16", "phi3"),
    "groups cut": Case("w4a16-g128-asym", changes={**WIDE, "intermediate_size": 384}),
    "bfloat16": Case("w8a8", dtype="bfloat16"),
    "bfloat16, repacked": Case("w4a16-g32", changes=WIDE, extras=("optimize",), dtype="bfloat16"),
    "head": Case(
        "w8a16", extras=("head", "mixed"), rules=(Rule("lm_head", "w4a16-g32"), Rule(r".*mlp\..*", "keep"))
    ),
    "mixtral": Case("w4a8-g32", "mixtral", rules=(Rule(r".*experts\.1\..*", "keep"),)),
    "channel scales": Case("w4a16-g32", "qwen2_moe", EXPERTS, method="awq"),
}
REFUSED = {
    "heads": Case("w8a16", changes={"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "groups": Case("w4a16-g32", changes={"intermediate_size": 96}),
}


def with_orders(tiny: Any, folder: Path) -> Path:
    """Linears whose input columns are put in order, as GPTQ's desc_act leaves them: one cut each way."""
    model = tiny("llama", torch.float32, **SMALL)
    shapes = {"model.layers.0.mlp.up_proj": (128, 64), "model.layers.0.mlp.down_proj": (64, 128)}
    packed = {n: packed_weight("w4a16-g32", *shape, order=True) for n, shape in shapes.items()}
    scheme = packed_weight("w4a16-g32", 8, 64).scheme
    entry = {"scheme": scheme.label, "input_order": True}
    install(model, packed, QuantKitConfig({scheme.label: scheme.to_dict()}, dict.fromkeys(packed, entry)))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tiny, tokens, tmp_path_factory) -> dict[str, Path]:
    server()
    base = tmp_path_factory.mktemp("cut")
    made = {
        name: case.make(tiny, tokens, base / str(i))
        for i, (name, case) in enumerate((CASES | REFUSED).items())
    }
    made["order"] = with_orders(tiny, base / "order")
    made["other"] = base / "other"
    shutil.copytree(made["w8a16"], made["other"])
    config = made["other"] / "config.json"
    config.write_text(config.read_text().replace('"rtn"', '"gptq"'))
    return made


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes noted of each directory."""
    out = tmp_path_factory.mktemp("found")
    orders = {
        name: ([str(folders[name])], case.extras, case.dtype) for name, case in (CASES | REFUSED).items()
    }
    orders["order"] = ([str(folders["order"])], (), "float32")
    for extras in ((), ("load",)):
        pair = [str(folders["w8a16"]), str(folders["other"])]
        orders[f"other{len(extras)}"] = (pair, extras, "float32")
    orders["absent"] = ([str(folders["w8a16"]), "nowhere"], ("load",), "float32")
    assert run_processes("tensor_parallel_ranks", orders, out, QUANTKIT_TIMEOUT="60") == [0, 0]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [*CASES, "order"])
def test_two_processes_answer_as_one(name, folders, found):
    case = CASES.get(name, Case(""))
    dtype = getattr(torch, case.dtype)
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype)
    one = answers(model)
    # sums in another order, and each process's rounded before they are added: a few roundings of the logits' size
    bound = one["logits"].abs().max() * torch.finfo(dtype).eps * 16
    for two in found:
        assert "error" not in two[name], two[name]
        assert (two[name]["logits"] - one["logits"]).abs().max() <= bound
        if dtype == torch.float32:  # in bfloat16 two tokens may be nearer to each other than the bound
            assert torch.equal(two[name]["tokens"], one["tokens"])
        assert two[name]["repacked"] == any(
            m.repacked_for for m in model.modules() if isinstance(m, QuantLinear)
        )
        if "optimize" in case.extras:
            assert (two[name]["optimized"]["logits"] - one["logits"]).abs().max() <= bound
        assert two[name].get("graphs", 1) == 1  # the sums over the processes break none
        if "gradient" in case.extras:
            expected = gradient(model)
            torch.testing.assert_close(two[name]["gradient"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["w8a16", "w8a8-static", "w4a16-g32", "w3a16", "fp8-block, tiles cut", "mixtral"]
)
def test_each_process_reads_and_holds_half(name, folders, found):
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    whole = linear_bytes(model)
    for two in found:
        # scales of rows are held whole where a linear is cut by its inputs
        assert whole / 2 <= two[name]["held"] <= whole * 0.52
        assert two[name]["read"] <= all_bytes(model) * 0.52


@pytest.mark.parametrize(("name", "rows"), [("w8a16", (64, 64)), ("fp8-static", (66, 65))])
def test_an_embedding_that_no_head_shares_is_cut(name, rows, found):
    assert tuple(two[name]["rows"] for two in found) == rows


@pytest.mark.parametrize(
    "name", ["w8a16", "w4a16-channel", "groups cut", "fp8-block, tiles cut", "head", "fp8-w8a16"]
)
def test_inspect_foretells_what_a_process_holds(name, folders, found):
    told = shares(folders[name], 2)
    assert told.most == max(two[name]["all"] for two in found)


def test_shorter_groups_are_told(folders):
    told = shares(folders["groups cut"], 2)
    assert set(told.regrouped.values()) == {64}
    assert all(name.endswith("down_proj") for name in told.regrouped)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("heads", ("num_attention_heads = 3 is no multiple of 2", "use 3 processes")),
        ("groups", ("mlp.down_proj: K / 2 = 48 columns, in groups of 32", "load it on one device")),
        ("other0", ("headers of the checkpoint: process 1 has", "process 0 has")),
        ("other1", ("config.json and headers of the checkpoint: process 1 has", "process 0 has")),
        ("absent", ("process 1: nowhere: no such directory",)),
    ],
)
def test_what_cannot_be_cut_is_refused_on_every_process(name, words, found):
    assert found[0][name] == found[1][name]
    for word in words:
        assert word in found[0][name]["error"]


def test_a_forward_without_the_other_process_ends(found):
    assert found[0]["deserted"]["seconds"] < 60
    assert found[0]["deserted"]["error"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("w8a16", "the LM head is cut over processes"), ("head", "no LM head that is not packed")],
)
def test_a_head_that_is_cut_is_not_packed_by_optimize(name, words, found):
    assert all(words in two[name]["head"] for two in found)


def test_blocks_with_cut_linears_that_are_not_packed_are_not_fused(found):
    assert all("not packed and cut over processes" in two["head"]["mixed"] for two in found)


def test_saving_a_part_is_refused(found):
    assert all("copy the directory" in two["w8a16"]["saved"] for two in found)


def test_inspect_says_whether_it_can_be_cut(run, refused, folders):
    code, text, _ = run("inspect", folders["groups cut"], "--tp", 2)
    assert code == 0
    assert "tensor parallel over 2: at most" in text
    assert "get groups of 64 columns" in text
    assert "it can be cut over 2" in text
    refused("inspect", folders["heads"], "--tp", "2", words=("num_attention_heads = 3", "use 3 processes"))
    refused("inspect", folders["heads"], "--tp", "1", words=("expected 2 or more",))
