"""generate of an optimized model: the tokens that transformers' own loop and cache give, from pages and its own loop."""

import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
import transformers
from test_optimize import KINDS, TINY, tiny
from transformers import (
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import quantkit
from quantkit import decode
from quantkit.cache import PAGE_SIZE
from quantkit.errors import QuantKitError

QUANTIZED = ("int8", "fp8", "int4")


def prompts(seed: int = 1) -> dict[str, torch.Tensor]:
    """Three prompts, two of them padded on the left."""
    ids = torch.randint(2, 96, (3, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def pair(kind: str = "llama", scheme: str | None = None, dtype: torch.dtype = torch.float32, **options):
    return tiny(kind, scheme, dtype), quantkit.optimize(tiny(kind, scheme, dtype), **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(do_sample=False, num_return_sequences=1, repetition_penalty=1.5),
        dict(do_sample=True, temperature=0.7, top_k=20, num_return_sequences=2),
        dict(do_sample=False, prefill_chunk_size=4),
        dict(do_sample=False, num_beams=2),
        dict(do_sample=False, return_dict_in_generate=True, output_scores=True),
        dict(do_sample=False, use_cache=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_the_tokens_of_transformers(kind, options):
    found = []
    for model in pair(kind):
        torch.manual_seed(0)
        tokens = model.generate(**prompts(), max_new_tokens=14, pad_token_id=0, eos_token_id=None, **options)
        found.append(getattr(tokens, "sequences", tokens))
    assert torch.equal(*found)


def endings() -> tuple[list[int], list[int]]:
    """Tokens that end a text, and at which steps the three prompts reach one: each at another, none at the first."""
    free = tiny("llama", None, torch.float32).generate(
        **prompts(), max_new_tokens=14, pad_token_id=0, do_sample=False
    )[:, 11:]
    for tokens in itertools.product(*free.tolist()):
        steps = [min(i for i, token in enumerate(row) if token in tokens) for row in free.tolist()]
        if len(set(steps)) == 3 and 0 < min(steps) and 4 <= max(steps) < 12:
            return list(tokens), steps
    raise AssertionError("no such tokens")


class Late(decode.StopCheck):
    """What a GPU's answers: one call late."""

    def __init__(self, device: torch.device) -> None:
        self.late, self.before = True, False

    def __call__(self, ended: torch.Tensor) -> bool:
        answer, self.before = self.before, bool(ended.all())
        return answer


@pytest.mark.parametrize("check", [decode.StopCheck, Late])
@pytest.mark.parametrize("spare", [3, 1, 0])  # tokens that were still allowed when the last text ended
def test_sequences_end_each_at_its_own_step(check, spare, monkeypatch):
    eos, steps = endings()
    options = dict(max_new_tokens=max(steps) + 1 + spare, pad_token_id=0, eos_token_id=eos, do_sample=False)
    plain, model = pair()
    expected = plain.generate(**prompts(), **options)
    assert expected.shape[1] == 11 + max(steps) + 1
    monkeypatch.setattr(decode, "StopCheck", check)
    assert torch.equal(model.generate(**prompts(), **options), expected)


class After(StoppingCriteria):
    """Ends each text at a length of its own."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return self.lengths <= ids.shape[1]


@pytest.mark.parametrize("check", [decode.StopCheck, Late])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize(
    "criteria",
    [
        [],
        [After([13, 15, 14])],
        [After([13, 15, 99]), After([99, 99, 16])],
        [MaxLengthCriteria(14)],
        [MaxLengthCriteria(12), After([13, 15, 14])],
        [MaxTimeCriteria(1000.0)],
    ],
    ids=["none", "one", "two", "a length", "a length and one", "a time"],
)
def test_the_criteria_of_the_caller_end_what_they_end_in_transformers(criteria, eos, check, monkeypatch):
    end, _ = endings()
    options = dict(max_new_tokens=8, pad_token_id=0, eos_token_id=end if eos else None, do_sample=False)
    options["stopping_criteria"] = StoppingCriteriaList(criteria)
    plain, model = pair()
    expected = plain.generate(**prompts(), **options)
    monkeypatch.setattr(decode, "StopCheck", check)
    assert torch.equal(model.generate(**prompts(), **options), expected)


def test_a_streamer_gets_every_token_and_no_other(monkeypatch):
    class Kept(TextStreamer):
        def __init__(self) -> None:
            self.got, self.over = [], False

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.reshape(-1))

        def end(self) -> None:
            self.over = True

    plain, model = pair()
    one = {name: value[:1] for name, value in prompts().items()}
    eos = int(plain.generate(**one, max_new_tokens=6, pad_token_id=0, do_sample=False)[0, -1])
    heard = []
    for m in (plain, model):
        heard.append(Kept())
        m.generate(
            **one, max_new_tokens=14, pad_token_id=0, eos_token_id=eos, do_sample=False, streamer=heard[-1]
        )
    assert all(one.over for one in heard)
    assert torch.equal(*(torch.cat(one.got) for one in heard))


@pytest.mark.parametrize("kv", ["bf16", *QUANTIZED])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_do_not_depend_on_how_a_text_is_cut(kind, kv):
    model = quantkit.optimize(tiny(kind, None, torch.float32), kv=kv)
    ids = torch.randint(2, 96, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model(ids).logits
    found = []
    for cut in ([21], [9, 12], [20, 1], [1] * 21):
        cache, logits = model.new_cache(2, 21), []
        with torch.no_grad():
            for part in ids.split(cut, 1):
                logits.append(model(part, past_key_values=cache, use_cache=True).logits)
        found.append(torch.cat(logits, 1))
        assert cache.get_seq_length() == 21
    # rounding may differ where sums were made in another order: by one step of a few codes
    loss = (found[0] - exact).abs().max()
    bound = 1e-4 * exact.abs().max() if kv == "bf16" else loss / 4
    assert all((other - found[0]).abs().max() < bound for other in found[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_lose_more(kind):
    ids = torch.randint(2, 96, (2, 50), generator=torch.Generator().manual_seed(1))
    losses = []
    for kv in ("bf16", *QUANTIZED):
        model = quantkit.optimize(tiny(kind, None, torch.float32), kv=kv)
        with torch.no_grad():
            found = model(ids, past_key_values=model.new_cache(2, 50)).logits
            losses.append((found - model(ids).logits).norm().item())
    assert losses[0] * 100 < losses[1] < losses[2] < losses[3]


def test_padding_takes_no_room_and_changes_nothing():
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv="int8")
    given, cache = prompts(), model.new_cache(3, 20)
    with torch.no_grad():
        logits = model(**given, past_key_values=cache, use_cache=True).logits
    assert cache.lengths.tolist() == [7, 11, 10]
    for row, length in enumerate(cache.lengths.tolist()):
        alone = model.new_cache(1, 20)
        with torch.no_grad():
            expected = model(
                given["input_ids"][row : row + 1, -length:], past_key_values=alone, use_cache=True
            ).logits
        assert (logits[row, -length:] - expected[0]).abs().max() < 1e-5


def test_the_next_call_takes_the_cache_of_the_last_if_it_fits():
    model = quantkit.optimize(tiny("llama", None, torch.float32))
    made = []

    def run(**options):
        tokens = model.generate(**prompts(), do_sample=False, pad_token_id=0, **options)
        made.append(model.kept_cache)
        return tokens

    first = run(max_new_tokens=5)
    assert torch.equal(run(max_new_tokens=5), first)
    assert torch.equal(run(max_new_tokens=20)[:, : first.shape[1]], first)
    assert made[0] is made[1] is made[2]
    kept = run(max_new_tokens=5, return_dict_in_generate=True).past_key_values
    assert kept is not made[0]
    assert kept.get_seq_length() == first.shape[1] - 1
    model.generate(
        **prompts(), max_length=decode.ROOM + 12, min_new_tokens=2, do_sample=False, pad_token_id=0
    )
    assert model.kept_cache.max_length == 2 * decode.ROOM


def test_a_cache_is_filled_and_continued_by_hand():
    plain, model = pair()
    ids = prompts()["input_ids"]
    cache = model.new_cache(3, PAGE_SIZE)
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        past_key_values=cache,
        do_sample=False,
        pad_token_id=0,
    )
    assert cache.get_seq_length() == 14
    expected = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, pad_token_id=0
    )
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=5,
        past_key_values=cache,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_guesses_that_were_wrong_are_taken_out_of_a_cache(kv):
    """Prompt lookup crops the cache after every wrong guess."""
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv=kv)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6]])
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False, pad_token_id=0)
    cache = model.new_cache(1, 64)
    found = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(found, model.generate(ids, **options))
    assert cache.columns == cache.lengths.item() == found.shape[1] - 1
    with pytest.raises(QuantKitError, match=r"crop: 3, expected 0 or less"):
        cache.crop(3)


def test_calls_within_and_beside_each_other_do_not_meet():
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv="int8")
    options = dict(max_new_tokens=14, do_sample=False, pad_token_id=0)
    given = [prompts(seed) for seed in range(4)]
    expected = [model.generate(**one, **options) for one in given]

    class Nested(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            model.generate(**given[1], max_new_tokens=2, do_sample=False, pad_token_id=0)
            return torch.zeros(len(ids), dtype=torch.bool)

    assert torch.equal(model.generate(**given[0], **options, stopping_criteria=[Nested()]), expected[0])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: model.generate(**one, **options), given))
    assert all(map(torch.equal, found, expected))


def test_positions_of_the_callers_own_are_kept_to():
    plain, model = pair()
    given = prompts()
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0) * 2
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**given, **options), plain.generate(**given, **options))


def test_hooks_and_masks_that_pages_do_not_serve():
    plain, model = pair()
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    right = {name: value.flip(1) for name, value in prompts().items()}
    assert torch.equal(model.generate(**right, **options), plain.generate(**right, **options))
    calls = []
    for m in (plain, model):
        m.model.layers[1].register_forward_hook(lambda *a: calls.append(1))
        m.generate(**prompts(), **options)
    assert len(calls) == 2 * 5
    with pytest.raises(QuantKitError, match=r"layers\.1 has forward hooks"):
        model(**prompts(), past_key_values=model.new_cache(3, 20))
    quantized = quantkit.optimize(tiny("llama", None, torch.float32), kv="int8")
    with pytest.raises(
        QuantKitError, match="generate with int8 KV: the attention_mask hides tokens behind others"
    ):
        quantized.generate(**right, **options)
    with torch.no_grad():  # transformers' own hooks, by which it captures outputs, stay where they are
        quantized(**prompts(), output_hidden_states=True)
    quantized.generate(**prompts(), **options)


def test_a_cache_that_does_not_fit_any_more_is_not_taken():
    model = quantkit.optimize(tiny("llama", None, torch.float32))
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    model.generate(**prompts(), **options)
    model.kv = "int8"
    model.generate(**prompts(), **options)
    assert model.kept_cache.kind == "int8"
    model.to(torch.bfloat16).generate(**prompts(), **options)
    assert model.kept_cache.dtype == torch.bfloat16
    model.free_cache()
    assert model.kept_cache is None


def test_pages_go_with_the_last_who_uses_them():
    model = quantkit.optimize(tiny("llama", None, torch.float32))
    gc.collect()
    gc.disable()
    try:
        for given in (prompts(), {name: value[:1] for name, value in prompts().items()}):
            model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0)
            kept = weakref.ref(model.kept_cache)
            model.generate(**{name: value[:2] for name, value in prompts().items()}, max_new_tokens=3)
            assert kept() is None
        kept = weakref.ref(model)
        del model
        assert kept() is None
    finally:
        gc.enable()


def test_inference_mode_or_not():
    model = quantkit.optimize(tiny("llama", None, torch.float32), kv="int8")
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        first = model.generate(**prompts(), **options)
    assert torch.equal(model.generate(**prompts(), **options), first)
    with torch.inference_mode():
        assert torch.equal(model.generate(**prompts(), **options), first)


def test_a_copy_has_pages_of_its_own():
    model = quantkit.optimize(tiny("llama", None, torch.float32))
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model.generate(**prompts(), **options)
    copied = deepcopy(model)
    assert torch.equal(copied.generate(**prompts(), **options), expected)
    assert copied.kept_cache is not model.kept_cache
    kept = deepcopy(model.kept_cache)
    kept.columns += 1
    assert kept.get_seq_length() == model.kept_cache.get_seq_length() + 1


def test_what_was_recorded_is_of_the_model_as_it_was():
    model = quantkit.optimize(tiny("llama", "fp8", torch.float32))
    before = decode.what_runs(model)
    assert decode.what_runs(model) == before
    quantkit.set_fp8_accumulation(model, "fast")
    assert decode.what_runs(model) != before
    quantkit.set_fp8_accumulation(model, "auto")
    assert decode.what_runs(model) == before
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert decode.what_runs(model) != before


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_is_an_empty_result(tokens):
    model = quantkit.optimize(tiny("llama", None, torch.float32))
    for batch in (0, 2) if tokens else (2,):
        ids = torch.full((batch, tokens), 7)
        with torch.no_grad():
            logits = model(ids, past_key_values=model.new_cache(batch, 20)).logits
        assert logits.shape == (batch, tokens, 96)


def test_what_a_cache_cannot_do_is_refused():
    plain, model = pair()
    given = prompts()
    with pytest.raises(QuantKitError, match=r"PagedCache: belongs to a model of quantkit\.optimize"):
        plain(**given, past_key_values=model.new_cache(3, 20))
    with pytest.raises(QuantKitError, match="made for 2 sequences, got 3"):
        model(**given, past_key_values=model.new_cache(2, 20))
    cache = model.new_cache(3, PAGE_SIZE)
    with torch.no_grad():
        model(**given, past_key_values=cache)
        with pytest.raises(QuantKitError, match=f"11 tokens and {PAGE_SIZE} more, room for {PAGE_SIZE}"):
            model(torch.full((3, PAGE_SIZE), 7), past_key_values=cache)
    empty = model.new_cache(3, 20)
    for mask in (given["attention_mask"].flip(1), torch.tensor([[1, 0, 1] + [1] * 8] * 3)):
        with pytest.raises(QuantKitError, match="padding on the left alone"):
            model(given["input_ids"], attention_mask=mask, past_key_values=empty)
        assert empty.columns == 0
    with pytest.raises(QuantKitError, match=r"attention_mask: \[3, 12\], a PagedCache expects \[3, 11\]"):
        model(given["input_ids"], attention_mask=torch.ones(3, 12), past_key_values=model.new_cache(3, 20))
    with pytest.raises(QuantKitError, match="cannot be reordered"):
        cache.reorder_cache(torch.tensor([1, 0, 2]))
    with pytest.raises(QuantKitError, match="neither attentions nor hidden states"):
        model.model(**given, past_key_values=model.new_cache(3, 20), output_attentions=True)
    with pytest.raises(QuantKitError, match="autocast is on for cpu"), torch.autocast("cpu"):
        model(**given, past_key_values=model.new_cache(3, 20))
    with pytest.raises(QuantKitError, match="optimize: Linear, expected a transformers model"):
        quantkit.optimize(torch.nn.Linear(1, 1))
    with pytest.raises(QuantKitError, match="kind is int2, expected one of bf16, int8, fp8, int4"):
        quantkit.optimize(tiny("llama", None, torch.float32), kv="int2")


def test_frequencies_that_change_with_the_text_keep_the_cache_of_transformers(monkeypatch):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    monkeypatch.setitem(KINDS, "dynamic", transformers.LlamaConfig(**TINY, rope_parameters=rope))
    _, model = pair("dynamic")
    assert not isinstance(model, decode.Generating)
    with pytest.raises(
        QuantKitError, match="kv int8: rope_type 'dynamic' has frequencies of the text's length"
    ):
        quantkit.optimize(tiny("dynamic", None, torch.float32), kv="int8")


def test_heads_that_no_page_holds_keep_the_cache_of_transformers(monkeypatch):
    monkeypatch.setitem(KINDS, "odd", transformers.LlamaConfig(**TINY | {"head_dim": 24}))
    plain, model = pair("odd")
    assert torch.equal(
        *(m.generate(**prompts(), max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (plain, model))
    )
    with pytest.raises(QuantKitError, match="kv int8: kv_pages: head_dim is 24"):
        quantkit.optimize(tiny("odd", None, torch.float32), kv="int8")


@pytest.mark.parametrize("kv", ["bf16", *QUANTIZED])
def test_bytes_of_a_cache(kv):
    model = quantkit.optimize(tiny("llama", None, torch.bfloat16), kv=kv)
    cache = model.new_cache(3, 2 * PAGE_SIZE - 1)
    # 2 layers, 2 heads of 16, keys and values; 8 bits: a scale of 4 bytes; 4 bits: one and a middle in 2 bytes each
    of_token = (
        2 * 2 * {"bf16": 2 * 16 * 2, "int8": 2 * (16 + 4), "fp8": 2 * (16 + 4), "int4": 2 * (8 + 4)}[kv]
    )
    assert cache.nbytes == of_token * 3 * 2 * PAGE_SIZE


def test_scores_that_nothing_changes_are_not_copied():
    class Same(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            assert scores.dtype == torch.float32
            return scores

    model = quantkit.optimize(tiny("llama", None, torch.bfloat16))
    options = dict(max_new_tokens=14, do_sample=False, pad_token_id=0)
    chosen = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decode, "greedy", lambda scores: (chosen.append(scores), scores.argmax(-1))[1])
        found = model.generate(**prompts(), **options)
        assert {scores.dtype for scores in chosen} == {torch.bfloat16}
        assert torch.equal(model.generate(**prompts(), **options, logits_processor=[Same()]), found)


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["bf16", *QUANTIZED])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_a_replayed_step_is_the_step(scheme, kind, kv):
    model = quantkit.optimize(tiny(kind, scheme, torch.bfloat16).cuda(), kv=kv)
    ids = prompts()["input_ids"].cuda()
    caches = [model.new_cache(3, 40) for _ in range(2)]
    decoder = decode.Decoder(model, caches[0])
    with torch.no_grad():
        for cache in caches:
            tokens = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
        for _ in range(10):
            logits = decoder.step(tokens)
            expected = model(tokens[:, None], past_key_values=caches[1], use_cache=True).logits[:, -1]
            assert torch.equal(logits, expected)
            assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
            tokens = logits.argmax(-1)
    assert caches[0].columns == caches[1].columns


@pytest.mark.gpu
def test_generate_on_a_gpu_gives_the_same_tokens_call_after_call():
    plain, model = (tiny("llama", None, torch.float32).cuda() for _ in range(2))
    quantkit.optimize(model)
    given = {name: value.cuda() for name, value in prompts().items()}
    expected = plain.generate(**given, max_new_tokens=14, pad_token_id=0, do_sample=False)
    for _ in range(2):
        assert torch.equal(
            model.generate(**given, max_new_tokens=14, pad_token_id=0, do_sample=False), expected
        )
    assert model.kept_cache.captured is not None
