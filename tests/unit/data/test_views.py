"""Changed copies of rows: what is changed, what never is, and that they are the same in every run."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distilpeft.data.views import MASK, filled, split, views
from distilpeft.recipe.data import Views

NOTHING = {"mask": 0, "replace": 0, "crop": 0, "splice": 0}
ROWS = [
    ("the film has a superb cast and a dull story", "an hour too long"),
    ("what a  waste\nof a good actor .", "great"),
    ("music and scenes that stay", "so they say"),
]
WORDS = [{word for text in texts for word in text.split()} for texts in zip(*ROWS, strict=True)]


def only(copies: int = 50, **settings: float) -> Views:
    return Views(copies=copies, **{**NOTHING, **settings})


def copies_of(row: int, made: list, copies: int = 50) -> list:
    return made[row * copies : (row + 1) * copies]


def is_part(few: list[str], many: list[str]) -> bool:
    return any(many[at : at + len(few)] == few for at in range(len(many) - len(few) + 1))


def test_masks_take_about_their_share_of_words_and_leave_the_others_where_they_are():
    made = views(ROWS, only(mask=0.3), 0)
    masked = total = 0
    for row, texts in enumerate(ROWS):
        for copy in copies_of(row, made):
            for text, changed in zip(texts, copy, strict=True):
                pairs = list(zip(text.split(), changed.split(), strict=True))
                assert all(new in (old, MASK) for old, new in pairs)
                masked += sum(new == MASK for _, new in pairs)
                total += len(pairs)
    assert abs(masked / total - 0.3) < 0.05


def test_white_space_stays_as_it_is():
    spaces = "".join(filter(str.isspace, ROWS[1][0]))
    for copy in copies_of(1, views(ROWS, only(mask=0.3, replace=0.3), 0)):
        assert "".join(filter(str.isspace, copy[0])) == spaces


def test_replaced_words_come_from_the_same_column_of_other_rows():
    made = views(ROWS, only(replace=0.5), 0)
    for row, texts in enumerate(ROWS):
        for copy in copies_of(row, made):
            for column, (text, changed) in enumerate(zip(texts, copy, strict=True)):
                assert len(changed.split()) == len(text.split())
                assert set(changed.split()) <= WORDS[column]
    assert any(copy != ROWS[0] for copy in copies_of(0, made))


def test_a_crop_is_a_part_of_half_the_words_or_more():
    lengths = Counter()
    for copy in copies_of(0, views(ROWS, only(crop=1), 0)):
        words = copy[0].split()
        assert is_part(words, ROWS[0][0].split())
        lengths[len(words)] += 1
    assert set(lengths) <= set(range(5, 11))
    assert len(lengths) > 3


def test_a_splice_begins_like_its_row_and_ends_like_another():
    seen = set()
    for copy in copies_of(0, views(ROWS, only(splice=1), 0)):
        words = copy[0].split()
        kept = next((at for at, word in enumerate(words) if word != (*ROWS[0][0].split(), *[""] * 20)[at]), len(words))
        rest = words[kept:]
        assert kept >= 1
        assert any(rest == texts[0].split()[len(texts[0].split()) - len(rest) :] for texts in ROWS)
        seen.add(" ".join(rest))
    assert len(seen) > 5


def test_texts_of_a_pair_are_cropped_and_spliced_together_with_one_other_row():
    rows = [(f"a{row} b{row} c{row} d{row}", f"w{row} x{row} y{row} z{row}") for row in range(9)]
    for copy in views(rows, only(splice=1), 3):
        sources = [{word[1:] for word in text.split()} for text in copy]
        assert len(sources[0] | sources[1]) <= 2


def test_views_depend_on_seed_row_and_number_alone():
    settings = Views(copies=6)
    made = views(ROWS, settings, 7)
    assert made == views(ROWS, settings, 7)
    assert made != views(ROWS, settings, 8)
    fewer = views(ROWS, Views(copies=2), 7)
    assert [copy for row in range(3) for copy in copies_of(row, made, 6)[:2]] == fewer
    alone = only(mask=0.3, crop=0.5)
    assert views(ROWS[:1], alone, 7) == copies_of(0, views(ROWS, alone, 7))


def test_python_s_random_numbers_are_those_of_the_first_run():
    """A change of them would change every artifact that learnt from views."""
    assert random.Random("0 1 2").random() == pytest.approx(0.9822062841, abs=1e-9)


TEXT = st.text(min_size=1).filter(lambda text: text.strip() and MASK not in text)
CELL = st.one_of(TEXT, st.lists(st.text("ab\u4e2d", min_size=1, max_size=3), min_size=1, max_size=6))


@given(st.lists(TEXT, min_size=1, max_size=5), st.integers(0, 99))
def test_a_view_of_a_text_is_a_text_that_can_be_used(texts, seed):
    for (changed,) in views([(text,) for text in texts], Views(mask=0.4, replace=0.4, crop=0.5, splice=0.5), seed):
        assert changed.strip()
        assert changed.replace(MASK, "").strip()


@given(st.text())
def test_words_put_together_are_the_text(text):
    assert "".join(split(text)) == text.lstrip()


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 99))
def test_words_of_tags_stay_whole_words(rows, seed):
    for (words,) in views([(row,) for row in rows], Views(mask=0.4, replace=0.4, crop=0.5, splice=0.5), seed):
        assert words
        assert all(word in ("a", "b", "c", MASK) for word in words)


def test_texts_without_spaces_are_changed_character_by_character():
    assert split("我 love 你们。") == ["我 ", "love ", "你", "们", "。"]
    (copy,) = views([("我们喜欢这部电影",)], only(1, mask=0.5), 0)
    assert len(copy[0]) == 8
    assert MASK in copy[0]


def test_words_that_come_together_get_a_space_but_characters_do_not():
    rows = [("a b c",), ("x y z",)]
    assert all(len(word) == 1 for copy in views(rows, only(splice=1), 0) for word in copy[0].split())
    assert all(" " not in copy[0] for copy in views([("你好",), ("电影",)], only(splice=1), 0))


def test_a_mask_becomes_the_tokenizer_s_own():
    assert filled(f"a {MASK} b", "[MASK]") == "a [MASK] b"
    assert filled(["a", MASK], "<mask>") == ["a", "<mask>"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (NOTHING, "would all equal their rows"),
        ({"mask": 0.6, "replace": 0.5}, "mask \\+ replace"),
        ({"copies": 0}, "greater"),
    ],
)
def test_views_that_make_no_sense_are_refused(settings, why):
    with pytest.raises(ValidationError, match=why):
        Views(**settings)
