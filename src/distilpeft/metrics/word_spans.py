"""Where words are among a tokenizer's tokens: by character offsets, which all fast tokenizers tell; torch-free.

A text's words are its parts between spaces. So a list of words is joined by spaces and read as any text is: training,
the deployed model and its users' own code find the same tokens.

    S  tokens    W  words
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[int, int]
"""First character, and the one after the last."""


def spans_of(text: str) -> list[Span]:
    """The words of a text."""
    return [found.span() for found in re.finditer(r"\S+", text)]


def first_tokens(words_W: Sequence[Span], offsets_S: Sequence[Span]) -> tuple[list[int], list[int]]:
    """The first token of each word.

    Args:
        words_W: where the words are, in their order.
        offsets_S: where the tokens are, in their order; special tokens and padding are at (0, 0).

    Returns:
        For every word that has a token: its index, and the token's. Others were cut off, or are made of characters that
        the tokenizer does not read.
    """
    kept, at, token = [], [], 0
    for word, (start, end) in enumerate(words_W):
        while token < len(offsets_S) and (offsets_S[token][1] <= start or offsets_S[token][0] == offsets_S[token][1]):
            token += 1
        if token == len(offsets_S):
            break
        if offsets_S[token][0] < end:
            kept.append(word)
            at.append(token)
    return kept, at


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of a row of tags: type, first word, last word; by seqeval, as conlleval counts them.

    Tags without B-, I- and their kin are entities of one word each, but for O.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    if all(tag == "O" or tag[1:2] == "-" for tag in tags):
        return [(str(kind), int(first), int(last)) for kind, first, last in get_entities(list(tags))]
    return [(tag, at, at) for at, tag in enumerate(tags) if tag != "O"]
