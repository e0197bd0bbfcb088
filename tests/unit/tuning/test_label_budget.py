"""A sweep over `data.labelled`: what each number of labels gives, and where the gain fades."""

from __future__ import annotations

import pytest

from distilpeft.report.plots import plot_files
from distilpeft.tuning import label_budget


def entry(labels: int, gain: float, **scores: float) -> dict:
    found = {role: {"value": score, "low": score - 0.02, "high": score + 0.02} for role, score in scores.items()}
    lead = {"against": "student_ce_only", "value": gain, "low": gain - 0.01, "high": gain + 0.01}
    return {"labels": labels, "scores": found, "lead": lead}


ENTRIES = [
    entry(200, 0.05, teacher=0.8, student=0.79, student_ce_only=0.74),
    entry(500, 0.005, teacher=0.84, student=0.82, student_ce_only=0.815),
    entry(1000, 0.0, teacher=0.86, student=0.84, student_ce_only=0.84),
]


def test_the_gain_fades_where_it_is_no_longer_more_than_chance():
    assert label_budget.fades(ENTRIES) == 500
    assert label_budget.fades(ENTRIES[:1]) is None
    late = [ENTRIES[1], entry(2000, 0.05, teacher=0.9)]
    assert label_budget.fades(late) is None, "ahead again with more"


def test_the_table_has_a_row_for_every_number_of_labels():
    text = "\n".join(label_budget.markdown(ENTRIES, "accuracy"))
    assert "| labels | teacher | student | labels alone | student less labels alone, points (95 %) |" in text
    assert "| 200 | 0.8000 | 0.7900 | 0.7400 | +5.00 (+4.00 to +6.00) |" in text
    assert "From 500 labels on, the student is not ahead of labels alone beyond chance." in text
    assert label_budget.markdown([], "accuracy") == []


@pytest.mark.skipif(not plot_files.available(), reason="needs matplotlib")
def test_the_plot_has_a_curve_for_every_model(tmp_path):
    files = label_budget.draw(ENTRIES, "accuracy", tmp_path)
    assert {file.name for file in files} == {"label-budget.svg", "label-budget.png"}
    svg = (tmp_path / "label-budget.svg").read_text()
    for name in ("teacher", "student", "labels alone", "accuracy by number of labels"):
        assert name in svg
    for number in ("200", "500", "1,000"):
        assert f">{number}</text>" in svg, "not as a power of ten"
    assert label_budget.draw([], "accuracy", tmp_path) == []
