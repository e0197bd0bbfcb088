"""Files of rows: each cell as the file's text has it, each broken row a row with a fault."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distilpeft.data import tables
from distilpeft.data.tables import FAULT, Wishes
from distilpeft.errors import InputError

pytestmark = pytest.mark.usefixtures("_in_a_folder")


@pytest.fixture
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(name: str, content: str | bytes | None = None, **wishes: object) -> tables.Table:
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tables.read([Path(name)], Wishes(**wishes))


def test_cells_of_csv_are_the_text_of_the_file():
    rows = read("rows.csv", 'text,label,n\n"a, b",01,1.0\nTRUE,,NA\n"x ""y""\nz",null,007\n').rows
    assert rows[:] == {"text": ["a, b", "TRUE", 'x "y"\nz'], "label": ["01", "", "null"], "n": ["1.0", "NA", "007"]}


def test_a_note_late_in_a_column_changes_no_other_cell():
    lines = ["text,label,n"] + [f"row {i},{i % 2},{i}" for i in range(20_000)] + ["late,unsure,n/a"]
    rows = read("rows.csv", "\n".join(lines)).rows
    assert rows[0] == {"text": "row 0", "label": "0", "n": "0"}
    assert rows[20_000] == {"text": "late", "label": "unsure", "n": "n/a"}


def test_cells_of_json_are_what_json_says():
    lines = ['{"a": true, "b": "x", "c": [1, "y"], "n": 0.1}', "", '{"a": 1, "b": null, "n": 2}',
             '{"a": "1", "c": {"d": "null"}, "b": "1"}']  # fmt: skip
    rows = read("rows.jsonl", "\n".join(lines)).rows
    assert rows["a"][:] == [True, 1, "1"]
    assert [type(cell) for cell in rows["a"]] == [bool, int, str]
    assert rows["b"][:] == ["x", None, "1"]
    assert rows["c"][:] == [[1, "y"], None, {"d": "null"}]
    assert rows["n"][:] == [0.1, 2.0, None]
    types = {name: getattr(rows.features[name], "dtype", "json") for name in "abcn"}
    assert types == {"a": "json", "b": "string", "c": "json", "n": "float64"}
    assert read("some.jsonl", '{"i": 1, "b": true}\n{"i": 2}').rows.features["i"] == datasets.Value("int64")


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a", "n": 1}, {"text": "b", "n": 2}]',
        '[\n {"text": "a", "n": 1},\n {"text": "b", "n": 2}\n]\n',
        '{"text": "a", "n": 1}\n{"text": "b", "n": 2}',
        '\ufeff{"text": "a", "n": 1}\r\n\r\n{"text": "b", "n": 2}\r\n',
        '{"version": "1", "data": [{"text": "a", "n": 1}, {"text": "b", "n": 2}]}',
        '{"text": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}',
        '{"text": ["a", "b"], "n": [1, 2]}',
    ],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_usual_form_of_json_gives_the_same_rows(name, content):
    if name == "rows.jsonl" and content.startswith('{"') and content.count("\n") == 0:
        pytest.skip("a file of lines with one line: that is its row")
    assert read(name, content).rows[:] == {"text": ["a", "b"], "n": [1, 2]}


@pytest.mark.parametrize("content", ["3", '"text"', "{}", "[1, 2", '{"a": \n'])
def test_json_without_rows_is_refused(content):
    with pytest.raises(InputError, match=r"^rows\.json:?"):
        read("rows.json", content)


def test_broken_rows_stay_rows_with_their_fault():
    rows = read("rows.csv", "a,b\n1,2\n1,2,3\n1\n1,2,\n").rows
    assert rows["b"][:] == ["2", None, None, "2"]
    assert rows[FAULT][:] == [
        None,
        "line 3 has 3 fields and the header 2; quote fields that hold the separator",
        None,
        None,
    ]
    rows = read("rows.jsonl", '{"a": 1}\n{"a": \n[2]\n{"a": "\\ud83d"}\n{"a": NaN}\n').rows
    assert rows["a"][:] == [1, None, None, None, None]
    faults = rows[FAULT][:]
    assert faults[0] is None
    assert faults[4] is None
    assert [fault.split(":")[0] for fault in faults[1:4]] == [
        "not a JSON object", "not a JSON object but a list (line 3)", "not a JSON object"
    ]  # fmt: skip
    assert "line 2: " in faults[1]
    assert "line 4: it holds half of a surrogate pair" in faults[3]


@pytest.mark.parametrize("content", ['a,b\n1,2\n"3,4\n5,6\n', 'a,b\n1,2\n3,"4', 'a,b\n1,2\n"3,4\n5,6'])
def test_a_quote_that_is_never_closed_is_refused_with_its_line(content):
    with pytest.raises(InputError, match=r"^rows\.csv:3: a quote that opens in this row is never closed"):
        read("rows.csv", content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text;label\na, b;0\nc;1\n", "semicolons"),
        ("text\tlabel\na, b\t0\nc\t1\n", "tabs"),
        ("text|label\na, b|0\nc|1\n", "vertical bars"),
        ("sep=;\ntext;label\na, b;0\nc;1\n", None),
        ('text,label\n"a, b",0\nc,1\n', None),
    ],
)
@pytest.mark.parametrize("columns", [None, ["text", "label"]])
def test_the_separator_is_found_and_said(content, said, columns):
    table = read("rows.csv", content, columns=columns)
    assert table.rows[:] == {"text": ["a, b", "c"], "label": ["0", "1"]}
    assert table.notes == ([] if said is None else [f"rows.csv: the fields are separated by {said}"])


def test_the_recipe_may_say_the_separator():
    assert read("rows.csv", "text:label\na:0\n", separator=":").rows[:] == {"text": ["a"], "label": ["0"]}


def test_only_the_columns_that_are_used_are_kept_or_all_if_one_is_missing():
    content = "a,b,c\n1,2,3\n"
    assert read("rows.csv", content, columns=["c", "a"]).rows.column_names == ["c", "a"]
    assert read("rows.csv", content, columns=["a", "d"]).rows.column_names == ["a", "b", "c"]


def test_a_used_column_that_stands_twice_in_the_header_is_refused():
    with pytest.raises(InputError, match=r"^rows\.csv:1: the header has the column 'a' twice"):
        read("rows.csv", "a,b,a\n1,2,3\n", columns=["a"])
    assert read("rows.csv", "a,b,a,\n1,2,3,4\n", columns=["b"]).rows[:] == {"b": ["2"]}
    assert read("rows.csv", "a,b,a,\n1,2,3,4\n").rows.column_names == ["a", "b", "a.1", "Unnamed: 3"]


def test_an_index_that_pandas_wrote_along_is_no_column():
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, 0]}).sample(frac=1, random_state=1)
    frame.to_parquet("rows.parquet")
    rows = read("rows.parquet").rows
    assert rows.column_names == ["text", "label"]
    assert sorted(rows["text"][:]) == ["a", "b", "c"]
    assert read("rows.jsonl", '{"__index_level_0__": 3, "text": "a"}\n').rows.column_names == ["text"]


def test_lines_of_text_are_rows():
    assert read("rows.txt", "one\n\n two \r\n").rows[:] == {"text": ["one", " two "]}


def test_several_files_are_one_table_with_the_rows_of_each_counted():
    Path("a.csv").write_text("text,n\na,1\nb,2\n")
    Path("b.csv").write_text("n;text\n3;c\n")
    table = tables.read([Path("a.csv"), Path("b.csv")], Wishes(["text", "n"]))
    assert table.rows[:] == {"text": ["a", "b", "c"], "n": ["1", "2", "3"]}
    assert list(table.counts) == [2, 1]


def test_what_was_said_of_a_file_is_said_again_when_it_comes_from_the_cache():
    first, again = (read("rows.csv", "text;label\nété;1\n".encode("cp1252")) for _ in range(2))
    assert first.notes == again.notes
    assert len(first.notes) == 2


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=20), st.sampled_from([",", ";", "\t", "|"]))
def test_what_the_standard_librarys_writer_wrote_is_read_back(pairs, separator):
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator)
    writer.writerows([("text", "label"), *pairs])
    rows = read("rows.csv", out.getvalue(), columns=["text", "label"]).rows
    assert list(zip(rows["text"], rows["label"], strict=True)) == pairs
    content = "".join(json.dumps({"text": one, "label": two}) + "\n" for one, two in pairs)
    rows = read("rows.jsonl", content).rows
    assert list(zip(rows["text"], rows["label"], strict=True)) == pairs
