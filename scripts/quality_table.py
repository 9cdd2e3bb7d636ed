"""Measures quantkit and other quantization tools by one protocol; each tool gets an environment of its own.

A row that is in the records is not measured again. `make tables` writes docs/quality.md from them.
"""

import argparse
from pathlib import Path

from quantkit.errors import as_one_line
from quantkit.eval.quality_peers import RECIPES, SETTINGS, TOOLS, Protocol, chosen, run_table
from quantkit.recipe import CalibrationSpec

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="directories of the originals")
    parser.add_argument("--text", required=True, help="evaluation text, see 'quantkit eval --help'")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--tools", nargs="+", choices=["quantkit", *TOOLS], help="default: all")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="default: all")
    parser.add_argument("--methods", nargs="+", help=f"default: all; quantkit's are {', '.join(RECIPES)}")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="each a choice of calibration windows"
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of one")
    parser.add_argument("--windows", type=int, default=20, help="evaluation windows of 1024 tokens")
    parser.add_argument("--folder", type=Path, default=ROOT / ".peers", help="for environments and weights")
    parser.add_argument(
        "--records",
        type=Path,
        default=ROOT / "docs" / "benchmarks" / "quality_peers.jsonl",
        help="appended to",
    )
    parser.add_argument("--device", default="cpu", help="of quantkit's own rows")
    args = parser.parse_args()
    spec = CalibrationSpec(args.calibration, args.samples, args.seq_len)
    rows = list(chosen(args.tools, args.settings, args.methods))
    protocol = Protocol(args.text, args.windows, spec, args.device)
    say = lambda line: print(line, flush=True)
    run_table(rows, args.models, args.seeds, protocol, args.folder, args.records, say)


if __name__ == "__main__":
    with as_one_line():
        main()
