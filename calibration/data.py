"""Calibration and evaluation text: where it comes from, and how it becomes windows of tokens.

A source is named by one string:

    self                          sampled from the model itself: no data needed
    path/to/text.txt              UTF-8; documents may be separated by a line <|endoftext|>
    wikitext, c4                  WikiText-2 raw train; the first shard of C4's validation split
    org/name[:config][:split]     any dataset with a column 'text'; its split 'train' by default

The same source, tokenizer and seed give the same tokens; `tokens_sha256` tells whether two runs had them.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
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
GREEDY = 3  # tokens after a random first one that are the likeliest: LLM-QAT, arXiv:2305.17888, section 2.1


def text_source(name: str) -> Iterable[str]:
    """The documents of a file or a dataset. Datasets are streamed.

    Raises:
        QuantKitError: no such file or dataset, not UTF-8, or no network.
    """
    path = Path(name)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise QuantKitError(
                f"{name}: byte {error.start} is not UTF-8; convert the file to UTF-8"
            ) from None
        return [
            document for document in re.split(rf"^{re.escape(SEPARATOR)}\n?", text, flags=re.M) if document
        ]
    if name in DATASETS:
        return dataset_documents(name, DATASETS[name])
    parts = name.split(":")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", parts[0]) and len(parts) <= 3 and path.suffix not in (".txt", ".md"):
        where = dict(path=parts[0], split=parts[2] if len(parts) == 3 else "train")
        return dataset_documents(name, where | (dict(name=parts[1]) if parts[1:] and parts[1] else {}))
    raise QuantKitError(
        f"text {name!r} is not a file here; give a UTF-8 text file, {', '.join(DATASETS)}, "
        "or a dataset as org/name[:config][:split]"
    )


def dataset_documents(name: str, where: dict[str, Any]) -> Iterator[str]:
    """The rows of a dataset's column 'text'; WikiText's rows are lines, so they make one document."""
    import datasets

    try:
        rows = datasets.load_dataset(**where, streaming=True)
        first = next(iter(rows), None)
        if first is None:
            raise QuantKitError(f"dataset {name} is empty; choose another split")
        if "text" not in first:
            raise QuantKitError(f"dataset {name} has no column 'text'; its columns are {', '.join(first)}")
        if name == "wikitext":
            yield "".join(row["text"] for row in rows)
        else:
            yield from (row["text"] for row in rows)
    except QuantKitError:
        raise
    except Exception as error:  # offline, gated, misspelt: hub, fsspec and datasets raise dozens of types
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise QuantKitError(
            f"dataset {name} cannot be read ({cause}); name a UTF-8 text file instead"
        ) from error


def pack_tokens(
    tokenizer: Any, text: str | Iterable[str], samples: int, seq_len: int, seed: int = 0
) -> torch.Tensor:
    """Cut text into windows of seq_len tokens and choose `samples` of them.

    Documents follow each other without padding, an end-of-text token after each. When the tokenizer
    begins every text with a BOS, so does every window: many models keep an attention sink there.

    Args:
        tokenizer: of transformers, or any callable with eos_token_id and bos_token_id.
        text: one document, or several.
        samples: windows wanted; all of them, fewer than that, if the text is short.
        seq_len: tokens a window, the BOS included.
        seed: of the choice.

    Returns:
        int64 [samples, seq_len]; windows in the order in which they were drawn.

    Raises:
        QuantKitError: the text does not fill one window.
    """
    documents = iter([text] if isinstance(text, str) else text)
    bos = [tokenizer.bos_token_id]
    bos = bos if encode(tokenizer, ["a"], add_special_tokens=True)[0][:1] == bos else []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    length = seq_len - len(bos)
    ids: list[int] = []
    while len(ids) < POOL * samples * length and (batch := list(islice(documents, 64))):
        for document in encode(tokenizer, batch):
            ids += document + eos
    count = min(len(ids) // length, POOL * samples)
    if not count:
        raise QuantKitError(
            f"the text has {len(ids)} tokens, but one window needs {length}; give a longer text"
        )
    windows = torch.tensor(ids[: count * length]).view(count, length)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(len(chosen), -1), windows[chosen]], 1)


def encode(tokenizer: Any, documents: list[str], add_special_tokens: bool = False) -> list[list[int]]:
    """Token ids of each document; verbose=False because no document is ever fed to the model whole."""
    return tokenizer(documents, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


@torch.no_grad()
def sample_from_model(
    model: Any, samples: int, seq_len: int, seed: int = 0, batch_size: int = 32, temperature: float = 1.0
) -> torch.Tensor:
    """Calibration data without data: sequences drawn from the model's own distribution.

    As in LLM-QAT (Liu et al. 2023, arXiv:2305.17888, section 2.1), which found them to serve better than
    text from elsewhere. They start from the BOS; a model without one starts from a random token and
    continues greedily for GREEDY tokens before it samples, so that it finds its feet.

    The seed fixes a stream of uniform numbers on the CPU, whatever the model's device; equal tokens then
    need equal logits, that is the same device, dtype and PyTorch.

    Returns:
        int64 [samples, seq_len] on the CPU, BOS included.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    device = model.get_input_embeddings().weight.device
    bos = config.bos_token_id
    rows = []
    for size in (min(batch_size, samples - i) for i in range(0, samples, batch_size)):
        if bos is None:
            token = torch.randint(config.vocab_size, (size, 1), generator=generator)
        else:
            token = torch.full((size, 1), bos)
        tokens, cache = [token.to(device)], None
        while len(tokens) < seq_len:
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
