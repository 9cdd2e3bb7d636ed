"""Draws docs/plots/*.png from docs/benchmarks/*.jsonl."""

from pathlib import Path

from quantkit.eval.plots import plot_linears, plot_quality
from quantkit.eval.records import read_records

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    (DOCS / "plots").mkdir(exist_ok=True)
    plot_linears(read_records(DOCS / "benchmarks" / "linears.jsonl"), DOCS / "plots" / "linears.png")
    plot_quality(read_records(DOCS / "benchmarks" / "quality.jsonl"), DOCS / "plots" / "quality.png")


if __name__ == "__main__":
    main()
