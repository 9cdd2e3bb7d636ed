"""Continuous batching for long: do many requests of mixed lengths get what each would get alone, in memory that does not grow?

A batch's products and sums round otherwise than those of one sequence. A request that goes another way than alone counts
as tied if the two tokens where they part are as likely, within `TIE`, to the model that reads the text up to there alone. Rounded
keys and values jump by a whole step where such a last bit decides: then also if the model goes that way alone when it reads
the text in two pieces, whose sums round otherwise too, cut at one place or another.
"""

from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from quantkit.decode import Generating
from quantkit.errors import QuantKitError
from quantkit.eval.records import Record, environment
from quantkit.fuse import CACHE_NAME

# Logits of this share of the largest are as likely, by dtype: eight roundings of it on the way from a sum to a logit.
TIE = {torch.float32: 8 * 2.0**-20, torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-8}
# Times that a text is read with other last bits. An answer that differs by nothing else goes a way that none of n such readings goes
# once in n + 1 times, and a run judges some 60 answers.
SHAKEN = 1024


@dataclass(frozen=True)
class Soak:
    """What became of the requests.

    Attributes:
        equal, tied, wrong: their numbers; `wrong` went another way where it was not a matter of rounding.
        rounds: in which they were given, one after the other.
        held_bytes: by the process on its device after each round.
    """

    equal: int
    tied: int
    wrong: int
    rounds: int
    held_bytes: tuple[int, ...]

    @property
    def grew(self) -> int:
        """Bytes from the second round, by which all is allocated, to the last."""
        return self.held_bytes[-1] - self.held_bytes[1]


def soak(
    model: Any,
    requests: int = 2000,
    longest: int = 512,
    new_tokens: int = 64,
    rounds: int = 10,
    seed: int = 0,
    **sizes: Any,
) -> Soak:
    """Gives random prompts of 1 to `longest` tokens to one manager, round after round, and to `generate` one at a time.

    Args:
        model: optimized.
        new_tokens: of a request, at most; each has a random number of its own.
        sizes: of `ContinuousBatchingConfig`.

    Raises:
        QuantKitError: the model is not optimized, or has no room for such requests.
    """
    if rounds < 3 or requests < rounds:
        raise QuantKitError(
            f"soak: {requests} requests in {rounds} rounds, expected 3 rounds or more with a request each: memory is compared "
            "between the second and the last"
        )
    if not isinstance(model, Generating):
        raise QuantKitError("soak: the model is not optimized; call quantkit.optimize first")
    config = model.config.get_text_config()  # type: ignore[attr-defined]
    if longest + new_tokens > config.max_position_embeddings:
        raise QuantKitError(
            f"soak: {longest} tokens and {new_tokens} new ones exceed the model's context of "
            f"{config.max_position_embeddings}; lower them"
        )
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, n: torch.randint(low, high + 1, (n,), generator=generator).tolist()
    work = [
        (draw(0, config.vocab_size - 1, n), new)
        for n, new in zip(draw(1, longest, requests), draw(1, new_tokens, requests), strict=True)
    ]
    manager = model.init_continuous_batching(
        generation_config=greedy_config(new_tokens),
        continuous_batching_config=ContinuousBatchingConfig(**sizes),
    )
    manager.start()
    answers, held = [], []
    try:
        for part in range(rounds):
            answers += answer(manager, work[part::rounds])
            held.append(held_bytes(model.device))  # type: ignore[attr-defined]
    finally:
        manager.stop(block=True)
    counts = {"equal": 0, "tied": 0, "wrong": 0}
    for (prompt, new), found in zip(
        [one for part in range(rounds) for one in work[part::rounds]], answers, strict=True
    ):
        counts[judge(model, prompt, new, found)] += 1
    return Soak(**counts, rounds=rounds, held_bytes=tuple(held))


def greedy_config(new_tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


def alone(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens after a prompt, by `generate`."""
    ids = torch.tensor([prompt], device=model.device)
    given = {"attention_mask": torch.ones_like(ids), "generation_config": greedy_config(new_tokens)}
    return model.generate(ids, **given)[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def answer(manager: Any, work: list[tuple[list[int], int]]) -> list[list[int]]:
    """The tokens of requests that are all given at once, in their order."""
    names = [manager.add_request(prompt, max_new_tokens=new) for prompt, new in work]
    found: dict[str, list[int]] = {}
    while len(found) < len(names):
        output = manager.get_result(timeout=1)
        if output is None:
            if not manager.is_running():
                raise RuntimeError("soak: the manager stopped before all requests were answered")
        elif output.error is not None:
            raise RuntimeError(f"soak: a request failed: {output.error}")
        elif output.is_finished():
            found[output.request_id] = output.generated_tokens
    return [found[name] for name in names]


@torch.no_grad()
def judge(model: Any, prompt: list[int], new: int, found: list[int], rounds: bool = False) -> str:
    """Whether an answer is "equal" to that of the prompt alone, "tied" with it, or "wrong".

    rounds: the model rounds x to 8 bits, where a last bit may decide over a whole step: an answer is also tied if the model goes
        that way alone once the last bits of the text's embeddings are others.
    """
    expected = alone(model, prompt, new)
    if found == expected:
        return "equal"
    if len(found) != len(expected):
        return "wrong"
    at = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
    text = torch.tensor([prompt + expected[:at]], device=model.device)
    logits = last_logits(model, text)
    gap = (logits[expected[at]] - logits[found[at]]).abs()
    if gap <= TIE[model.dtype] * logits.abs().max():
        return "tied"
    cuts = range(1, text.shape[1]) if model.kv != "bf16" else ()
    in_pieces = (last_logits(model, text, cut=cut) for cut in cuts)
    shaken = (last_logits(model, text, seed=seed) for seed in range(SHAKEN if rounds else 0))
    return "tied" if any(other.argmax() == found[at] for other in chain(in_pieces, shaken)) else "wrong"


def last_logits(model: Any, text: torch.Tensor, cut: int = 0, seed: int | None = None) -> torch.Tensor:
    """Of the token after a text [1, T], read alone, its first `cut` tokens before the others.

    seed: the last bits of its embeddings are changed at random.
    """
    cache = {CACHE_NAME: model.new_cache(1, text.shape[1]), "logits_to_keep": 1}
    x = model.get_input_embeddings()(text)
    if seed is not None:
        bits = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x.device)
        x = (x.double() * (1 + bits * torch.finfo(x.dtype).eps)).to(x.dtype)
    if cut:
        model(inputs_embeds=x[:, :cut], **cache)
    return model(inputs_embeds=x[:, cut:], **cache).logits[0, -1].float()  # type: ignore[no-any-return]


def held_bytes(device: torch.device) -> int:
    """Bytes of this process's tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmRSS")).split()[1])


def soak_record(found: Soak, model: Any, *, name: str, scheme: str, requests: int) -> Record:
    """The counts with their conditions, for `records.write_records`."""
    return {
        "kind": "soak",
        "model": name,
        "scheme": scheme,
        "kv": model.kv,
        "requests": requests,
        **asdict(found),
        "grew_bytes": found.grew,
        **environment(model.device),
    }
