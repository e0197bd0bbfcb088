"""Answers as stretches of a text: the best one that a model's scores allow, and how near it is to the right ones.

Torch-free: training scores and deployed models find answers by the same code.

    S  tokens of a window
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
PUNCTUATION = set(string.punctuation)


@dataclass(frozen=True)
class Span:
    """A stretch of tokens.

    Attributes:
        score: logit of its start plus logit of its end.
        start: first token.
        end: last token.
    """

    score: float
    start: int
    end: int


def best_span(start_S: Floats, end_S: Floats, inside_S: NDArray[np.bool_], longest: int) -> Span | None:
    """The likeliest stretch of at most `longest` tokens, all of them inside; None if there is none.

    Args:
        start_S: logits of the first token.
        end_S: logits of the last.
        inside_S: tokens of the text that the answer stands in, one stretch without gaps.
        longest: tokens of an answer.
    """
    places = np.flatnonzero(inside_S)
    if not len(places):
        return None
    first, last = int(places[0]), int(places[-1]) + 1
    starts, ends = (array[first:last].astype(np.float64) for array in (start_S, end_S))
    best: Span | None = None
    for more in range(min(longest, len(starts))):
        sums = starts[: len(starts) - more] + ends[more:]
        at = int(sums.argmax())
        if best is None or sums[at] > best.score:
            best = Span(float(sums[at]), first + at, first + at + more)
    return best


Window = tuple[Floats, NDArray[np.bool_]]
"""Logits of start and end [2, S], and which tokens belong to the text."""


def choose(windows: Iterable[Window], longest: int, *, no_answer: bool) -> tuple[int, Span] | None:
    """The best stretch of all windows of a text.

    Args:
        windows: of one question, in their order.
        longest: tokens of an answer.
        no_answer: whether there may be none: then the first token, [CLS], stands for that, and if it is likelier in
            every window than any stretch is in one, there is none (arXiv:1810.04805, section 4.3).

    Returns:
        The window's number and the stretch in it; None for no answer.
    """
    best: tuple[int, Span] | None = None
    nothing = np.inf
    for number, (logits_2S, inside_S) in enumerate(windows):
        span = best_span(logits_2S[0], logits_2S[1], inside_S, longest)
        nothing = min(nothing, float(logits_2S[:, 0].sum()))
        if span is not None and (best is None or span.score > best[1].score):
            best = (number, span)
    return None if no_answer and best is not None and nothing > best[1].score else best


def normalised(answer: str) -> str:
    """An answer as SQuAD compares it: small letters, no punctuation, no articles, single spaces (arXiv:1606.05250)."""
    text = "".join(letter for letter in answer.lower() if letter not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones; without a right one, if it is none."""
    return float(any(normalised(answer) == normalised(one) for one in right or [""]))


def f1(answer: str, right: Sequence[str]) -> float:
    """F1 over words with the right answer that is nearest; where either is empty, 1 if both are."""
    return max(_f1(normalised(answer).split(), normalised(one).split()) for one in right or [""])


def _f1(one: list[str], two: list[str]) -> float:
    if not one or not two:
        return float(one == two)
    both = sum((Counter(one) & Counter(two)).values())
    return 2 * both / (len(one) + len(two))
