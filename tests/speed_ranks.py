"""What each process of test_eval_parallel.py does: times sums and a random model that is cut over all of them."""

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig

from all_reduce_ranks import empty_files, in_a_file
from quantkit import QuantKitError, QuantLinear, optimize, processes
from quantkit.eval.calibration_speed import time_calibration
from quantkit.eval.collectives import bench_collectives
from quantkit.eval.decode import bench_decode, generate
from quantkit.eval.random_model import CONFIGS, random_model
from quantkit.exchange import Exchange
from quantkit.peers import join
from quantkit.rank_linear import GatheredLinear, GatheredPlain, RowLinear
from quantkit.recipe import CalibrationSpec, Recipe
from quantkit.scheme import parse_scheme

SIZES = dict(
    hidden_size=256,
    intermediate_size=768,  # 384 columns a process: three groups of 128
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
TINY = LlamaConfig(**SIZES)


def of_a_model(label: str, head: str | None) -> dict[str, Any]:
    model = random_model(TINY, parse_scheme(label), torch.float32, group=torch.distributed.group.WORLD)
    assert isinstance(model.lm_head, GatheredPlain)
    before = generate(model, torch.arange(8).view(1, 8), 6)
    model = optimize(model, head)
    assert isinstance(model.lm_head, GatheredLinear if head else GatheredPlain)
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, RowLinear)
    prompt = torch.arange(8).view(1, 8)
    return {
        "before": before,
        "tokens": generate(model, prompt, 6),
        "held": sum(m.weight_bytes for m in model.model.layers.modules() if isinstance(m, QuantLinear)),
        "why_not": down.exchange.why_not if down.exchange else None,
        "record": bench_decode(model, 1, 8, 4, repeats=1, commit="abc1234"),
    }


def by(exchange: Exchange) -> dict[str, Any]:
    """What a model answers whose norms add by this exchange, in float16."""
    group = torch.distributed.group.WORLD
    model = optimize(random_model(TINY, parse_scheme("w8a16"), torch.float16, group=group))
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            assert linear.exchange is not None
            linear.exchange = exchange
    prompt = torch.arange(8).view(1, 8)
    tokens = generate(model, prompt, 6)
    calls = exchange.mailbox.calls.tolist() if exchange.mailbox else None
    cache = model.new_cache(1, 16)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache)
        logits = model(input_ids=prompt[:, :1], past_key_values=cache).logits.float()
    return {"tokens": tokens, "logits": logits, "calls": calls}


def refused(**changes: Any) -> str:
    config = LlamaConfig(**{**TINY.to_dict(), **changes})
    try:
        random_model(config, parse_scheme("w4a16-g128"), group=torch.distributed.group.WORLD)
    except QuantKitError as error:
        return str(error)
    return ""


def main(rank: int, out: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    processes.start("cpu")
    found: dict[str, Any] = {
        label: of_a_model(label, head) for label, head in (("w4a16-g128", None), ("w8a8", "w8a16"))
    }
    if os.environ.get("TRITON_INTERPRET") == "1":  # the kernel runs on a CPU
        group = torch.distributed.group.WORLD
        if rank == 0:
            empty_files(Path(out), 2, TINY.hidden_size, torch.float16)
        torch.distributed.barrier()
        box = in_a_file(out, rank, 2, TINY.hidden_size, torch.float16)
        found |= {"one kernel": by(Exchange(group, box)), "library": by(Exchange(group))}
    found["heads"] = refused(num_key_value_heads=1)
    kept: list[Any] = []
    sums = bench_collectives(
        [(1, 256), (3, 64)],
        torch.device("cpu"),
        roundings=("bfloat16", "int8"),
        replays=2,
        on_record=kept.append,
    )
    assert kept == (sums if rank == 0 else [])
    CONFIGS["tiny"] = SIZES
    recipe = Recipe("w4a16-g32", "gptq", calibration=CalibrationSpec(samples=4, seq_len=16))
    scratch, cpu = Path(out) / "calibration", torch.device("cpu")
    timed = list(time_calibration("tiny", [recipe], scratch, cpu, peers=join(cpu)))
    torch.save(found | {"sums": sums, "calibration": timed}, Path(out) / f"{rank}.pt")
