"""Writes the tables of the documents from docs/benchmarks/*.jsonl; --check only says whether they are stale."""

import argparse
import sys
from pathlib import Path

from quantkit.errors import as_one_line
from quantkit.eval.tables import update

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "documents", nargs="*", type=Path, help="markdown files; default: README.md and docs/*.md"
    )
    parser.add_argument(
        "--records", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of NAME.jsonl"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    args = parser.parse_args()
    documents = args.documents or [*ROOT.glob("README.md"), *sorted((ROOT / "docs").glob("*.md"))]
    stale = [document for document in documents if update(document, args.records, args.check)]
    for document in stale:
        print(f"{document}: {'stale; run scripts/tables.py' if args.check else 'written'}")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    with as_one_line():
        sys.exit(main())
