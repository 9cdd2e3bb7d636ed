"""Calibration and evaluation text: where it comes from, and how it becomes windows of tokens.

A source is named by one string:

    self                          sampled from the model itself: no data needed
    path/to/text.txt              UTF-8; documents may be separated by a line <|endoftext|>
    path/to/rows.jsonl            a JSON object a line, with the columns of a dataset
    wikitext, c4                  WikiText-2 raw train; the first shard of C4's validation split
    org/name[:config][:split]     any dataset; its split 'train' by default

Rows have a column 'text', or chats in a column 'messages', a list of {role, content}, which the tokenizer's
chat template renders. The same source, tokenizer and seed give the same tokens; `tokens_sha256` tells whether two runs had them.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import QuantKitError

SEPARATOR = "<|endoftext|>"
DATASETS: dict[str, dict[str, Any]] = {
    "wikitext": dict(path="Salesforce/wikitext", name="wikitext-2-raw-v1", split="train"),
    "c4": dict(
        path="allenai/c4",
        data_files={"validation": "en/c4-validation.00000-of-00008.json.gz"},
        split="validation",
    ),
}
POOL = 16  # windows are drawn from the first POOL * samples ones, so a huge source is not read to its end
MOST_UNKNOWN = 0.5  # of a text's tokens that may be the unknown one
SAMPLED_AT_A_TIME = 32  # sequences
GREEDY = 3  # tokens after a random first one that are the likeliest: LLM-QAT, arXiv:2305.17888, section 2.1


def text_source(name: str, tokenizer: Any = None) -> Iterable[str]:
    """The documents of a file or a dataset. Datasets and .jsonl files are streamed.

    Args:
        name: see the head of this file.
        tokenizer: of transformers; renders chats, and is needed for them alone.

    Raises:
        QuantKitError: no such file or dataset, no text in it, not UTF-8, a row without text, or no network.
    """
    path = Path(name)
    if path.is_file():
        return json_lines(path, tokenizer) if path.suffix == ".jsonl" else file_documents(path)
    if name in DATASETS:
        return dataset_documents(name, DATASETS[name], tokenizer)
    parts = name.split(":")
    files = (".txt", ".md", ".jsonl")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", parts[0]) and len(parts) <= 3 and path.suffix not in files:
        where = dict(path=parts[0], split=parts[2] if len(parts) == 3 else "train")
        where |= dict(name=parts[1]) if parts[1:] and parts[1] else {}
        return dataset_documents(name, where, tokenizer)
    raise QuantKitError(
        f"text {name!r} is not a file here; give a UTF-8 text file, {', '.join(DATASETS)}, "
        "or a dataset as org/name[:config][:split]"
    )


def file_documents(path: Path) -> list[str]:
    """The documents of a text file, which lines <|endoftext|> separate."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QuantKitError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    if (zero := text.find("\0")) >= 0:
        raise QuantKitError(f"{path}: character {zero} is NUL, so it is no text file; give UTF-8 text")
    if not text.strip():
        raise QuantKitError(f"{path}: found no text in it, expected UTF-8 text; name another file")
    return [document for document in re.split(rf"^{re.escape(SEPARATOR)}\n?", text, flags=re.M) if document]


def json_lines(path: Path, tokenizer: Any) -> Iterator[str]:
    """The documents of a .jsonl file, a row a line."""
    rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise QuantKitError(f"{where}: not JSON in UTF-8 ({error}); mend the line") from None
            yield row_text(row, where, tokenizer)
            rows += 1
    if not rows:
        raise QuantKitError(f"{path}: found no row in it, expected a JSON object a line; name another file")


def dataset_documents(name: str, where: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """The texts of a dataset's rows; WikiText's rows are lines, so they make one document."""
    import datasets

    try:
        rows = datasets.load_dataset(**where, streaming=True)
        first = next(iter(rows), None)
        if first is None:
            raise QuantKitError(f"dataset {name} is empty; choose another split")
        texts = (row_text(row, f"dataset {name}", tokenizer) for row in rows)
        if name == "wikitext":
            yield "".join(texts)
        else:
            yield from texts
    except QuantKitError:
        raise
    except Exception as error:  # offline, gated, misspelt: hub, fsspec and datasets raise dozens of types
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise QuantKitError(
            f"dataset {name} cannot be read ({cause}); name a UTF-8 text file instead"
        ) from error


def row_text(row: Any, where: str, tokenizer: Any) -> str:
    """The column 'text' of a row, or its 'messages' as the tokenizer's chat template renders them.

    Raises:
        QuantKitError: neither column, not of that form, or a tokenizer without a chat template.
    """
    columns = row if isinstance(row, dict) else {}
    text, messages = columns.get("text"), columns.get("messages")
    if isinstance(text, str):
        return text
    if "text" in columns and messages is None:
        raise QuantKitError(f"{where}: 'text' is {str(text)[:60]}, expected a string; mend the row")
    if messages is None:
        found = f"columns are {', '.join(columns)}" if columns else f"row is {type(row).__name__}"
        raise QuantKitError(f"{where}: no column 'text' or 'messages'; its {found}; name other data")
    if not (isinstance(messages, list) and messages and all(map(is_message, messages))):
        raise QuantKitError(
            f"{where}: 'messages' is {str(messages)[:60]}, expected a list of {{role, content}}; mend the row"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise QuantKitError(
            f"{where}: holds chats ('messages'), but the tokenizer has no chat template; give rows with a 'text'"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (
        Exception
    ) as error:  # templates raise what they like: a role out of turn, a part that they don't know
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise QuantKitError(
            f"{where}: the chat template refuses 'messages' ({cause}); mend the row"
        ) from error


def is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def pack_tokens(
    tokenizer: Any,
    text: str | Iterable[str],
    samples: int,
    seq_len: int,
    seed: int = 0,
    allow_short: bool = False,
) -> torch.Tensor:
    """Cut text into windows of seq_len tokens and choose `samples` of them.

    Documents follow each other without padding, an end-of-text token after each that has none. When the
    tokenizer begins every text with a BOS, so does every window: many models keep an attention sink there.
    The BOS that chat templates write is left out for it.

    Args:
        tokenizer: of transformers, or any callable with eos_token_id and bos_token_id.
        text: one document, or several.
        samples: windows wanted.
        seq_len: tokens a window, the BOS included.
        seed: of the choice.
        allow_short: take fewer windows where the text does not give as many.

    Returns:
        int64 [samples, seq_len]; windows in the order in which they were drawn.

    Raises:
        QuantKitError: the text is too short, or most of it is unknown to the tokenizer.
    """
    documents = iter([text] if isinstance(text, str) else text)
    bos = [tokenizer.bos_token_id]
    bos = bos if encode(tokenizer, ["a"], add_special_tokens=True)[0][:1] == bos else []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    length = seq_len - len(bos)
    unknown, unknowns = getattr(tokenizer, "unk_token_id", None), 0
    ids: list[int] = []
    while len(ids) < POOL * samples * length and (batch := list(islice(documents, 64))):
        for document in encode(tokenizer, batch):
            unknowns += document.count(unknown) if unknown is not None else 0
            ids += document[len(bos) if document[:1] == bos else 0 :]
            ids += eos if document[-1:] != eos else []
    if unknowns > MOST_UNKNOWN * len(ids):
        raise QuantKitError(
            f"{unknowns / len(ids):.0%} of the text's tokens are {tokenizer.unk_token}; the tokenizer belongs to "
            "another model, or the text is in another language; name another text"
        )
    count = min(len(ids) // length, POOL * samples)
    if count < (1 if allow_short else samples):
        also = f", or take the {count} that there are with --allow-short" if count else ""
        raise QuantKitError(
            f"the text has {len(ids)} tokens, but {samples} sequences of {length} need {samples * length}; "
            f"give a longer text, fewer samples or a shorter seq_len{also}"
        )
    windows = torch.tensor(ids[: count * length]).view(count, length)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(len(chosen), -1), windows[chosen]], 1)


def encode(tokenizer: Any, documents: list[str], add_special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each document; verbose=False because no document is ever fed to the model whole."""
    return tokenizer(documents, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


@torch.no_grad()
def sample_from_model(
    model: Any,
    samples: int,
    seq_len: int,
    seed: int = 0,
    batch_size: int = SAMPLED_AT_A_TIME,
    temperature: float = 1.0,
    on_token: Callable[[int, int], None] = lambda done, total: None,
) -> torch.Tensor:
    """Calibration data without data: sequences drawn from the model's own distribution.

    As in LLM-QAT (Liu et al. 2023, arXiv:2305.17888, section 2.1), which found them to serve better than
    text from elsewhere. They start from the BOS; a model without one starts from a random token and
    continues greedily for GREEDY tokens before it samples, so that it finds its feet.

    The seed fixes a stream of uniform numbers on the CPU, whatever the model's device; equal tokens then
    need equal logits, that is the same device, dtype and PyTorch. `on_token` is told how many tokens of all
    sequences together are done, and how many there will be.

    Returns:
        int64 [samples, seq_len] on the CPU, BOS included.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    device = model.get_input_embeddings().weight.device
    bos = config.bos_token_id
    rows: list[torch.Tensor] = []
    for size in (min(batch_size, samples - i) for i in range(0, samples, batch_size)):
        if bos is None:
            token = torch.randint(config.vocab_size, (size, 1), generator=generator)
        else:
            token = torch.full((size, 1), bos)
        tokens, cache = [token.to(device)], None
        while len(tokens) < seq_len:
            on_token(seq_len * sum(map(len, rows)) + size * len(tokens), seq_len * samples)
            out = model(tokens[-1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            u = torch.rand(size, 1, generator=generator).to(device)
            if bos is None and len(tokens) <= GREEDY:
                tokens.append(logits.argmax(-1, keepdim=True))
                continue
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
            tokens.append(token.clamp(max=logits.shape[-1] - 1))
        rows.append(torch.cat(tokens, 1).cpu())
        on_token(seq_len * sum(map(len, rows)), seq_len * samples)
    return torch.cat(rows)


def evaluation_text() -> str:
    """About 140 kB of English prose that every CPython carries: the paragraphs of its language reference.

    Code, tables and lists are left out and lines are joined: a model of prose takes them for noise, and its
    perplexity would hang on a few odd tokens. The text differs a little between Python versions, so a figure
    measured on it names the version.
    """
    from pydoc_data.topics import topics

    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(" ".join(p.split()) for p in paragraphs if is_prose(p)))


def is_prose(paragraph: str) -> bool:
    """Sentences from the left margin: a capital first, a full stop or colon last, at least a dozen words."""
    indented = any(line.startswith("   ") for line in paragraph.splitlines())
    ends = paragraph.rstrip().endswith((".", ":"))
    return bool(re.match("[A-Z]", paragraph)) and ends and not indented and len(paragraph.split()) >= 12


def tokens_sha256(tokens: torch.Tensor) -> str:
    """Hex SHA-256 of the tokens as little-endian int64, row after row."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
