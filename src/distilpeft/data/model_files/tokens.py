"""What a model's tokenizer makes of the recipe's texts, by its files: words that it knows, tokens that have embeddings.

transformers makes an empty tokenizer out of a folder without one, and adds tokens to a tokenizer without adding rows to
the embeddings; both are seen here before any weight is loaded. Torch-free: only tokenizer.json is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from distilpeft.data.sources import Source, adapter_shapes, has_vocabulary, is_gguf, model_config, model_folder
from distilpeft.errors import InputError
from distilpeft.machine.files import read_json

SAMPLED_TEXTS = 200
"""Training rows whose texts show whether a tokenizer knows their words."""
SAMPLED_LETTERS = 10_000
"""Of each of these texts."""
UNREADABLE, NOTED = 0.5, 0.01
"""Shares of texts that a tokenizer does not know: above the first it is refused, above the second a line says so."""
BYTES_ALONE = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer", "BltTokenizer")
"""Tokenizers that need no vocabulary."""
Spans = Sequence[tuple[int, int]]


def check_tokenizer_files(source: Source, key: str) -> None:
    """Refuse a local model folder without a tokenizer; transformers would make one that knows no word.

    Raises:
        InputError: names the folder and the way out.
    """
    folder = source.reader.path
    if folder is None or is_gguf(source) or has_vocabulary(folder):
        return
    settings = _settings(folder)
    if settings.get("tokenizer_class") in BYTES_ALONE or "auto_map" in settings:
        return
    raise InputError(
        f"{key}: {folder} has no tokenizer files (tokenizer.json, vocab.txt, ...), so every word would be unknown; "
        "save the model's tokenizer there, too (tokenizer.save_pretrained)"
    )


def _settings(folder: Path) -> Mapping[str, object]:
    file = folder / "tokenizer_config.json"
    return read_json(file, "the tokenizer's configuration is damaged") if file.is_file() else {}


def longest_text(source: Source) -> int | None:
    """The length at which a model's tokenizer cuts texts, if its files name one."""
    folder = model_folder(source.reader)
    length = _settings(folder).get("model_max_length") if folder is not None and folder.is_dir() else None
    return int(length) if isinstance(length, int | float) and math.isfinite(length) else None


def embedding_rows(source: Source, overrides: Mapping[str, object] | None = None) -> int | None:
    """Rows of a model's embedding matrix, those that an adapter brings instead of its base's; None if unknown here.

    Args:
        source: the model.
        overrides: what `student.from_config` changes in its configuration.
    """
    config = model_config(source)
    if config is None:
        return None
    if source.adapter is not None:
        names = (".embed_tokens.weight", ".word_embeddings.weight", ".wte.weight", ".shared.weight")
        own = [shape[0] for name, shape in adapter_shapes(source.adapter).items() if name.endswith(names)]
        if own:
            return own[0]
    config = {**config, **(overrides or {})}
    parts = [config, *(config.get(name) for name in ("text_config", "encoder", "decoder"))]
    rows = [
        part["vocab_size"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int)
    ]
    return min(rows, default=None)


def embedding_units(config: Mapping[str, Any]) -> int | None:
    """Units of a word embedding by a model's configuration; ALBERT and small ELECTRAs have fewer than hidden ones."""
    config = config.get("text_config") or config
    names = ("embedding_size", "hidden_size", "dim", "n_embd", "d_model")
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


@lru_cache(maxsize=4)
def _core_of(file: Path, changed_ns: int) -> tuple[Any, int | None, int]:
    """The tokenizer in a file, the id of what it does not know, and its size; large ones take half a second to read."""
    del changed_ns  # so that a file that was written again is read again
    from tokenizers import Tokenizer

    try:
        text = file.read_text(encoding="utf-8")
        core, model = Tokenizer.from_str(text), json.loads(text)["model"]
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    core.no_truncation()
    core.no_padding()
    token = model.get("unk_token")
    unknown = core.token_to_id(token) if isinstance(token, str) else model.get("unk_id")
    return core, unknown, 1 + max(core.get_vocab(with_added_tokens=True).values(), default=-1)


@dataclass(frozen=True)
class Words:
    """A tokenizer that was read from its tokenizer.json.

    Attributes:
        core: of the library tokenizers.
        unknown: the id of what it does not know; None if it knows everything.
        size: the largest id and one.
        special: kind of special token (`pad_token`, `eos_token`) → its text.
    """

    core: Any
    unknown: int | None
    size: int
    special: Mapping[str, str]

    @staticmethod
    def of(source: Source) -> Words | None:
        """The tokenizer of a model; None if there is no tokenizer.json on this machine."""
        folder = model_folder(source.reader)
        file = folder / "tokenizer.json" if folder is not None else None
        if folder is None or file is None or not file.is_file():
            return None
        return Words(*_core_of(file, file.stat().st_mtime_ns), _special(folder))


def _special(folder: Path) -> dict[str, str]:
    """Special tokens as text; in older layouts they are in a file of their own."""
    older = folder / "special_tokens_map.json"
    damage = "the tokenizer's special tokens are damaged"
    settings = {**(read_json(older, damage) if older.is_file() else {}), **_settings(folder)}
    tokens = {}
    for name in ("pad_token", "eos_token"):
        entry = settings.get(name)
        token = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def unknown_share(texts: Iterable[str], words: Words) -> tuple[float, float, str]:
    """How much of some texts a tokenizer does not know; see `share_of`."""
    cut = (text[:SAMPLED_LETTERS] for text in texts)
    encodings = ((text, words.core.encode(text, add_special_tokens=False)) for text in cut)
    return share_of(((text, encoding.ids, encoding.offsets) for text, encoding in encodings), words.unknown)


def share_of(encodings: Iterable[tuple[str, Sequence[int], Spans]], unknown: int | None) -> tuple[float, float, str]:
    """How much of some texts is read as the unknown token, or not at all.

    Args:
        encodings: each text with its token ids and where in the text each stands.
        unknown: the id of what the tokenizer does not know.

    Returns:
        The share of characters, blanks aside, that are in unknown tokens; the share that is in no token; the first
        piece of text that is unknown.
    """
    total, lost, dropped, first = 0, 0, 0, ""
    for text, ids, spans in encodings:
        strange = {
            at for token, (begin, end) in zip(ids, spans, strict=True) if token == unknown for at in range(begin, end)
        }
        reached = {at for begin, end in spans for at in range(begin, end)}
        positions = {at for at, letter in enumerate(text) if not letter.isspace()}
        total += len(positions)
        lost += len(positions & strange)
        dropped += len(positions - reached)
        if not first and strange:
            begin, end = next(span for token, span in zip(ids, spans, strict=True) if token == unknown)
            first = text[begin:end]
    return lost / max(total, 1), dropped / max(total, 1), first


def refuse_unreadable(shares: tuple[float, float, str], source: Source, key: str, count: int) -> str | None:
    """A caution about texts of which a tokenizer does not know a part.

    Raises:
        InputError: it does not know most of them.
    """
    lost, dropped, first = shares
    what = f"the tokenizer of {source.reader.name}"
    if lost + dropped > UNREADABLE:
        raise InputError(
            f"{key}: {what} does not know {lost + dropped:.0%} of the characters of the first {count} training texts"
            f"{f' (such as {first[:20]!r})' if first else ''}; take a model for texts like these"
        )
    if lost > NOTED:
        return (
            f"{key}: {what} does not know {lost:.1%} of the characters of the first {count} training texts, such as "
            f"{first[:20]!r}; the model sees all of them as one token"
        )
    return None


@dataclass(frozen=True)
class Unembedded:
    """Tokens of a model's tokenizer for which it has no embedding.

    Attributes:
        name: the model.
        words: its tokenizer.
        rows: of its embedding matrix.
    """

    name: str
    words: Words
    rows: int

    def fault(self, texts: Iterable[str], limit: int | None) -> str | None:
        """Which token of a row's texts has no embedding, if any; of each text the first `limit` tokens count."""
        for text in texts:
            encoding = self.words.core.encode(text)
            token = next((token for token in encoding.ids[:limit] if token >= self.rows), None)
            if token is not None:
                return f"holds {self.what(token)}"
        return None

    def what(self, token: int) -> str:
        """A token without an embedding, in words."""
        return without_row(self.name, self.words.core.id_to_token(token), token, self.words.size, self.rows)


def without_row(name: str, text: str, token: int, size: int, rows: int) -> str:
    """A token without an embedding, in words."""
    return (
        f"the token {text!r} (id {token}), for which {name} has no embedding: its tokenizer has {size} tokens, its "
        f"embedding matrix {rows} rows (resize_token_embeddings adds them)"
    )


def unembedded(source: Source, model: Source, overrides: Mapping[str, object] | None = None) -> Unembedded | None:
    """The tokens without an embedding, of a tokenizer and a model; None if there are none, or the files are not here.

    Args:
        source: whose tokenizer is read.
        model: whose embeddings are looked up.
        overrides: see `embedding_rows`.
    """
    rows = embedding_rows(model, overrides)
    words = Words.of(source) if rows is not None else None
    if words is None or rows is None or words.size <= rows:
        return None
    return Unembedded(model.name, words, rows)


def strings(cell: object) -> Iterator[str]:
    """All texts in a cell: itself, or those of its lists and mappings."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, Mapping):
        for entry in cell.values():
            yield from strings(entry)
    elif isinstance(cell, list | tuple):
        for entry in cell:
            yield from strings(entry)
