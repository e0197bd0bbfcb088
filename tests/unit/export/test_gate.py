"""The sums of the export gate, against independent ones, and what each limit looks at."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from distilpeft.export import gate as parity
from distilpeft.export.comparison import Call, Verdict, compare, faults
from distilpeft.export.gate import Gate
from distilpeft.recipe.export import Limits
from distilpeft.tasks.multi_label_classification import MultiLabelTask
from distilpeft.tasks.regression import RegressionTask
from distilpeft.tasks.text_classification import TextClassificationTask

NONE = Limits(None, None, None, None)
GOOD = {"max_abs_diff": 0.0, "kl": 0.0, "top1_agreement": 1.0, "metric_kept": 1.0}


def call(logits_NV, labels_N, rows_N=None, cut=None) -> Call:
    count = len(labels_N)
    rows_N = np.arange(count) if rows_N is None else np.array(rows_N)
    return Call({}, np.arange(count), np.array(labels_N), rows_N, logits_NV.astype(np.float32), cut)


def verdict(folder, calls, answers, *, language=False) -> Verdict:
    for number, answer in enumerate(answers):
        np.save(folder / f"{number}.npy", answer.astype(np.float32))
    family = "language" if language else "classes"
    return compare(calls, folder, family, TextClassificationTask(None).answers)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    student = rng.normal(size=(150, 7)).astype(np.float32) * 3
    return student, (student + rng.normal(size=student.shape) * 0.5).astype(np.float32), rng.integers(0, 7, 150)


def test_classifier_figures_are_what_scipy_gives(tmp_path, pair):
    student, export, labels = pair
    figures = verdict(tmp_path, [call(student, labels)], [export]).figures
    p, q = (softmax(values.astype(np.float64), axis=-1) for values in (student, export))
    right = [np.mean(values.argmax(-1) == labels) for values in (student, export)]
    expected = {
        "rows": 150, "positions": 150, "max_abs_diff": np.abs(student.astype(np.float64) - export).max(),
        "kl": rel_entr(p, q).sum(-1).mean(), "top1_agreement": np.mean(student.argmax(-1) == export.argmax(-1)),
        "metric_student": right[0], "metric_export": right[1], "metric_kept": right[1] / right[0],
    }  # fmt: skip
    assert figures == pytest.approx(expected, rel=1e-12)


def test_language_figures_are_nats_and_their_exponential(tmp_path, pair):
    student, export, labels = pair
    figures = verdict(tmp_path, [call(student, labels)], [export], language=True).figures
    nats = [-log_softmax(v.astype(np.float64), -1)[np.arange(150), labels].mean() for v in (student, export)]
    assert (figures["metric_student"], figures["metric_export"]) == pytest.approx(nats, rel=1e-12)
    assert figures["metric_kept"] == pytest.approx(np.exp(nats[0] - nats[1]), rel=1e-12)


def test_calls_of_unequal_size_count_position_by_position_not_call_by_call(tmp_path, pair):
    """Trap 3: no mean of means."""
    student, export, labels = pair
    whole = verdict(tmp_path, [call(student, labels)], [export]).figures
    parts = [slice(0, 1), slice(1, 140), slice(140, 150)]
    calls = [call(student[part], labels[part], range(150)[part]) for part in parts]
    assert verdict(tmp_path, calls, [export[part] for part in parts]).figures == pytest.approx(whole, rel=1e-12)


def test_a_fault_of_the_cache_alone_shows_in_difference_and_kl(tmp_path, pair):
    student, _, labels = pair
    broken = student.copy()
    broken[3, 2] += 4
    found = verdict(tmp_path, [call(student, labels), call(student, labels, cut=2)], [student, broken])
    assert found.figures["max_abs_diff"] == pytest.approx(4, abs=1e-5)
    assert found.figures["kl"] > 0
    assert found.figures["positions"] == 150
    assert found.worst[0][0] == 3


def test_the_rows_that_differ_most_are_named_each_once_in_order(tmp_path, pair):
    student, _, labels = pair
    broken = student.copy()
    broken[10, 0] += 1
    broken[20, 0] += 9
    broken[21, 0] += 8
    rows = np.arange(150)
    rows[21] = 20  # two positions of one row
    found = verdict(tmp_path, [call(student, labels, rows)], [broken])
    named = [row for row, _, _ in found.worst]
    assert set(named[:2]) == {10, 20}
    assert len(set(named)) == len(named) == 3
    found.faults = ["too far"]
    assert str(found).startswith("too far. Validation rows that differ most: ")


def test_logits_that_are_not_finite_or_not_as_many_are_faults_by_themselves(tmp_path, pair):
    student, _, labels = pair
    broken = student.copy()
    broken[42, 1] = np.nan
    assert "not finite, such as for validation row 42" in verdict(tmp_path, [call(student, labels)], [broken]).faults[0]
    assert "shape (150, 6)" in verdict(tmp_path, [call(student, labels)], [student[:, :6]]).faults[0]


@pytest.mark.parametrize(
    ("limit", "at", "beyond"),
    [
        ("max_abs_diff", 0.1, 0.11),
        ("kl", 0.1, 0.11),
        ("top1_agreement", 0.9, 0.89),
        ("metric_kept", 0.9, 0.89),
    ],
)
def test_each_limit_holds_at_its_value_and_is_broken_beyond_it_or_by_nan(limit, at, beyond):
    limits = replace(NONE, **{limit: at})
    assert faults({**GOOD, limit: at}, limits) == []
    (said,) = faults({**GOOD, limit: beyond}, limits)
    assert limit in said
    assert len(faults({**GOOD, limit: float("nan")}, limits)) == 1
    assert faults({**GOOD, limit: beyond}, NONE) == []


class Rows:
    """Rows of 8 tokens, whose last 7 are targets."""

    lengths_N = np.full(100, 8)

    def load_batch(self, ids):
        at_N = np.concatenate([np.arange(7) + 8 * row for row in range(len(ids))])
        ids_BS = torch.tensor(ids)[:, None].expand(-1, 8)
        return {
            "inputs": {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)},
            "at_N": torch.from_numpy(at_N),
            "labels_N": torch.zeros(len(at_N)).long(),
            "rows_N": torch.from_numpy(at_N // 8),
        }


class Echo:
    """Its logits tell the row."""

    def run(self, inputs):
        return np.repeat(inputs["input_ids"][:, :, None], 5, -1).astype(np.float32), None


def gate_calls(monkeypatch, **limits):
    for name, value in limits.items():
        monkeypatch.setattr(parity, name, value)
    gate = Gate.__new__(Gate)
    gate._gate_rows, gate._language, gate._runner = 60, True, Echo()
    gate._data, gate._student, gate._caches = (
        SimpleNamespace(task=SimpleNamespace(inputs=lambda _, batch: batch["inputs"])),
        None,
        True,
    )
    return gate._calls(Rows(), 5)


def test_the_gate_asks_one_row_and_several_and_the_first_ones_through_the_cache_too(monkeypatch):
    calls = gate_calls(monkeypatch)
    whole = [call for call in calls if call.cut is None]
    assert [len(call.inputs["input_ids"]) for call in whole] == [1, 2, 3, 8, 16, 1, 2, 3, 8, 16]
    assert [row for call in whole for row in np.unique(call.rows_N)] == list(range(60))
    assert all((call.logits_NV[:, 0] == call.rows_N).all() for call in calls), "the very positions of each row"
    through = [call for call in calls if call.cut is not None]
    assert [len(call.inputs["input_ids"]) for call in through] == [1, 2, 3, 8, 16]
    assert {call.cut for call in through} == {4}


def test_a_large_vocabulary_gets_smaller_batches_and_fewer_positions(monkeypatch):
    calls = gate_calls(monkeypatch, CALL_BYTES=2 * 4 * 5 * 8, LOGITS_BYTES=4 * 5 * 30)
    whole = [call for call in calls if call.cut is None]
    assert [len(call.inputs["input_ids"]) for call in whole] == [1, 2, 2]
    assert sum(len(call.at_N) for call in whole) == 35


def test_decisions_of_several_classes_are_compared_as_bernoulli_variables(tmp_path):
    rng = np.random.default_rng(0)
    ours, theirs, labels = rng.normal(size=(40, 3)) * 2, rng.normal(size=(40, 3)) * 2, rng.integers(0, 2, (40, 3))
    np.save(tmp_path / "0.npy", theirs.astype(np.float32))
    one = Call({}, np.arange(40), labels, np.arange(40), ours.astype(np.float32))
    found = compare([one], tmp_path, "classes", MultiLabelTask(None).answers).figures
    p, q = (1 / (1 + np.exp(-side)) for side in (ours, theirs))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-5)
    assert found["top1_agreement"] == ((ours > 0) == (theirs > 0)).mean()
    assert found["metric_student"] == ((ours > 0) == labels).mean()
    assert (found["rows"], found["positions"]) == (40, 120)


def test_numbers_are_compared_in_standard_deviations_of_the_labels(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.normal(50, 20, 64)
    ours = labels + rng.normal(0, 5, 64)
    theirs = ours + rng.normal(0, 2, 64)
    np.save(tmp_path / "0.npy", theirs[:, None].astype(np.float32))
    one = Call({}, np.arange(64), labels, np.arange(64), ours[:, None].astype(np.float32))
    verdict = compare([one], tmp_path, "values", RegressionTask(None).answers)
    found, unit = verdict.figures, labels.std()
    assert found["max_abs_diff"] == pytest.approx(np.abs(ours - theirs).max() / unit, rel=1e-4)
    assert found["kl"] == pytest.approx(np.square((ours - theirs) / unit).mean() / 2, rel=1e-4)
    errors = [np.sqrt(np.square(side - labels).mean()) for side in (ours, theirs)]
    assert found["metric_kept"] == pytest.approx(errors[0] / errors[1], rel=1e-4)
    assert "top1_agreement" not in found
    worst = int(np.abs(ours - theirs).argmax())
    assert verdict.worst[0][0] == worst


def text_faults(folder, family, own, **found) -> list[str]:
    """What the gate says of libraries that read texts by themselves."""
    gate = Gate.__new__(Gate)
    gate._family, gate._ids, gate.calls = family, [[at] for at in range(len(own))], [call(own, [0.0, 8.0])]
    gate._runner = SimpleNamespace(run=lambda inputs: (own[inputs["input_ids"][0]], None))
    for name, array in found.items():
        np.save(folder / f"{name}.npy", np.array(array))
    return gate._text_faults(folder, Limits(1e-4, None, None, None))


def test_a_library_that_reads_texts_otherwise_is_named_with_the_row(tmp_path):
    own, vectors = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[3.0, 4.0], [0.0, 0.0]])
    same = {"texts": own, "vectors": vectors, "others": vectors * 7}
    assert text_faults(tmp_path, "classes", own, **same) == [], "the length of a vector does not count"
    (fault,) = text_faults(tmp_path, "classes", own, **{**same, "texts": own + np.array([[0, 0], [0, 0.5]])})
    assert fault == "model2vec reads validation row 1 differently: off by 0.5 (max_abs_diff allows 0.0001)"
    (fault,) = text_faults(tmp_path, "classes", own, **{**same, "others": [[4.0, 3.0], [0.0, 0.0]]})
    assert fault.startswith("sentence-transformers reads validation row 0 differently: off by 0.2 ")
    assert text_faults(tmp_path, "vectors", own, **{**same, "texts": own * 2}) == []
    numbers = {"texts": own + 3e-4, "vectors": vectors, "others": vectors}  # labels spread over 4
    assert text_faults(tmp_path, "values", own, **numbers) == []


class TestBatching:
    """Rows alone and in padded batches, of a model whose answer to a row depends on the rows beside it."""

    COUNT = 70

    def gate(self, family):
        made = Gate.__new__(Gate)
        rng = np.random.default_rng(0)
        self.logits_NC = rng.normal(size=(self.COUNT, 3 if family == "classes" else 1)).astype(np.float32)
        labels_N = torch.from_numpy(rng.normal(size=self.COUNT) * 5)

        def load_batch(ids):
            return {"labels_N": labels_N[ids], "ids": torch.from_numpy(ids)}

        task = TextClassificationTask(None) if family == "classes" else RegressionTask(None)
        inputs = lambda _, batch: {"ids": batch["ids"]}  # noqa: E731
        made._data = SimpleNamespace(task=SimpleNamespace(inputs=inputs))
        made._rows = SimpleNamespace(lengths_N=np.zeros(self.COUNT), load_batch=load_batch)
        made._student, made._language, made._gate_rows = None, False, 1000
        made._family, made._answers = family, task.answers
        made.calls = [call(self.logits_NC, labels_N.numpy())]
        return made, labels_N.numpy()

    def runner(self, shift):
        def run(inputs):
            return self.logits_NC[inputs["ids"]] + shift * (len(inputs["ids"]) > 1), None

        return SimpleNamespace(run=run)

    def test_classes_are_counted_that_change(self):
        gate, _ = self.gate("classes")
        shift = np.array([0.75, 0, 0], np.float32)
        other = (self.logits_NC + shift).argmax(-1) != self.logits_NC.argmax(-1)
        assert 0 < other.sum() < self.COUNT
        found = gate.batching(self.runner(shift))
        assert found == {
            "rows": 70, "batch_size": 32, "max_abs_diff": pytest.approx(0.75), "changed": pytest.approx(other.mean())
        }  # fmt: skip
        assert gate.batching(self.runner(0 * shift)) == {
            "rows": 70, "batch_size": 32, "max_abs_diff": 0.0, "changed": 0.0
        }  # fmt: skip

    def test_answers_in_texts_are_as_wide_as_the_longest_row_of_a_batch(self):
        """Columns behind a row's end are out of reach, whatever the model says there."""
        gate, _ = self.gate("classes")
        lengths = [3, 5]
        gate._rows.lengths_N, gate._answers = np.array(lengths), lambda logits, labels: (logits, labels)
        own = [np.array([0.5, 2.0, 1.0]), np.array([1.0, 0.0, 0.0, 0.0, 3.0])]

        def answered(_rows, ids, shift):
            most = max(lengths[row] for row in ids)
            logits = np.full((len(ids), most), 7.0)
            allowed = np.zeros((len(ids), most), bool)
            for at, row in enumerate(ids):
                logits[at, : lengths[row]] = own[row] + shift * (len(ids) > 1) * np.eye(1, lengths[row], 0)[0]
                allowed[at, : lengths[row]] = True
            return Call({}, np.arange(len(ids)), np.zeros(len(ids)), np.arange(len(ids)), logits, allowed_NV=allowed)

        gate._call = answered
        assert gate.batching(0.0) == {"rows": 2, "batch_size": 32, "max_abs_diff": 0.0, "changed": 0.0}
        assert gate.batching(1.75) == {"rows": 2, "batch_size": 32, "max_abs_diff": 1.75, "changed": 0.5}

    def test_numbers_are_compared_in_standard_deviations_of_the_labels(self):
        gate, labels_N = self.gate("values")
        found = gate.batching(self.runner(np.float32(2)))
        assert found == {
            "rows": 70, "batch_size": 32, "max_abs_diff": pytest.approx(2 / labels_N.std(), rel=1e-5)
        }  # fmt: skip
