"""What each size gives: fronts, budgets and names."""

from __future__ import annotations

import pytest

from distilpeft.tuning import frontier


def entry(student: str, form: str, score: float, size: float, latency: float | None, **changes) -> dict:
    return {
        "student": student, "values": {}, "form": form, "seeds": 3, "size_bytes": size * 1e6, "memory_bytes": 2e8,
        "score": {"value": score, "low": score - 0.01, "high": score + 0.01}, "latency_ms": latency,
        "rows_per_s": 1000.0, "with_encoding": True, "speedup": 10.0, "front_latency": False, "front_size": True,
        **changes,
    }  # fmt: skip


ENTRIES = [
    entry("3 layers", "onnx", 0.88, 70.0, 2.0),
    entry("3 layers", "onnx-int8", 0.87, 17.5, 1.2),
    entry("1 layer", "onnx-int8", 0.84, 14.0, 0.5),
    entry("static", "onnx-int8", 0.80, 1.8, 0.06),
    entry("worse", "onnx-int8", 0.70, 16.0, 0.9),
    entry("teacher", "teacher", 0.90, 57.0, 18.0),
]


def test_every_limit_that_gives_something_better_is_named_and_no_teacher_is():
    assert frontier.budgets(ENTRIES, "accuracy") == [
        "Up to 2 MB: static, onnx-int8: accuracy 0.8000, 1.8 MB.",
        "Up to 20 MB: 3 layers, onnx-int8: accuracy 0.8700, 17.5 MB.",
        "Up to 100 MB: 3 layers, onnx: accuracy 0.8800, 70 MB.",
        "Up to 0.1 ms: static, onnx-int8: accuracy 0.8000, 0.06 ms.",
        "Up to 0.5 ms: 1 layer, onnx-int8: accuracy 0.8400, 0.5 ms.",
        "Up to 2 ms: 3 layers, onnx: accuracy 0.8800, 2 ms.",
    ]


def test_where_lower_is_better_the_lowest_is_chosen():
    lines = frontier.budgets(ENTRIES, "nats_per_token")
    assert lines[0] == "Up to 2 MB: static, onnx-int8: nats_per_token 0.8000, 1.8 MB."
    assert lines[1] == "Up to 20 MB: worse, onnx-int8: nats_per_token 0.7000, 16 MB."


def test_of_equal_scores_the_cheaper_one_is_chosen():
    same = [entry("a", "onnx", 0.8, 9.0, 1.0), entry("b", "onnx", 0.8, 8.0, 1.0)]
    assert frontier.budgets(same, "accuracy")[0] == "Up to 10 MB: b, onnx: accuracy 0.8000, 8 MB."


def test_models_that_were_not_timed_have_no_latency_budget():
    assert frontier.budgets([entry("a", "onnx", 0.8, 9.0, None)], "accuracy") == [
        "Up to 10 MB: a, onnx: accuracy 0.8000, 9 MB."
    ]


@pytest.mark.parametrize("entries", [[], [entry("a", "onnx", 0.8, 9.0, None)]])
def test_nothing_timed_is_no_plot(entries, tmp_path):
    assert frontier.draw(entries, "accuracy", tmp_path) == []


def test_the_plot_is_written_with_every_student_by_name(tmp_path):
    pytest.importorskip("matplotlib")
    files = frontier.draw(ENTRIES, "accuracy", tmp_path)
    assert {file.name for file in files} == {"frontier.svg", "frontier.png"}
    drawn = (tmp_path / "frontier.svg").read_text(encoding="utf-8")
    assert all(f"{one['student']}, {one['form']}" in drawn for one in ENTRIES[:-1])


def test_the_table_says_what_is_on_a_front_and_how_scores_were_chosen():
    lines = frontier.markdown(ENTRIES, "accuracy")
    assert "| static | onnx-int8 | 0.8000 (0.790 to 0.810) | 1.8 | 200 | 0.06 | 1,000 | 10 | size |" in lines
    assert lines[-1].startswith("accuracy (lowest to highest of the seeds); latency of one row")
    assert frontier.markdown([], "accuracy") == []
