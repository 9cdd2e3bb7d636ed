import copy
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from quantkit.calibration.data import (
    evaluation_text,
    pack_tokens,
    sample_from_model,
    text_source,
    tokens_sha256,
)
from quantkit.errors import QuantKitError

LM = Path(__file__).parents[1] / "examples" / "lm-7m"


class Letters:
    """A tokenizer whose tokens are the letters' code points; a BOS, if it has one, begins every text."""

    eos_token_id = 0

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, documents, add_special_tokens=False, verbose=True):
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [prefix + [ord(c) for c in d] for d in documents]}


def test_windows_cut_the_documents_in_order_with_an_end_of_text_after_each():
    tokens = pack_tokens(Letters(), ["abc", "de", "fg"], samples=2, seq_len=5)
    assert sorted(tokens.tolist()) == [[97, 98, 99, 0, 100], [101, 0, 102, 103, 0]]


def test_every_window_begins_with_the_bos_of_tokenizers_that_put_one_before_a_text():
    tokens = pack_tokens(Letters(bos=1), "abcdef", samples=3, seq_len=3)
    assert sorted(tokens.tolist()) == [[1, 97, 98], [1, 99, 100], [1, 101, 102]]


def test_the_choice_of_windows_is_seeded():
    pack = lambda seed: pack_tokens(Letters(), "".join(map(chr, range(50, 900))), 10, 8, seed)
    assert torch.equal(pack(1), pack(1))
    assert not torch.equal(pack(1), pack(2))
    assert len({tuple(window) for window in pack(1).tolist()}) == 10


def test_a_huge_source_is_not_read_to_its_end():
    def documents():
        for _ in range(1000):
            yield "x" * 99
        raise AssertionError("read too far")

    assert pack_tokens(Letters(), documents(), samples=4, seq_len=100).shape == (4, 100)


def test_a_short_text_is_refused_unless_that_is_allowed():
    words = (
        r"has 30 tokens, but 8 sequences of 10 need 80; .* or take the 3 that there are with --allow-short"
    )
    with pytest.raises(QuantKitError, match=words):
        pack_tokens(Letters(), "x" * 29, samples=8, seq_len=10)
    assert pack_tokens(Letters(), "x" * 29, samples=8, seq_len=10, allow_short=True).shape == (3, 10)
    assert pack_tokens(Letters(), "x" * 79, samples=8, seq_len=10).shape == (8, 10)
    for allow_short in (False, True):
        with pytest.raises(QuantKitError, match=r"has 4 tokens, but 8 sequences of 10 need 80; .* seq_len$"):
            pack_tokens(Letters(), "abc", samples=8, seq_len=10, allow_short=allow_short)


def test_a_text_that_the_tokenizer_does_not_know_is_refused():
    tokenizer = Letters()
    tokenizer.unk_token, tokenizer.unk_token_id = "?", ord("?")
    assert len(pack_tokens(tokenizer, "ab?" * 10, samples=3, seq_len=10)) == 3
    with pytest.raises(
        QuantKitError, match=r"^65% of the text's tokens are \?; the tokenizer belongs to ano"
    ):
        pack_tokens(tokenizer, "a??" * 10, samples=3, seq_len=10)


def test_a_special_token_that_a_chat_template_wrote_is_not_doubled():
    tokens = pack_tokens(Letters(bos=1), ["\1ab", "cd\0", "\1ef\0"], samples=2, seq_len=5)
    assert sorted(tokens.tolist()) == [[1, 97, 98, 0, 99], [1, 100, 0, 101, 102]]


def test_a_file_is_split_at_separator_lines(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one\n<|endoftext|>\ntwo <|endoftext|> still two\n<|endoftext|>\n", encoding="utf-8")
    assert list(text_source(str(file))) == ["one\n", "two <|endoftext|> still two\n"]


def test_a_file_of_one_line_is_one_document(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one line without an end")
    assert list(text_source(str(file))) == ["one line without an end"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"caf\xe9", "byte 3 is not UTF-8"),
        (b"\x7fELF\x02\x00\x00", "character 5 is NUL, so it is no text file"),
        ("text".encode("utf-16"), "byte 0 is not UTF-8"),
        (b"", "found no text in it"),
        (b" \n\n", "found no text in it"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, why):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    with pytest.raises(QuantKitError, match=f"text.txt: {why}"):
        text_source(str(file))


class Chats:
    """A tokenizer with a chat template, as far as `text_source` asks for one."""

    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        if messages[0]["role"] != "user":
            raise ValueError("the user speaks first\nalways")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hé"}]


def test_a_file_of_json_lines_has_a_row_a_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "one\ntwo", "id": 1}, {"messages": CHAT}, {"text": "both", "messages": CHAT}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "utf-8")
    assert list(text_source(str(file), Chats())) == ["one\ntwo", "<user>hi<assistant>hé", "both"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a"', "line 2: not JSON in UTF-8"),
        (b'{"text": "caf\xe9"}', "line 2: not JSON in UTF-8"),
        (b"\x00\x01", "line 2: not JSON in UTF-8"),
        (b'["a"]', "line 2: no column 'text' or 'messages'; its row is list"),
        (b'{"body": "a", "title": 1}', "line 2: no column .*; its columns are body, title"),
        (b'{"text": 5}', "line 2: 'text' is 5, expected a string"),
        (b'{"messages": []}', r"line 2: 'messages' is \[\], expected a list of \{role, content\}"),
        (b'{"messages": "hi"}', "line 2: 'messages' is hi, expected a list"),
        (b'{"messages": [{"role": "user"}]}', "line 2: 'messages' is .*, expected a list"),
        (
            b'{"messages": [{"role": "tool", "content": "a"}]}',
            r"line 2: the chat template refuses 'messages' \(ValueError: the user speaks first\)",
        ),
    ],
)
def test_a_line_at_fault_is_named(tmp_path, line, why):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(QuantKitError, match=f"rows.jsonl, {why}") as error:
        list(text_source(str(file), Chats()))
    assert "\n" not in str(error.value)


def test_json_lines_without_a_row_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n")
    with pytest.raises(QuantKitError, match=r"rows\.jsonl: found no row in it"):
        list(text_source(str(file)))


def test_chats_need_a_tokenizer_with_a_template(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    for tokenizer in (None, Letters()):
        with pytest.raises(QuantKitError, match=r"holds chats .*, but the tokenizer has no chat template"):
            list(text_source(str(file), tokenizer))


def test_the_chat_template_of_a_real_tokenizer_is_applied(lm, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    tokenizer = copy.deepcopy(lm[1])
    with pytest.raises(QuantKitError, match="no chat template"):
        list(text_source(str(file), tokenizer))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    assert list(text_source(str(file), tokenizer)) == ["[user] hi\n[assistant] hé\n"]
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(QuantKitError, match=r"refuses 'messages' \(TemplateError: no such role\)"):
        list(text_source(str(file), tokenizer))


@pytest.mark.parametrize("name", ["missing.txt", "no/such/file.txt", "wikitex", "a:b"])
def test_an_unknown_name_says_what_is_possible(name):
    with pytest.raises(QuantKitError, match=r"is not a file here; give a UTF-8 text file, wikitext, c4"):
        text_source(name)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets`: the calls it received, and the rows or the exception it answers with."""
    state = types.SimpleNamespace(calls=[], rows=[])

    def load_dataset(**where):
        state.calls.append(where)
        if isinstance(state.rows, Exception):
            raise state.rows
        return state.rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return state


def test_datasets_are_streamed_by_name_config_and_split(hub):
    hub.rows = [{"text": "a"}, {"text": "b"}]
    assert list(text_source("org/name")) == ["a", "b"]
    assert list(text_source("org/name:small:test")) == ["a", "b"]
    assert list(text_source("org/name::test")) == ["a", "b"]
    assert list(text_source("wikitext")) == ["ab"]  # its rows are lines
    assert hub.calls[:3] == [
        dict(path="org/name", split="train", streaming=True),
        dict(path="org/name", name="small", split="test", streaming=True),
        dict(path="org/name", split="test", streaming=True),
    ]


def test_chats_of_a_dataset_are_rendered(hub):
    hub.rows = [{"messages": CHAT, "id": 1}] * 2
    assert list(text_source("org/name", Chats())) == ["<user>hi<assistant>hé"] * 2


def test_dataset_failures_are_one_line_that_names_the_way_out(hub):
    hub.rows = ConnectionError("no route\nto host")
    with pytest.raises(
        QuantKitError, match=r"^dataset c4 cannot be read \(ConnectionError: no route\); name a UTF-8"
    ) as e:
        list(text_source("c4"))
    assert "\n" not in str(e.value)
    hub.rows = [{"body": "a", "title": "b"}]
    with pytest.raises(QuantKitError, match="no column 'text' or 'messages'; its columns are body, title"):
        list(text_source("org/name"))
    hub.rows = []
    with pytest.raises(QuantKitError, match="dataset org/name is empty"):
        list(text_source("org/name"))


@pytest.fixture(scope="module")
def lm():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(LM)


def test_a_real_tokenizer_gives_back_the_text(lm):
    text = evaluation_text()[:20000]
    tokens = pack_tokens(lm[1], text, samples=1000, seq_len=64, allow_short=True)
    assert tokens.dtype == torch.int64
    assert all(lm[1].decode(window) in text for window in tokens)


def test_samples_are_drawn_from_the_model(lm):
    model, _ = lm
    tokens = sample_from_model(model, samples=8, seq_len=48, seed=3)
    assert tokens.shape == (8, 48)
    assert (tokens[:, 0] == model.config.bos_token_id).all()
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    p = logits.log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1).flatten()
    variance = (p.exp() * p.square()).sum(-1).flatten() - entropy.square()
    # tokens drawn from p have -log p of that mean and variance; 4 standard errors
    assert (nll - entropy).sum().abs() <= 4 * variance.sum().sqrt()


def test_samples_depend_on_the_seed_alone(lm):
    a, b, c = (sample_from_model(lm[0], 3, 12, seed) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len(sample_from_model(lm[0], 5, 4, batch_size=2)) == 5


def test_sampling_tells_how_far_it_is(lm):
    told = []
    sample_from_model(lm[0], 3, 4, batch_size=2, on_token=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == [2, 4, 6, 8, 9, 10, 11, 12]
    assert {total for _, total in told} == {12}


def test_a_model_without_bos_starts_from_random_tokens(lm, monkeypatch):
    monkeypatch.setattr(lm[0].config, "bos_token_id", None)
    tokens = sample_from_model(lm[0], 6, 6)
    assert len(set(tokens[:, 0].tolist())) > 1
    with torch.no_grad():
        greedy = lm[0](tokens).logits.argmax(-1)
    assert torch.equal(tokens[:, 1:4], greedy[:, :3])


def test_hash_is_of_little_endian_int64():
    import hashlib

    expected = hashlib.sha256(b"\x01" + bytes(7) + b"\x00\x01" + bytes(6)).hexdigest()
    assert tokens_sha256(torch.tensor([[1], [256]])) == expected
    assert tokens_sha256(torch.tensor([[1], [256]], dtype=torch.int32)) == expected


def test_evaluation_text_is_long_and_the_same_every_time():
    assert len(evaluation_text()) > 100_000
    assert evaluation_text() == evaluation_text()
