"""`distilpeft predict`: what is read, what is answered, and what is refused, with a model made of numbers."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from distilpeft.errors import InputError
from distilpeft.export import predict
from distilpeft.export.bundle import answer


class Classifier:
    """Says `long` of texts of more than 5 characters."""

    def __init__(self, pair=False, **task):
        self.manifest = {"task": "text_classification", "labels": ["short", "long"], "pair": pair, "max_tokens": 5}
        self.manifest["provenance"] = {"recipe": {"task": task}}
        self.batches, self.texts, self.num_cut = [], [], 0

    def answers(self, texts):
        self.batches.append(len(texts))
        self.texts += texts
        self.num_cut += sum(len(text) > 5 for text in texts)
        return [answer(self.manifest, np.log([0.25, 0.75] if len(text) > 5 else [0.9, 0.1])) for text in texts]


class Writer:
    manifest: dict = {"task": "causal_lm"}  # noqa: RUF012
    num_cut = 0

    def complete(self, prompt, count):
        return prompt[::-1][:count]


def lines(source, model=None, out=None, texts=(), batch_size=2, **options):
    model = model or Classifier()
    stream = io.StringIO(source) if isinstance(source, str) else source
    with mock.patch.object(predict, "Bundle", return_value=model):
        found = predict.run("folder", texts, stream, out, batch_size=batch_size, max_new_tokens=3, **options)
        return [json.loads(line) for line in found]


def test_texts_lines_and_json_objects_are_answered_in_their_order_in_batches():
    model = Classifier()
    found = lines('tiny\n\n{"id": 7, "text": "a longer one"}\n{"prompt": "abc"}\n', model)
    assert [row["label"] for row in found] == ["short", "long", "short"]
    assert found[1] == {"id": 7, "text": "a longer one", "label": "long",
                        "probabilities": {"short": 0.25, "long": 0.75}}  # fmt: skip
    assert model.batches == [2, 1]
    assert [row["label"] for row in lines(None, texts=["a", "a longer text"])] == ["short", "long"]


def test_a_language_model_completes():
    assert lines("abcdef\n", Writer()) == [{"text": "abcdef", "completion": "fed"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{\n', "input:2: not a JSON object, as the first line is"),
        ('{"text": "fine"}\nplain\n', "input:2: not a JSON object, as the first line is"),
        ('fine\n{"id": 1}', "input:2: no text under 'text' or 'prompt'; its columns are id; name one with --text"),
        ('fine\n{"text": 2024}', "input:2: 'text' holds a number (2024), not a text"),
        ('fine\n{"text": true}', "input:2: 'text' holds bool (True), not a text"),
        ('fine\n{"text": " "}', "input:2: 'text' is empty"),
        ('[{"text": "fine"}, 3]', "input: row 2: not a JSON object but a int"),
        ("", "input: holds no texts"),
        ("\n \n", "input: holds no texts"),
    ],
)
def test_a_bad_line_is_named_and_a_file_is_whole_or_not_there(tmp_path, content, message):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(InputError) as refused:
        lines(content, out=out)
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_answers_go_to_a_file_and_empty_texts_are_refused(tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(InputError, match="text 2: is empty"):
        lines(None, texts=["a", " "])
    assert lines("fine\n", out=out) == []
    assert json.loads(out.read_text())["label"] == "short"


ROWS = [
    {"review": "a, quoted\nline", "mood": "good", "id": "1"},
    {"review": "tiny", "mood": "bad", "id": "2"},
]


def written(folder: Path, name: str) -> Path:
    path, frame = folder / name, pd.DataFrame(ROWS)
    if ".csv" in name:
        text = frame.to_csv(index=False, sep=";" if "semicolons" in name else ",")
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode("utf-8-sig"))
    elif name.endswith(".parquet"):
        frame.sample(frac=1, random_state=0).sort_values("id").to_parquet(path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\ufeff" + "".join(json.dumps(row) + "\r\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    "name", ["rows.csv", "semicolons.csv", "rows.csv.gz", "rows.parquet", "rows.json", "rows.jsonl", "rows.ndjson"]
)
def test_every_data_file_is_read_as_training_reads_it_and_keeps_its_columns(tmp_path, name):
    model = Classifier(text="review", label="mood")
    found = lines(written(tmp_path, name), model)
    assert model.texts == ["a, quoted\nline", "tiny"]
    assert [{key: row[key] for key in ("review", "mood", "id")} for row in found] == ROWS
    assert [row["label"] for row in found] == ["long", "short"]


def test_a_stream_may_be_a_json_array_or_begin_with_a_byte_order_mark():
    assert [row["label"] for row in lines(json.dumps([{"text": "a"}, {"text": "longer one"}]))] == ["short", "long"]
    assert [row["text"] for row in lines('\ufeff{"text": "a"}\n{"text": "b"}\n')] == ["a", "b"]
    assert [row["text"] for row in lines("[1] a list\n[2] of notes\n")] == ["[1] a list", "[2] of notes"]


def test_a_line_of_plain_text_may_begin_with_a_brace(tmp_path):
    (tmp_path / "rows.txt").write_text("{smile} we had tea\nrude bus\n")
    assert [row["text"] for row in lines(tmp_path / "rows.txt")] == ["{smile} we had tea", "rude bus"]


def test_an_answer_never_replaces_what_the_input_holds():
    (row,) = lines('{"text": "a", "label": "gold", "predicted_label": "x", "probabilities": 1}\n')
    assert (row["label"], row["predicted_label"], row["probabilities"]) == ("gold", "x", 1)
    assert row["predicted_predicted_label"] == "short"
    assert row["predicted_probabilities"] == {"short": 0.9, "long": 0.1}


def test_columns_can_be_named(tmp_path):
    path = written(tmp_path, "rows.csv")
    assert [row["label"] for row in lines(path, text_column="mood")] == ["short", "short"]
    with pytest.raises(
        InputError, match=r"rows\.csv: row 1: no text under 'text' or 'prompt'; its columns are review,"
    ):
        lines(path)
    model = Classifier(pair=True, text="premise", pair_="x")
    (tmp_path / "pairs.jsonl").write_text('{"premise": "a", "b": "c"}\n')
    lines(tmp_path / "pairs.jsonl", model, pair_column="b")
    assert model.texts == [("a", "c")]
    with pytest.raises(InputError, match=r"no text under 'pair' or 'context'.*name one with --pair"):
        lines(tmp_path / "pairs.jsonl", model)


def test_a_broken_row_of_a_file_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text,id\na,1\nb,2,3\n")
    with pytest.raises(InputError, match=r"rows\.csv: row 2: line 3 has 3 fields and the header 2"):
        lines(tmp_path / "rows.csv")
    (tmp_path / "empty.csv").write_text("text,id\n")
    with pytest.raises(InputError, match=r"empty\.csv: holds no texts"):
        lines(tmp_path / "empty.csv")


def test_texts_that_were_cut_are_reported_once():
    said = []
    lines("tiny\na longer one\nanother longer one\n", say=said.append)
    assert said == ["2 texts were longer than 5 tokens and were cut there, as in training."]
    said.clear()
    lines("tiny\n", say=said.append)
    assert said == []
