"""transformers' continuous batching over quantkit's pages: `generate_batch` of an optimized model.

transformers schedules requests, shares their prefixes and captures steps in CUDA graphs, from version 5.23 on; a layer's
keys and values lie in `KVPages` instead of tensors of the model's dtype. A block of transformers is one page of each
layer, and has the same number in all of them. Sliding windows keep transformers' own cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from quantkit.cache import Step
from quantkit.kernels.kv_pages import KVPages

try:
    from transformers.generation.continuous_batching import cache as transformers_cache
    from transformers.generation.continuous_batching.cache_allocators import (
        FULL_ATTENTION,
        FullAttentionCacheAllocator,
    )
except ImportError:  # transformers before 5.23
    FULL_ATTENTION, FullAttentionCacheAllocator = "", object  # type: ignore[misc, assignment]

AVAILABLE = bool(FULL_ATTENTION)
# Makes transformers prepare what a flash kernel takes, lengths instead of masks. Its attention is not called.
ATTENTION = "flash_quantkit"
FAST_PATH_BLOCKS = 32  # of a request, up to which its steps take a table of pages; transformers' own default


class PageAllocator(FullAttentionCacheAllocator):  # type: ignore[misc]
    """The blocks of all layers of one model, as pages of one kind.

    Attributes:
        pages: of each layer.
    """

    kind: str

    @classmethod
    def get_bytes_per_page(
        cls, num_key_value_heads: int, head_dim: int, cache_dtype: torch.dtype, page_size: int
    ) -> int:
        return empty_pages(cls.kind, 1, num_key_value_heads, head_dim, page_size, cache_dtype).nbytes

    def register_cache_tensor(
        self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: Any
    ) -> None:
        """Divides transformers' tensor, uint8, among the layers: the pages of each tensor side by side."""
        self.bytes_per_sector = bytes_per_sector
        self.block_physical_stride = self.tokens_per_page  # a token's index is its slot
        blocks = cache_tensor.numel() // self.bytes_per_block
        empty = empty_pages(
            self.kind, blocks, self.num_key_value_heads, self.head_dim, self.tokens_per_page, self.cache_dtype
        )
        self.pages, rows, at = [], [], 0
        for _ in self.layer_indices:
            views: list[Tensor | None] = []
            for like in (empty.keys, empty.values, empty.key_scales, empty.value_scales):
                if like is None:
                    views.append(None)
                    continue
                part = cache_tensor[at : at + like.nbytes]
                at += like.nbytes
                rows.append(part.view(blocks, -1))
                views.append(part.view(like.dtype).view(like.shape))
            self.pages.append(KVPages(*views, kind=self.kind))  # type: ignore[arg-type, misc]
        self._copy_view = BlockRows(rows)  # type: ignore[assignment]
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)


class BlockRows:
    """Blocks as rows of bytes, for transformers to copy: what lies in several tensors, one beside the other."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts, self.device = parts, parts[0].device

    def index_select(self, dim: int, blocks: Tensor) -> Tensor:
        return torch.cat([part.index_select(dim, blocks) for part in self.parts], 1)

    def index_copy_(self, dim: int, blocks: Tensor, rows: Tensor) -> None:
        for part, row in zip(self.parts, rows.split([p.shape[1] for p in self.parts], 1), strict=True):
            part.index_copy_(dim, blocks, row)


def empty_pages(
    kind: str, pages: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> KVPages:
    """Pages without memory, for their sizes."""
    return KVPages.allocate(kind, pages, kv_heads, head_dim, page_size=page_size, dtype=dtype, device="meta")


@cache
def allocator_of(kind: str) -> type[PageAllocator]:
    return type("PageAllocator", (PageAllocator,), {"kind": kind})


@contextmanager
def as_flash(config: Any) -> Iterator[None]:
    """The model's config with an attention for which transformers prepares lengths; its own again afterwards."""
    attention = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = attention


def serve_pages(manager: Any, model_config: Any, kind: str, fast_path_blocks: int | None) -> None:
    """Makes a manager that has not begun hold keys and values in pages of a kind.

    Args:
        fast_path_blocks: what the caller asked for; transformers rules it out without a flash-attention package.
    """
    config = manager.continuous_batching_config
    config.max_blocks_per_request = FAST_PATH_BLOCKS if fast_path_blocks is None else fast_path_blocks
    create = manager._create_batch_processor

    def with_pages() -> Any:
        allocators = {FULL_ATTENTION: allocator_of(kind)}
        with as_flash(model_config), patch.dict(transformers_cache.ATTN_TYPE_TO_ALLOCATOR, allocators):
            return create()

    manager._create_batch_processor = with_pages


def page_allocator(cache: Any) -> PageAllocator | None:
    """The pages behind a cache of transformers' continuous batching, if there are any."""
    if not AVAILABLE or not isinstance(cache, transformers_cache.PagedAttentionCache):
        return None
    allocator = cache.cache_allocators.get(FULL_ATTENTION)
    return allocator if isinstance(allocator, PageAllocator) else None


def step_of(allocator: PageAllocator, given: dict[str, Any]) -> Step:
    """The tokens of a forward, from what transformers gives a model with it (its `PagedAttentionArgs`)."""
    page_size, positions = allocator.tokens_per_page, given["position_ids"].long()
    ends = given["cu_seq_lens_k"][FULL_ATTENTION]
    lengths = ends.diff().int()
    if (block_table := given.get("block_table")) is not None:  # one token each
        table = block_table[allocator.index]
        last = lengths.long() - 1
        page = table.gather(1, (last.clamp(min=0) // page_size)[:, None]).squeeze(1).long()
        slots = torch.where(last >= 0, page * page_size + last % page_size, -1)
        return Step(positions.view(-1, 1), slots, table, lengths, None, table.shape[1] * page_size)
    slots, read = (given[name][allocator.index] for name in ("write_index", "read_index"))
    indices = read if read.numel() else slots  # of all tokens of each request, one request after the other
    max_length = given["max_length_k"][FULL_ATTENTION]
    firsts = page_size * torch.arange(-(-max_length // page_size), device=ends.device)
    at = ends[:-1, None].long() + firsts
    table = (indices[at.clamp(max=indices.numel() - 1)] // page_size).int()
    return Step(positions, slots, table, lengths, given["cu_seq_lens_q"].int(), max_length)
