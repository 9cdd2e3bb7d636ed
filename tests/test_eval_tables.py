import runpy
import sys
from pathlib import Path

import pytest

from quantkit.errors import QuantKitError
from quantkit.eval.plots import plot_linears, plot_quality
from quantkit.eval.records import write_records
from quantkit.eval.tables import fill, markdown, rich_table, tables, update

ROOT = Path(__file__).resolve().parents[1]
MADE = dict(
    device="NVIDIA H200", torch="2.11.0", triton="3.6.0", commit="abc1234", date="2026-11-22T10:00:00+00:00"
)
DOCUMENT = "# Results\n\n<!-- table:speed -->\nold\n<!-- /table -->\n\nThe end.\n"


def linear(scheme="w4a16-g128", M=1, us=20.0, **changes):
    shape = dict(kind="linear", shape="gate_up", N=28672, K=4096, limit_us=14.1, bf16_us=58.0)
    return {**shape, **MADE, "scheme": scheme, "M": M, "us": us, **changes}


def quality(scheme="w4a16-g128", method="gptq", kl=0.04, **changes):
    figures = dict(
        bits_per_weight=4.125, disk_bytes=27_400_000, perplexity=16.2, ratio=1.0277, kl=kl, top1=0.91
    )
    source = dict(kind="quality", model="lm-27m", text="wikitext2-valid", protocol="20 windows")
    return {**source, **figures, **MADE, "scheme": scheme, "method": method, **changes}


def decode(batch=1, graph_ms=3.2):
    settings = dict(
        kind="decode", model="llama-3-8b", scheme="fp8", batch=batch, prompt_len=512, new_tokens=128
    )
    speeds = dict(
        memory_bytes=9.1e9, prefill_tokens_per_s=41234.5, generate_tokens_per_s=40, generate_ms=25.0
    )
    graph = dict(graph_tokens_per_s=graph_ms and 1e3 / graph_ms, graph_ms=graph_ms, limit_ms=1.87)
    return {**settings, **speeds, **graph, **MADE}


def test_linears_are_a_row_a_scheme_and_a_column_an_m():
    (table,) = tables([linear(), linear(M=16, us=29.0), linear("fp8", us=29.0, limit_us=None)])
    assert markdown(table) == (
        "**gate_up (N 28672, K 4096)**\n\n"
        "| scheme | M=1 | M=16 |\n"
        "| --- | ---: | ---: |\n"
        "| bfloat16 | 58.0 | 58.0 |\n"
        "| w4a16-g128 | 20.0 / 1.42 / 2.90 | 29.0 / 2.06 / 2.00 |\n"
        "| fp8 | 29.0 / - / 2.00 |  |\n\n"
        "us / multiple of the limit / speed-up over bfloat16. "
        "NVIDIA H200; torch 2.11.0; triton 3.6.0; commit abc1234; 2026-11-22.\n"
    )


def test_a_kernel_with_a_wrong_result_shows_no_time():
    (table,) = tables([linear(us=None, refused="rel_error 0.3 exceeds 0.01")])
    assert table.rows[-1] == ("w4a16-g128", "wrong result")


def test_a_later_record_replaces_the_earlier_of_the_same_setting():
    (table,) = tables([linear(us=30.0), linear(us=20.0, commit="def5678")])
    assert table.rows[-1] == ("w4a16-g128", "20.0 / 1.42 / 2.90")
    assert "commit def5678;" in table.caption


def test_devices_are_not_mixed_in_a_table():
    first, second = tables([linear(), linear(device="NVIDIA H100")])
    assert "NVIDIA H100" in second.caption
    assert "NVIDIA H100" not in first.caption


def test_quality_shows_the_protocol_and_leaves_out_what_the_original_has_not():
    original = quality("bfloat16", None, None, ratio=None, top1=None, bits_per_weight=None, perplexity=15.764)
    (table,) = tables([original, quality()])
    assert table.rows[0] == ("bfloat16", "", "-", "27.4", "15.764", "-", "-", "-")
    assert table.rows[1] == ("w4a16-g128", "gptq", "4.12", "27.4", "16.200", "1.0277", "0.0400", "91.0%")
    assert table.caption.startswith("20 windows; NVIDIA H200;")


def test_decode_without_a_graph_has_a_dash():
    (table,) = tables([decode(), decode(16, graph_ms=None)])
    assert table.rows[0][5:] == ("40", "25.00", "312", "3.20", "1.87")
    assert table.rows[1][7:9] == ("-", "-")


def test_the_terminal_gets_the_same_cells():
    (table,) = tables([linear()])
    rich = rich_table(table)
    assert [str(column.header) for column in rich.columns] == list(table.header)
    assert rich.row_count == len(table.rows)


@pytest.mark.parametrize("records", [[], [{"kind": "speed"}], [linear(), quality()]])
def test_records_that_are_no_table_are_refused(records):
    with pytest.raises(QuantKitError, match="a table is of one of quality, linear, decode"):
        tables(records)


def test_only_the_text_between_the_markers_changes(tmp_path):
    write_records(tmp_path / "speed.jsonl", [linear()])
    filled = fill(DOCUMENT, tmp_path)
    assert filled.startswith("# Results\n\n<!-- table:speed -->\n")
    assert filled.endswith("<!-- /table -->\n\nThe end.\n")
    assert "old" not in filled
    assert markdown(*tables([linear()])) in filled
    assert fill(filled, tmp_path) == filled
    assert fill("no tables here\n", tmp_path) == "no tables here\n"


def test_a_marker_that_is_never_closed_is_named(tmp_path):
    with pytest.raises(QuantKitError, match=r"a\.md: a '<!-- table:NAME -->' line has no"):
        fill("<!-- table:speed -->\nold\n", tmp_path, "a.md")


def test_two_tables_keep_what_is_between_them(tmp_path):
    write_records(tmp_path / "speed.jsonl", [linear()])
    filled = fill(DOCUMENT + DOCUMENT, tmp_path)
    assert filled == fill(DOCUMENT, tmp_path) * 2


def test_missing_records_are_named(tmp_path):
    with pytest.raises(QuantKitError, match=r"speed\.jsonl: no such file"):
        fill(DOCUMENT, tmp_path)


def test_checking_finds_a_stale_table_and_writes_nothing(tmp_path):
    write_records(tmp_path / "speed.jsonl", [linear()])
    document = tmp_path / "results.md"
    document.write_text(DOCUMENT)
    assert update(document, tmp_path, check=True)
    assert document.read_text() == DOCUMENT
    assert update(document, tmp_path)
    assert not update(document, tmp_path, check=True)


def test_the_script_exits_with_1_for_stale_and_2_for_missing_records(tmp_path, monkeypatch, capsys):
    document = tmp_path / "results.md"
    document.write_text(DOCUMENT)

    def run(*options: str) -> int:
        script = ROOT / "scripts" / "tables.py"
        monkeypatch.setattr(sys, "argv", [str(script), str(document), "--records", str(tmp_path), *options])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(script), run_name="__main__")
        return exit_.value.code

    assert run("--check") == 2
    assert capsys.readouterr().err.count("\n") == 1
    write_records(tmp_path / "speed.jsonl", [linear()])
    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0


def test_the_projects_documents_agree_with_the_records():
    documents = [*ROOT.glob("README.md"), *(ROOT / "docs").glob("*.md")]
    stale = [d.name for d in documents if update(d, ROOT / "docs" / "benchmarks", check=True)]
    assert not stale, f"run scripts/tables.py: {', '.join(stale)}"


def test_plots_are_drawn(tmp_path):
    plot_linears([linear(), linear(M=16, us=29.0), linear("fp8", us=None)], tmp_path / "linears.png")
    plot_quality([quality(), quality("w8a16", "rtn", 0.001, bits_per_weight=8.0)], tmp_path / "quality.svg")
    assert (tmp_path / "linears.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "w8a16" in (tmp_path / "quality.svg").read_text() or "<svg" in (tmp_path / "quality.svg").read_text()
    )
