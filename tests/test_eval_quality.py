import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantkit.errors import QuantKitError
from quantkit.eval import divergence as divergence_module
from quantkit.eval import perplexity as perplexity_module
from quantkit.eval.divergence import divergence
from quantkit.eval.perplexity import negative_log_likelihood, windows
from quantkit.eval.quality import evaluate, quality_record

VOCABULARY = 96


def tiny_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,  # the default of 0.02 leaves the distributions flat
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def exact(model: LlamaForCausalLM, tokens: torch.Tensor, window: int) -> tuple[list[torch.Tensor], float]:
    """Log-probabilities in float64 a window, and the perplexity they give."""
    logs, losses = [], []
    for start in range(0, len(tokens) - window + 1, window):
        piece = tokens[start : start + window]
        with torch.no_grad():
            log_p = model(piece[None]).logits[0].double().log_softmax(-1)
        logs.append(log_p)
        losses += [-log_p[s, piece[s + 1]].item() for s in range(window - 1)]
    return logs, math.exp(sum(losses) / len(losses))


def softmax_bound(model: LlamaForCausalLM, tokens: torch.Tensor, window: int) -> float:
    """Rounding of a float32 log-softmax: eps for each of the V terms' sum, and for the largest magnitude met."""
    largest = max(log.abs().max().item() for log in exact(model, tokens, window)[0])
    return torch.finfo(torch.float32).eps * (VOCABULARY + 4 * largest)


def test_windows_do_not_overlap_and_drop_the_partial_tail():
    cut = windows(torch.arange(35), window=10)
    assert torch.equal(cut, torch.arange(30).view(3, 10))
    assert torch.equal(windows(torch.arange(35)[None], window=10, limit=2), cut[:2])


def test_a_text_of_exactly_one_window_loses_nothing():
    assert windows(torch.arange(10), window=10).shape == (1, 10)


def test_a_text_shorter_than_a_window_is_one_short_window():
    assert torch.equal(windows(torch.arange(7), window=10), torch.arange(7)[None])


@pytest.mark.parametrize(
    ("length", "window", "limit", "message"),
    [(1, 10, None, "has 1 tokens"), (20, 1, None, "window is 1"), (20, 10, 0, "0 windows")],
)
def test_nothing_to_predict_is_an_error(length, window, limit, message):
    with pytest.raises(QuantKitError, match=message):
        windows(torch.arange(length), window, limit)


def test_perplexity_equals_a_float64_computation():
    model, tokens = tiny_model(), text(70)
    quality = evaluate(model, tokens, window=32)
    expected = exact(model, tokens, 32)[1]
    worst = abs(quality.perplexity / expected - 1) / softmax_bound(model, tokens, 32)
    assert worst <= 1, f"error is {worst:.2f}x the rounding bound"
    assert (quality.windows, quality.window, quality.predictions) == (2, 32, 62)
    assert quality.kl is quality.top1 is quality.ratio is None


def test_divergence_equals_a_float64_computation():
    model, other, tokens = tiny_model(0), tiny_model(1), text(64)
    quality = evaluate(model, tokens, window=32, against=other)
    q, p = torch.cat(exact(model, tokens, 32)[0]), torch.cat(exact(other, tokens, 32)[0])
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    # each term p (log p - log q) carries the rounding of two log-softmaxes, and p sums to 1
    bound = softmax_bound(model, tokens, 32) + softmax_bound(other, tokens, 32) * (1 + expected)
    worst = abs(quality.kl - expected) / bound
    assert worst <= 1, f"error is {worst:.2f}x the rounding bound"
    assert quality.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert quality.reference_perplexity == evaluate(other, tokens, window=32).perplexity
    assert quality.ratio == quality.perplexity / quality.reference_perplexity


def test_a_model_does_not_diverge_from_itself():
    model = tiny_model()
    quality = evaluate(model, text(64), window=32, against=model)
    assert (quality.kl, quality.top1, quality.ratio) == (0, 1, 1)


def test_the_reference_comes_first_in_the_divergence():
    p = torch.tensor([[0.5, 0.5]]).log()
    q = torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergence(p, q)[0] == pytest.approx(expected, rel=8 * torch.finfo(torch.float32).eps)


def test_a_token_that_both_models_rule_out_adds_nothing():
    logits = torch.tensor([[0.0, -math.inf]])
    assert divergence(logits, logits) == (0, 1)


def test_chunking_changes_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 33, VOCABULARY, generator=generator)
    tokens = text(33)
    whole = negative_log_likelihood(a, tokens), divergence(a, b)
    monkeypatch.setattr(perplexity_module, "CHUNK", 5 * VOCABULARY)  # chunks of 5 positions, the last shorter
    assert divergence_module.chunks is perplexity_module.chunks
    assert [part.stop - part.start for part in perplexity_module.chunks(33, VOCABULARY)] == [5] * 6 + [3]
    pieces = negative_log_likelihood(a, tokens), divergence(a, b)
    # only the order of the float64 sum differs
    assert pieces[0] == pytest.approx(whole[0], rel=33 * torch.finfo(torch.float64).eps)
    assert pieces[1] == pytest.approx(whole[1], rel=33 * torch.finfo(torch.float64).eps)


def test_the_window_is_clipped_to_the_context_and_the_record_says_so():
    quality = evaluate(tiny_model(), text(130), window=1024)
    assert (quality.window, quality.windows) == (64, 2)
    assert quality.notes == ("window clipped from 1024 to the model's context of 64 tokens",)


def test_a_short_text_is_evaluated_and_the_record_says_so():
    quality = evaluate(tiny_model(), text(20), window=32)
    assert (quality.window, quality.windows, quality.predictions) == (20, 1, 19)
    assert "fewer than one window of 32" in quality.notes[0]


def test_the_protocol_states_the_method():
    model = tiny_model().to(torch.bfloat16)
    quality = evaluate(model, text(64), window=32, against=tiny_model())
    assert quality.protocol == (
        "2 non-overlapping windows of 32 tokens (stride 32), 62 predictions, no BOS added, bfloat16, against float32"
    )
    assert quality.to_dict()["protocol"] == quality.protocol


def test_progress_counts_windows_and_the_training_mode_comes_back():
    model, seen = tiny_model().train(), []
    evaluate(model, text(130), window=32, limit=3, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert model.training


def test_two_vocabularies_cannot_be_compared():
    with pytest.raises(QuantKitError, match="96 tokens and the reference 80"):
        evaluate(tiny_model(), text(64), window=32, against=tiny_model(vocab_size=80))


def test_tokens_of_another_tokenizer_are_named():
    with pytest.raises(QuantKitError, match="token 96, the model's vocabulary 96"):
        evaluate(tiny_model(), torch.full((64,), 96), window=32)


def test_nan_logits_are_an_error_not_a_figure():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(QuantKitError, match="not finite in window 0"):
        evaluate(model, text(64), window=32)


def test_the_record_has_figures_sizes_and_conditions(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    quality = evaluate(model, text(64), window=32)
    record = quality_record(
        quality,
        model,
        name="tiny",
        scheme="float32",
        method=None,
        text="random",
        folder=tmp_path,
        commit="abc1234",
    )
    assert record["perplexity"] == quality.perplexity
    assert record["bits_per_weight"] is None
    assert record["disk_bytes"] > record["memory_bytes"] / 2
    assert {"protocol", "stride", "window", "device", "torch", "date"} <= set(record)
    json.dumps(record, allow_nan=False)
