"""Draws docs/plots/*.png from docs/benchmarks/*.jsonl."""

from pathlib import Path

from quantkit.errors import as_one_line
from quantkit.eval.plots import plot_linears, plot_quality, plot_times
from quantkit.eval.records import read_records

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    (DOCS / "plots").mkdir(exist_ok=True)
    linears = read_records(DOCS / "benchmarks" / "linears.jsonl")
    plot_linears(linears, DOCS / "plots" / "linears.png")
    plot_times(linears, DOCS / "plots" / "w4a16.png")
    plot_quality(read_records(DOCS / "benchmarks" / "quality.jsonl"), DOCS / "plots" / "quality.png")


if __name__ == "__main__":
    with as_one_line():
        main()
