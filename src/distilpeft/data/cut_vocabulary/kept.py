"""Which tokens of a tokenizer a task needs. Torch-free; works on the JSON of the library tokenizers.

What keeps the encoding of every counted text, by kind of model:

- WordPiece takes the longest piece that fits, again and again. If all pieces that it took are kept, they are still the
  longest that fit, since none was added. A word stays unknown, too: it has a character that is no piece, and trained
  vocabularies have no longer piece with such a character.
- BPE applies the merge of lowest rank that there is. The merges inside a piece are the same in every word that the
  piece comes out of, since one across its edge would have been applied first. So all merges on the way to each piece
  are kept, with what they give; any further merges of the original may be there as well, in the original order.
- Unigram takes the path of highest score. It is still there, no better one was added, and unknown characters cost what
  they did: a fixed amount below the lowest score, whose piece is kept.

Other texts need something to fall back to: single characters (see `_letters`), and all bytes where pieces are bytes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.errors import InputError
from distilpeft.machine.files import JsonObject
from distilpeft.recipe.student import Vocabulary

MODELS = ("WordPiece", "BPE", "Unigram", "WordLevel")
"""Kinds of tokenizers that can be cut."""
Merge = tuple[str, str]


def check_kind(spec: JsonObject, name: str) -> None:
    """Refuse a tokenizer that cannot be cut.

    Args:
        spec: its tokenizer.json.
        name: of the model, for the message.

    Raises:
        InputError: names its kind.
    """
    kind = spec["model"].get("type", "unknown")
    if kind not in MODELS:
        raise InputError(
            f"student.vocabulary: the tokenizer of {name} is of the kind {kind}; only {', '.join(MODELS)} can be cut"
        )
    if spec["model"].get("dropout"):
        raise InputError(f"student.vocabulary: the tokenizer of {name} merges at random (dropout); it cannot be cut")


def pieces_of(model: JsonObject) -> dict[str, int]:
    """Piece → id of a tokenizer's model, without added tokens."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces and scores in the order of their ids
        return {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def merges_of(model: JsonObject) -> list[Merge]:
    """The merges of a BPE model in their order; older files have each as one text."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def kept_ids(
    spec: JsonObject, counts_V: NDArray[np.int64], extra: Collection[int], settings: Vocabulary
) -> NDArray[np.int64]:
    """The ids to keep, ascending.

    Args:
        spec: the tokenizer's tokenizer.json.
        counts_V: how often each id occurs in the texts.
        extra: ids that are kept whether they occur or not, such as special tokens.
        settings: what the recipe asks for.

    Raises:
        InputError: the tokens that have to be kept are more than the recipe allows.
    """
    model = spec["model"]
    pieces = pieces_of(model)
    used = {piece: int(counts_V[index]) for piece, index in pieces.items() if index < len(counts_V) and counts_V[index]}
    always = {token["id"] for token in spec["added_tokens"]} | set(extra)
    always |= {pieces[piece] for piece in _fallbacks(spec, pieces, used)}
    if settings.max_size is not None and len(always) > settings.max_size:
        raise InputError(
            f"student.vocabulary.max_size: {settings.max_size} tokens are not enough for special tokens and single "
            f"characters alone, which are {len(always)}; raise it"
        )
    ways = _Merges(model, pieces) if model["type"] == "BPE" else None
    ids = set(always)
    for piece in sorted(used, key=lambda piece: (-used[piece], pieces[piece])):
        if used[piece] < settings.min_count:
            break
        more = {pieces[part] for part in ((piece,) if ways is None else ways.parts(piece))} - ids
        if settings.max_size is not None and len(ids) + len(more) > settings.max_size:
            break
        ids |= more
    return np.array(sorted(ids), dtype=np.int64)


def _fallbacks(spec: JsonObject, pieces: Mapping[str, int], used: Collection[str]) -> set[str]:
    """Pieces of which any text can be made, as far as the original could."""
    model = spec["model"]
    fallbacks = {token for token in (model.get("unk_token"),) if token in pieces}
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        names = [piece for piece, _ in model["vocab"]]
        fallbacks.add(names[int(np.argmin(scores))])  # what an unknown character costs follows from it
        if model.get("unk_id") is not None:
            fallbacks.add(names[model["unk_id"]])
    if model["type"] == "WordLevel":
        return fallbacks
    if model.get("byte_fallback"):
        fallbacks |= {f"<0x{byte:02X}>" for byte in range(256)} & pieces.keys()
    if _reads_bytes(spec):
        from tokenizers.pre_tokenizers import ByteLevel

        return fallbacks | (set(ByteLevel.alphabet()) & pieces.keys())
    return fallbacks | _letters(model, pieces, used)


def _reads_bytes(spec: JsonObject) -> bool:
    """Whether the model's characters stand for bytes."""

    def kinds(part: Any) -> Iterable[str]:
        if isinstance(part, dict):
            yield str(part.get("type"))
            for inner in (*part.get("pretokenizers", ()), *part.get("normalizers", ())):
                yield from kinds(inner)

    return "ByteLevel" in {*kinds(spec.get("pre_tokenizer")), *kinds(spec.get("normalizer"))}


def _letters(model: JsonObject, pieces: Mapping[str, int], used: Collection[str]) -> set[str]:
    """Single characters, wherever in a word: those of all scripts that used pieces have, and digits, signs, symbols."""
    scripts = {_script(letter) for piece in used for letter in _bare(piece, model)}
    singles = ((piece, _bare(piece, model)) for piece in pieces)
    return {piece for piece, bare in singles if len(bare) == 1 and _script(bare) in scripts | {""}}


def _bare(piece: str, model: JsonObject) -> str:
    """A piece without what marks its place in a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    piece = piece.removesuffix(suffix) if len(piece) > len(suffix) else piece
    return piece.removeprefix(prefix) if len(piece) > len(prefix) else piece


def _script(letter: str) -> str:
    """The script of a letter: the first word of its name in Unicode, which never changes; "" for other characters."""
    return unicodedata.name(letter, "").partition(" ")[0] if unicodedata.category(letter)[0] in "LM" else ""


class _Merges:
    """How the pieces of a BPE model come about."""

    def __init__(self, model: JsonObject, pieces: Mapping[str, int]) -> None:
        self._model, self._pieces = model, pieces
        self._prefix, self._suffix = (
            model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")
        )
        self._ranks = {merge: rank for rank, merge in enumerate(merges_of(model))}
        self._ways: dict[str, list[Merge]] = {}
        for merge in self._ranks:
            self._ways.setdefault(joined(merge, self._prefix), []).append(merge)
        self._parts: dict[str, frozenset[str]] = {}

    def parts(self, piece: str) -> frozenset[str]:
        """The piece, and all that is merged on the way to it."""
        if piece not in self._parts:
            ways = self._ways.get(piece, [])
            if len(ways) > 1:  # mostly there is one
                self._parts[piece] = self._walk(piece)
            else:
                halves = [half for merge in ways for half in merge]
                self._parts[piece] = frozenset({piece}).union(*map(self.parts, halves))
        return self._parts[piece]

    def _walk(self, piece: str) -> frozenset[str]:
        """The same, by merging.

        A piece that no merges lead to stands alone: whole words may be taken without merging (`ignore_merges`).
        """
        symbols = self._symbols(piece)
        parts = {piece, *symbols}
        while len(symbols) > 1:
            ranked = [(self._ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in self._ranks]
            if not ranked:
                return frozenset({piece})
            _, at = min(ranked)
            symbols[at : at + 2] = [joined((symbols[at], symbols[at + 1]), self._prefix)]
            parts.add(symbols[at])
        return frozenset(parts) if symbols == [piece] and parts <= self._pieces.keys() else frozenset({piece})

    def _symbols(self, piece: str) -> list[str]:
        """The characters that a piece begins as."""
        inside = self._prefix and piece.startswith(self._prefix) and len(piece) > len(self._prefix)
        last = self._suffix and piece.endswith(self._suffix) and len(piece) > len(self._suffix)
        symbols = [self._prefix + letter for letter in _bare(piece, self._model)]
        if symbols and not inside:
            symbols[0] = symbols[0].removeprefix(self._prefix)
        if symbols and last:
            symbols[-1] += self._suffix
        return symbols


def joined(merge: Merge, prefix: str) -> str:
    """What a merge gives: the mark of a piece inside a word is dropped between the two."""
    return merge[0] + merge[1].removeprefix(prefix)
