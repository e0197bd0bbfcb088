"""Metrics against small sets counted by hand (trap 25)."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, matthews_corrcoef

from distilpeft.metrics.classification import FUNCTIONS, OfflineMetric, agreement, by_class, scores, wilson
from distilpeft.metrics.probabilities import softmax
from distilpeft.recipe.task import KINDS

# predicted 0, 1, 2, 0; right, wrong, right, wrong
PROBABILITIES = np.array([[0.70, 0.20, 0.10], [0.10, 0.62, 0.28], [0.20, 0.30, 0.50], [0.42, 0.33, 0.25]])
LABELS = np.array([0, 2, 2, 1])
COUNTED = {
    "accuracy": 2 / 4,
    # F1 of class 0: 2·1/(2 + 1); of class 1: 0; of class 2: 2·1/(1 + 2)
    "macro_f1": (2 / 3 + 0 + 2 / 3) / 3,
    # right·rows − Σ predicted·present = 2·4 − (2·1 + 1·1 + 1·2) = 3; rows² − Σ counts² = 16 − 6 = 10 on either side
    "mcc": 3 / 10,
    # four bins with one row each: |1 − 0.70| + |0 − 0.62| + |1 − 0.50| + |0 − 0.42|
    "ece": (0.30 + 0.62 + 0.50 + 0.42) / 4,
    # −(ln 0.70 + ln 0.28 + ln 0.50 + ln 0.33) / 4
    "log_loss": (0.35667494 + 1.27296568 + 0.69314718 + 1.10866262) / 4,
}


def test_every_metric_of_the_recipe_is_counted_by_hand_here():
    assert set(COUNTED) == set(KINDS["text_classification"].metrics) == set(FUNCTIONS)


@pytest.mark.parametrize("name", KINDS["text_classification"].metrics)
def test_a_metric_equals_the_count_by_hand(name):
    assert FUNCTIONS[name](PROBABILITIES, LABELS) == pytest.approx(COUNTED[name], abs=1e-8)


@pytest.mark.parametrize("name", KINDS["text_classification"].metrics)
def test_a_metric_works_through_evaluate(name):
    metric = OfflineMetric(name)
    assert metric.compute(predictions=PROBABILITIES, references=LABELS) == {
        name: pytest.approx(COUNTED[name], abs=1e-8)
    }


def test_a_metric_works_through_evaluate_batch_by_batch():
    metric = OfflineMetric("accuracy")
    for start in (0, 3):
        metric.add_batch(predictions=PROBABILITIES[start : start + 3], references=LABELS[start : start + 3])
    assert metric.compute() == {"accuracy": 0.5}


def test_calibration_error_averages_inside_a_bin_before_it_takes_the_size():
    # 0.70 and 0.72 share a bin: |(1 − 0.70) + (0 − 0.72)| / 2
    assert FUNCTIONS["ece"](np.array([[0.70, 0.30], [0.72, 0.28]]), np.array([0, 1])) == pytest.approx(0.21)


def test_calibration_error_of_a_sure_model_is_its_share_of_mistakes():
    sure = np.array([[1.0, 0.0]] * 4)
    assert FUNCTIONS["ece"](sure, np.array([0, 0, 0, 1])) == pytest.approx(0.25)


def test_a_class_that_is_neither_predicted_nor_present_counts_as_zero_in_macro_f1():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    assert FUNCTIONS["macro_f1"](probabilities, np.array([0, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_macro_f1_and_mcc_are_those_of_scikit_learn_bit_for_bit(classes):
    rng = np.random.default_rng(classes)
    for size in (1, 2, 5, 40, 333):
        probabilities, labels = rng.random((size, classes)), rng.integers(0, classes, size)
        predicted = probabilities.argmax(-1)
        f1 = f1_score(labels, predicted, labels=range(classes), average="macro", zero_division=0.0)
        assert FUNCTIONS["macro_f1"](probabilities, labels) == f1
        varied = min(len(set(labels)), len(set(predicted))) > 1  # scikit-learn warns of a single label
        assert FUNCTIONS["mcc"](probabilities, labels) == (matthews_corrcoef(labels, predicted) if varied else 0)


def test_log_loss_of_an_impossible_label_is_finite():
    assert FUNCTIONS["log_loss"](np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(-math.log(1e-15))


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], [0, 1]])
def test_predictions_of_one_class_have_an_mcc_of_zero_without_a_warning(labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FUNCTIONS["mcc"](np.array([[0.9, 0.1], [0.8, 0.2]]), np.array(labels)) == 0


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_the_wilson_interval_has_its_known_values(right, rows, low, high):
    assert wilson(right / rows, rows) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_wilson_interval_holds_the_share_at_both_ends_for_any_number_of_rows(share):
    outside = [rows for rows in range(1, 500) if not wilson(share, rows)[0] <= share <= wilson(share, rows)[1]]
    assert outside == []


def test_softmax_is_exact_for_large_logits():
    logits = np.array([[1e4, 1e4 + math.log(3), -1e4]], dtype=np.float64)
    np.testing.assert_allclose(softmax(logits), [[0.25, 0.75, 0.0]], atol=1e-9)


def test_a_model_agrees_with_itself_and_with_itself_plus_a_constant():
    logits = np.random.default_rng(0).normal(0, 5, (50, 4))
    for other in (logits, logits + 7.5):
        found = agreement(logits, other)
        assert found["kl"] == pytest.approx(0, abs=1e-12)
        assert found["top1_agreement"] == 1.0


def test_agreement_is_the_kl_from_reference_to_model_counted_by_hand():
    model, reference = np.log([[0.9, 0.1], [0.5, 0.5]]), np.log([[0.5, 0.5], [0.4, 0.6]])
    # row 1: 0.5 ln(0.5/0.9) + 0.5 ln(0.5/0.1) = 0.5108256; row 2: 0.4 ln 0.8 + 0.6 ln 1.2 = 0.0201355
    assert agreement(model, reference)["kl"] == pytest.approx((0.5108256 + 0.0201355) / 2, abs=1e-7)


def test_agreement_counts_rows_with_the_same_top_class():
    model = np.array([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    reference = np.array([[3.0, 1.0], [1.0, 3.0], [1.0, 3.0], [1.0, 9.0]])
    assert agreement(model, reference)["top1_agreement"] == 0.75


def drawn(seed, rows=300):
    """Logits of a model whose probabilities are exactly right, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (rows, 2))
    uniform = rng.random((rows, 1))
    return logits, (uniform > softmax(logits).cumsum(-1)).sum(-1)


def test_scores_are_the_metrics_with_an_interval_and_the_number_of_rows():
    found = scores(KINDS["text_classification"].metrics, np.log(PROBABILITIES), LABELS)
    assert list(found) == list(KINDS["text_classification"].metrics)
    for name in KINDS["text_classification"].metrics:
        assert set(found[name]) == {"value", "low", "high", "num_rows"}
        assert found[name]["value"] == pytest.approx(COUNTED[name], abs=1e-8)
        assert found[name]["num_rows"] == 4


@pytest.mark.parametrize("name", KINDS["text_classification"].metrics)
def test_the_interval_of_a_score_holds_its_value(name):
    found = scores((name,), *drawn(0))[name]
    assert found["low"] <= found["value"] <= found["high"]
    assert found["low"] < found["high"]


def test_the_interval_of_the_calibration_error_of_a_well_calibrated_model_holds_its_value():
    # a resample of few rows is less well calibrated than the rows themselves
    found = {seed: scores(("ece",), *drawn(seed))["ece"] for seed in range(20)}
    assert [seed for seed, score in found.items() if not score["low"] <= score["value"] <= score["high"]] == []


def test_scores_of_a_faultless_model_hold_their_values_and_warn_of_nothing():
    labels = np.array([0, 1] * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(KINDS["text_classification"].metrics, np.eye(2)[labels] * 20.0, labels)
    for name, score in found.items():
        assert score["low"] <= score["value"] <= score["high"], (name, score)


def test_scores_of_rows_of_one_class_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(KINDS["text_classification"].metrics, np.array([[5.0, 0.0]] * 6), np.zeros(6, dtype=np.int64))
    assert found["accuracy"]["value"] == 1.0
    assert found["mcc"]["value"] == 0.0


def test_intervals_are_the_same_in_every_run():
    logits, labels = drawn(0)
    assert scores(KINDS["text_classification"].metrics, logits, labels) == scores(
        KINDS["text_classification"].metrics, logits, labels
    )


def test_more_rows_make_a_narrower_interval():
    few, many = (scores(("log_loss",), *drawn(0, rows))["log_loss"] for rows in (100, 2000))
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])


def test_a_metric_that_evaluate_loads_by_name_joins_the_scores(tmp_path):
    """`hub:NAME` takes whatever `evaluate.load` takes: a folder here, an id where there is a hub."""
    folder = tmp_path / "wrong_share"
    folder.mkdir()
    (folder / "wrong_share.py").write_text(
        "import datasets\n"
        "import evaluate\n"
        "class WrongShare(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        value = datasets.Value('int64')\n"
        "        features = datasets.Features({'predictions': value, 'references': value})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        wrong = sum(a != b for a, b in zip(predictions, references))\n"
        "        return {'wrong_share': wrong / len(predictions)}\n"
    )
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    found = scores(("accuracy", f"hub:{folder}"), logits, np.array([0, 1, 1, 0]))
    assert found["wrong_share"] == {"value": 0.25, "low": None, "high": None, "num_rows": 4}
    assert found["accuracy"]["value"] == 0.75


def test_answers_by_class_are_those_of_scikit_learn():
    rng = np.random.default_rng(3)
    predicted, labels = rng.integers(0, 4, 50), rng.integers(0, 5, 50)
    found = by_class(predicted, labels, 6)
    assert (found.confusion_CC == confusion_matrix(labels, predicted, labels=range(6))).all()
    assert found.right_C.sum() == (predicted == labels).sum()
    assert (found.predicted_C == np.bincount(predicted, minlength=6)).all()
    assert (found.present_C == np.bincount(labels, minlength=6)).all()
