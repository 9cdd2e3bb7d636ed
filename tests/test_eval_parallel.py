"""Speed of several processes, run by two of them on a CPU at tiny sizes."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from parallel import run_processes, server
from quantkit.eval.collectives import ERROR_BOUNDS
from quantkit.eval.random_model import random_model
from quantkit.eval.tables import tables
from quantkit.linear import QuantLinear
from quantkit.scheme import parse_scheme
from rounding import GPU
from speed_ranks import TINY


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    server()
    out = tmp_path_factory.mktemp("speed")
    assert run_processes("speed_ranks", str(out), QUANTKIT_TIMEOUT="60") == [0, 0]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("label", ["w4a16-g128", "w8a8"])
def test_a_random_model_is_made_in_parts_that_answer_together(label, found):
    one, other = (two[label] for two in found)
    assert torch.equal(one["tokens"], other["tokens"])
    if label == "w4a16-g128":  # the other one's head was rounded then
        assert torch.equal(one["tokens"], one["before"])
    whole = random_model(TINY, parse_scheme(label), torch.float32)
    held = sum(m.weight_bytes for m in whole.model.layers.modules() if isinstance(m, QuantLinear))
    assert held / 2 <= one["held"] <= held * 0.52
    assert one["record"]["ranks"] == 2
    assert one["why_not"] == "process 0: no GPU, or no Triton"


@pytest.mark.skipif(GPU, reason="needs Triton's interpreter, which a GPU's tests go without")
def test_a_model_whose_norms_add_the_parts_in_their_kernel_answers_alike(found):
    """By the kernel in the interpreter, over memory that both processes see: steps of few rows, not the prompt."""
    for two in found:
        one_kernel, library = two["one kernel"], two["library"]
        assert one_kernel["calls"] == [5 * 4, 0, 0, 0]  # of row 0: steps times norms after a sum
        assert torch.equal(one_kernel["tokens"], library["tokens"])
        bound = library["logits"].abs().max() * torch.finfo(torch.float16).eps * 16
        assert (one_kernel["logits"] - library["logits"]).abs().max() <= bound
    assert torch.equal(found[0]["one kernel"]["logits"], found[1]["one kernel"]["logits"])


def test_a_random_model_that_cannot_be_cut_is_refused(found):
    assert found[0]["heads"] == found[1]["heads"]
    assert "num_key_value_heads = 1 is no multiple of 2" in found[0]["heads"]


def test_sums_have_records_with_their_error_and_a_table(found):
    records = found[0]["sums"]
    assert [(r["M"], r["K"], r["rounding"], r["way"]) for r in records] == [
        (M, K, rounding, "library") for M, K in ((1, 256), (3, 64)) for rounding in ("bfloat16", "int8")
    ]
    for record in records:
        assert record["ranks"] == 2
        assert record["us"] > 0
        assert record["rel_error"] < ERROR_BOUNDS[record["rounding"]]
        assert record["why_not"] == "process 0: no GPU, or no Triton"
    fused = [r | {"way": "one kernel", "us": r["us"] / 2} for r in records]
    (table,) = tables([*records, *fused])
    assert table.title == "all-reduce, residual and norm over 2 processes"
    assert [row[0] for row in table.rows] == ["1 x 256", "1 x 256", "3 x 64", "3 x 64"]
    assert {row[-1] for row in table.rows} == {"2.00"}


def test_answers_of_several_processes_have_a_table():
    made = {"device": "X", "torch": "2", "triton": "3", "commit": "c", "date": "2026-01-01"}
    record = {"kind": "parallel", "model": "m", "ranks": 2, "dtype": "float16", "new_tokens": 64, **made}
    counts = {"sums": "one kernel", "equal": 7, "tied": 1, "wrong": 0}
    (table,) = tables(
        [record | {"scheme": "w4a16"} | counts, record | {"scheme": "fp8-block", "refused": "x"}]
    )
    assert table.title == "greedy answers of 64 tokens by 2 processes, beside one's"
    assert table.rows == (
        ("m, w4a16", "float16", "7", "1", "0", "one kernel"),
        ("m, fp8-block", "float16", "refused", "-", "-", "-"),
    )


def test_calibration_by_several_processes_has_a_record_that_says_so(found):
    for two in found:
        (record,) = two["calibration"]
        assert record["ranks"] == 2
        assert record["seconds"] > 0
    (table,) = tables(found[0]["calibration"])
    assert table.rows[0][:2] == ("w4a16-g32, 2 processes", "gptq")
