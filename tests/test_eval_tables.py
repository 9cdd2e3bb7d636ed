import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from quantkit.errors import QuantKitError
from quantkit.eval.plots import plot_linears, plot_quality, plot_times
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


def peer(kernel="marlin", M=1, us=10.0, library="vllm 0.23.0", **changes):
    return linear(M=M, us=us, kernel=kernel, library=library, **changes)


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


def test_each_device_has_tables_of_its_own_the_last_measured_first():
    early = linear(us=30.0) | dict(device="NVIDIA H100", date="2026-11-21T08:00:00+00:00")
    first, second = tables([early, linear("fp8"), linear()])
    assert first.title == "gate_up (N 28672, K 4096), NVIDIA H200"
    assert [row[0] for row in first.rows] == ["bfloat16", "fp8", "w4a16-g128"]
    assert second.title == "gate_up (N 28672, K 4096), NVIDIA H100"
    assert second.rows[-1] == ("w4a16-g128", "30.0 / 2.13 / 1.93")


def test_a_kernel_with_a_wrong_result_shows_no_time():
    (table,) = tables([linear(us=None, refused="rel_error 0.3 exceeds 0.01")])
    assert table.rows[-1] == ("w4a16-g128", "wrong result")


def test_a_later_record_replaces_the_earlier_of_the_same_setting():
    (table,) = tables([linear(us=30.0), linear(us=20.0, commit="def5678")])
    assert table.rows[-1] == ("w4a16-g128", "20.0 / 1.42 / 2.90")
    assert "commit def5678;" in table.caption


def test_a_peer_has_a_row_of_its_own_below_the_schemes():
    (table,) = tables(
        [
            peer(),
            linear(),
            peer("gemlite", 16, 15.0, "gemlite 0.6"),
            peer(us=11.0),
            linear("fp8"),
            peer("gemlite", 16, 14.0, "gemlite 0.6", variant="x in 8 bits"),
        ]
    )
    assert [row[0] for row in table.rows] == [
        "bfloat16",
        "w4a16-g128",
        "fp8",
        "w4a16-g128 marlin",
        "w4a16-g128 gemlite",
        "w4a16-g128 gemlite, x in 8 bits",
    ]
    assert table.rows[1][1] == "20.0 / 1.42 / 2.90"
    assert table.rows[3][1:] == ("11.0 / 0.78 / 5.27", "")
    assert "vllm 0.23.0 or gemlite 0.6; NVIDIA H200;" in table.caption


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


def test_an_optimized_model_has_rows_of_its_own():
    (table,) = tables([decode(), decode() | {"optimized": "int8 KV"}, decode()])
    assert [row[0] for row in table.rows] == ["fp8", "fp8, optimized, int8 KV"]


def test_quantized_keys_and_values_have_rows_of_their_own():
    (table,) = tables([quality(), quality(kv="bf16"), quality(kv="int8"), quality(kv="int8")])
    assert [row[0] for row in table.rows] == ["w4a16-g128", "w4a16-g128, bf16 KV", "w4a16-g128, int8 KV"]


def attention(op="decode_attention", kv="int8", us=5.5, **changes):
    problem = dict(kind="attention", op=op, shape="llama-3-8b", batch=16, length=4096, kv=kv, page_size=64)
    speeds = dict(kernel="k", us=us, limit_us=4.1, GB_per_s=2500.4, TFLOP_per_s=12.3, rel_error=0.0012)
    return {**problem, **speeds, **MADE, **changes}


def test_attention_is_a_table_an_op_with_the_peer_among_its_rows():
    records = [attention(kv="bf16"), attention(), attention(op="rope_write")]
    records += [
        attention(kv="bf16", library="torch 2.11.0"),
        attention(us=None, GB_per_s=None, TFLOP_per_s=None),
    ]
    first, second = tables(records)
    assert (first.title, second.title) == ("decode_attention", "rope_write")
    assert first.rows == (
        ("llama-3-8b", "16 x 4096", "bf16 pages", "5.5", "4.1", "2,500", "12.3", "1.2e-03"),
        ("llama-3-8b", "16 x 4096", "int8 pages", "-", "4.1", "-", "-", "1.2e-03"),  # the last of its setting
        ("llama-3-8b", "16 x 4096", "torch 2.11.0", "5.5", "4.1", "2,500", "12.3", "1.2e-03"),
    )


def test_producers_are_rows_and_an_empty_kernel_stands_below_them():
    one = dict(kind="producer", producer="swiglu", rounding="int8", M=1, K=64, us=2.0, limit_us=1.5, **MADE)
    empty = one | dict(producer="empty kernel", rounding=None, M=None, K=None, us=0.614, limit_us=None)
    (table,) = tables([empty, one, one | dict(M=64, us=None), one | dict(rounding="fp8", M=64, us=4.0)])
    assert table.header == ("producer", "K", "M=1", "M=64")
    assert table.rows == (
        ("swiglu, int8", "64", "2.00 / 75%", "wrong result"),
        ("swiglu, fp8", "64", "", "4.00 / 38%"),
        ("empty kernel", "", "0.61", ""),
    )


def test_a_soak_is_a_row_a_cache():
    soaked = dict(kind="soak", model="lm-7m", scheme="float32", kv="int8", requests=2000, **MADE)
    (table,) = tables([soaked | dict(equal=1998, tied=2, wrong=0, grew_bytes=250_000)])
    assert table.rows == (("lm-7m, float32, int8 KV", "2000", "1998", "2", "0", "+0.25"),)


def test_decode_without_a_graph_has_a_dash():
    (table,) = tables([decode(), decode(16, graph_ms=None)])
    assert table.rows[0][6:] == ("40", "25.00", "312", "3.20", "1.87")
    assert table.rows[1][8:10] == ("-", "-")


def test_the_terminal_gets_the_same_cells():
    (table,) = tables([linear()])
    rich = rich_table(table)
    assert [str(column.header) for column in rich.columns] == list(table.header)
    assert rich.row_count == len(table.rows)


@pytest.mark.parametrize("records", [[], [{"kind": "speed"}], [linear(), quality()]])
def test_records_that_are_no_table_are_refused(records):
    with pytest.raises(QuantKitError, match="a table is of one of calibration, quality, linear, decode"):
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


TIMES = [
    *(linear(M=M, us=20.0 + M) for M in (1, 16, 256)),
    *(peer(M=M, us=10.0 + M) for M in (1, 16)),
    *(peer("gemlite", M, None, "gemlite 0.6") for M in (1, 16)),
    *(linear("fp8", M=M) for M in (1, 16, 256)),
    *(linear(shape="o", N=4096, M=M, limit_us=None) for M in (256, 1, 16)),
    *(linear(shape="down", M=M) for M in (1, 16)),
]


def drawn(records, path, monkeypatch, **options):
    """The figure that plot_times saves."""
    figures = []
    save = Figure.savefig
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
        plot_times(records, path, **options)
    return figures[0]


def test_times_have_a_panel_a_shape_and_a_line_a_kernel_that_was_timed(tmp_path, monkeypatch):
    figure = drawn(TIMES, tmp_path / "times.png", monkeypatch)
    first, second = figure.axes
    assert first.get_title() == "gate_up (N 28672, K 4096)\nNVIDIA H200"
    assert second.get_title().startswith("o (N 4096")
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    lines = [[*zip(line.get_xdata(), line.get_ydata(), strict=True)] for line in first.lines]
    assert lines == [
        [(1, 14.1), (16, 14.1), (256, 14.1)],
        [(1, 58.0), (16, 58.0), (256, 58.0)],
        [(1, 21.0), (16, 36.0), (256, 276.0)],
        [(1, 11.0), (16, 26.0)],
    ]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [
        "limit",
        "bfloat16",
        "w4a16-g128",
        "w4a16-g128 marlin",
    ]
    # no limit on that device, no peers: what is there has its place and color all the same
    assert [line.get_color() for line in second.lines] == [line.get_color() for line in first.lines[1:3]]
    assert [*second.lines[1].get_xdata()] == [1, 16, 256]


def test_times_of_peers_alone_are_drawn(tmp_path, monkeypatch):
    figure = drawn([peer(M=M) for M in (1, 2, 4)], tmp_path / "times.png", monkeypatch)
    assert len(figure.axes[0].lines) == 3


def test_times_are_the_same_bytes_twice(tmp_path):
    for name in ("a", "b"):
        plot_times(TIMES, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_times_at_too_few_m_are_refused(tmp_path):
    with pytest.raises(QuantKitError, match="no shape has times of w8a16 at 3 values of M"):
        plot_times(TIMES, tmp_path / "times.png", scheme="w8a16")
    assert not (tmp_path / "times.png").exists()


def test_speedups_are_of_our_kernels_alone(tmp_path):
    plot_linears([linear(), linear(M=16)], tmp_path / "ours.png")
    plot_linears([linear(), linear(M=16), peer(), peer(M=16)], tmp_path / "with_peers.png")
    assert (tmp_path / "ours.png").read_bytes() == (tmp_path / "with_peers.png").read_bytes()


def test_the_plots_command_draws_every_plot(tmp_path):
    write_records(tmp_path / "docs" / "benchmarks" / "linears.jsonl", TIMES)
    write_records(tmp_path / "docs" / "benchmarks" / "quality.jsonl", [quality()])
    script = tmp_path / "scripts" / "plots.py"
    script.parent.mkdir()
    script.write_text((ROOT / "scripts" / "plots.py").read_text())  # it finds docs/ beside its own folder
    runpy.run_path(str(script), run_name="__main__")
    assert {p.name for p in (tmp_path / "docs" / "plots").iterdir()} == {
        "linears.png",
        "quality.png",
        "w4a16.png",
    }
