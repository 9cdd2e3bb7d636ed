"""Greedy tokens and tokens a second of one checkpoint, by `quantkit.load`, by transformers alone and by vLLM, each in a process of its own.

    python -m quantkit.eval.engines quantkit DIR engines.jsonl          # --optimize: its blocks as `quantkit.optimize` makes them
    python -m quantkit.eval.engines transformers EXPORT engines.jsonl   # as it opens an export by itself
    python -m quantkit.eval.engines vllm DIR engines.jsonl              # a quantkit directory: by the plug-in
    python -m quantkit.eval.engines vllm EXPORT engines.jsonl           # its own kernels, of an export; --quantization quantkit: ours
    python -m quantkit.eval.engines compare engines.jsonl

Kernels that sum in another order part where two logits are nearly equal: `compare` says how far apart the first one's two largest were there.
float16 (`--dtype`) tells more of them apart than bfloat16.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import QuantKitError, as_one_line
from quantkit.eval.decode import exactly
from quantkit.eval.records import Record, environment, read_records, write_records
from quantkit.eval.tables import parted
from quantkit.load import is_quantized, load_model
from quantkit.optimize import optimize

TEXTS = (
    "Once upon a time",
    "The capital of France is",
    "In 1905, Albert Einstein",
    "def main():\n    ",
    "The history of the city begins",
    "Water boils at",
    "She opened the door and",
    "The film was released in",
)
ROWS = 16  # sequences at once, whose tokens a second are measured


def prompts(folder: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def of_quantkit(folder: str, dtype: str, new: int, timed: int, optimized: bool = False) -> Record:
    """`new` greedy tokens after each prompt, the gaps between the two largest logits before each, and tokens a second."""
    model = load_model(Path(folder), dtype=getattr(torch, dtype))
    if optimized:
        return of_model("quantkit, optimized", optimize(model), folder, new, timed)
    return of_model("quantkit", model, folder, new, timed)


def of_transformers(folder: str, dtype: str, new: int, timed: int) -> Record:
    """The same of a format that transformers opens by itself."""
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise QuantKitError(f"{folder}: no config.json, expected a model directory")
    if is_quantized(Path(folder)):
        raise QuantKitError(
            f"{folder}: a quantkit directory, which transformers opens by our kernels; export it with quantkit convert"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map={"": device})
    return of_model(f"transformers {version('transformers')}", model, folder, new, timed)


def of_model(engine: str, model: Any, folder: str, new: int, timed: int) -> Record:
    def generate(rows: list[list[int]], tokens: int, **options: Any) -> Any:
        return model.generate(**exactly(model, torch.tensor(rows, device=model.device), tokens), **options)

    answers = []
    for ids in prompts(folder):
        found = generate([ids], new, output_logits=True, return_dict_in_generate=True)
        two = torch.stack(found.logits).float()[:, 0].topk(2).values
        answers.append(
            {"ids": found.sequences[0, len(ids) :].tolist(), "gaps": (two[:, 0] - two[:, 1]).tolist()}
        )
    rows = [prompts(folder)[0]] * ROWS
    tokens_per_s = speed(lambda tokens: generate(rows, tokens), timed)
    return record(
        engine, folder, str(model.dtype).removeprefix("torch."), answers, tokens_per_s, model.device
    )


def of_vllm(folder: str, dtype: str, new: int, timed: int, quantization: str | None) -> Record:
    """The same by vLLM, without gaps."""
    try:
        import vllm
    except ImportError as error:
        raise QuantKitError(f"vllm: {error}; install it to serve {folder} with it") from error
    engine = vllm.LLM(
        folder,
        quantization=quantization,
        dtype=dtype,
        max_model_len=1024,
        gpu_memory_utilization=0.2,
        seed=0,
    )

    def generate(rows: list[list[int]], tokens: int) -> list[list[int]]:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        found = engine.generate([{"prompt_token_ids": ids} for ids in rows], sampling)
        return [list(one.outputs[0].token_ids) for one in found]

    answers = [{"ids": generate([ids], new)[0]} for ids in prompts(folder)]
    rows = [prompts(folder)[0]] * ROWS
    kernels = ", quantkit's kernels" if quantization or is_quantized(Path(folder)) else ""
    tokens_per_s = speed(lambda tokens: generate(rows, tokens), timed)
    return record(
        f"vllm {version('vllm')}{kernels}", folder, dtype, answers, tokens_per_s, torch.device("cuda")
    )


def speed(run: Any, timed: int) -> float:
    """Tokens a second of run(tokens), of `ROWS` sequences, after a short one."""
    run(8)
    begin = time.perf_counter()
    run(timed)
    return ROWS * timed / (time.perf_counter() - begin)


def record(
    engine: str,
    folder: str,
    dtype: str,
    answers: list[dict[str, Any]],
    tokens_per_s: float,
    device: torch.device,
) -> Record:
    return {
        "kind": "engine",
        "engine": engine,
        "model": Path(folder).name,
        "dtype": dtype,
        "answers": answers,
        "rows": ROWS,
        "tokens_per_s": tokens_per_s,
        **environment(device),
    }


def compare(records: list[Record]) -> list[str]:
    """A line a record, beside the first of its dtype, and one for each answer that parts from the first's."""
    lines = []
    for other in records:
        first = next(r for r in records if r["dtype"] == other["dtype"])
        found = parted(first, other)
        lines += [
            f"  {TEXTS[answer]!r}: token {token} differs from {first['engine']}'s"
            + (f", whose two largest logits are {gap:.4f} apart there" if gap is not None else "")
            for answer, token, gap in found
        ]
        same = len(other["answers"]) - len(found)
        lines.append(
            f"{other['engine']} {other['model']} {other['dtype']}: {same} of {len(other['answers'])} answers as "
            f"{first['engine']}'s, {other['tokens_per_s']:.0f} tokens/s at {other['rows']} rows"
        )
    return lines


def read(path: str) -> list[Record]:
    records = read_records(path)
    if not records or any(r.get("kind") != "engine" for r in records):
        raise QuantKitError(
            f"{path}: has lines that are no engine's answers, or none, expected a file that this program wrote"
        )
    return records


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=("quantkit", "transformers", "vllm", "compare"))
    parser.add_argument(
        "paths", nargs="+", help="DIR, and the file to whose end the record goes; or the files to compare"
    )
    parser.add_argument("--quantization", help="of vLLM: quantkit, to take over a compressed-tensors export")
    parser.add_argument("--optimize", action="store_true", help="of quantkit: also quantkit.optimize")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--new", type=int, default=64, help="tokens compared")
    parser.add_argument("--timed", type=int, default=256, help="tokens timed")
    given = parser.parse_args(arguments)
    if given.engine == "compare":
        print("\n".join(compare([record for path in given.paths for record in read(path)])))
        return
    if len(given.paths) != 2:
        parser.error(f"{len(given.paths)} paths, expected DIR and the file of records")
    folder, out = given.paths
    settings = folder, given.dtype, given.new, given.timed
    if given.engine == "vllm":
        found = of_vllm(*settings, given.quantization)
    elif given.engine == "transformers":
        found = of_transformers(*settings)
    else:
        found = of_quantkit(*settings, given.optimize)
    write_records(out, [found])
    print(f"{found['engine']} {folder}: {found['tokens_per_s']:.0f} tokens/s at {ROWS} rows")


if __name__ == "__main__":
    with as_one_line():
        main()
