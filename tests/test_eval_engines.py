"""Tokens of one checkpoint by several engines: what is stored, and where answers part."""

import sys
from importlib.resources import files
from types import SimpleNamespace

import pytest
import transformers

from quantkit.errors import QuantKitError
from quantkit.eval import engines
from quantkit.eval.records import environment, read_records
from quantkit.eval.tables import tables

MODEL = str(files("quantkit") / "examples" / "lm-7m")


def test_quantkits_tokens_are_generates_and_vllms_stand_beside_them(tmp_path, monkeypatch, capsys):
    records = str(tmp_path / "engines.jsonl")
    engines.main(["quantkit", MODEL, records, "--new", "5", "--timed", "9"])
    (found,) = read_records(records)
    assert [len(answer["ids"]) for answer in found["answers"]] == [5] * len(engines.TEXTS)
    assert all(gap >= 0 for answer in found["answers"] for gap in answer["gaps"])
    assert found["tokens_per_s"] > 0
    by_prompt = {
        tuple(ids): answer["ids"]
        for ids, answer in zip(engines.prompts(MODEL), found["answers"], strict=True)
    }

    class LLM:
        """Gives the tokens of ours, but for one of the second prompt."""

        def __init__(self, folder, **options):
            assert (folder, options["quantization"], options["dtype"]) == (MODEL, "quantkit", "bfloat16")

        def generate(self, rows, sampling):
            texts = [(by_prompt[tuple(row["prompt_token_ids"])] * 2)[: sampling.max_tokens] for row in rows]
            if rows[0]["prompt_token_ids"] == engines.prompts(MODEL)[1]:
                texts = [[*text[:3], text[3] + 1, *text[4:]] for text in texts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=text)]) for text in texts]

    stub = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", stub)
    monkeypatch.setattr(engines, "version", lambda name: "0.23")
    monkeypatch.setattr(engines, "environment", lambda device: environment("cpu"))
    engines.main(["vllm", MODEL, records, "--quantization", "quantkit", "--new", "5", "--timed", "9"])
    capsys.readouterr()
    engines.main(["compare", records])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("quantkit lm-7m bfloat16: 8 of 8 answers as quantkit's")
    gap = found["answers"][1]["gaps"][3]
    assert lines[1] == (
        f"  'The capital of France is': token 3 differs from quantkit's, whose two largest logits are {gap:.4f} apart there"
    )
    assert lines[2].startswith("vllm 0.23, quantkit's kernels lm-7m bfloat16: 7 of 8 answers as quantkit's")
    (table,) = tables(read_records(records))
    assert [(row[0], *row[3:]) for row in table.rows] == [
        ("quantkit, of lm-7m", "8 of 8", "-"),
        ("vllm 0.23, quantkit's kernels, of lm-7m", "7 of 8", f"{gap:.4f}"),
    ]


def test_transformers_and_the_optimized_model_stand_beside_the_loaded_one(tmp_path, capsys):
    records, short = str(tmp_path / "engines.jsonl"), ["--new", "5", "--timed", "9"]
    engines.main(["quantkit", MODEL, records, "--dtype", "float16", *short])
    engines.main(["quantkit", MODEL, records, *short])
    engines.main(["quantkit", MODEL, records, "--optimize", *short])
    engines.main(["transformers", MODEL, records, *short])
    capsys.readouterr()
    engines.main(["compare", records])
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.split(": ")[0] for line in lines] == [
        "quantkit lm-7m float16",
        "quantkit lm-7m bfloat16",
        "quantkit, optimized lm-7m bfloat16",
        f"transformers {transformers.__version__} lm-7m bfloat16",
    ]
    assert lines[3].split(": ")[1].startswith("8 of 8 answers")  # of an unquantized model: the same one


def test_a_quantkit_directory_is_no_matter_of_transformers_alone(tmp_path):
    with pytest.raises(QuantKitError, match="expected a model directory"):
        engines.of_transformers(str(tmp_path), "bfloat16", 5, 9)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "quantkit"}}')
    with pytest.raises(QuantKitError, match="export it with quantkit convert"):
        engines.of_transformers(str(tmp_path), "bfloat16", 5, 9)


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(QuantKitError, match="install it to serve"):
        engines.of_vllm(MODEL, "bfloat16", 5, 9, None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "a file that this program wrote"),
        (b'{"kind": "linear"}', "a file that this program wrote"),
        (b"[1]", "list where an object is expected"),
        (b"{", "one object a line is expected"),
        (b"\xff", "one JSON object a line is expected"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, expected):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(QuantKitError, match=rf"a\.jsonl.*{expected}"):
        engines.main(["compare", str(tmp_path / "a.jsonl")])
