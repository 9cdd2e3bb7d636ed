"""Held-out windows share nothing with the calibration; figures from hidden states are those of the whole models."""

import copy

import pytest
import torch

from quantkit.calibration.data import pack_tokens
from quantkit.eval import held_out, perplexity
from quantkit.eval.held_out import drift, final_divergence, head_of, held_out_windows
from quantkit.eval.quality import evaluate
from quantkit.models import decoder_blocks


class Words:
    """A tokenizer whose tokens are numbers in the text, or of other words their lengths."""

    eos_token_id = 0

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, documents, add_special_tokens=False, verbose=True):
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        number = lambda word: int(word) if word.isdecimal() else len(word)
        return {"input_ids": [prefix + [number(word) for word in d.split()] for d in documents]}


def text(words: int, documents: int) -> list[str]:
    numbers = torch.randint(3, 500, (documents, words), generator=torch.Generator().manual_seed(0))
    return [" ".join(map(str, row.tolist())) for row in numbers]


def runs(rows: torch.Tensor, length: int) -> set[tuple[int, ...]]:
    return {tuple(r[i : i + length]) for r in rows.tolist() for i in range(len(r) - length + 1)}


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("window", [64, 40, 100])  # as calibrated, out of step with it, and longer
def test_held_out_windows_are_of_the_text_and_not_of_the_calibration(bos, window):
    tokenizer, documents = Words(bos), text(333, 20)
    calibration = pack_tokens(tokenizer, documents, samples=12, seq_len=64)
    found, of_text = held_out_windows(tokenizer, iter(documents), calibration, 4, window)
    assert of_text
    assert found.shape == (4, window)
    assert len({tuple(row) for row in found.tolist()}) == 4
    if bos is not None:
        assert (found[:, 0] == bos).all()
    own = found[:, bos is not None :]
    assert not runs(own, held_out.RUN) & runs(calibration, held_out.RUN)
    stream = [token for ids in tokenizer(documents)["input_ids"] for token in [*ids, 0]]
    assert runs(own, own.shape[1]) <= runs(torch.tensor([stream]), own.shape[1])


def test_a_text_that_was_used_up_gives_way_to_the_one_that_python_carries():
    tokenizer, documents = Words(), text(100, 2)
    calibration = pack_tokens(tokenizer, documents, samples=99, seq_len=20, allow_short=True)
    for source in (documents, None):
        found, of_text = held_out_windows(tokenizer, source, calibration, 3, 20)
        assert not of_text
        assert found.shape == (3, 20)
        assert found.max() < 100  # lengths of words


@torch.no_grad()
def last_hidden(model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What leaves the last decoder block, in batches of two."""
    found = []
    keep = lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    handle = decoder_blocks(model)[1][-1].register_forward_hook(keep)
    for batch in tokens.split(2):
        model(batch, use_cache=False)
    handle.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("positions", [1000, 7, 1])  # logits of so many at a time
def test_figures_from_hidden_states_are_those_of_the_whole_models(architecture, positions, tiny, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK", positions * 128)
    changes = {"final_logit_softcapping": 2.0} if architecture == "gemma2" else {}
    original = tiny(architecture, torch.float32, **changes)
    changed = copy.deepcopy(original)
    for name, parameter in changed.named_parameters():
        if "layers" in name or "norm" in name or "lm_head" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    windows = torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(2))
    heads = [head_of(model, decoder_blocks(model)[1]) for model in (original, changed)]
    found = final_divergence(
        heads[0],
        last_hidden(original, windows),
        last_hidden(changed, windows),
        windows,
        "random tokens",
        vocabulary=128,
        quantized_head=heads[1],
    )
    expected = evaluate(changed, windows.flatten(), 24, original)
    assert expected.kl > 1e-3
    for name in ("kl", "perplexity", "reference_perplexity", "top1", "windows", "window"):
        # both are made in float32, in another order
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=2e-4), name
    assert len(found.kl_by_position) == 24
    assert sum(found.kl_by_position) / 24 == pytest.approx(found.kl)
    assert original(windows[:1]).logits.shape == (1, 24, 128)  # its blocks are its own again


def test_positions_are_gathered_in_at_most_so_many_bins(tiny, monkeypatch):
    monkeypatch.setattr(held_out, "BINS", 8)
    model = tiny("llama", torch.float32)
    windows = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(2))
    hidden = last_hidden(model, windows)
    noise = torch.zeros_like(hidden[0])
    noise[:, 15:18] = 1.0
    noise[:, :, ::2] *= -1
    head = head_of(model, decoder_blocks(model)[1])
    found = final_divergence(head, hidden, [hidden[0] + noise], windows, "", vocabulary=128)
    assert [kl > 1e-4 for kl in found.kl_by_position] == [False] * 5 + [True] + [False] * 2
    assert found.kl == pytest.approx(sum(found.kl_by_position) / 8)


def test_drift_is_relative_and_over_all_batches():
    hidden = [torch.ones(2, 3, 4), 3 * torch.ones(1, 3, 4)]
    assert drift(hidden, hidden) == 0
    # 24 values off by 0.5, 12 by 0: sqrt(6 / (24 + 108))
    assert drift(hidden, [hidden[0] + 0.5, hidden[1]]) == pytest.approx((6 / 132) ** 0.5)
    assert drift([torch.zeros(1, 1, 1)], [torch.zeros(1, 1, 1)]) == 0
