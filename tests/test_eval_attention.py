"""The benchmark of attention, run on a CPU at tiny sizes: what it records, and that wrong results have no time."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from quantkit.eval import attention
from quantkit.eval.attention import Heads, bench_attention
from quantkit.eval.records import read_records, write_records
from quantkit.kernels.kv_pages import KINDS

TINY = Heads("tiny", 4, 2, 16)


def test_every_op_and_kind_has_a_record_with_its_error(tmp_path):
    kept = []
    records = bench_attention(
        [TINY], [(2, 40)], device="cpu", replays=2, working_set=0, page_size=16, on_record=kept.append
    )
    assert kept == records
    found = [(r["op"], r["kv"], r["kernel"]) for r in records]
    ops = ("decode_attention", "prefill_attention", "rope_write")
    expected = [(op, kind, f"{op}_torch") for kind in KINDS for op in ops]
    assert found == [*expected, ("decode_attention", "bf16", "scaled_dot_product_attention")]
    assert records[-1]["library"].startswith("torch ")
    for record in records:
        assert record["kind"] == "attention"
        assert record["rel_error"] < attention.ERROR_BOUND
        assert record["us"] > 0
        assert record["limit_us"] is None
    write_records(tmp_path / "attention.jsonl", records)
    assert read_records(tmp_path / "attention.jsonl") == json.loads(json.dumps(records))


def test_a_wrong_result_has_no_time(monkeypatch):
    monkeypatch.setattr(attention, "exact", lambda q, *rest: torch.ones_like(q).double())
    records = bench_attention(
        [TINY], [(1, 17)], ["int8"], "cpu", replays=1, working_set=0, page_size=16, peer=False
    )
    refused = {r["op"]: r["us"] for r in records if "refused" in r}
    assert refused == {"decode_attention": None, "prefill_attention": None}
