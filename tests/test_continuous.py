"""generate_batch of an optimized model: what generate gives for one prompt at a time, from pages that requests share."""

import pytest
import torch
from test_optimize import tiny
from transformers import ContinuousBatchingConfig, GenerationConfig

import quantkit
from quantkit.continuous import AVAILABLE, BlockRows, PageAllocator
from quantkit.errors import QuantKitError
from quantkit.eval import soak as soaking
from quantkit.eval.soak import alone, greedy_config, judge, soak, soak_record

KV = ("bf16", "int8", "fp8", "int4")
needs_pages = pytest.mark.skipif(
    not AVAILABLE, reason="continuous batching over pages needs transformers 5.23"
)


def requests(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    return [torch.randint(2, 96, (int(n),), generator=generator).tolist() for n in lengths]


def batched(model, prompts: list[list[int]], new: int, **sizes) -> dict[tuple[int, ...], list[int]]:
    """The tokens after each prompt."""
    sizes = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 48} | sizes
    outputs = model.generate_batch(
        prompts,
        generation_config=greedy_config(new),
        continuous_batching_config=ContinuousBatchingConfig(**sizes),
        progress_bar=False,
    )
    assert all(output.error is None for output in outputs.values())
    return {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}


@needs_pages
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_requests_get_what_they_would_get_alone(kind, kv):
    model = quantkit.optimize(tiny(kind, "w8a8", torch.float32), kv=kv)
    prompts = requests(9, 40)  # some in chunks: a batch has 48 tokens
    found = batched(model, prompts, 8)
    assert found == {tuple(prompt): alone(model, prompt, 8) for prompt in prompts}


@needs_pages
@pytest.mark.parametrize("kv", ["bf16", "int4"])
def test_requests_share_the_pages_of_a_prefix(kv, monkeypatch):
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv=kv)
    (prefix,) = requests(1, 1, seed=2)
    prefix = (prefix + requests(1, 60, seed=3)[0] * 60)[:40]
    prompts = [prefix + rest for rest in requests(5, 9)]
    matched = []
    match = PageAllocator.match_prefix_blocks
    monkeypatch.setattr(
        PageAllocator,
        "match_prefix_blocks",
        lambda self, ids: (matched.append(match(self, ids)), matched[-1])[1],
    )
    found = batched(
        model, prompts, 6, max_requests_per_batch=2
    )  # the others come when pages are there to share
    assert max(len(blocks) for blocks in matched) == 2
    assert found == {tuple(prompt): alone(model, prompt, 6) for prompt in prompts}


@needs_pages
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_requests_that_find_no_room_wait(kv):
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv=kv)
    prompts = requests(8, 30)
    found = batched(model, prompts, 20, num_blocks=5, cpu_offload_space=0)
    assert found == {tuple(prompt): alone(model, prompt, 20) for prompt in prompts}


@needs_pages
def test_several_answers_to_one_prompt():
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv="int8")
    (prompt,) = requests(1, 30, seed=1)
    outputs = model.generate_batch(
        [prompt],
        # so cold that the likeliest token is always drawn
        generation_config=GenerationConfig(
            max_new_tokens=8, do_sample=True, temperature=1e-4, num_return_sequences=3, eos_token_id=-1
        ),
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=48),
        progress_bar=False,
    )
    assert [output.generated_tokens for output in outputs.values()] == [alone(model, prompt, 8)] * 3


@needs_pages
@pytest.mark.parametrize("kv", KV)
def test_blocks_are_as_small_as_their_pages(kv):
    model = quantkit.optimize(tiny("llama", None, torch.bfloat16), kv=kv)
    manager = model.init_continuous_batching(
        generation_config=greedy_config(4),
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=16),
    )
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))  # is as it was
    manager.start()
    (output,) = [manager.get_result(manager.add_request([5, 6, 7], max_new_tokens=4))]
    assert len(output.generated_tokens) == 4
    cache = manager.batch_processor.cache
    (allocator,) = cache.cache_allocators.values()
    one_layer = model.new_cache(1, 1).layers[0].pages.bytes_per_token * 16
    assert allocator.bytes_per_block == 2 * one_layer
    assert len(allocator.pages) == 2
    assert sum(pages.nbytes for pages in allocator.pages) <= cache.cache_tensor.numel()
    assert manager.batch_processor.inputs_and_outputs.attention_mask is None
    manager.stop(block=True)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(QuantKitError, match="page_size 24, expected one of 16, 32"):
        batched(model, [[5]], 1, page_size=24)
    assert model.config._attn_implementation == "sdpa"


def test_blocks_are_copied_from_all_tensors():
    parts = [torch.arange(n, n + 6 * width).view(6, width) for n, width in ((0, 3), (100, 2))]
    expected = torch.cat(parts, 1)
    rows = BlockRows([part.clone() for part in parts])
    picked = rows.index_select(0, torch.tensor([4, 1]))
    assert torch.equal(picked, expected[[4, 1]])
    rows.index_copy_(0, torch.tensor([0, 5]), picked)
    expected[[0, 5]] = expected[[4, 1]]
    assert torch.equal(rows.index_select(0, torch.arange(6)), expected)


def test_where_there_are_no_pages():
    prompts = requests(3, 20)
    model = quantkit.optimize(tiny("mistral", None, torch.float32))
    found = batched(model, prompts, 6) if AVAILABLE else {tuple(p): alone(model, p, 6) for p in prompts}
    assert found == {tuple(prompt): alone(model, prompt, 6) for prompt in prompts}
    model = quantkit.optimize(tiny("mistral", None, torch.float32), kv="int8")
    with pytest.raises(QuantKitError, match="generate_batch with int8 KV: its layers have sliding windows"):
        model.generate_batch(prompts, generation_config=greedy_config(4))
    if not AVAILABLE:
        model = quantkit.optimize(tiny("llama", None, torch.float32), kv="int8")
        with pytest.raises(QuantKitError, match=r"needs transformers 5\.23"):
            model.generate_batch(prompts, generation_config=greedy_config(4))


@needs_pages
@pytest.mark.parametrize("kv", ["bf16", "int4"])
def test_a_soak_counts_what_is_equal(kv, monkeypatch):
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv=kv)
    sizes = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 48}
    found = soak(model, requests=24, longest=40, new_tokens=12, rounds=3, **sizes)
    assert (found.equal, found.tied, found.wrong) == (24, 0, 0)
    assert len(found.held_bytes) == 3
    record = soak_record(found, model, name="tiny", scheme="float32", requests=24)
    assert (record["kind"], record["kv"], record["equal"]) == ("soak", kv, 24)
    monkeypatch.setattr(PageAllocator, "get_write_indices", lambda self, *a: [16] * a[2])  # all to one place
    found = soak(model, requests=4, longest=40, new_tokens=12, rounds=3, **sizes)
    assert found.wrong > 0


@pytest.mark.parametrize(
    ("kv", "rounds", "way", "verdict"),
    [
        ("int8", False, {"cut": 4}, "tied"),
        ("bf16", False, {"cut": 4}, "wrong"),
        ("bf16", True, {"seed": 40}, "tied"),
        ("bf16", False, {"seed": 40}, "wrong"),
    ],
)
def test_what_is_rounded_may_lead_where_other_last_bits_lead(kv, rounds, way, verdict, monkeypatch):
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv=kv)
    prompt = [5, 6, 7, 8, 9, 10]
    found = alone(model, prompt, 3)
    assert judge(model, prompt, 3, found) == "equal"
    found[-1] = (found[-1] + 1) % 64
    assert judge(model, prompt, 3, found, rounds) == "wrong"
    whole = soaking.last_logits

    def otherwise(model, text, **read):
        logits = whole(model, text, **read)
        logits[found[-1]] += 100 if read == way else 0
        return logits

    monkeypatch.setattr(soaking, "last_logits", otherwise)
    assert judge(model, prompt, 3, found, rounds) == verdict


def test_a_soak_that_cannot_be_is_refused():
    with pytest.raises(QuantKitError, match=r"not optimized; call quantkit\.optimize first"):
        soak(tiny("llama", None, torch.float32))
    with pytest.raises(QuantKitError, match="9 requests in 2 rounds, expected 3 rounds or more"):
        soak(tiny("llama", None, torch.float32), requests=9, rounds=2)
    with pytest.raises(QuantKitError, match="512 tokens and 64 new ones exceed the model's context of 64"):
        soak(quantkit.optimize(tiny("llama", None, torch.float32)))
