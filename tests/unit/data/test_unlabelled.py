"""Which labels a study keeps, and which rows without labels are left out."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilpeft.data.reading import read_unlabelled
from distilpeft.data.unlabelled import chosen_labels, not_held_out, unlabelled_digest
from distilpeft.errors import InputError
from distilpeft.recipe.data import Data, Unlabelled

CLASSES = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]


def test_every_class_keeps_its_share_and_at_least_one_label():
    kept = chosen_labels(CLASSES, 20, seed=0)
    assert Counter(CLASSES[row] for row in kept) == {"a": 12, "b": 6, "c": 1, "d": 1}
    assert list(kept) == sorted(set(kept.tolist()))


def test_the_choice_depends_on_its_seed_alone():
    assert list(chosen_labels(CLASSES, 20, 0)) == list(chosen_labels(CLASSES, 20, 0))
    assert list(chosen_labels(CLASSES, 20, 0)) != list(chosen_labels(CLASSES, 20, 1))


def test_a_smaller_budget_is_a_part_of_a_larger_one():
    classes = ["a"] * 50 + ["b"] * 50
    budgets = [set(chosen_labels(classes, count, 0).tolist()) for count in (10, 20, 50, 100)]
    assert all(one <= two for one, two in itertools.pairwise(budgets))
    assert budgets[-1] == set(range(100))


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60), st.data())
def test_exactly_as_many_are_kept_as_are_asked_for(classes, data):
    count = data.draw(st.integers(len(set(classes)), len(classes)))
    kept = chosen_labels(classes, count, 3)
    assert len(kept) == count
    found, there = Counter(classes[row] for row in kept), Counter(classes)
    for name in there:
        share = count * there[name] / len(classes)
        assert max(1, share - len(there)) <= found[name] <= min(there[name], share + len(there))


@pytest.mark.parametrize(
    ("count", "why"),
    [(101, "101 labels are to be kept, but there are 100 training rows"), (3, "fewer than the 4 classes")],
)
def test_a_budget_that_cannot_be_kept_is_refused(count, why):
    with pytest.raises(InputError, match=why):
        chosen_labels(CLASSES, count, 0)


def test_rows_that_models_are_judged_on_are_found_in_other_case_and_with_other_spaces():
    texts = ["A good film", "a  GOOD film ", "another film", ("Who?", "he"), b"abc"]
    held_out = ["a good\tfilm", ("who? ", "He"), b"abc"]
    assert list(not_held_out(texts, held_out)) == [False, False, True, False, False]


@pytest.fixture
def _rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"body": f"text {number}", "kind": "ab"[number % 2]} for number in range(10)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(**settings):
    origins = []

    def check(rows, places):
        origins.extend(places.of(index) for index in range(len(rows)))
        return rows.select_columns(["text"])

    rows, _ = read_unlabelled(Unlabelled(source="more.jsonl", **settings), check, {"body": "text"})
    return rows["text"][:], origins


@pytest.mark.usefixtures("_rows")
def test_rows_come_under_the_names_of_the_main_source_with_their_own_numbers():
    texts, origins = read(where={"kind": "b"}, rows="train[2:8]")
    assert texts == ["text 3", "text 5", "text 7"]
    assert origins == ["more.jsonl: row 4", "more.jsonl: row 6", "more.jsonl: row 8"]


@pytest.mark.usefixtures("_rows")
def test_a_random_choice_is_the_same_each_time():
    texts, origins = read(max_rows=4)
    assert len(texts) == 4
    assert (texts, origins) == read(max_rows=4)
    assert origins == [f"more.jsonl: row {int(text.split()[1]) + 1}" for text in texts]
    assert read(max_rows=100)[0] == [f"text {number}" for number in range(10)]


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rows": "train[5"}, r"data\.unlabelled\.rows: cannot slice"),
        ({"rows": "unsupervised"}, r"data\.unlabelled\.rows: cannot slice .*has train \(10 rows\)"),
        ({"where": {"kind": "z"}}, r"data\.unlabelled\.where: no row of more\.jsonl"),
        ({"where": {"sort": "z"}}, r"data\.unlabelled\.where\.sort: no such column"),
        ({"source": "none.csv"}, r"data\.unlabelled\.source: "),
        ({"config": "en"}, r"data\.unlabelled\.config: a configuration is for hub data sets"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_own_key(settings, why):
    with pytest.raises(InputError, match=why):
        read_unlabelled(Unlabelled(**{"source": "more.jsonl", **settings}), lambda rows, places: rows, {"body": "text"})


@pytest.mark.usefixtures("_rows")
def test_columns_may_change_places():
    seen = []

    def check(rows, places):
        seen.append(rows[0])
        return rows

    read_unlabelled(Unlabelled(source="more.jsonl", max_rows=1), check, {"body": "kind", "kind": "body"})
    (row,) = seen
    assert row["kind"].startswith("text")
    assert row["body"] in "ab"


@pytest.mark.usefixtures("_rows")
def test_a_missing_column_is_named_with_those_that_are_there():
    with pytest.raises(InputError, match=r"data\.unlabelled: more\.jsonl has no column 'title'; its columns are"):
        read_unlabelled(Unlabelled(source="more.jsonl"), lambda rows, places: rows, {"title": "text"})


@pytest.mark.usefixtures("_rows")
def test_the_digest_follows_the_file_and_the_settings(tmp_path):
    def digest(**settings):
        return unlabelled_digest(Data(source="x.csv", split={}, unlabelled={"source": "more.jsonl", **settings}))

    assert unlabelled_digest(Data(source="x.csv", split={})) is None
    first = digest()
    assert first == digest() != digest(max_rows=3)
    (tmp_path / "more.jsonl").write_text('{"body": "other", "kind": "a"}\n')
    assert digest() != first


def test_not_held_out_takes_many_rows_in_a_blink():
    texts = [f"text {number}" for number in range(20_000)]
    assert np.sum(list(not_held_out(texts, texts[:5]))) == 19_995
