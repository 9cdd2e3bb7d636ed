"""Many requests of mixed lengths through `generate_batch` of an optimized model, each compared with `generate`."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

import quantkit
from quantkit.errors import as_one_line
from quantkit.eval.decode import scheme_of
from quantkit.eval.records import write_records
from quantkit.eval.soak import soak, soak_record
from quantkit.kernels.kv_pages import KINDS
from quantkit.load import load_model


def main(
    model: Annotated[Path, typer.Argument(help="A quantized directory, or any model.")],
    kv: Annotated[str, typer.Option(help=f"Keys and values: {', '.join(KINDS)}.")] = "int8",
    requests: Annotated[int, typer.Option(help="In all.")] = 2000,
    longest: Annotated[int, typer.Option(help="Tokens of a prompt, at most.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens generated for a request, at most.")] = 64,
    rounds: Annotated[int, typer.Option(help="Memory is read after each.")] = 10,
    page_size: Annotated[int, typer.Option(help="Tokens a page.")] = 64,
    blocks: Annotated[int, typer.Option(help="Pages a layer.")] = 2048,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    records: Annotated[Path | None, typer.Option(help="Append to this .jsonl file.")] = None,
) -> None:
    """Print how many answers were equal, and by how much the process grew; exit with 1 if one was wrong."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype: torch.dtype | str = torch.float32 if device == "cpu" or not torch.cuda.is_available() else "auto"
    subject = quantkit.optimize(load_model(model, device, dtype=dtype), kv=kv)
    sizes = {"page_size": page_size, "num_blocks": blocks, "max_batch_tokens": 2048}
    found = soak(subject, requests, longest, new, rounds, **sizes)
    record = soak_record(found, subject, name=model.name, scheme=scheme_of(subject), requests=requests)
    print(
        f"{requests} requests, {kv} KV: {found.equal} equal, {found.tied} tied, {found.wrong} wrong; "
        f"{found.grew / 1e6:+.2f} MB from round 2 to {rounds}"
    )
    if records is not None:
        write_records(records, [record])
    sys.exit(1 if found.wrong else 0)


if __name__ == "__main__":
    with as_one_line():
        typer.run(main)
