"""Prefill and decode speed of a causal language model, with transformers' own loop and without its host time.

`generate` runs one forward a token from Python: at small batches the host, not the GPU, sets its pace. The
graph figure is what the GPU takes: one greedy step over a static cache, captured and replayed.
"""

from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from quantkit.decode import Decoder, Generating, greedy
from quantkit.errors import QuantKitError
from quantkit.eval.records import Record, environment
from quantkit.eval.roofline import roof
from quantkit.eval.sizes import memory_bytes
from quantkit.eval.timing import capture, seconds_of_one, synchronized_seconds
from quantkit.fuse import CACHE_NAME, FusedBlock
from quantkit.linear import QuantLinear
from quantkit.models import head_dim_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StaticDecoder:
    """Greedy decoding in fixed memory: every step runs the same kernels on the same addresses.

    Attributes:
        token: int64 [batch, 1], the last token; `step` reads it and overwrites it.
    """

    def __init__(self, model: "PreTrainedModel", batch: int, max_length: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    @property
    def capturable(self) -> bool:
        """Whether a step is the same kernels each time: sliding windows keep part of their state in Python."""
        return not any(self.cache.is_sliding)

    @torch.no_grad()
    def prefill(self, prompt: torch.Tensor) -> None:
        """Starts over with a prompt, int64 [batch, T]; `token` becomes the one that follows it."""
        self.cache.reset()
        self.advance(prompt)

    @torch.no_grad()
    def step(self) -> None:
        self.advance(self.token)

    def advance(self, tokens: torch.Tensor) -> None:
        # The cache counts its tokens in a tensor, from which the model makes positions and mask: on the device,
        # so that a captured step finds the count of the replay, not of the capture.
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))


class OptimizedDecoder:
    """Greedy decoding by an optimized model: as its `generate` does it, without what that asks and checks a step.

    Attributes:
        token: int64 [batch, 1], the last token; `step` reads it and overwrites it.
    """

    def __init__(self, model: Any, prompt: torch.Tensor, new_tokens: int) -> None:
        self.model = model
        self.cache = model.empty_cache(len(prompt), prompt.shape[1] + new_tokens)
        self.decoder = Decoder(model, self.cache)
        self.token = torch.zeros(len(prompt), 1, dtype=torch.int64, device=prompt.device)

    @torch.no_grad()
    def prefill(self, prompt: torch.Tensor) -> None:
        """Starts over with a prompt, int64 [batch, T]; `token` becomes the one that follows it."""
        self.cache.reset()
        logits = self.model(input_ids=prompt, logits_to_keep=1, **{CACHE_NAME: self.cache}).logits
        self.token[:, 0] = greedy(logits[:, -1])

    @torch.no_grad()
    def step(self) -> None:
        self.token[:, 0] = greedy(self.decoder.step(self.token[:, 0]))


def bench_decode(
    model: "PreTrainedModel",
    batch: int,
    prompt_len: int,
    new_tokens: int,
    *,
    repeats: int = 3,
    name: str | None = None,
    seed: int = 0,
    commit: str | None = None,
) -> Record:
    """Times prefill of random prompts and greedy decode after them.

    Args:
        batch: sequences at once.
        prompt_len: tokens of each prompt.
        new_tokens: tokens generated for each, at least 2.
        repeats: each time is the median of so many runs after one unmeasured.
        name: of the model in the record; None: what it was loaded from.

    Returns:
        One record. `generate_ms` is the time of a step of `model.generate`: of `new_tokens` tokens less that of
        one, divided by `new_tokens` - 1. `graph_ms` is the mean step of a replayed CUDA graph, null on a CPU
        and for models with sliding windows that are not optimized. `limit_ms` is the time to read what a step must read
        once (weights without the embedding table, keys and values at the middle of the run), null on a CPU.
        `ranks` is of a model that is cut over processes, whose figures are those of this one; `optimized` tells the cache
        and head of an optimized model. `memory_bytes` is the sum of the model's tensors, `device_bytes` what is allocated
        on the GPU before the run, `peak_bytes` the most during it, both null on a CPU.

    Raises:
        QuantKitError: fewer than 2 new tokens, or more tokens than the model's context.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if new_tokens < 2 or batch < 1 or prompt_len < 1:
        raise QuantKitError(
            f"batch {batch}, prompt of {prompt_len} and {new_tokens} new tokens; at least 1, 1 and 2 are needed"
        )
    if context and prompt_len + new_tokens > context:
        raise QuantKitError(
            f"prompt of {prompt_len} and {new_tokens} new tokens exceed the model's context of {context} tokens"
        )
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocabulary, (batch, prompt_len), generator=generator).to(device)

    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prefill = prefill_seconds(model, prompt, repeats)
    generate_step = generate_seconds(model, prompt, new_tokens, repeats)
    graph_step = graph_seconds(model, prompt, new_tokens, repeats) if device.type == "cuda" else None
    limits = roof(device)
    step_bytes = weight_bytes_read(model) + cache_bytes(model, batch, prompt_len + new_tokens // 2)
    return {
        "kind": "decode",
        "model": name or model.config.name_or_path or model.config.model_type,
        "scheme": scheme_of(model),
        **({"ranks": ranks} if (ranks := ranks_of(model)) > 1 else {}),
        **optimized_how(model),
        "batch": batch,
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
        "prefill_tokens_per_s": batch * prompt_len / prefill,
        "generate_tokens_per_s": batch / generate_step,
        "generate_ms": generate_step * 1e3,
        "graph_tokens_per_s": batch / graph_step if graph_step else None,
        "graph_ms": graph_step * 1e3 if graph_step else None,
        "limit_ms": limits.seconds(step_bytes) * 1e3 if limits else None,
        "memory_bytes": memory_bytes(model),
        "device_bytes": held,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        **environment(device, commit),
    }


def prefill_seconds(model: "PreTrainedModel", prompt: torch.Tensor, repeats: int) -> float:
    """Seconds of one forward over the prompt, filling a growing cache, with logits for the last position only."""

    cache = model.new_cache(*prompt.shape) if isinstance(model, Generating) else None

    @torch.no_grad()
    def run() -> None:
        if cache is None:
            model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        else:
            cache.reset()
            model(input_ids=prompt, logits_to_keep=1, **{CACHE_NAME: cache})

    return median(synchronized_seconds(run, prompt.device, repeats))


def generate_seconds(model: "PreTrainedModel", prompt: torch.Tensor, new_tokens: int, repeats: int) -> float:
    """Seconds a decode step of `model.generate`, without the prefill.

    The two runs of a difference follow each other: the host, which binds a short prompt's prefill, is not always as fast.
    """

    def seconds(tokens: int) -> float:
        return seconds_of_one(lambda: generate(model, prompt, tokens), prompt.device)

    for tokens in (1, new_tokens):
        generate(model, prompt, tokens)
    steps = [seconds(new_tokens) - seconds(1) for _ in range(repeats)]
    return median(steps) / (new_tokens - 1)


def generate(model: "PreTrainedModel", prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Exactly `new_tokens` greedy tokens after each prompt, whatever they are -> int64 [batch, new_tokens]."""
    ids = model.generate(**exactly(model, prompt, new_tokens))  # type: ignore[operator]
    return ids[:, prompt.shape[1] :]


def exactly(model: "PreTrainedModel", prompt: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """What `generate` has to be given for so many greedy tokens after each prompt, whatever they are."""
    return {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "max_new_tokens": new_tokens,
        "eos_token_id": model.config.get_text_config().vocab_size,  # no token, but looked for as any other
        "pad_token_id": 0,
    }


def graph_seconds(
    model: "PreTrainedModel", prompt: torch.Tensor, new_tokens: int, repeats: int
) -> float | None:
    """Seconds a replay of one captured step, the mean over `new_tokens` of them but the first, the median over the repeats.

    The first one also waits until other processes have come as far.
    """
    with torch.cuda.device(prompt.device):
        if isinstance(model, Generating):
            decoder: OptimizedDecoder | StaticDecoder = OptimizedDecoder(model, prompt, new_tokens)
            step = decoder.step
        else:
            decoder, graph = captured_step(model, prompt, new_tokens)
            if graph is None:
                return None
            step = graph.replay
        samples = []
        for _ in range(1 + repeats):
            decoder.prefill(prompt)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            step()
            start.record()
            for _ in range(new_tokens - 1):
                step()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e-3 / (new_tokens - 1))
    return median(samples[1:])


def captured_step(
    model: "PreTrainedModel", prompt: torch.Tensor, new_tokens: int
) -> "tuple[StaticDecoder, torch.cuda.CUDAGraph | None]":
    """A decoder with room for the prompt and `new_tokens`, just past the prompt, and the graph of one step."""
    decoder = StaticDecoder(model, len(prompt), prompt.shape[1] + new_tokens)
    if not decoder.capturable:
        return decoder, None
    decoder.prefill(prompt)  # allocates the cache, which must outlive the graph's own memory
    graph = capture(decoder.step)
    decoder.prefill(prompt)
    return decoder, graph


def optimized_how(model: Any) -> dict[str, str]:
    """{"optimized": the kind of its cache, and the scheme of its head if packed} of an optimized model."""
    if not any(isinstance(module, FusedBlock) for module in model.modules()):
        return {}
    head = model.get_output_embeddings()
    cache = f"{model.kv} KV" if isinstance(model, Generating) else "no pages"
    return {"optimized": f"{cache}, {head.scheme.label} head" if isinstance(head, QuantLinear) else cache}


def ranks_of(model: torch.nn.Module) -> int:
    """Processes that a model is cut over."""
    groups = (m.group for m in model.modules() if isinstance(m, QuantLinear) and m.group is not None)
    return max(map(torch.distributed.get_world_size, groups), default=1)


def scheme_of(model: torch.nn.Module) -> str:
    """Labels of the packed linears' schemes but the LM head's, joined by '+'; the dtype of a model without any."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    labels = {m.scheme.label for m in model.modules() if isinstance(m, QuantLinear) and m is not head}
    return "+".join(sorted(labels)) or str(next(model.parameters()).dtype).removeprefix("torch.")


def weight_bytes_read(model: "PreTrainedModel") -> int:
    """Bytes of weights that one decode step reads: all but the embedding table, unless it is the head too."""
    total = memory_bytes(model)  # repacked weights are buffers
    embedding = model.get_input_embeddings().weight
    tied = getattr(model.get_output_embeddings(), "weight", None) is embedding
    return total if tied or not isinstance(embedding, torch.Tensor) else total - embedding.nbytes


def cache_bytes(model: "PreTrainedModel", batch: int, length: int) -> int:
    """Bytes of keys and values of `length` tokens a sequence, as the model's cache holds them."""
    if isinstance(model, Generating):
        cache = model.new_cache(1, 1)
        return cache.nbytes // cache.max_length * batch * length
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = head_dim_of(config)
    return 2 * config.num_hidden_layers * heads * dim * model.dtype.itemsize * batch * length
