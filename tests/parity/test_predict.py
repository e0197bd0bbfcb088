"""Traps 10 and 17: padding changes no logit; frozen passes repeat exactly; the student's dropout stays on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import tiny

from distilpeft.machine.runtime import Runtime
from distilpeft.recipe.task import TextClassification
from distilpeft.tasks.text_classification import TextClassificationTask
from distilpeft.training.scoring import predict

TASK = TextClassificationTask(
    TextClassification(kind="text_classification", text="text", label="label", labels=("bad", "good"))
)


@pytest.fixture(scope="module")
def rows():
    tokenizer = tiny.tokenizer()
    ids = tokenizer([text for text, _ in tiny.rows(24, seed=4)])["input_ids"]

    def load_batch(picked: np.ndarray) -> dict:
        batch = {"input_ids": [ids[i] for i in picked], "label": [0] * len(picked)}
        return TASK.collate(batch, tokenizer)

    return load_batch


def logits(model, rows, size):
    order = np.arange(24)[::-1].copy()
    found = predict(Runtime(), model, order, rows, TASK.measure, micro_batch_size=size, precision="fp32")
    return found[::-1]


def test_a_rows_logits_do_not_depend_on_how_much_its_batch_is_padded(rows):
    model = tiny.classifier(initializer_range=0.3)
    alone, padded = logits(model, rows, 1), logits(model, rows, 24)
    np.testing.assert_allclose(padded, alone, atol=1e-5)
    assert np.abs(alone - alone[0]).max() > 0.1, "the rows must differ for this test to mean anything"


def test_two_frozen_passes_are_equal_and_training_mode_comes_back(rows):
    model = tiny.classifier(hidden_dropout_prob=0.5).train()
    first, second = logits(model, rows, 8), logits(model, rows, 8)
    np.testing.assert_array_equal(first, second)
    assert model.training
    assert all(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout))
