"""`distilpeft predict`: what is read, what is answered, and what is refused, with a model made of numbers."""

from __future__ import annotations

import io
import json
from unittest import mock

import numpy as np
import pytest

from distilpeft.errors import InputError
from distilpeft.export import predict
from distilpeft.export.bundle import answer


class Classifier:
    """Says `long` of texts of more than 5 characters."""

    def __init__(self):
        self.manifest = {"task": "text_classification", "labels": ["short", "long"]}
        self.batches = []

    def answers(self, texts):
        self.batches.append(len(texts))
        return [answer(self.manifest, np.log([0.25, 0.75] if len(text) > 5 else [0.9, 0.1])) for text in texts]


class Writer:
    manifest: dict = {"task": "causal_lm"}  # noqa: RUF012

    def complete(self, prompt, count):
        return prompt[::-1][:count]


def lines(source, model=None, out=None, texts=(), batch_size=2):
    model = model or Classifier()
    stream = None if source is None else io.StringIO(source)
    with mock.patch.object(predict, "Bundle", return_value=model):
        found = predict.run("folder", texts, stream, out, batch_size=batch_size, max_new_tokens=3)
        return [json.loads(line) for line in found]


def test_texts_lines_and_json_objects_are_answered_in_their_order_in_batches():
    model = Classifier()
    found = lines('tiny\n\n{"id": 7, "text": "a longer one", "label": "old"}\n{"prompt": "abc"}\n', model)
    assert [row["label"] for row in found] == ["short", "long", "short"]
    assert found[1] == {"id": 7, "text": "a longer one", "label": "long",
                        "probabilities": {"short": 0.25, "long": 0.75}}  # fmt: skip
    assert model.batches == [2, 1]
    assert [row["label"] for row in lines(None, texts=["a", "a longer text"])] == ["short", "long"]


def test_a_language_model_completes():
    assert lines("abcdef\n", Writer()) == [{"text": "abcdef", "completion": "fed"}]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "input:2: not valid JSON"),
        ('{"id": 1}', "input:2: wants a text under 'text' or 'prompt'; its keys are id"),
        ('{"text": 5}', "input:2: wants a text"),
        ('{"text": " "}', "input:2: wants a text"),
    ],
)
def test_a_bad_line_is_named_and_a_file_is_whole_or_not_there(tmp_path, bad, message):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(InputError) as refused:
        lines(f"fine\n{bad}\n", out=out)
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="text 2: is empty"):
        lines(None, texts=["a", " "])
    assert lines("fine\n", out=out) == []
    assert json.loads(out.read_text())["label"] == "short"
