"""What follows from figures: verdicts, words for a difference, curves, and what was not measured."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from distilpeft.report import verdict as findings
from distilpeft.report.schema import Comparison, Report


def model(form, score, ms, size, kept, metric="accuracy"):
    return {
        "role": f"export:{form}", "scores": {metric: {"value": score}}, "latency_ms": {"p50": ms, "p95": ms},
        "size_bytes": size, "kept": kept, "memory_bytes": 90e6,
    }  # fmt: skip


def report(**parts):
    told = {"recipe": "small", "split": "test", "task": "text_classification", "metric": "accuracy", "settings": {}}
    rows = {"train": 10, "truncated": 0}
    return Report.model_validate({**told, "rows": rows, "student_vs_teacher": None, "models": [], **parts})


def verdict(*models, metric="accuracy", comparisons=()):
    return findings.verdict(report(models=models, metric=metric, comparisons=comparisons))


SAFE = model("safetensors", 0.82, 6.0, 70e6, 0.995)
QUICK = model("onnx", 0.82, 3.0, 71e6, 0.995)
SMALL = model("onnx-int8", 0.80, 1.5, 17e6, 0.97)


def test_the_fastest_has_to_be_within_one_percent_of_the_teacher():
    found = verdict(SAFE, QUICK, SMALL)
    assert (found.fastest, found.smallest, found.best) == ("export:onnx", "export:onnx-int8", "export:onnx")
    assert found.sentences == (
        "Fastest within 1% of the teacher and best score: onnx, 3.0 ms, 71.0 MB, 90 MB of memory, accuracy 0.8200, "
        "99.5% of the teacher's score.",
        "Smallest: onnx-int8, 1.5 ms, 17.0 MB, 90 MB of memory, accuracy 0.8000, 97.0% of the teacher's score.",
    )


def test_one_export_may_be_all_three():
    found = verdict(SAFE, {**SMALL, "kept": 0.999, "scores": {"accuracy": {"value": 0.83}}})
    assert found.sentences[0].startswith("Fastest within 1% of the teacher, smallest and best score: onnx-int8, ")
    assert len(found.sentences) == 1


def test_where_none_is_good_enough_the_nearest_is_named():
    found = verdict(SMALL, model("onnx", 0.78, 3.0, 71e6, 0.95))
    assert found.fastest is None
    assert found.sentences[0] == (
        "No export is within 1% of the teacher; onnx-int8 comes nearest (97.00% of its score)."
    )


def test_lower_nats_are_better_nats():
    found = verdict(*(model(form, nats, 3.0, 1e6, 0.9, "nats_per_token") for form, nats in (("a", 4.0), ("b", 3.0))),
                    metric="nats_per_token")  # fmt: skip
    assert found.best == "export:b"


def test_without_a_timed_export_there_is_no_verdict():
    assert verdict({**SAFE, "latency_ms": None}).sentences == ()


def test_the_verdict_says_how_sure_the_distance_from_the_teacher_is():
    pair = {"role": "export:onnx", "against": "teacher", "metric": "accuracy", "difference": -0.004, "low": -0.02,
            "high": 0.012, "p_value": 0.61}  # fmt: skip
    assert (
        "(-0.40 points, 95 % -2.00 to +1.20, p = 0.61: may be chance)"
        in verdict(QUICK, comparisons=[pair]).sentences[0]
    )


@pytest.mark.parametrize(("p_value", "said"), [(0.049, "more than chance"), (0.05, "may be chance")])
def test_a_difference_is_more_than_chance_below_five_percent(p_value, said):
    pair = {"role": "student", "against": "teacher", "metric": "nats_per_token", "difference": 0.5, "low": 0.4,
            "high": 0.6, "p_value": p_value}  # fmt: skip
    assert (
        findings.difference(Comparison(**pair)) == f"+0.5000 nats, 95 % +0.4000 to +0.6000, p = {p_value:.2g}: {said}"
    )


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
        "energy: the machine does not tell it",
        "latency and memory on a GPU",
        "latency of teacher: killed",
        "how much another seed changes (evaluate.seeds)",
        "calibration curves of tokens (their ECE is in the table)",
    ]
    timed |= {"energy": ["gpu 0"], "arms": [{**arm, "device": "cuda"}], "skipped": []}
    seeds = {"seeds": [1, 2], "metric": "accuracy", "models": [], "comparisons": []}
    found = report(benchmark=timed, seeds=seeds, models=[{**student, "calibration": {}}])
    assert findings.not_measured(found) == []
