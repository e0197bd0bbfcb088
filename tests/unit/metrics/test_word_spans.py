"""Words among tokens, and entities among tags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from support import tiny_lm

from distilpeft.metrics.word_spans import entities, first_tokens, spans_of


def test_words_are_the_parts_between_spaces():
    text = "Ada  Lovelace,\twrote\n"
    assert [text[start:end] for start, end in spans_of(text)] == ["Ada", "Lovelace,", "wrote"]


def test_a_words_token_is_its_first_and_special_tokens_are_none():
    words = [(0, 3), (4, 12), (13, 14)]
    offsets = [(0, 0), (0, 3), (4, 6), (6, 10), (10, 12), (13, 14), (0, 0)]
    assert first_tokens(words, offsets) == ([0, 1, 2], [1, 2, 5])


def test_words_that_were_cut_off_or_are_not_read_have_no_token():
    assert first_tokens([(0, 3), (4, 7), (8, 11)], [(0, 0), (0, 3), (4, 5), (0, 0)]) == ([0, 1], [1, 2])
    assert first_tokens([(0, 3), (4, 5), (6, 9)], [(0, 3), (6, 9)]) == ([0, 2], [0, 1])


def test_a_token_that_begins_with_the_space_belongs_to_the_word_behind_it():
    assert first_tokens([(0, 3), (4, 8)], [(0, 3), (3, 6), (6, 8)]) == ([0, 1], [0, 1])
    assert first_tokens([(0, 3), (4, 8)], [(0, 3), (3, 4), (4, 8)]) == ([0, 1], [0, 2])


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1), min_size=1))
def test_with_a_byte_level_tokenizer_every_word_has_the_token_that_begins_it(words):
    text = " ".join(words)
    read = tiny_lm.tokenizer()(text, return_offsets_mapping=True)
    spans, at = [], 0
    for word in words:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    kept, tokens = first_tokens(spans, read["offset_mapping"])
    assert kept == list(range(len(words)))
    for (start, end), token in zip(spans, tokens, strict=True):
        first, last = read["offset_mapping"][token]
        assert start - 1 <= first <= start < last <= end


TAGS = st.lists(st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]), min_size=1, max_size=12)


@given(st.lists(st.tuples(TAGS, st.randoms(use_true_random=False)), min_size=1, max_size=6))
def test_f1_over_entities_is_that_of_seqeval(rows):
    there = [tags for tags, _ in rows]
    told = [[rng.choice(["O", "B-PER", "I-PER", "I-LOC"]) for _ in tags] for tags, rng in rows]
    found = sum(len(set(entities(one)) & set(entities(two))) for one, two in zip(there, told, strict=True))
    both = sum(len(entities(one)) + len(entities(two)) for one, two in zip(there, told, strict=True))
    assert 2 * found / max(both, 1) == pytest.approx(f1_score(there, told, zero_division=0) if both else 0)


def test_tags_without_positions_are_entities_of_a_word_each():
    assert entities(["NOUN", "NOUN", "O", "VERB"]) == [("NOUN", 0, 0), ("NOUN", 1, 1), ("VERB", 3, 3)]
