"""Vectors: pooling and losses in float64 against loops, neighbours and similarity by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors
from support import tiny
from transformers import BertModel

from distilpeft.distillation.losses import Loss
from distilpeft.recipe.task import Embedding
from distilpeft.tasks.embedding import EmbeddingTask

TASK = Embedding(kind="embedding", text="text")
TEXTS = ["good film", "the dull actor of the scene and the music", "fine"]
RNG = np.random.default_rng(5)


def model_of(task: Embedding = TASK, **changes) -> BertModel:
    torch.manual_seed(2)
    model = BertModel(tiny.config(2, **changes)).double().eval()
    EmbeddingTask(task).prepare(model)
    return model


def batch_of(*texts):
    words = tiny.tokenizer()
    return EmbeddingTask(TASK).collate({"input_ids": [words(text)["input_ids"] for text in texts]}, words)


def alone(model, text, pooling) -> torch.Tensor:
    states = model(**tiny.tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
    return states.mean(0) if pooling == "mean" else states[0]


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_the_loss_is_that_of_single_rows(pooling, loss):
    model = model_of(TASK.model_copy(update={"pooling": pooling, "loss": loss}))
    teacher = torch.tensor(RNG.normal(size=(3, 64)), dtype=torch.float64).float()
    found = EmbeddingTask(TASK).loss_sum(model, batch_of(*TEXTS), Loss(1.0), teacher)
    right = 0.0
    for text, target in zip(TEXTS, teacher.double(), strict=True):
        own = alone(model, text, pooling)
        if loss == "mse":
            right = right + ((own - target) ** 2).mean()
        else:
            right = right + 1 - own @ target / (own.norm() * target.norm())
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
    weights = list(model.encoder.parameters())
    for one, two in zip(torch.autograd.grad(found, weights), torch.autograd.grad(right, weights), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_a_matrix_into_a_wider_space_begins_with_lengths_and_angles_as_they_are():
    model = model_of(hidden_size=32).float()
    EmbeddingTask(TASK).attach(model, 64)
    weight = model.feature_projections["vector"].weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(32), atol=1e-5, rtol=0)
    EmbeddingTask(TASK).loss_sum(model, batch_of(*TEXTS), Loss(1.0), torch.randn(3, 64)).backward()
    assert weight.grad.any()
    same = model_of().float()
    EmbeddingTask(TASK).attach(same, 64)
    assert not hasattr(same, "feature_projections")
    EmbeddingTask(TASK.model_copy(update={"project": True})).attach(same, 64)
    assert hasattr(same, "feature_projections")


def unit(rows: int, width: int) -> np.ndarray:
    found = RNG.normal(size=(rows, width))
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def measured(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full((len(ours), 1), ours.shape[1]), ours, theirs], axis=1)


def test_neighbours_and_similarity_are_those_of_other_libraries():
    theirs = unit(60, 8)
    ours = theirs[:, :5] + RNG.normal(size=(60, 5)) * 0.2
    ours /= np.linalg.norm(ours, axis=-1, keepdims=True)
    found = EmbeddingTask(TASK).metrics(measured(ours, theirs), None)
    near = [
        NearestNeighbors(n_neighbors=11, metric="cosine").fit(side).kneighbors(side, return_distance=False)
        for side in (ours, theirs)
    ]
    shared = [len((set(one) & set(two)) - {n}) / 10 for n, (one, two) in enumerate(zip(*near, strict=True))]
    assert found["neighbours"] == pytest.approx(np.mean(shared))
    above = np.triu_indices(60, 1)
    right = stats.pearsonr((ours @ ours.T)[above], (theirs @ theirs.T)[above]).statistic
    assert found["similarity"] == pytest.approx(right)
    assert found["cosine"] == 0, "vectors of different spaces have none"
    told = EmbeddingTask(TASK).scores(("neighbours", "similarity"), measured(ours, theirs), None)
    assert told["similarity"]["low"] < right < told["similarity"]["high"]


def test_the_teacher_agrees_with_itself_and_turning_its_space_changes_nothing_but_the_cosine():
    theirs = unit(40, 6)
    same = EmbeddingTask(TASK).metrics(measured(theirs, theirs), None)
    assert same == pytest.approx({"neighbours": 1, "similarity": 1, "cosine": 1})
    turned = theirs @ np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    found = EmbeddingTask(TASK).metrics(measured(turned, theirs), None)
    assert (found["neighbours"], found["similarity"]) == (pytest.approx(1), pytest.approx(1))
    assert found["cosine"] < 0.9


def test_no_vector_at_all_shares_nothing():
    rows = type("Rows", (), {"lengths_N": np.ones(5)})
    values = EmbeddingTask(TASK).majority_values(None, rows)
    assert EmbeddingTask(TASK).metrics(values, None) == {"neighbours": 0, "similarity": 0, "cosine": 0}
