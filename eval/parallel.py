"""Whether a model that is cut over processes says what it says on one: greedy tokens of both, scheme by scheme.

    torchrun --nproc-per-node 2 -m quantkit.eval.parallel quantkit/examples/lm-7m

The first process quantizes the model by rounding to nearest, and holds it whole once all have answered. Both are optimized: on GPUs
their steps are CUDA graphs. An answer that goes another way is tied if the two tokens where they part are as likely (`soak.judge`):
sums in another order give another last bit, and where x is rounded to 8 bits, now and then another code. Then it is also tied if one
process alone goes that way once the last bits of the text's embeddings are others.
"""

import argparse
import gc
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import transformers

from quantkit.errors import QuantKitError, as_one_line
from quantkit.eval.records import Record, environment, write_records
from quantkit.eval.soak import TIE, alone, judge
from quantkit.load import load, load_model
from quantkit.optimize import optimize
from quantkit.processes import gather, start
from quantkit.recipe import Recipe
from quantkit.scheme import PRESETS, parse_scheme
from quantkit.shares import shares
from quantkit.source import load_tokenizer, resolve
from quantkit.streaming import quantize_checkpoint

PROMPTS = (
    "The history of the city begins with",
    "In the first half of the nineteenth century the",
    "She opened the door and",
    "The function returns the number of",
    "Water is a",
    "The election of the president was",
    "He played for the team from 1998 until",
    "We hold that the law",
)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TIE}


def compare(
    folder: Path,
    prompts: list[list[int]],
    new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: bool,
) -> Record:
    """How many answers of the model cut over all processes are "equal", "tied" or "wrong" beside those of one process; or why
    it cannot be cut.

    All processes call it, and the first has the counts.
    """
    try:
        shares(folder, dist.get_world_size())
    except QuantKitError as error:  # which says beforehand what loading would refuse
        return {"refused": str(error).removeprefix(f"{folder}: ")}
    cut = optimize(load(folder, tp_plan="auto", dtype=dtype))
    exchange = cut.model.layers[0].mlp.down_proj.exchange
    found = gather([alone(cut, prompt, new_tokens) for prompt in prompts], "answers")
    del cut
    gc.collect()
    counts: Counter[str] = Counter(equal=0, tied=0, wrong=0)
    if dist.get_rank() == 0:
        whole = optimize(load_model(folder, device, dtype=dtype))
        counts.update(
            judge(whole, prompt, new_tokens, one, rounds)
            for prompt, one in zip(prompts, found[0], strict=True)
        )
        counts["wrong"] += sum(other != found[0] for other in found[1:])  # all processes say the same
    how = "library" if exchange.mailbox is None else "one kernel"
    return {"sums": how, "why_not": exchange.why_not, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="A model directory, not quantized.")
    parser.add_argument("--scheme", action="append", help="One an option; all presets by default.")
    parser.add_argument("--new", type=int, default=64, help="Tokens generated.")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model; bfloat16 on GPUs, float32 on CPUs")
    parser.add_argument("--records", type=Path, help="append to RECORDS/parallel.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start(arguments.device)
    on_gpu = arguments.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = DTYPES[arguments.dtype or ("bfloat16" if on_gpu else "float32")]
    source, rank = resolve(arguments.model), dist.get_rank()
    tokenizer = load_tokenizer(source)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    tokens = torch.tensor([(prompt * 64)[:64] for prompt in prompts])  # for static scales
    wrong = 0
    with TemporaryDirectory() as made:
        places = gather(made, "folders")
        for label in arguments.scheme or list(PRESETS):
            folder = Path(places[0]) / label
            if rank == 0:
                quantize_checkpoint(source, folder, Recipe(label, "rtn"), device, tokens)
            dist.barrier()
            rounds = parse_scheme(label).activation is not None
            found = compare(folder, prompts, arguments.new, dtype, device, rounds)
            wrong += found.get("wrong", 0)
            if rank == 0:
                kind = {"kind": "parallel", "model": source.name, "scheme": label, "ranks": len(places)}
                kind |= {"dtype": str(dtype).removeprefix("torch.")}
                print(f"{label}: {found}", flush=True)
                if arguments.records:
                    record = kind | found | {"new_tokens": arguments.new} | environment(device)
                    write_records(arguments.records / "parallel.jsonl", [record])
        dist.barrier()
    sys.stdout.flush()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    with as_one_line():
        main()
