"""`generate` of an optimized model: transformers' own, with a `PagedCache` and a loop whose step is one CUDA graph.

The host runs ahead of the GPU: whether all sequences have ended is asked of the step before the last.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, MaxLengthCriteria, PreTrainedModel
from transformers.generation import GenerationMode

from quantkit.cache import PagedCache, on_the_left
from quantkit.continuous import AVAILABLE, as_flash, serve_pages
from quantkit.errors import QuantKitError
from quantkit.fuse import CACHE_NAME, hooked_part
from quantkit.kernels.kv_pages import PAGE_SIZES

ROOM = 256  # tokens; caches are made in multiples of so many, to fit the next call too


@dataclass
class Captured:
    """A step that was recorded: it reads and writes these tensors, and the cache's.

    Attributes:
        of: `what_runs` of the model when it was recorded.
        tokens: int64 [batch, 1], what it is given.
        logits: [batch, vocabulary].
    """

    of: tuple[Any, ...]
    graph: Any
    tokens: Tensor
    logits: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a cache has other tensors: its step is recorded anew."""


class Decoder:
    """One token for each of a batch of sequences: the model's forward over a cache, on a GPU as a CUDA graph.

    The graph stays with the cache, and serves the next decoder of the same model and cache.

    Args:
        cache: of the sequences; filled with their prompts before the first `step`.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        if cache.captured is not None and cache.captured.of != what_runs(model):
            cache.captured = None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Gives each sequence its next token.

        Args:
            tokens: int64 [batch].

        Returns:
            Logits of what follows, [batch, vocabulary]; on a GPU the next step overwrites them.

        Raises:
            QuantKitError: the cache is full.
        """
        self.cache.check_room(1)
        if tokens.device.type != "cuda":
            return self.forward(tokens[:, None])
        if self.cache.captured is None:
            self.cache.captured = self.capture(tokens)
        captured = self.cache.captured
        captured.tokens.copy_(tokens[:, None])
        self.cache.columns += 1
        captured.graph.replay()
        return captured.logits  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        given = {"input_ids": tokens, CACHE_NAME: self.cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(**given).logits[:, -1]

    def capture(self, tokens: Tensor) -> Captured:
        """Records a step. It and the one that is run before it, for compilation cannot be captured, are taken back."""
        cache, columns = self.cache, self.cache.columns
        with torch.inference_mode(False):
            tokens = tokens[:, None].clone()
        lengths = cache.lengths.clone()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.forward(tokens)
                cache.lengths.copy_(lengths)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self.forward(tokens)
        finally:
            cache.columns = columns
            cache.lengths.copy_(lengths)
        return Captured(what_runs(self.model), graph, tokens, logits)


def what_runs(model: torch.nn.Module) -> tuple[Any, ...]:
    """What a recorded step has of a model's state: where its tensors are, its modules, how they sum, which adapters act."""
    tensors = (tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()])
    switches = ("fp8_accumulation", "_active_adapter", "_disable_adapters", "merged_adapters")
    modules = ((id(m), *(str(getattr(m, name, None)) for name in switches)) for m in model.modules())
    return (*tensors, *modules)


def greedy(scores: Tensor) -> Tensor:
    """scores.argmax(-1): of [batch, vocabulary] the place of each row's first largest score, or first NaN, int64 [batch]."""
    if not scores.is_cuda or scores.dtype == torch.float64:
        return scores.argmax(-1)
    from quantkit.kernels.argmax import argmax_triton  # Triton is not on all platforms

    return argmax_triton(scores)


class StopCheck:
    """Tells whether all sequences have ended: at once on a CPU, on a GPU one call later, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.late = device.type == "cuda"
        if self.late:
            self.flags = [torch.zeros((), dtype=torch.bool, pin_memory=True) for _ in range(2)]
            self.events = [torch.cuda.Event() for _ in range(2)]
            self.calls = 0

    def __call__(self, ended: Tensor) -> bool:
        """Args: ended: bool [batch]."""
        if not self.late:
            return bool(ended.all())
        now, before = self.calls % 2, (self.calls + 1) % 2
        self.flags[now].copy_(ended.all(), non_blocking=True)
        self.events[now].record()
        self.calls += 1
        if self.calls == 1:
            return False
        self.events[before].synchronize()
        return bool(self.flags[before])


class Generating:
    """Put before the class of an optimized model: what its `generate` calls.

    Attributes:
        kv: kind of the caches that `generate` makes.
        kept_cache: of the last call, which the next one takes with its graph if it fits; None while a call has it.
    """

    kv: str
    kept_cache: PagedCache | None = None

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if not pages_serve(self, generation_config, model_kwargs, generation_mode):
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        batch = batch_size * (generation_config.num_return_sequences or 1)
        if generation_config.return_dict_in_generate:  # with its cache, which then is the caller's
            model_kwargs[CACHE_NAME] = self.new_cache(batch, max_cache_length)
        else:
            model_kwargs[CACHE_NAME] = self.empty_cache(batch, max_cache_length)
        return None

    def new_cache(self: Any, batch: int, max_length: int) -> PagedCache:
        """A cache for so many sequences and tokens, to be given to forward or `generate`."""
        attention, config = self.get_decoder().layers[0].self_attn, self.config.get_text_config()
        kv_heads = (attention.k_proj.stop - attention.k_proj.start) // attention.head_dim  # of this process
        return PagedCache(config, batch, max_length, kv_heads, self.kv, self.dtype, self.device)

    def free_cache(self) -> None:
        """Gives back the pages that the last call of `generate` left for the next one, and the step recorded over them.

        Of a model that is cut over processes NCCL ends only then: call it before `destroy_process_group`.
        """
        self.kept_cache = None

    def empty_cache(self: Any, batch: int, max_length: int) -> PagedCache:
        """The cache that the last call left, if it fits, else a new one; `_sample` leaves it to the next call."""
        kept = self.__dict__.pop("kept_cache", None)  # at once: calls in two threads must not get the same
        fits = kept is not None and kept.batch_size == batch and max_length <= kept.max_length
        if fits and (kept.kind, kept.dtype, kept.lengths.device) == (self.kv, self.dtype, self.device):
            kept.reset()
            return kept  # type: ignore[no-any-return]
        kept = None  # its memory first
        return self.new_cache(batch, -(-max_length // ROOM) * ROOM)

    @torch.no_grad()
    def _sample(
        self: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        cache: Any = model_kwargs.get(CACHE_NAME)
        ours = isinstance(cache, PagedCache) and not getattr(cache, "_is_user_defined", False)
        if (
            not ours
            or synced_gpus
            or generation_config.return_dict_in_generate
            or places_differ(model_kwargs)
        ):
            return super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        on_its_device: AbstractContextManager[Any] = nullcontext()
        if input_ids.is_cuda:
            on_its_device = torch.cuda.device(input_ids.device)
        with on_its_device:
            tokens = self.decode(
                Decoder(self, cache),
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                streamer,
                model_kwargs,
            )
        self.kept_cache = cache
        return tokens

    def decode(
        self: Any,
        decoder: Decoder,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Tensor:
        """The loop of transformers' `_sample`, for what `pages_serve` allows."""
        device = input_ids.device
        stop = StopCheck(torch.device("cpu") if streamer is not None else device)  # it gets no token too many
        lengths = [one.max_length for one in stopping_criteria if type(one) is MaxLengthCriteria]
        early = [one for one in stopping_criteria if type(one) is not MaxLengthCriteria]
        may_end = any(hasattr(criterion, "eos_token_id") for criterion in early)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
        logits = self._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
        as_they_are = (
            not generation_config.do_sample and not logits_processor
        )  # the largest is so in float32 too
        while True:
            scores = logits
            if not as_they_are:
                scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            else:
                tokens = greedy(scores)
            if may_end:
                tokens = torch.where(ended, generation_config._pad_token_tensor.to(device), tokens)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            for criterion in early:
                ended = ended | criterion(input_ids, None)
            if early and stop(ended):
                input_ids = input_ids[:, : -1 if stop.late else None]
                break
            if any(input_ids.shape[1] >= most for most in lengths):
                break
            logits = decoder.step(tokens)
        if streamer is not None:
            streamer.end()
        return input_ids

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        sliding = any(kind != "full_attention" for kind in layer_kinds(self.config.get_text_config()))
        if sliding or not AVAILABLE:
            if self.kv != "bf16":
                why = "its layers have sliding windows" if sliding else "it needs transformers 5.23 or newer"
                raise QuantKitError(
                    f"generate_batch with {self.kv} KV: {why}; optimize the model with kv='bf16', or use generate"
                )
            return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        given = kwargs.get("continuous_batching_config") or next(
            (one for one in args if isinstance(one, ContinuousBatchingConfig)), None
        )
        if given is not None and given.page_size not in PAGE_SIZES:
            raise QuantKitError(
                f"generate_batch: page_size {given.page_size}, expected one of {', '.join(map(str, PAGE_SIZES))}"
            )
        blocks = None if given is None else given.max_blocks_per_request
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        with as_flash(self.config):
            manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        if manager is not kept:
            serve_pages(manager, self.config, self.kv, blocks)
        return manager


def layer_kinds(config: Any) -> list[str]:
    """Of attention, of each layer."""
    one = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return getattr(config, "layer_types", None) or [one] * config.num_hidden_layers


def pages_serve(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: GenerationMode
) -> bool:
    """Whether a `PagedCache` can serve a call of `generate`: it gives no attentions, cannot reorder its sequences, takes
    padding on the left, and does not call the hooks of what is in a block.

    Raises:
        QuantKitError: it cannot for the padding or hooks, and the model is to have quantized keys and values.
    """
    able = (
        mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and model_kwargs.get(CACHE_NAME) is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation is None
        and not generation_config.is_assistant
        and not generation_config.output_attentions
        and not generation_config.output_hidden_states
    )
    if not able:
        return False
    mask = model_kwargs.get("attention_mask")
    why = ""
    if isinstance(mask, Tensor) and (mask.dim() != 2 or not on_the_left(mask)):
        why = "the attention_mask hides tokens behind others, expected padding on the left"
    elif hooked := hooked_part(model.get_decoder()):
        why = f"{hooked} has forward hooks, which a block over pages does not call"
    if why and model.kv != "bf16":
        raise QuantKitError(f"generate with {model.kv} KV: {why}; change that, or optimize with kv='bf16'")
    return not why


def places_differ(model_kwargs: dict[str, Any]) -> bool:
    """Whether a caller has given other positions than the tokens' places among those that are no padding."""
    given, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if given is None:
        return False
    real = torch.ones_like(given) if mask is None else mask[:, -given.shape[-1] :].to(given.dtype)
    return bool(((given - (real.cumsum(-1) - 1)) * real).any())
