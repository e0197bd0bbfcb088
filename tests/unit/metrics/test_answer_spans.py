"""The best stretch of a text against trying all of them, and SQuAD's scores against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilpeft.metrics.answer_spans import best_span, choose, exact, f1, normalised


@given(st.integers(1, 12), st.integers(0, 4), st.integers(1, 14), st.integers(0, 2**32 - 1))
def test_the_best_span_is_the_best_of_all(size, before, longest, seed):
    rng = np.random.default_rng(seed)
    start, end = rng.normal(size=(2, before + size + 2))
    inside = np.zeros(before + size + 2, dtype=bool)
    inside[before : before + size] = True
    all_spans = [
        (start[s] + end[e], s, e)
        for s in range(before, before + size) for e in range(s, min(s + longest, before + size))
    ]  # fmt: skip
    found = best_span(start, end, inside, longest)
    assert (found.score, found.start, found.end) == pytest.approx(max(all_spans))


def window(answer, score, nothing):
    """Five tokens, [CLS] and four of the text, of which `answer` has this score."""
    logits = np.full((2, 5), -9.0)
    logits[:, 0], logits[:, answer] = nothing / 2, score / 2
    return logits, np.array([False, True, True, True, True])


def test_the_best_window_wins_and_none_if_all_of_them_say_so():
    windows = [window(1, 2.0, 5.0), window(3, 4.0, 3.0)]
    number, span = choose(windows, 3, no_answer=True)
    assert (number, span.start, span.end) == (1, 3, 3)
    assert choose([window(1, 2.0, 5.0), window(3, 4.0, 4.5)], 3, no_answer=True) is None
    assert choose([window(1, 2.0, 5.0), window(3, 4.0, 4.5)], 3, no_answer=False) is not None


def test_a_window_without_text_has_no_span():
    assert best_span(np.zeros(3), np.zeros(3), np.zeros(3, dtype=bool), 5) is None


def test_answers_are_compared_as_squad_does():
    assert normalised("The  Analytical Engine,") == "analytical engine"
    assert exact("an Engine", ["the engine!"]) == 1
    assert exact("engines", ["engine", "an engine"]) == 0
    assert f1("the analytical engine of Babbage", ["Analytical Engine", "Babbage"]) == pytest.approx(2 * 2 / (4 + 2))
    assert f1("x", ["y"]) == 0


def test_no_answer_is_right_where_there_is_none_and_wrong_where_there_is_one():
    assert (exact("", []), f1("", [])) == (1, 1)
    assert (exact("x", []), f1("x", [])) == (0, 0)
    assert (exact("", ["x"]), f1("", ["x"])) == (0, 0)
