"""The documents say what the code does: the methods' tables, and every command line."""

import os
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from quantkit.cli import app
from quantkit.method import QUALITIES, STEPS, default_method, parse_method
from quantkit.scheme import PRESETS, parse_scheme

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "docs" / "methods.md"
MARKED = re.compile(r"(?<=<!-- quality -->\n).*?(?=<!-- /quality -->)", re.DOTALL)
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def quality_table() -> str:
    rows = [("scheme", *QUALITIES), ("---",) * (len(QUALITIES) + 1)]
    for name, scheme in PRESETS.items():
        rows.append((f"`{name}`", *(f"`{default_method(scheme, quality)}`" for quality in QUALITIES)))
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n"


def test_the_table_of_qualities_is_the_codes():
    """QUANTKIT_WRITE=1 pytest tests/test_docs.py writes it."""
    text = METHODS.read_text()
    if os.environ.get("QUANTKIT_WRITE"):
        METHODS.write_text(text := MARKED.sub(lambda _: quality_table(), text))
    assert MARKED.findall(text) == [quality_table()]


def test_every_step_has_a_row_in_order():
    rows = re.findall(r"^\| `(\w+)` \| (?:model|scaling|rounding|refinement) \|", METHODS.read_text(), re.M)
    assert rows == list(STEPS)


def test_groups_and_zeros_do_not_change_what_a_quality_chooses():
    for label in ("w4a16-g32", "w4a16-channel-asym"):
        for quality in QUALITIES:
            chosen = default_method(parse_scheme(label), quality)
            assert chosen == default_method(PRESETS["w4a16"], quality)
            assert "rotate" not in chosen.split("+")
            assert ("learn" in chosen.split("+")) == (quality == "best")
    assert parse_method("rotate").rounding == parse_method("awq+learn").rounding == "gptq"


def commands() -> list[str]:
    found = []
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        spelled = re.findall(r"^    (quantkit .*)$", text, re.M) + re.findall(r"`(quantkit [a-z].*?)`", text)
        found += [line.split("  #")[0] for line in spelled]
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_commands_are_ones_that_the_cli_has(line):
    verb, *words = shlex.split(line)[1:]
    if verb.startswith("-"):
        return
    verbs = typer.main.get_command(app).commands
    assert verb in verbs, f"no such verb: {line}"
    known = {name for option in verbs[verb].params for name in (*option.opts, *option.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word in known, f"{line}: {verb} has no {word}"
    values = dict(pairwise(words))
    if "--scheme" in values:
        parse_scheme(values["--scheme"])
    if "--method" in values:
        parse_method(values["--method"])
    assert values.get("--quality", "fast") in QUALITIES
