"""Graphs of static students against the students, at shapes that were not seen when they were traced."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from distilpeft.export.formats import onnx_graph, onnx_int8
from distilpeft.export.runtimes import open_onnx
from distilpeft.models.static.architecture import (
    StaticConfig,
    StaticForSequenceClassification,
    StaticModel,
    balance,
    body_of,
)
from distilpeft.tasks.text_rows import WHOLE

WORDS, UNITS = 400, 32


def student(*, outlier: bool = False, headless: bool = False, **changes):
    torch.manual_seed(0)
    config = StaticConfig(WORDS, UNITS, ignored_ids=[0, 1], sep_token_id=1, num_labels=3, **changes)
    model = (StaticModel if headless else StaticForSequenceClassification)(config)
    with torch.no_grad():
        body_of(model).embeddings.weight.normal_()
        body_of(model).token_weights.uniform_(0.1, 2)
        if outlier:  # of a token that is in no row
            body_of(model).embeddings.weight[-1] *= 300
    return model.eval().requires_grad_(False)


def rows(count, length):
    rng = np.random.default_rng(count * 100 + length)
    ids, mask = rng.integers(0, WORDS - 1, (count, length)), np.ones((count, length), np.int64)
    for row in range(1, count):
        cut = rng.integers(0, length)
        ids[row, cut:], mask[row, cut:] = 0, 0  # of some rows nothing is left
    return {"input_ids": ids, "attention_mask": mask}


def answers(model, inputs):
    found = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return (found.pooler_output if isinstance(model, StaticModel) else found.logits).numpy()


def written(model, file, *, balanced=True):
    own = copy.deepcopy(model)
    if balanced:
        balance(own)
    onnx_graph.write(own, file, pooling=WHOLE if isinstance(model, StaticModel) else None)
    return file


@pytest.mark.parametrize("changes", [{"pair": True, "head_size": 8}, {"headless": True}], ids=["pairs", "vectors"])
def test_a_graph_is_the_student_to_rounding_for_any_number_of_rows_and_tokens(tmp_path, changes):
    model = student(**changes)
    runner = open_onnx(written(model, tmp_path / "model.onnx"), 1)
    for count, length in [(1, 1), (1, 9), (3, 1), (4, 13)]:
        inputs = rows(count, length)
        np.testing.assert_allclose(runner.run(inputs)[0], answers(model, inputs), atol=2e-6)


def distance(model, file, out):
    inputs, right = rows(16, 9), answers(model, rows(16, 9))
    way = next(onnx_int8.candidates("dynamic", file, lambda _: 0.0, lambda: iter(())))
    way.write(out)
    return np.abs(open_onnx(out, 1).run(inputs)[0] - right).max() / right.std()


def test_one_large_vector_costs_the_others_no_bits(tmp_path):
    """With one scale for the whole table the vectors of all other tokens would be rounded away."""
    model = student(headless=True, outlier=True)
    plain = distance(model, written(model, tmp_path / "a.onnx", balanced=False), tmp_path / "a8.onnx")
    own = distance(model, written(model, tmp_path / "b.onnx"), tmp_path / "b8.onnx")
    assert plain > 0.5
    assert own < 0.02
    assert (tmp_path / "b8.onnx").stat().st_size < 0.5 * (tmp_path / "b.onnx").stat().st_size
