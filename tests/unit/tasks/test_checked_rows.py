"""Rows with and without labels, read as a run reads them: what is kept and left out, and that no label gets through."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from support import commands, pupils, tiny, tiny_tasks

from distilpeft.data.labels import LABEL
from distilpeft.data.views import MASK
from distilpeft.errors import InputError
from distilpeft.models.pair import Pair
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks import text_rows
from distilpeft.tasks.checked_rows import UNLABELLED, VIEWS
from distilpeft.tasks.rows import TAUGHT, TaskData, TaskRows, read_task_rows, task_of

KINDS = tuple(kind for kind in pupils.KINDS if kind != "embedding")


def read(recipe: Path, *changes: str) -> TaskRows:
    return read_task_rows(load_recipe(recipe, list(changes)))


def write(file: Path, rows: list[tuple[str, ...]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(rows)
    return file


@pytest.fixture
def moods(tmp_path) -> Path:
    """A recipe with 20 texts, of which every fifth has no label."""
    recipe = commands.workspace(tmp_path)
    rows = [(f"text number {at}", "" if at % 5 == 4 else str(at % 2)) for at in range(20)]
    write(tmp_path / "rows.csv", [("text", "label"), *rows])
    return recipe


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_labels_strips_all_others_in_every_kind_of_task(tmp_path, kind):
    recipe = pupils.workspace(tmp_path / kind, kind, labelled=12)
    loaded = load_recipe(recipe)
    every = loaded.model_copy(update={"data": loaded.data.model_copy(update={"labelled": None})})
    found, plain = read_task_rows(loaded), read_task_rows(every)
    assert len(found.splits["train"]) == 12
    assert len(found.splits["train"]) + len(found.splits[UNLABELLED]) + found.held_out == len(plain.splits["train"])
    for split in ("validation", "test"):
        assert found.splits[split][:] == plain.splits[split][:]
    stripped = found.splits[UNLABELLED]
    if LABEL in stripped.column_names:
        blanks = {json.dumps(label if not isinstance(label, list) else sorted(set(label))) for label in stripped[LABEL]}
        assert len(blanks) == 1, "nothing of a label is left"
    assert "answers" not in stripped.column_names


WORDED = tuple(kind for kind in KINDS if kind not in ("causal_lm", "seq2seq", "image_classification"))


@pytest.mark.parametrize("kind", WORDED)
def test_views_are_rows_without_labels_that_equal_no_other_row(tmp_path, kind):
    recipe = load_recipe(pupils.workspace(tmp_path / kind, kind, labelled=12, data__views={"copies": 3}))
    task, splits = task_of(recipe), read_task_rows(recipe).splits
    made, taught = splits[VIEWS], [*task.texts(splits["train"]), *task.texts(splits[UNLABELLED])]
    assert 0.5 * 3 * len(taught) < len(made) <= 3 * len(taught)
    texts = list(task.texts(made))
    others = {*taught, *task.texts(splits["validation"]), *task.texts(splits["test"])}
    assert len(set(texts)) == len(texts)
    assert not set(texts) & others
    assert made.features == splits[UNLABELLED].features
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    found = task.encode(made[:], tokenizer, 64)
    ids = [number for row in found["input_ids"] for number in row]
    assert tokenizer.convert_tokens_to_ids("[MASK]") in ids
    assert not any(MASK in word for word in tokenizer.convert_ids_to_tokens(ids))


def test_views_that_all_equal_other_rows_leave_none(tmp_path):
    recipe = commands.workspace(tmp_path, data__views={"copies": 2, "mask": 0, "replace": 0, "crop": 1, "splice": 0})
    write(tmp_path / "rows.csv", [("text", "label"), *((f"word{at}", str(at % 2)) for at in range(20))])
    loaded = load_recipe(recipe)
    assert VIEWS not in read_task_rows(loaded).splits
    data = TaskData(loaded, "rows", tmp_path / "cache")
    taught = data.tokens(TAUGHT, Pair(loaded).student_reader)
    assert len(taught.lengths_N) == data.num_rows("train")


def test_views_of_pictures_are_the_pictures_moved_and_mirrored(tmp_path):
    recipe = pupils.workspace(
        tmp_path / "pictures", "image_classification", labelled=12,
        data__views={"copies": 3}, task__augment={"shift": 0.2, "flip": True},
    )  # fmt: skip
    loaded = load_recipe(recipe)
    task, splits = task_of(loaded), read_task_rows(loaded).splits
    taught = len(splits["train"]) + len(splits[UNLABELLED])
    assert len(splits[VIEWS]) == 3 * taught
    reader = Pair(loaded).teacher_reader.tokenizer
    plain = task.encode(splits["train"][:], reader, 1)["digest"]
    digests = [tuple(digest) for digest in task.encode(splits[VIEWS][:], reader, 1)["digest"]]
    assert len(set(digests)) > 2 * taught
    assert task.encode(splits[VIEWS][:], reader, 1)["digest"] == [list(digest) for digest in digests]
    assert any(digest != tuple(plain[0]) for digest in digests[:3])


def test_a_tokenizer_without_a_mask_reads_its_unknown_token():
    none = SimpleNamespace(mask_token=None, unk_token="<unk>")
    assert text_rows.masked([f"a {MASK}", [MASK, "b"]], none) == ["a <unk>", ["<unk>", "b"]]
    assert text_rows.masked([MASK], SimpleNamespace(mask_token=None, unk_token=None)) == ["_"]


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("causal_lm", {}, "data.views: is not for causal_lm"),
        ("seq2seq", {}, "data.views: is not for seq2seq"),
        ("embedding", {}, "data.views: embedding has no labels"),
        ("image_classification", {}, "data.views: copies of pictures vary by task.augment"),
        ("image_classification", {"data__views": {"mask": 0.2}}, "data.views.mask: is for texts"),
        ("text_classification", {"distil__alpha": 0}, "data.views: rows without labels teach nothing where"),
    ],
)  # fmt: skip
def test_views_are_refused_where_they_make_no_sense(tmp_path, kind, changes, why):
    recipe = pupils.workspace(tmp_path / kind, kind, **{"data__views": {"copies": 2}, **changes})
    with pytest.raises(InputError, match=re.escape(why)):
        load_recipe(recipe)


def test_rows_with_an_empty_label_are_faults_unless_the_recipe_has_a_use_for_them(moods):
    with pytest.raises(InputError, match=r"rows.csv: row 5: .*4 bad rows of 20"):
        read(moods)
    found = read(moods, "data.on_empty_label=unlabelled")
    texts = found.splits[UNLABELLED]["text"][:]
    assert texts == [f"text number {at}" for at in (4, 9, 14, 19)]
    labelled = {text for split in ("train", "validation", "test") for text in found.splits[split]["text"]}
    assert labelled == {f"text number {at}" for at in range(20)} - set(texts)


def test_an_empty_label_where_models_are_judged_stays_a_fault(moods):
    """Or rows of the test file would be trained on, and be missing there."""
    folder = moods.parent
    for name in ("train", "dev", "test"):
        write(
            folder / f"{name}.csv",
            [("text", "label"), *((f"{name} text {n}", "" if n == 5 else str(n % 2)) for n in range(8))],
        )
    files = ", ".join(f"{name}: {folder}/{name}.csv" for name in ("train", "dev", "test"))
    splits = [
        f"data.source={{{files}}}",
        "data.split=null",
        "data.train=train",
        "data.validation=dev",
        "data.test=test",
    ]
    with pytest.raises(InputError, match=r"dev\.csv: row 6: "):
        read(moods, "data.on_empty_label=unlabelled", *splits)
    found = read(moods, "data.on_empty_label=unlabelled", "data.on_bad_row=skip", *splits)
    assert found.splits[UNLABELLED]["text"][:] == ["train text 5"]


def test_a_bad_row_without_a_label_is_named_by_its_own_number(moods):
    write(moods.parent / "rows.csv", [("text", "label"), *((f"text {n}", str(n % 2)) for n in range(9)), ("", "")])
    with pytest.raises(InputError, match=r"rows\.csv: row 10: column 'text' holds no text"):
        read(moods, "data.on_empty_label=unlabelled")


def test_another_source_needs_no_column_of_labels_and_may_call_its_texts_otherwise(moods):
    write(moods.parent / "more.csv", [("body",), ("one more text",), ("and another",)])
    found = read(
        moods, "data.on_bad_row=skip", f"data.unlabelled={{source: {moods.parent}/more.csv, columns: {{text: body}}}}"
    )
    assert found.splits[UNLABELLED]["text"][:] == ["one more text", "and another"]


def test_a_label_of_another_source_is_not_read_at_all(moods):
    """Not even one that is no class."""
    write(moods.parent / "more.csv", [("text", "label"), ("one more text", "unknown"), ("and another", "1")])
    found = read(moods, "data.on_bad_row=skip", f"data.unlabelled={{source: {moods.parent}/more.csv}}")
    assert Counter(found.splits[UNLABELLED][LABEL]) == {0: 2}


def test_rows_that_models_are_judged_on_are_left_out_and_counted(moods):
    plain = read(moods, "data.on_bad_row=skip")
    judged = plain.splits["test"]["text"][0]
    write(moods.parent / "more.csv", [("text",), (f"  {judged.upper()}",), ("and another",)])
    found = read(moods, "data.on_bad_row=skip", f"data.unlabelled={{source: {moods.parent}/more.csv}}")
    assert found.splits[UNLABELLED]["text"][:] == ["and another"]
    assert found.held_out == 1
    assert any("1 rows without labels are also in validation or test" in line for line in found.remarks())


def test_bad_rows_of_another_source_are_named_or_skipped(moods):
    write(moods.parent / "more.csv", [("text",), ("one more text",), (" ",)])
    more = f"data.unlabelled={{source: {moods.parent}/more.csv}}"
    write(moods.parent / "rows.csv", [("text", "label"), *((f"text {n}", str(n % 2)) for n in range(20))])
    with pytest.raises(InputError, match=r"more\.csv: row 2: column 'text' holds no text"):
        read(moods, more)
    assert read(moods, more, "data.on_bad_row=skip").skipped == {f"{moods.parent}/more.csv": 1}


def test_a_column_that_is_not_read_of_a_row_cannot_be_renamed(moods):
    with pytest.raises(InputError, match=r"data\.unlabelled\.columns\.label: what is read of a row is text"):
        read(moods, "data.on_bad_row=skip", "data.unlabelled={source: rows.csv, columns: {label: mood}}")


def test_pictures_without_a_label_come_from_a_file_of_their_own(tmp_path):
    recipe = tiny_tasks.workspace(tmp_path, "image_classification")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    rows.select(range(300, 400)).remove_columns("digit").to_parquet(str(tmp_path / "more.parquet"))
    rows.select(range(300)).to_parquet(str(tmp_path / "rows.parquet"))
    found = read(recipe, f"data.unlabelled={{source: {tmp_path}/more.parquet}}")
    assert len(found.splits[UNLABELLED]) + found.held_out == 100
    assert set(found.splits[UNLABELLED].column_names) == {"image", LABEL}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["data.labelled=5", "distil.alpha=0"], "data.labelled: rows without labels teach nothing where"),
        (["distil.controls=[hard_labels]"], "distil.controls: is for rows without labels"),
        (["distil.unlabelled_weight=0.5"], "distil.unlabelled_weight: is for rows without labels"),
        (["data.labelled=0"], "data.labelled: "),
        (["data.unlabelled={source: rows.csv, max_rows: 0}"], "data.unlabelled.max_rows: "),
        (["data.unlabelled={sauce: rows.csv}"], "data.unlabelled.sauce: unknown key; did you mean"),
        (["export.of=student_ce_only", "distil.ce_only_baseline=false"], "export.of: no student is trained on labels"),
        (["export.of=student_ce_only_long"], "export.of: is trained only where some rows have no label"),
    ],
)
def test_settings_that_make_no_sense_are_refused(moods, changes, why):
    with pytest.raises(InputError, match=why.replace(".", r"\.").replace("(", r"\(")):
        load_recipe(moods, changes)


def test_language_models_and_vectors_have_no_labels_to_leave_empty(tmp_path):
    recipe = pupils.workspace(tmp_path / "lm", "causal_lm")
    load_recipe(recipe, ["data.labelled=5"])
    with pytest.raises(InputError, match=r"data\.on_empty_label: causal_lm has no column of labels"):
        load_recipe(recipe, ["data.on_empty_label=unlabelled"])
    vectors = pupils.workspace(tmp_path / "vectors", "embedding")
    with pytest.raises(InputError, match=r"data\.labelled: embedding has no labels: name all rows in data\.source"):
        load_recipe(vectors, ["data.labelled=5"])
