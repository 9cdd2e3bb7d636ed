"""What `quantkit quantize` puts beside the tensors: the report, the card, the page, and what reads them."""

import io
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from quantkit import QuantKitError, Recipe, quantize_checkpoint
from quantkit.calibration.pipeline import IN_CONFIG
from quantkit.card import license_of, model_card
from quantkit.cli import print_verdict, report_table
from quantkit.eval import samples as sampling
from quantkit.eval.report_html import report_html
from quantkit.judge import judge
from quantkit.load import verify
from quantkit.quantize import Progress
from quantkit.report import (
    CARD,
    HTML,
    REPORT,
    TIMINGS,
    BlockReport,
    BlockTiming,
    HeldOut,
    Report,
    Sample,
    Timings,
    Verdict,
    read_report,
    report_json,
)

DIFFER = {HTML, TIMINGS}  # between two runs of one job


@pytest.fixture
def without_a_page(monkeypatch) -> None:
    """Plots take longer than quantizing a tiny model."""
    monkeypatch.setattr("quantkit.streaming.report_html", lambda report, timings: "")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in DIFFER}


@pytest.fixture(scope="module")
def model(source, tmp_path_factory) -> Path:
    """A tiny model with a tokenizer and a card."""
    folder = shutil.copytree(source(), tmp_path_factory.mktemp("report") / "tiny")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe original's.\n")
    return folder


RECIPE = Recipe("w4a16-g32", "gptq")


@pytest.fixture(scope="module")
def out(model, tokens, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "packed"
    quantize_checkpoint(model, out, RECIPE, "cpu", tokens, report=True)
    return out


@pytest.fixture(scope="module")
def full(out) -> tuple[Report, Timings]:
    """A report with every field filled, and names and texts that would break a page that does not escape them."""
    found = read_report(out)
    modules = tuple(
        replace(m, error_rtn=round(2 * m.error, 4), damp_percent=0.01, clip=0.9, tokens=192, input_absmax=3.5)
        for m in found.modules
    )
    filled = replace(
        found,
        model="org/<b>&$x$",
        on_hub=True,
        modules=modules,
        blocks=(BlockReport(0, 0.01), BlockReport(1, 0.02)),
        held_out=HeldOut("<i>", 2, 16, 21.0, 20.0, 0.04, 0.9, (0.05, 0.03)),
        samples=(Sample("</q><script>", "| `a` *b*\n# c", "</style><img src='http://x'>"),),
        samples_skipped="",
    )
    timings = Timings(
        3.0, 10**9, (BlockTiming(0, 1.0, 10**9), BlockTiming(1, 2.0, 10**9)), {modules[0].name: 0.5}
    )
    return replace(filled, verdict=judge(filled)), timings


def test_the_files_lie_beside_the_tensors(out, model):
    names = {path.name for path in out.iterdir()}
    assert {REPORT, TIMINGS, CARD, HTML, "config.json", "tokenizer.json"} <= names
    assert "The original's" not in (out / CARD).read_text()
    assert verify(out) == []
    AutoModelForCausalLM.from_pretrained(out)
    report = read_report(out)
    assert (report.model, report.license, report.architecture) == ("tiny", "mit", "LlamaForCausalLM")
    listed = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    assert {m.name for m in report.modules} == set(listed)
    assert report.modules[0].name == "model.layers.0.self_attn.q_proj"
    assert all(set(entry) <= set(IN_CONFIG) for entry in listed.values())
    weight = AutoModelForCausalLM.from_pretrained(model).get_submodule(report.modules[0].name).weight
    first = report.modules[0]
    assert (first.N, first.K) == tuple(weight.shape)
    assert (first.weight_min, first.weight_max) == pytest.approx(
        (weight.min().item(), weight.max().item()), rel=5e-6
    )
    assert first.weight_absmax == pytest.approx(weight.abs().max().item(), rel=5e-6)
    assert first.bits == 4.5
    assert report.bits_per_weight == 4.5
    assert len(report.samples) == len(sampling.PROMPTS)
    timings = json.loads((out / TIMINGS).read_text())
    assert [block["index"] for block in timings["blocks"]] == [0, 1]


def test_without_being_asked_for_there_is_no_report(packed):
    folder = packed("llama", "w8a16")
    assert not {REPORT, TIMINGS, CARD, HTML} & {path.name for path in folder.iterdir()}
    assert read_report(folder) is None


@pytest.mark.usefixtures("without_a_page")
def test_a_second_run_and_a_continued_one_give_the_same_bytes(out, model, tokens, tmp_path):
    class Killed(Exception):
        pass

    done = []

    def step() -> None:
        done.append(0)
        if len(done) == 2:
            raise Killed

    assert (out / REPORT).stat().st_size > 1000
    quantize_checkpoint(model, tmp_path / "again", RECIPE, "cpu", tokens, report=True)
    assert contents(tmp_path / "again") == contents(out)
    with pytest.raises(Killed):
        quantize_checkpoint(
            model, tmp_path / "broken", RECIPE, "cpu", tokens, Progress(step=step), report=True
        )
    summary = quantize_checkpoint(model, tmp_path / "broken", RECIPE, "cpu", tokens, report=True)
    assert contents(tmp_path / "broken") == contents(out)
    assert summary.verdict == read_report(out).verdict
    assert [b["index"] for b in json.loads((tmp_path / "broken" / TIMINGS).read_text())["blocks"]] == [1]


def test_a_report_comes_back_as_it_was_written(full, tmp_path):
    report = full[0]
    (tmp_path / REPORT).write_text(report_json(report))
    assert read_report(tmp_path) == report  # its figures have few digits
    broken = replace(report, held_out=replace(report.held_out, kl=math.nan, perplexity=math.inf))
    (tmp_path / REPORT).write_text(report_json(broken))
    assert read_report(tmp_path).held_out.kl is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-9], "not valid JSON"),
        (lambda text: text.replace('"report_version": 1', '"report_version": 2'), "newer quantkit"),
        (lambda text: text.replace('"bits"', '"bytes"'), "cannot be read"),
        (lambda text: '{"report_version": 1}', "cannot be read"),
        (lambda text: text.replace('"findings"', '"found"'), "cannot be read"),
    ],
)
def test_a_damaged_report_is_named(out, tmp_path, change, words):
    folder = shutil.copytree(out, tmp_path / "damaged")
    (folder / REPORT).write_text(change((out / REPORT).read_text()))
    for reader in (read_report, verify):
        with pytest.raises(QuantKitError, match=words) as error:
            reader(folder)
        assert str(folder / REPORT) in str(error.value)


def test_verify_sees_a_report_of_another_run_and_lets_the_card_be_edited(out, tmp_path):
    folder = shutil.copytree(out, tmp_path / "copied")
    (folder / CARD).write_text("edited")
    (folder / HTML).unlink()
    assert verify(folder) == []
    text = (out / REPORT).read_text()
    (folder / REPORT).write_text(text.replace("layers.0.mlp", "layers.7.mlp"))
    assert verify(folder) == [
        f"{REPORT}: lists other modules or schemes than config.json; delete it, it is of another run"
    ]


# the card


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_it_is_and_how_to_use_it(full):
    report = full[0]
    card = model_card(report)
    content = front(card)
    assert content["base_model"] == "org/<b>&$x$"
    assert content["base_model_relation"] == "quantized"
    assert content["license"] == "mit"
    assert content["tags"] == ["quantkit", "4-bit", "w4a16-g32", "gptq"]
    assert report.verdict.sentence in card
    assert "0.0400 nats" in card
    assert "import quantkit" in card
    assert "\\| \\`a\\` \\*b\\* \\# c" in card
    assert not re.search(r"[^\\]<(img|script|/)", card)


def test_a_folder_is_not_taken_for_a_model_of_the_hub(out):
    content = front((out / CARD).read_text())
    assert "base_model" not in content
    assert content["license"] == "mit"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# A\n", "apache-2.0"),
        ("---\nlicense: [mit, other]\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: mit", "mit"),
        ("# license: mit", None),
        (None, None),
    ],
)
def test_the_license_is_read_from_the_front_matter(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == expected


# the page

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, ids and texts; fails on a tag that is closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_stands_alone_and_is_the_same_twice(full):
    html = report_html(*full)
    assert html == report_html(*full)
    page = Page(html)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == 6
    assert not {"script", "img", "link", "image", "iframe", "metadata", "b&$x$"} & set(tags)
    assert tags.count("style") == 1  # a style inside a drawing would rule the page
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("href", "xlink:href"):
                assert value.startswith("#")
                assert value[1:] in ids
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target[1:] in ids
    assert not re.search(r"#01020\d", html)  # every placeholder colour became a variable
    assert not re.search(r"20\d\d-\d\d-\d\d", html)
    for text in ("</q><script>", "org/<b>&$x$", "</style><img src='http://x'>"):
        assert any(text in found for found in page.texts)


def test_a_page_has_the_plots_that_there_are_figures_for(out):
    page = Page((out / HTML).read_text())
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert labels == ["Error of each linear", "KL by position", "Drift", "Ranges", "Bits", "Time"]


def test_linears_outside_the_blocks_and_experts_have_their_place(full):
    report, timings = full
    one = report.modules[0]
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(3)]
    names += ["model.layers.0.mlp.shared.up_proj", "lm_head"]
    changed = replace(report, modules=tuple(replace(one, name=name) for name in names))
    html = report_html(changed, timings)
    for label in ("experts.up_proj", "shared.up_proj", "lm_head"):
        assert f">{label}</text>" in html


# the samples


def test_samples_load_one_model_at_a_time(tiny):
    alive = []

    class Loaded:
        def __init__(self, text):
            assert not alive
            alive.append(self)
            self.text, self.device = text, torch.device("cpu")

        def generate(self, ids, **kwargs):
            return torch.cat([ids, torch.tensor([[len(self.text)]])], 1)

    class Tokenizer:
        eos_token_id = 0

        def __call__(self, text, return_tensors):
            return {"input_ids": torch.tensor([[1, 2]])}

        def decode(self, ids, skip_special_tokens):
            alive.clear()
            return str(ids.tolist())

    found = sampling.samples(lambda: Loaded("one"), lambda: Loaded("three"), Tokenizer(), ["a"], 1)
    assert found == (Sample("a", "[3]", "[5]"),)


def test_a_model_that_does_not_fit_is_not_loaded(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(sampling, "free_bytes", lambda device: 10**10)
    assert sampling.why_not(10**8, False, cpu) == ""
    assert "2.0 GB" in sampling.why_not(2 * 10**9, False, cpu)
    assert sampling.why_not(2 * 10**9, True, cpu) == ""
    assert "needs 6.0 GB, 10.0 GB are free" in sampling.why_not(3 * 10**9, True, cpu)
    monkeypatch.setattr(sampling, "free_bytes", lambda device: None)
    assert sampling.why_not(10**8, False, cpu) == ""


@pytest.mark.usefixtures("without_a_page")
def test_without_a_tokenizer_the_run_ends_well_and_says_so(source, tmp_path):
    quantize_checkpoint(source(), tmp_path / "out", Recipe("w8a16"), "cpu", report=True)
    report = read_report(tmp_path / "out")
    assert report.samples == ()
    assert "tokenizer" in report.samples_skipped
    assert report.verdict.severity == "ok"


# the terminal


def test_the_table_of_modules_fits_into_a_hundred_columns(full):
    modules = tuple(replace(m, name=m.name.replace("layers.", "layers.1")) for m in full[0].modules)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report_table(modules))
    lines = console.export_text().splitlines()
    assert len(lines) == 1 + len(modules)  # no row is folded
    assert max(map(len, lines)) <= 100
    assert lines[1].split()[0] == modules[0].name
    assert "0.01" in lines[1]


def test_columns_without_a_figure_are_left_out(full):
    bare = tuple(replace(m, error_rtn=None, clip=None) for m in full[0].modules)
    headers = [str(column.header) for column in report_table(bare).columns]
    assert headers == ["module", "error", "damping", "tokens", "max |w|", "max |x|"]


@pytest.mark.parametrize(("severity", "color"), [("ok", "green"), ("warning", "yellow"), ("alarm", "red")])
def test_the_panel_is_as_loud_as_the_verdict(severity, color, monkeypatch, full):
    console = Console(
        width=100, record=True, file=io.StringIO(), color_system="standard", force_terminal=True
    )
    monkeypatch.setattr("quantkit.cli.out", console)
    verdict = full[0].verdict
    findings = tuple(replace(finding, severity=severity) for finding in verdict.findings)
    print_verdict(Verdict(severity, "A [b]sentence[/b].", findings))
    styled = console.export_text(styles=True)
    code = {"green": 32, "yellow": 33, "red": 31}[color]
    assert styled.startswith(f"\x1b[{code}m╭")
    assert "A [b]sentence[/b]." in styled
