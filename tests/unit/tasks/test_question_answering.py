"""Answers in texts: windows, what is learnt in each, the loss in float64 without padding, and scores."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from support import tiny
from support.rows import checked
from torch.nn.functional import cross_entropy, kl_div

from distilpeft.distillation.losses import Loss
from distilpeft.errors import InputError
from distilpeft.recipe.task import QuestionAnswering
from distilpeft.tasks import question_answering as task_
from distilpeft.tasks.question_answering import QuestionAnsweringTask
from distilpeft.tasks.rows import Tokens

TASK = QuestionAnswering(
    kind="question_answering", question="question", context="context", answers="answers", stride=2, longest_answer=3
)
OPEN = TASK.model_copy(update={"no_answer": True})
LONG = "the film and a story of the actor and superb music of a scene"
ROWS = {
    "question": ["good", "great", "bad music"],
    "context": ["the film and a superb story", LONG, "a dull script"],
    "answers": [
        {"text": ["superb story"], "answer_start": [15]},
        {"text": ["superb music", "music"], "answer_start": [38, 45]},
        {"text": ["dull"], "answer_start": [2]},
    ],
}


def encoded(task=TASK, max_tokens=10, **columns):
    rows = datasets.Dataset.from_dict({**ROWS, **columns})
    rows = checked(QuestionAnsweringTask(task), rows, "rows.jsonl")
    return QuestionAnsweringTask(task).encode(rows[:], tiny.tokenizer(), max_tokens)


def tokens(**how):
    found = datasets.Dataset.from_dict(encoded(**how), features=QuestionAnsweringTask(TASK).features())
    return Tokens(QuestionAnsweringTask(TASK), found, tiny.tokenizer())


def words(ids):
    return [tiny.WORDS[i] for i in ids]


class Model(torch.nn.Module):
    """Says for a token what a table says for its id and its text."""

    def __init__(self, seed=0):
        super().__init__()
        table = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, len(tiny.WORDS), 2)) * 2)
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, attention_mask, token_type_ids):
        found = self.table[token_type_ids, input_ids]
        return Output(found)


class Output:
    def __init__(self, found):
        self.start_logits, self.end_logits = found[..., 0], found[..., 1]

    def __contains__(self, name):
        return name in vars(self)


def test_a_long_text_becomes_windows_that_overlap_and_the_answer_is_learnt_where_it_is_whole():
    found = encoded()
    assert found["window"] == [0, 0, 1, 2, 0]
    assert found["truncated"] == [False, True, True, True, False]
    for ids, (start, end), answers in zip(found["input_ids"], found["label"], found["answers"], strict=True):
        if start:
            assert " ".join(words(ids[start : end + 1])) == answers[0]
    assert [start > 0 for start, _ in found["label"]] == [True, False, False, True, True]
    first, second = (words(found["input_ids"][at])[3:-1] for at in (1, 2))
    assert first[-2:] == second[:2], "they share task.stride tokens"
    for at in range(5):
        text = words(found["input_ids"][at][found["first"][at] : found["last"][at] + 1])
        spans = zip(found["starts"][at], found["ends"][at], strict=True)
        assert text == [found["context"][at][start:end] for start, end in spans]
    assert set(found) == set(QuestionAnsweringTask(TASK).features())


@pytest.mark.parametrize(
    "answers",
    [
        [[{"text": "superb story", "answer_start": 15}], [], [{"text": "dull", "answer_start": 2}]],
        ["superb story", "", "dull"],
    ],
)
def test_answers_may_be_a_list_of_pairs_or_a_text_that_stands_where_it_first_occurs(answers):
    plain = encoded()
    found = encoded(task=OPEN, answers=answers)
    assert found["label"][0] == plain["label"][0]
    assert found["label"][-1] == plain["label"][-1]
    assert found["label"][1:4] == [[0, 0]] * 3
    assert found["answers"][1] == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answers": ["story", "story", "story"]}, "row 3: the answer 'story' does not stand anywhere in 'context'"),
        ({"answers": [{"text": ["film"], "answer_start": [at]} for at in (4, 4, 0)]}, "row 3.*at character 0"),
        (
            {"answers": ["film", "", "dull"]},
            "row 2: the question has no answer; .* task.no_answer",
        ),
        ({"answers": [[3], [3], [3]]}, r"row 1: column 'answers' holds '\[3\]'; it wants text and answer_start"),
        ({"context": ["the film", " ", "x"]}, "row 2: column 'context' holds no text|row 1: the answer"),
        ({"question": ["", "a", "b"]}, "row 1: column 'question' holds no text"),
    ],
)
def test_rows_that_cannot_be_used_are_named(columns, message):
    with pytest.raises(InputError, match=message):
        encoded(**columns)


def test_a_deployed_model_is_held_against_the_questions_as_they_were_learnt():
    rows = datasets.Dataset.from_dict({"question": ["  good "], "context": [" film"], "answers": ["film"]})
    assert list(QuestionAnsweringTask(TASK).texts(rows)) == [("good", " film")]


def test_a_question_that_leaves_no_room_is_named():
    with pytest.raises(InputError, match=r"data.max_tokens: 6 tokens leave no room .*'bad music' of 4 tokens"):
        encoded(max_tokens=6)


@pytest.mark.parametrize("alone", [False, True])
def test_the_loss_is_over_the_texts_tokens_and_cls_and_knows_no_padding(alone):
    """In float64, against PyTorch's losses on every row by itself, cut to what can be an answer."""
    model, teacher, rows = Model(0), Model(1), tokens()
    batches = [rows.load_batch(np.array(ids)) for ids in ([[r] for r in range(5)] if alone else [list(range(5))])]
    found = sum(
        QuestionAnsweringTask(TASK).loss_sum(
            model, batch, Loss(0.7, 2.0), QuestionAnsweringTask(TASK).soft(teacher, batch).detach()
        )
        for batch in batches
    )
    (grad,) = torch.autograd.grad(found, model.table)
    assert sum(QuestionAnsweringTask(TASK).count_rows(batch) for batch in batches) == 10
    right = 0.0
    for row in rows.dataset:
        allowed = [0, *range(row["first"], row["last"] + 1)]
        types, ids = ([row[name][at] for at in allowed] for name in ("token_types", "input_ids"))
        for side in (0, 1):
            q, p = (one.table[types, ids, side].float() for one in (model, teacher))
            at = torch.tensor([allowed.index(row["label"][side])])
            kl = kl_div(torch.log_softmax(q / 2, 0), torch.softmax(p.detach() / 2, 0), reduction="sum")
            right = right + 0.7 * 4 * kl + 0.3 * cross_entropy(q[None], at)
    (right_grad,) = torch.autograd.grad(right, model.table)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(grad, right_grad, rtol=1e-5, atol=1e-5)


def values_of(model, rows):
    with torch.no_grad():
        return QuestionAnsweringTask(TASK).measure(model, rows.load_batch(np.arange(len(rows.lengths_N)))).numpy()


def sure_of(rows, right):
    """Values of a model that answers each window as its label says; else with the text's first token."""
    width = int(rows.lengths_N.max())
    values = np.full((len(rows.lengths_N), width, 2), -5.0, dtype=np.float32)
    for at, row in enumerate(rows.dataset):
        label = row["label"] if right else [row["first"], row["first"]]
        values[at, label[0], 0] = values[at, label[1], 1] = 5.0 + (label[0] > 0)
    return values.reshape(len(values), -1)


def test_a_question_is_scored_once_by_the_best_of_its_windows():
    rows = tokens()
    assert task_.answers_of(TASK, sure_of(rows, True), rows) == [
        ("superb story", ["superb story"]), ("superb music", ["superb music", "music"]), ("dull", ["dull"])
    ]  # fmt: skip
    good, bad = (
        QuestionAnsweringTask(TASK).scores(("f1", "exact_match", "log_loss"), sure_of(rows, which), rows)
        for which in (1, 0)
    )
    assert (good["f1"]["value"], good["exact_match"]["value"], good["f1"]["num_rows"]) == (1.0, 1.0, 3)
    assert bad["exact_match"]["value"] == 0
    assert good["log_loss"]["value"] < 0.01 < bad["log_loss"]["value"]
    sums, weights = QuestionAnsweringTask(TASK).added(sure_of(rows, True), rows)
    assert (sums.tolist(), weights.tolist()) == ([1, 1, 1], [1, 1, 1])


def test_a_question_without_an_answer_is_right_if_every_window_says_so():
    rows = tokens(task=OPEN, answers=["superb story", "", "dull"])
    found = task_.answers_of(OPEN, sure_of(rows, True), rows)
    assert found == [("superb story", ["superb story"]), ("", []), ("dull", ["dull"])]
    assert QuestionAnsweringTask(OPEN).metrics(sure_of(rows, True), rows)["f1"] == 1


def test_distance_from_the_teacher_is_per_start_and_end_over_what_can_be_one():
    rows = tokens()
    ours, theirs = (values_of(Model(seed), rows) for seed in (0, 1))
    found = QuestionAnsweringTask(TASK).against_teacher(ours, theirs, rows)
    batch = rows.load_batch(np.arange(5))
    log_q, log_p = (torch.log_softmax(task_.place_logits(Model(seed), batch), -1).detach() for seed in (0, 1))
    right = kl_div(log_q, log_p, reduction="sum", log_target=True) / 10
    assert found["kl"] == pytest.approx(float(right), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean()))
