"""Terms from inside the teacher: values and gradients against loops over single rows in float64, layers, faults."""

from __future__ import annotations

import math

import pytest
import torch
from support import tiny
from torch import nn

from distilpeft.distillation.projections import drop_projections
from distilpeft.errors import InputError
from distilpeft.recipe.distil import Features, HiddenStates, Relations
from distilpeft.training.features import FeatureLoss, attention_part, check, layer_map

TEXTS = ["good film", "the dull actor of the scene and the music", "fine", "a story"]
BOTH = Features(hidden=HiddenStates(weight=0.5), relations=Relations(weight=2.0))


def pair(**changes):
    teacher = tiny.classifier(4, seed=1).double().eval().requires_grad_(False)
    return tiny.classifier(2, seed=2, **changes).double().eval(), teacher


def batch_of(*texts):
    return {"inputs": dict(tiny.tokenizer()(list(texts), padding=True, return_tensors="pt"))}


def term(loss: FeatureLoss, student, teacher, batch, count=None) -> torch.Tensor:
    with torch.no_grad():
        teacher(**batch["inputs"])
    student(**batch["inputs"])
    return loss.sum(student, batch, count or len(batch["inputs"]["input_ids"]))


def states(model, text) -> tuple:
    """Hidden states after each layer, and queries, keys and values of the last, of one text alone."""
    inputs = tiny.tokenizer()(text, return_tensors="pt")
    found = model(**inputs, output_hidden_states=True).hidden_states
    attention = model.bert.encoder.layer[-1].attention.self
    parts = [getattr(attention, name)(found[-2])[0] for name in ("query", "key", "value")]
    return [layer[0] for layer in found[1:]], parts


def by_hand(student, teacher, text, settings: Features) -> torch.Tensor:
    """The terms of one row, by the papers' formulas, token by token and head by head."""
    ours, theirs = states(student, text), states(teacher, text)
    total = torch.zeros((), dtype=torch.float64)
    if settings.hidden:
        total = total + settings.hidden.weight * hidden_by_hand(ours[0], theirs[0], settings.hidden)
    if settings.relations:
        for a, b in zip(ours[1], theirs[1], strict=True):
            total = total + settings.relations.weight * relations_by_hand(a, b, settings.relations.heads or 4)
    return total


def hidden_by_hand(ours, theirs, settings: HiddenStates) -> torch.Tensor:
    found = []
    for one, two in settings.layers.items() if settings.layers else ((0, 1), (1, 3)):
        for a, b in zip(ours[one], theirs[two], strict=True):
            squares = ((a - b) ** 2).mean()
            found.append(squares if settings.loss == "mse" else 1 - (a @ b) / (a.norm() * b.norm()))
    return torch.stack(found).mean()


def relations_by_hand(ours, theirs, heads: int) -> torch.Tensor:
    found = []
    for head in range(heads):
        rows = []
        for side in (ours, theirs):
            width = side.shape[1] // heads
            part = side[:, head * width : (head + 1) * width]
            rows.append((part @ part.T / math.sqrt(width)).softmax(-1))
        found.append((rows[1] * (rows[1].log() - rows[0].log())).sum(-1).mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize(
    "settings",
    [
        BOTH,
        Features(hidden=HiddenStates(loss="cosine", layers={0: 0, 1: 2})),
        Features(relations=Relations(heads=2)),
    ],
    ids=["both", "cosine", "relations"],
)
def test_values_and_gradients_are_those_of_single_rows(settings):
    student, teacher = pair()
    loss = FeatureLoss(settings, student, teacher, by_token=False)
    found = term(loss, student, teacher, batch_of(*TEXTS))
    right = sum(by_hand(student, teacher, text, settings) for text in TEXTS)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
    weights = list(student.bert.encoder.parameters())
    one = torch.autograd.grad(found, weights, allow_unused=True)  # relations do not see what follows them
    two = torch.autograd.grad(right, weights, allow_unused=True)
    assert sum(a is not None for a in one) > 20
    for a, b in zip(one, two, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_sum_over_rows_does_not_know_of_batches_and_padding():
    student, teacher = pair()
    loss = FeatureLoss(BOTH, student, teacher, by_token=False)
    whole = term(loss, student, teacher, batch_of(*TEXTS))
    parts = sum(term(loss, student, teacher, batch_of(text)) for text in TEXTS)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    thrice = term(loss, student, teacher, batch_of(*TEXTS), count=3 * len(TEXTS))  # three decisions in each row
    torch.testing.assert_close(thrice, 3 * whole)


def test_tokens_that_the_loss_counts_are_those_that_are_compared():
    student, teacher = pair()
    settings = Features(hidden=HiddenStates())
    loss = FeatureLoss(settings, student, teacher, by_token=True)
    batch = batch_of(*TEXTS)
    width = batch["inputs"]["input_ids"].shape[1]
    batch["at_N"] = torch.tensor([1, width + 2, width + 3])
    found = term(loss, student, teacher, batch, count=3)
    ours, theirs = states(student, TEXTS[0])[0], states(teacher, TEXTS[0])[0]
    right = sum(((ours[one][1] - theirs[two][1]) ** 2).mean() / 2 for one, two in ((0, 1), (1, 3)))
    ours, theirs = states(student, TEXTS[1])[0], states(teacher, TEXTS[1])[0]
    right += sum(((ours[one][t] - theirs[two][t]) ** 2).mean() / 2 for one, two in ((0, 1), (1, 3)) for t in (2, 3))
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)


def test_other_widths_go_through_matrices_that_are_trained_and_dropped():
    student, teacher = pair(hidden_size=32)
    student = student.float()
    teacher = teacher.float()
    before = set(student.state_dict())
    loss = FeatureLoss(BOTH, student, teacher, by_token=False)
    assert student.feature_projections["1"].weight.shape == (64, 32)
    term(loss, student, teacher, batch_of(*TEXTS)).backward()
    assert student.feature_projections["0"].weight.grad.any()
    drop_projections(student)
    assert set(student.state_dict()) == before


def test_equal_models_are_at_no_distance():
    teacher = tiny.classifier(2, seed=1).eval()
    student = tiny.classifier(2, seed=1).eval()
    loss = FeatureLoss(BOTH, student, teacher, by_token=False)
    assert float(term(loss, student, teacher, batch_of(*TEXTS)).detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "student", "teacher", "last", "found"),
    [
        (None, 3, 6, False, {0: 1, 1: 3, 2: 5}),
        (None, 2, 5, False, {0: 1, 1: 4}),
        (None, 4, 4, False, {0: 0, 1: 1, 2: 2, 3: 3}),
        (None, 3, 12, True, {2: 11}),
        ({0: 5}, 3, 6, False, {0: 5}),
    ],
)
def test_layers_are_spread_over_the_teachers(asked, student, teacher, last, found):
    assert layer_map(asked, student, teacher, last=last) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Features(hidden=HiddenStates(layers={2: 0})), r"layer 2 does not exist; the student has 0..1"),
        (Features(relations=Relations(layers={1: 4})), r"layer 4 does not exist; the teacher has 0..3"),
        (Features(relations=Relations(heads=5)), "5 heads do not divide the student's width, 64"),
    ],
)
def test_what_the_models_do_not_have_is_refused_by_their_configurations(settings, message):
    with pytest.raises(InputError, match=message):
        check(settings, (2, 4), (tiny.config(2), tiny.config(4)))


def test_attention_without_such_layers_is_refused():
    with pytest.raises(InputError, match="Linear has 0 linear layers for the query; known are those called query,"):
        attention_part(nn.Linear(2, 2), "query")
