"""What follows from figures: verdicts, words for a difference, curves, and what was not measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from distilpeft.report import advice
from distilpeft.report import verdict as findings
from distilpeft.report.schema import Comparison, Report


def model(form, score, ms, size, kept, metric="accuracy"):
    return {
        "role": f"export:{form}", "scores": {metric: {"value": score}}, "latency_ms": {"p50": ms, "p95": ms},
        "size_bytes": size, "kept": kept, "memory_bytes": 90e6,
    }  # fmt: skip


def report(**parts):
    base = {"recipe": "small", "split": "test", "task": "text_classification", "metric": "accuracy", "settings": {},
            "rows": {"train": 10, "truncated": 0}, "student_vs_teacher": None, "models": []}  # fmt: skip
    return Report.model_validate({**base, **parts})


def verdict(*models, metric="accuracy", comparisons=()):
    return advice.verdict(report(models=models, metric=metric, comparisons=comparisons))


SAFE = model("safetensors", 0.82, 6.0, 70e6, 0.995)
QUICK = model("onnx", 0.82, 3.0, 71e6, 0.995)
SMALL = model("onnx-int8", 0.80, 1.5, 17e6, 0.97)
TEACHER = {**model("", 0.824, 39.0, 83e6, 1.0), "role": "teacher"}


def pair(role, against, difference, p_value=0.61):
    return {"role": role, "against": against, "metric": "accuracy", "difference": difference, "low": difference - 0.016,
            "high": difference + 0.016, "p_value": p_value}  # fmt: skip


def test_the_fastest_within_one_percent_of_the_teacher_is_deployed():
    found = verdict(SAFE, QUICK, SMALL, TEACHER)
    assert (found.deploy, found.fastest, found.smallest) == ("export:onnx", "export:onnx", "export:onnx-int8")
    assert found.sentences == (
        "Deploy onnx: accuracy 0.8200, 13 times as fast as the teacher, 1.2 times smaller, 99.5% of its accuracy.",
        "Smallest: onnx-int8, 1.5 ms, 17.0 MB, 90 MB of memory, accuracy 0.8000, 97.0% of the teacher's accuracy.",
    )


def test_latencies_of_a_noisy_machine_are_called_so_where_they_stand():
    timed = {"reference": "student", "rounds": 20, "arms": [], "noise": {"noisy": True, "why": ["others"]}}
    models = (SAFE, QUICK, SMALL, TEACHER)
    found = advice.verdict(report(models=models, metric="accuracy", comparisons=(), benchmark=timed)).sentences
    assert "13 times as fast as the teacher (on a noisy machine), 1.2 times smaller" in found[0]
    assert found[1].startswith("Smallest: onnx-int8, 1.5 ms (on a noisy machine), 17.0 MB")


def test_one_export_may_be_all_three():
    found = verdict(SAFE, {**SMALL, "kept": 0.999, "scores": {"accuracy": {"value": 0.83}}})
    assert found.sentences == ("Deploy onnx-int8: accuracy 0.8300, 99.9% of its accuracy.",)


def test_equally_fast_exports_are_chosen_by_size():
    assert verdict(SAFE, {**QUICK, "latency_ms": SAFE["latency_ms"]}).deploy == "export:safetensors"


@pytest.mark.parametrize(("p_value", "chosen"), [(0.4, "onnx-int8"), (0.01, "onnx")])
def test_where_none_is_good_enough_the_fastest_that_is_equal_to_the_student_is_deployed(p_value, chosen):
    """Never a row of what is missing: one export is named, with its price."""
    far = {**QUICK, "kept": 0.96}
    pairs = [pair("export:onnx", "student", 0.0, 1.0), pair("export:onnx-int8", "student", -0.02, p_value)]
    found = verdict(far, SMALL, TEACHER, comparisons=pairs)
    assert (found.fastest, found.deploy) == (None, f"export:{chosen}")
    assert found.sentences[0].startswith(f"Deploy {chosen}: accuracy")


def test_lower_nats_are_better_nats():
    found = verdict(*(model(form, nats, 3.0, 1e6, 0.9, "nats_per_token") for form, nats in (("a", 4.0), ("b", 3.0))),
                    metric="nats_per_token")  # fmt: skip
    assert found.best == found.deploy == "export:b"


def test_without_a_timed_export_there_is_no_verdict():
    assert verdict({**SAFE, "latency_ms": None}).sentences == ()


def test_the_verdict_says_how_sure_the_distance_from_the_teacher_is():
    found = verdict(QUICK, comparisons=[pair("export:onnx", "teacher", -0.004)]).sentences[0]
    assert "(-0.40 points, 95 % -2.00 to +1.20, p = 0.61, not significant)" in found


@pytest.mark.parametrize(
    ("exported", "first"), [("student", "Labels alone train"), ("student_ce_only", "Deploy onnx: ")]
)
def test_a_better_student_on_labels_alone_comes_before_an_export_of_the_other(exported, first):
    students = [{"role": "student_ce_only", "scores": {"accuracy": {"value": 0.9}}}]
    pairs = [pair("student", "student_ce_only", -0.05)]
    given = {"export": {"of": exported}}
    found = advice.verdict(report(models=[QUICK, *students], comparisons=pairs, given=given)).sentences
    assert found[0].startswith(first)
    assert any("Deploy student_ce_only: export.of" in line for line in found) == (exported == "student")
    assert any(line.startswith("The best of this run's exports is onnx: ") for line in found) == (exported == "student")


def test_calibration_is_reported_where_the_score_gains_nothing():
    scores = {"student": (0.81, 0.047, 0.419), "student_ce_only": (0.812, 0.083, 0.472)}
    models = [
        {"role": role, "scores": {"accuracy": {"value": right}, "ece": {"value": ece}, "log_loss": {"value": nats}}}
        for role, (right, ece, nats) in scores.items()
    ]
    found = advice.gain(report(models=models, comparisons=[pair("student", "student_ce_only", -0.002)]))
    assert found[0].startswith("Distilling gained nothing significant: -0.20 points (95 % -1.80 to +1.40)")
    assert found[1] == "ECE is 0.047 instead of 0.083 and log-loss is 0.419 instead of 0.472 on labels alone."


@pytest.mark.parametrize(
    ("lead", "behind", "unlabelled", "says"),
    [
        (0.01, 0.0, 0, "Next: a better teacher (more epochs, all of its weights, a larger base)."),
        (0.06, -0.04, 0, "Next: text without labels (data.unlabelled), more epochs or more layers. The teacher is "
         "still ahead by 4.00 points."),
        (0.06, -0.01, 0, "Next: text without labels (data.unlabelled)."),
        (0.06, -0.01, 900, "Next: a better teacher. The student has reached this one"),
    ],
)  # fmt: skip
def test_the_next_step_follows_from_the_figures(lead, behind, unlabelled, says):
    models = [{"role": "student_ce_only", "scores": {"accuracy": {"value": 0.8}}}]
    pairs = [pair("student_ce_only", "teacher", -lead), pair("student", "teacher", behind)]
    rows = {"train": 10, "truncated": 0, "unlabelled": unlabelled}
    (found,) = advice.next_steps(report(models=models, comparisons=pairs, rows=rows))
    assert found.startswith(says)


def test_perfect_students_need_other_rows_and_equal_calibration_is_not_news():
    scores = {"accuracy": {"value": 1.0}, "ece": {"value": 0.0001}, "log_loss": {"value": 0.0002}}
    models = [{"role": role, "scores": scores} for role in ("student", "student_ce_only", "teacher")]
    pairs = [
        pair("student_ce_only", "teacher", 0.0),
        pair("student", "teacher", 0.0),
        pair("student", "student_ce_only", 0.0),
    ]
    found = report(models=models, comparisons=pairs)
    assert advice.next_steps(found) == [
        "Next: more or harder test rows. On these, the student is perfect with labels alone, too."
    ]
    assert len(advice.gain(found)) == 1


@pytest.mark.parametrize(("p_value", "said"), [(0.049, "significant"), (0.05, "not significant")])
def test_a_difference_is_significant_below_five_percent(p_value, said):
    pair = {"role": "student", "against": "teacher", "metric": "nats_per_token", "difference": 0.5, "low": 0.4,
            "high": 0.6, "p_value": p_value}  # fmt: skip
    found = findings.difference(report(), Comparison(**pair))
    assert found == f"+0.5000 nats, 95 % +0.4000 to +0.6000, p = {p_value:.2g}, {said}"


def logged(folder):
    return SimpleNamespace(path=folder, file=lambda name: folder / name)


def test_steps_that_were_left_out_are_not_drawn(tmp_path):
    taken = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1}
    lines = [taken, {"step": 2, "loss": None, "grad_norm": None, "lr": 0.1}]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = SimpleNamespace(artifacts={"teacher": logged(tmp_path)})
    assert findings.curves(plan)["teacher"].step == (1,)


def test_curves_are_means_over_stretches_and_end_where_training_ended(tmp_path):
    lines = [{"step": step, "loss": float(step), "grad_norm": 1.0, "lr": 0.1} for step in range(1, 1001)]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "other").mkdir()
    plan = SimpleNamespace(artifacts={
        "teacher": logged(tmp_path), "evaluate/teacher": SimpleNamespace(path=tmp_path / "other"),
    })  # fmt: skip
    found = findings.curves(plan)
    assert list(found) == ["teacher"]
    curve = found["teacher"].as_json()
    assert {len(values) for values in curve.values()} == {200}
    assert (curve["step"][0], curve["step"][-1]) == (5, 1000)
    assert (curve["loss"][0], curve["loss"][-1]) == (3.0, 998.0)


def test_a_short_training_is_drawn_step_by_step(tmp_path):
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 2.0, "grad_norm": 1.0, "lr": 0.1}\n')
    plan = SimpleNamespace(artifacts={"teacher": logged(tmp_path)})
    assert findings.curves(plan)["teacher"].as_json() == {"step": [1], "loss": [2.0], "grad_norm": [1.0], "lr": [0.1]}


def test_what_is_missing_is_said():
    arm = {"role": "student", "threads": 2}
    timed = {
        "reference": "student", "rounds": 20, "energy": [], "arms": [{**arm, "device": "cpu"}],
        "skipped": [{"role": "teacher", "why": "killed"}],
    }  # fmt: skip
    student = {"role": "student", "scores": {}, "calibration": None}
    assert findings.not_measured(report(benchmark=timed, seeds=None, models=[student])) == [
        "energy: no counters available on this machine",
        "latency and memory on a GPU",
        "latency of teacher: killed",
        "how much another seed changes (evaluate.seeds)",
        "calibration curves of tokens (their ECE is in the table)",
    ]
    timed |= {"energy": ["gpu 0"], "arms": [{**arm, "device": "cuda"}], "skipped": []}
    seeds = {"seeds": [1, 2], "metric": "accuracy", "models": [], "comparisons": []}
    found = report(benchmark=timed, seeds=seeds, models=[{**student, "calibration": {}}])
    assert findings.not_measured(found) == []


@pytest.mark.parametrize(
    ("labels", "test", "said"),
    [
        (["bad", "good"], "mcnemar", "identical answers on all 500 rows"),
        (["bad", "good", "so-so"], "mcnemar", "right and wrong on the same rows, of all 500 rows"),
        ([], "bootstrap", "identical scores on all 500 rows"),
    ],
)
def test_two_models_without_a_difference_are_called_as_alike_as_they_are(labels, test, said):
    same = {**pair("export:onnx", "student", 0.0, 1.0), "low": 0.0, "high": 0.0, "wins": 0, "losses": 0}
    judged = report(settings={"task": {"labels": labels}})
    assert findings.difference(judged, Comparison(**same, test=test, num_rows=500)) == said
    swapped = Comparison(**{**same, "wins": 2, "losses": 2}, test=test, num_rows=500)
    assert findings.difference(judged, swapped).endswith("not significant"), "as many better as worse is not the same"
