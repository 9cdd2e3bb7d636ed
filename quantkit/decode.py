"""`generate` of an optimized model: transformers' own, with a `PagedCache` and a loop whose step is one CUDA graph.

The host runs ahead of the GPU: whether all sequences have ended is asked of the step before the last.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, PreTrainedModel
from transformers.generation import GenerationMode

from quantkit.cache import PagedCache
from quantkit.continuous import ATTENTION, AVAILABLE, serve_pages
from quantkit.errors import QuantKitError
from quantkit.fuse import CACHE_NAME

ROOM = 256  # tokens; caches are made in multiples of so many, to fit the next call too


class Decoder:
    """One token for each of a batch of sequences: the model's forward over a cache, on a GPU as a CUDA graph.

    Attributes:
        cache: of the sequences; filled with their prompts before the first `step`.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.tokens = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Gives each sequence its next token.

        Args:
            tokens: int64 [batch].

        Returns:
            Logits of what follows, [batch, vocabulary]; the next step overwrites them.

        Raises:
            QuantKitError: the cache is full.
        """
        self.tokens.copy_(tokens[:, None])
        if self.tokens.device.type != "cuda":
            return self.forward()
        if self.graph is None:
            self.capture()
        self.cache.check_room(1)
        self.cache.columns += 1
        self.graph.replay()  # type: ignore[union-attr]
        return self.logits

    def forward(self) -> Tensor:
        return self.model(
            input_ids=self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]

    def capture(self) -> None:
        """Records a step. The one that is run before it, for compilation cannot be captured, is taken back."""
        lengths, columns = self.cache.lengths.clone(), self.cache.columns
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.forward()
            self.cache.lengths.copy_(lengths)
            self.cache.columns = columns
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.forward()
        self.cache.columns = columns


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
        last_decoder: of the last call, whose cache and graph the next call takes if they fit.
    """

    kv: str
    last_decoder: Decoder | None = None

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if not pages_serve(generation_config, model_kwargs, generation_mode):
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
        return PagedCache(self.config.get_text_config(), batch, max_length, self.kv, self.dtype, self.device)

    def empty_cache(self: Any, batch: int, max_length: int) -> PagedCache:
        """The cache of the last call if it fits, else a new one."""
        kept = None if self.last_decoder is None else self.last_decoder.cache
        if kept is not None and kept.batch_size == batch and max_length <= kept.max_length:
            kept.reset()
            return kept
        self.last_decoder = None  # its memory first
        cache = self.new_cache(batch, -(-max_length // ROOM) * ROOM)
        self.last_decoder = Decoder(self, cache)
        return cache

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
        decoder = self.last_decoder
        if decoder is None or model_kwargs.get(CACHE_NAME) is not decoder.cache or synced_gpus:
            return super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        device = input_ids.device
        stop = StopCheck(torch.device("cpu") if streamer is not None else device)  # it gets no token too many
        may_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
        logits = self._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
        while True:
            scores = logits_processor(input_ids, logits.to(torch.float32, copy=True))
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if may_end:
                tokens = torch.where(ended, generation_config._pad_token_tensor.to(device), tokens)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            ended = ended | stopping_criteria(input_ids, None)
            if stop(ended):
                input_ids = input_ids[:, : -1 if stop.late else None]
                break
            if input_ids.shape[1] == stopping_criteria.max_length:
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
        blocks = None if given is None else given.max_blocks_per_request
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        attention = self.config._attn_implementation
        self.config._attn_implementation = ATTENTION
        try:
            manager = super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.config._attn_implementation = attention
            raise
        if manager is not kept:
            manager._original_attn_impl = attention  # to which it will return
            serve_pages(manager, self.kv, blocks)
        return manager


def layer_kinds(config: Any) -> list[str]:
    """Of attention, of each layer."""
    one = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return getattr(config, "layer_types", None) or [one] * config.num_hidden_layers


def pages_serve(generation_config: Any, model_kwargs: dict[str, Any], mode: GenerationMode) -> bool:
    """Whether a `PagedCache` can serve a call of `generate`: it gives no attentions, and cannot reorder its sequences."""
    return (
        mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and model_kwargs.get(CACHE_NAME) is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation is None
        and not generation_config.is_assistant
        and not generation_config.output_attentions
        and not generation_config.output_hidden_states
    )
