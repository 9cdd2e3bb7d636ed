"""Keys and values of a batch of sequences in pages, quantized or not, as a transformers `Cache`.

The blocks of an optimized model write and read the pages themselves (`fuse.py`). Pages are read back by every attention,
that of a prompt's own tokens too, so that the result does not depend on how a text was cut into forwards.
"""

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from quantkit.errors import QuantKitError
from quantkit.kernels.kv_pages import KVPages
from quantkit.models import head_dim_of

PAGE_SIZE = 64  # tokens


@dataclass
class Fill:
    """How full a cache is, for its layers too, which must not hold it: pages go with the last who uses the cache.

    Attributes:
        columns: tokens that were given to each sequence, padding included.
        max_length: tokens that there is room for.
    """

    columns: int
    max_length: int


@dataclass(frozen=True)
class Step:
    """The T tokens that each of B sequences gets in one forward.

    Attributes:
        positions: int64 [B, T]; negative: padding on the left.
        slots: int64 [B T], where keys and values are written; -1: nowhere.
        page_table: int32 [B, pages].
        lengths: int32 [B], tokens of each sequence, these included.
        starts: int32 [B + 1], the first row of each sequence; None where each has one row.
        max_length: no sequence has more tokens than this.
        whole: these T are all tokens of every sequence, without padding.
        plans: `decode_plan` of each window that a layer had.
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    lengths: Tensor
    starts: Tensor | None
    max_length: int
    whole: bool = False
    plans: dict[int, Tensor] = field(default_factory=dict)


class PagedCache(Cache):
    """A cache of fixed size for the blocks of an optimized model.

    Sequences are padded on the left or not at all; padding takes no room. Its tensors stay where they are, so that a
    forward of one token each can be captured in a CUDA graph.

    Args:
        config: of the text model.
        batch: sequences.
        max_length: tokens that each can have.
        kv_heads: of a layer, of which a process may have a part.
        kind: "bf16" (the model's dtype), "int8", "fp8" or "int4".
        dtype, device: of the model.

    Attributes:
        layers: a `PagedLayer` for each of the model's.
        page_table: int32 [batch, pages].
        lengths: int32 [batch], on the device.
        rotary: cosines and sines of all positions, [max_length, head_dim], for the model that uses the cache to keep.
        captured: a CUDA graph of a step over these very tensors, for `decode.py` to keep.
    """

    layers: list["PagedLayer"]  # type: ignore[assignment]

    def __init__(
        self,
        config: PreTrainedConfig,
        batch: int,
        max_length: int,
        kv_heads: int,
        kind: str = "bf16",
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        pages = -(-max_length // PAGE_SIZE)
        self.kind, self.dtype, self.fill = kind, dtype, Fill(0, pages * PAGE_SIZE)
        head_dim = head_dim_of(config)
        layers = []
        with torch.inference_mode(False):  # its tensors are changed in place, in that mode or not
            for _ in range(config.num_hidden_layers):
                made = KVPages.allocate(
                    kind, batch * pages, kv_heads, head_dim, page_size=PAGE_SIZE, dtype=dtype, device=device
                )
                layers.append(PagedLayer(self.fill, made))
            self.page_table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
            self.first_slots = self.max_length * torch.arange(batch, device=device).view(batch, 1)
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.captured: Any = None
        super().__init__(layers=layers)  # type: ignore[arg-type]

    @property
    def columns(self) -> int:
        return self.fill.columns

    @columns.setter
    def columns(self, value: int) -> None:
        self.fill.columns = value

    @property
    def max_length(self) -> int:
        return self.fill.max_length

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages on the device."""
        return sum(layer.pages.nbytes for layer in self.layers)

    def take(self, batch: int, tokens: int, mask: Tensor | None = None) -> Step:
        """Makes room for the next tokens of every sequence.

        Args:
            mask: [batch, columns + tokens], 0 for padding on the left; None: no padding.

        Raises:
            QuantKitError: another batch than the cache is for, no room, or padding that is not on the left.
        """
        if batch != self.batch_size:
            raise QuantKitError(
                f"PagedCache: made for {self.batch_size} sequences, got {batch}; make one for {batch}"
            )
        self.check_room(tokens)
        fresh = None if mask is None else self.real(mask, tokens)
        self.columns += tokens
        return self.place(tokens, fresh)

    def check_room(self, tokens: int) -> None:
        if self.columns + tokens > self.max_length:
            raise QuantKitError(
                f"PagedCache: {self.columns} tokens and {tokens} more, room for {self.max_length}; "
                "make one for all that is to come: model.new_cache(batch, tokens)"
            )

    def real(self, mask: Tensor, tokens: int) -> Tensor | None:
        """How many of the next tokens of each sequence are not padding, int32 [batch]; None: all of them."""
        if mask.dim() != 2 or mask.shape != (self.batch_size, self.columns + tokens):
            raise QuantKitError(
                f"attention_mask: {list(mask.shape)}, a PagedCache expects [{self.batch_size}, {self.columns + tokens}], "
                "a column for each token that was and is given"
            )
        mask = mask.bool()
        if mask.all():
            return None
        if not on_the_left(mask):
            raise QuantKitError(
                "attention_mask: hides tokens behind others, a PagedCache takes padding on the left alone; "
                "set tokenizer.padding_side = 'left'"
            )
        return mask[:, -tokens:].sum(1, dtype=torch.int32)

    def place(self, tokens: int, fresh: Tensor | None) -> Step:
        """The device's part of `take`, which can be captured."""
        if tokens == 1 and fresh is None:
            positions = self.lengths[:, None].long()
            self.lengths += 1
            slots = self.first_slots + positions
        else:
            self.lengths += tokens if fresh is None else fresh
            rows = torch.arange(-tokens, 0, device=self.lengths.device)
            positions = self.lengths[:, None] + rows  # int64
            slots = self.first_slots + positions
            if fresh is not None:
                slots = torch.where(rows >= -fresh[:, None], slots, -1)
        starts = None
        if tokens != 1:
            starts = torch.arange(self.batch_size + 1, dtype=torch.int32, device=slots.device) * tokens
        whole = tokens > 1 and tokens == self.columns and fresh is None
        return Step(positions, slots.flatten(), self.page_table, self.lengths, starts, self.max_length, whole)

    def reset(self) -> None:
        self.columns = 0
        self.lengths.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens of every sequence, none of which may be padding: as many as a negative number says."""
        if tokens_to_remove > 0:
            raise QuantKitError(
                f"PagedCache.crop: {tokens_to_remove}, expected 0 or less; -1 removes one token of every sequence"
            )
        self.columns += tokens_to_remove
        self.lengths += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise QuantKitError("PagedCache: sequences cannot be reordered; generate beams without it")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        raise QuantKitError("PagedCache: sequences cannot be picked; make one for those that are to go on")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise QuantKitError("PagedCache: sequences cannot be repeated; make one for all of them")


def on_the_left(mask: Tensor) -> bool:
    """Whether what a mask [batch, columns] hides are the first columns of each sequence."""
    mask = mask.bool()
    return not bool((mask[:, :-1] & ~mask[:, 1:]).any())


class PagedLayer(CacheLayerMixin):
    """One layer's pages, and what transformers asks of a layer."""

    is_sliding = False
    is_croppable = True

    def __init__(self, fill: Fill, pages: KVPages) -> None:
        super().__init__()
        self.fill, self.pages, self.is_initialized = fill, pages, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pages are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise QuantKitError(
            "PagedCache: belongs to a model of quantkit.optimize, this one is not; optimize it, or use DynamicCache"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.fill.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.fill.columns

    def get_max_length(self) -> int:
        return self.fill.max_length
