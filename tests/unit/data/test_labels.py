"""Label cells to class ids: names first, exactly; a position in the list only where nothing else is possible."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.rows import checked

from distilpeft.data.labels import LABEL, Fault, class_reader
from distilpeft.errors import InputError
from distilpeft.planning import check
from distilpeft.recipe.task import TextClassification, TokenClassification
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import class_counts, read_task_rows
from distilpeft.tasks.text_classification import TextClassificationTask
from distilpeft.tasks.token_classification import TokenClassificationTask

MOODS = ("bad", "good", "mixed")


def ids(labels: tuple[str, ...], cells: list[Any], feature: Any = None, label_is: Any = None) -> list[Any]:
    """Class ids of a column's cells; None for a fault."""
    reader = class_reader(labels, feature, cells, label_is)
    found = [reader.class_id(cell) for cell in cells]
    return [None if isinstance(one, Fault) else one for one in found]


def fault(labels: tuple[str, ...], cells: list[Any], at: int = 0, **options: Any) -> str:
    found = class_reader(labels, options.pop("feature", None), cells, options.pop("label_is", None)).class_id(cells[at])
    assert isinstance(found, Fault)
    return found


@pytest.mark.parametrize(
    ("labels", "cells", "expected"),
    [
        # names, as text, number or boolean
        (MOODS, ["bad", " good ", "Good", "", None, "other"], [0, 1, None, None, None, None]),
        (("true", "false"), ["true", "false", "True"], [0, 1, None]),
        (("true", "false"), [True, False, np.bool_(True)], [0, 1, 0]),
        (("TRUE", "FALSE"), ["TRUE", "FALSE", "true"], [0, 1, None]),
        (("TRUE", "FALSE"), [True, False], [0, 1]),
        (("01", "00"), ["00", "01", "1", "0", 1], [1, 0, None, None, None]),
        (("1", "2", "3"), ["1", "3", "0", "4"], [0, 2, None, None]),
        (("1", "2", "3"), [1, 3, 0, np.int64(2)], [0, 2, None, 1]),
        (("1", "0"), ["1.0", "0.0", "", "1.5"], [0, 1, None, None]),
        (("1", "0"), [1.0, 0.0, float("nan")], [0, 1, None]),
        (("1.0", "0.0"), ["1.0", "0.0", "1"], [0, 1, None]),
        (("1.0", "0.0"), [1.0, 0.0], [0, 1]),
        (("-1", "1"), ["-1", "1", "0"], [0, 1, None]),
        (("A", "a"), ["a", "A"], [1, 0]),
        # positions, where nothing else is possible
        (MOODS, [0, 2, 1], [0, 2, 1]),
        (MOODS, ["0", "2", " 1 "], [0, 2, 1]),
        (MOODS, ["0.0", "2.0", ""], [0, 2, None]),
        (MOODS, [0.0, 2.0, float("nan"), 1.5], [0, 2, None, None]),
        (MOODS, ["0", "2", "unsure"], [0, 2, None]),
        (MOODS, [0, 1, -1], [0, 1, None]),
        # positions, where something else is possible
        (MOODS, [1, 2, 3], [None, None, None]),
        (MOODS, ["0", "1", "good"], [None, None, 1]),
        (MOODS, [True, False], [None, None]),
        (MOODS, ["0", "x", "y"], [None, None, None]),
        (MOODS, ["00", "01"], [None, None]),
        (("no", "yes"), [0, 1], [None, None]),
        (("yes", "no"), ["0", "1"], [None, None]),
        (("true", "false"), [1, 0], [None, None]),
    ],
)
def test_a_cell_is_a_name_or_a_certain_position_or_a_fault(labels, cells, expected):
    assert ids(labels, cells) == expected


def test_the_recipe_may_say_that_cells_are_positions_or_names():
    assert ids(("1", "0"), ["1", "0", "2"], label_is="index") == [1, 0, None]
    assert ids(MOODS, [1, 2, 3], label_is="index") == [1, 2, None]
    assert ids(MOODS, ["0", "1"], label_is="name") == [None, None]
    assert ids(("no", "yes"), ["0", "1.0"], label_is="index") == [0, 1]


@pytest.mark.parametrize(
    ("names", "cells", "expected"),
    [
        (["mixed", "bad", "good"], [0, 1, 2], [2, 0, 1]),
        (["good", "bad"], [0, 1], [1, 0]),
        (["bad", "good", "mixed", "unsure"], [0, 3], [0, None]),
        (["Bad", "Good", "Mixed"], [0, 1], [None, None]),
        (["neg", "pos", "both"], [0, 1], [None, None]),
    ],
)
def test_a_class_label_column_is_read_by_its_names(names, cells, expected):
    assert ids(MOODS, cells, datasets.ClassLabel(names=names)) == expected
    assert ids(MOODS, cells, datasets.List(datasets.ClassLabel(names=names))) == expected
    assert ids(MOODS, [0, 1], datasets.ClassLabel(names=names), "index") == [0, 1]


def test_a_fault_says_why_and_what_to_do():
    assert "names must match exactly: the recipe has 'good'" in fault(MOODS, ["Good"])
    assert "3 is beyond the last position, 2" in fault(MOODS, [1, 2, 3])
    assert "task.label_is: index says that they are" in fault(MOODS, [1, 2, 3])
    assert "the class '1' is itself called like a number" in fault(("1", "2"), [0, 1])
    assert "the class 'yes' is itself called like" in fault(("yes", "no"), [0, 1])
    assert "other rows have names such as 'good'" in fault(MOODS, ["0", "good"])
    assert fault(MOODS, [None]) == "the label is missing"
    assert "is class 'pos' of the column, none of task.labels" in fault(
        MOODS, [0], feature=datasets.ClassLabel(names=["pos"])
    )
    assert "..." in fault(tuple(f"class {i}" for i in range(30)), ["x"])


def test_tags_of_words_follow_the_same_rule():
    task = TokenClassification(kind="token_classification", words="words", tags="tags", labels=("O", "B-X", "I-X"))
    feature = datasets.List(datasets.ClassLabel(names=["B-X", "O"]))
    features = datasets.Features({"words": datasets.List(datasets.Value("string")), "tags": feature})
    rows = datasets.Dataset.from_dict({"words": [["a", "b"]], "tags": [[0, 1]]}, features=features)
    assert checked(TokenClassificationTask(task), rows)[LABEL][:] == [[1, 0]]
    rows = datasets.Dataset.from_dict({"words": [["a", "b"], ["c"]], "tags": [[1, 0], [2]]})
    assert checked(TokenClassificationTask(task), rows)[LABEL][:] == [[1, 0], [2]]
    with pytest.raises(InputError, match="row 2: label 3 is none"):
        checked(
            TokenClassificationTask(task),
            datasets.Dataset.from_dict(
                {"words": [["a", "b"], ["c"]], "tags": [["O", "B-X"], [3]]}, on_mixed_types="use_json"
            ),
        )


def test_where_every_row_is_bad_skipping_is_no_way_out():
    task = TextClassificationTask(
        TextClassification(kind="text_classification", text="text", label="label", labels=("a", "b"))
    )
    rows = datasets.Dataset.from_dict({"text": ["x"] * 3, "label": [1, 2, 1]})
    with pytest.raises(InputError, match=r"3 bad rows of 3: 1, 2, 3\); fix them$"):
        checked(task, rows, on_bad_row="skip")


# What `check` counts, against the standard library's and pyarrow's own reading of the same file

ALPHABETS = st.one_of(
    st.lists(st.sampled_from(["good", "Good", "GOOD", "no", "yes", "Ärger", "好", "a b", "a,b", 'say "x"', "x;y"])),
    st.lists(st.integers(-3, 12).map(str)),
    st.lists(st.sampled_from(["00", "01", "001", "10", "1.0", "0.0", "1"])),
    st.just(["true", "false"]), st.just(["TRUE", "FALSE"]), st.just(["True", "False", "None"]),
)  # fmt: skip
RECIPE = """\
name: counts
task: {{kind: text_classification, text: text, label: label, labels: {labels}}}
data: {{source: {source}, split: {{train: 0.6, validation: 0.2, test: 0.2}}}}
teacher: {{model: some/teacher, optim: {{lr: 1e-3}}, fit: {{epochs: 1, batch_size: 4}}}}
student: {{from_teacher: {{first: 1}}}}
distil: {{alpha: 0.5, temperature: 1, optim: {{lr: 1e-3}}, fit: {{epochs: 1, batch_size: 4}}}}
"""


def write(path: Path, rows: list[dict[str, str]]) -> Counter[str]:
    """Write rows in the format of the file's ending; the labels as another reader counts them."""
    if path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else ","
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
        reader = csv.DictReader(io.StringIO(path.read_text("utf-8"), newline=""), delimiter=separator)
        return Counter(row["label"] for row in reader)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return Counter(json.loads(line)["label"] for line in path.read_text("utf-8").splitlines())
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
        return Counter(row["label"] for row in json.loads(path.read_text("utf-8")))
    pq.write_table(pa.Table.from_pylist(rows), path)
    return Counter(pq.read_table(path, columns=["label"])["label"].to_pylist())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    alphabet=ALPHABETS.map(lambda names: list(dict.fromkeys(names))).filter(lambda names: len(names) >= 2),
    picks=st.lists(st.integers(0, 11), min_size=12, max_size=40),
    ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".parquet"]),
)
def test_the_class_counts_of_check_are_those_of_another_reader(tmp_path, monkeypatch, alphabet, picks, ending):
    monkeypatch.chdir(tmp_path)
    labels = [alphabet[pick % len(alphabet)] for pick in picks]
    labels[:2] = alphabet[:2]
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels * 3)]
    path = tmp_path / f"rows{ending}"
    expected = write(path, rows)
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.format(labels=json.dumps(alphabet, ensure_ascii=False), source=path.name), "utf-8"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    counts = class_counts(recipe, read_task_rows(recipe).splits)
    assert {name: sum(numbers) for name, numbers in counts.items()} == {name: expected[name] for name in alphabet}


def test_check_prints_the_rows_of_each_class_with_an_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"film {i}, a [bold] one", "label": ["bad", "good"][i % 2]} for i in range(40)]
    write(tmp_path / "rows.csv", rows)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(labels='["good", "bad", "never"]', source="rows.csv"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    splits, out = read_task_rows(recipe).splits, io.StringIO()
    check._show_classes(recipe, splits, Console(file=out, width=100))
    lines = {line.split()[0]: line for line in out.getvalue().splitlines() if line.strip()}
    counts = class_counts(recipe, splits)
    assert [int(cell) for cell in lines["good"].split()[1:4]] == counts["good"]
    assert sum(counts["good"]) == sum(counts["bad"]) == 20
    first = next(row["text"] for row in splits["train"] if row[LABEL] == 0)
    assert first in lines["good"]
    assert "no training row has 'never'" in lines["warning:"]
