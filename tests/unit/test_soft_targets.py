"""Soft targets: found by row id, resumed after an interruption, refused for anything they were not made for."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from distilpeft.artifact import artifact
from distilpeft.errors import InputError
from distilpeft.soft_targets import SoftTargets, Writer, binding, rows_digest
from distilpeft.tasks.text_classification import FEATURES

BOUND = {"teacher": "t1", "base": "b1", "weights": "w1", "tokenizer": "k1", "rows": "r1"}
LOGITS = np.random.default_rng(0).normal(0, 4, (11, 3)).astype(np.float32)


def fill(folder, start=0, stop=11, step=4, bound=BOUND):
    writer = Writer(folder, len(LOGITS), 3, bound)
    for begin in range(start, stop, step):
        writer.append(LOGITS[begin : min(begin + step, stop)])
    return writer


def test_logits_come_back_by_row_id_in_any_order(tmp_path):
    fill(tmp_path).close()
    store = SoftTargets(tmp_path, BOUND)
    order = np.random.default_rng(1).permutation(len(LOGITS))
    for batch in (order[:5], order[5:], np.array([3, 3, 0])):
        np.testing.assert_array_equal(store.lookup(batch), np.stack([LOGITS[i] for i in batch]))
    assert store.lookup(order).dtype == np.float32


def test_a_row_that_is_not_in_the_store_is_an_error(tmp_path):
    fill(tmp_path).close()
    with pytest.raises(IndexError):
        SoftTargets(tmp_path, BOUND).lookup(np.array([len(LOGITS)]))


def test_a_writer_goes_on_where_an_interrupted_one_stopped(tmp_path):
    stopped = fill(tmp_path, stop=8)
    del stopped
    writer = Writer(tmp_path, len(LOGITS), 3, BOUND)
    assert writer.done == 8
    writer.append(LOGITS[8:])
    writer.close()
    np.testing.assert_array_equal(SoftTargets(tmp_path, BOUND).lookup(np.arange(11)), LOGITS)


def test_a_writer_that_was_stopped_before_its_first_rows_starts_at_the_beginning(tmp_path):
    Writer(tmp_path, len(LOGITS), 3, BOUND)
    assert Writer(tmp_path, len(LOGITS), 3, BOUND).done == 0


def test_a_writer_for_another_teacher_starts_at_the_beginning(tmp_path):
    fill(tmp_path, stop=8)
    writer = Writer(tmp_path, len(LOGITS), 3, {**BOUND, "teacher": "t2"})
    assert writer.done == 0
    writer.append(-LOGITS)
    writer.close()
    np.testing.assert_array_equal(SoftTargets(tmp_path, {"teacher": "t2"}).lookup(np.arange(11)), -LOGITS)


def test_a_writer_for_another_teacher_that_is_stopped_before_its_first_rows_inherits_no_progress(tmp_path):
    fill(tmp_path, stop=8)
    other = {**BOUND, "teacher": "t2"}
    Writer(tmp_path, len(LOGITS), 3, other)
    assert Writer(tmp_path, len(LOGITS), 3, other).done == 0


def test_a_store_with_missing_rows_cannot_be_finished(tmp_path):
    with pytest.raises(AssertionError, match="missing rows"):
        fill(tmp_path, stop=8).close()


@pytest.mark.parametrize("name", list(BOUND))
def test_a_store_of_something_else_is_refused_with_both_sides_named(tmp_path, name):
    fill(tmp_path).close()
    with pytest.raises(InputError) as caught:
        SoftTargets(tmp_path, {**BOUND, name: "other9"})
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: ")
    assert f"{name} {BOUND[name]}" in message
    assert "other9" in message


def test_a_folder_without_a_store_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"bound\.json: cannot be read"):
        SoftTargets(tmp_path, BOUND)


def tokens(ids=((1, 5, 2), (1, 6, 7, 2), (1, 2)), labels=(0, 1, 0)):
    lengths = [len(row) for row in ids]
    columns = {
        "input_ids": [list(row) for row in ids],
        "label": list(labels),
        "num_tokens": lengths,
        "truncated": [False] * len(ids),
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


@pytest.mark.parametrize(
    "other",
    [
        tokens(ids=((1, 5, 2), (1, 6, 8, 2), (1, 2))),
        tokens(labels=(0, 1, 1)),
        tokens(ids=((1, 5, 2), (1, 6, 7), (2, 1, 2))),
        tokens(ids=((1, 6, 7, 2), (1, 5, 2), (1, 2)), labels=(1, 0, 0)),
        tokens(ids=((1, 5, 2), (1, 6, 7, 2)), labels=(0, 1)),
    ],
    ids=["token", "label", "boundary", "order", "fewer"],
)
def test_the_digest_of_rows_changes_with_any_token_label_boundary_or_order(other):
    assert rows_digest(other) != rows_digest(tokens())


def test_the_digest_of_rows_does_not_depend_on_how_they_are_stored():
    one = rows_digest(tokens())
    assert rows_digest(tokens()) == one
    parts = [tokens().select([i]) for i in range(3)]
    assert rows_digest(datasets.concatenate_datasets(parts)) == one
    assert rows_digest(tokens().select([2, 1, 0]).select([2, 1, 0])) == one


def test_the_digest_of_many_rows_does_not_depend_on_how_they_are_stored():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 99, rng.integers(2, 6)).tolist() for _ in range(10_500)]
    whole = tokens(rows, rng.integers(0, 2, len(rows)).tolist())
    halves = [whole.select(range(4321)), whole.select(range(4321, len(rows)))]
    assert rows_digest(datasets.concatenate_datasets(halves).flatten_indices()) == rows_digest(whole)
    changed = whole.select([*range(10_499), 0])
    assert rows_digest(changed) != rows_digest(whole)


def teacher(folder, base="base-1", weights=b"weights", text=b"log"):
    made = artifact(folder, "teacher", 1, {}, {"base": base})
    made.partial.mkdir(parents=True)
    (made.partial / "adapter.safetensors").write_bytes(weights)
    (made.partial / "log.txt").write_bytes(text)
    made.publish({}, {})
    return made


def test_targets_are_bound_to_the_teacher_its_weights_the_tokenizer_and_the_rows(tmp_path):
    plain = binding(teacher(tmp_path / "a"), tokens(), "k1")
    assert plain["base"] == "base-1"
    assert binding(teacher(tmp_path / "b", text=b"other log"), tokens(), "k1") == plain
    assert binding(teacher(tmp_path / "c", weights=b"other"), tokens(), "k1")["weights"] != plain["weights"]
    other_base = binding(teacher(tmp_path / "d", base="base-2"), tokens(), "k1")
    assert other_base["teacher"] != plain["teacher"]
    assert binding(teacher(tmp_path / "e"), tokens(labels=(1, 1, 1)), "k2") == {
        **plain, "tokenizer": "k2", "rows": rows_digest(tokens(labels=(1, 1, 1))),
    }  # fmt: skip
