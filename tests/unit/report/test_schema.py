"""The report as types: what is read is what was written, and what does not belong is refused."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from support import reports

from distilpeft.errors import InputError
from distilpeft.machine.files import sealed, write_json
from distilpeft.recipe.task import KINDS
from distilpeft.report import build
from distilpeft.report.schema import QuantizationCost, Report

PLAIN = {
    "classifier": reports.plain("one", "text_classification", reports.CLASSIFIERS),
    "language model": reports.plain("one", "causal_lm", reports.LANGUAGE_MODELS),
}
FULL = {"classifier": reports.classifier, "language model": reports.language_model, "bare": reports.bare}


@pytest.mark.parametrize("found", PLAIN.values(), ids=PLAIN)
def test_a_report_is_written_as_it_was_read(found):
    assert Report.model_validate(found).as_json() == found


@pytest.mark.parametrize("make", FULL.values(), ids=FULL)
def test_reading_what_was_written_gives_the_same_report(make):
    report = make()
    text = json.dumps(report.as_json())
    again = Report.model_validate(json.loads(text))
    assert again == report
    assert json.dumps(again.as_json()) == text


def test_numbers_keep_the_form_they_were_written_in():
    found = {"value": 5, "low": 5.0, "high": 1e-07, "num_rows": 7}
    report = reports.changed(reports.classifier(), models=[{"role": "student", "scores": {"accuracy": found}}])
    assert json.dumps(report.as_json()["models"][0]["scores"]["accuracy"]) == json.dumps(found)


def test_a_part_that_was_not_given_is_not_written_and_null_stays_null():
    found = {name: part for name, part in PLAIN["classifier"].items() if name != "curves"} | {"seeds": None}
    report = Report.model_validate(found)
    assert report.curves == {}
    assert "curves" not in report.as_json()
    assert report.as_json()["seeds"] is None


def test_a_report_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        reports.classifier().seed = 3


@pytest.mark.parametrize("where", ["report", "model", "score"])
def test_an_unknown_key_is_refused_wherever_it_is(where):
    found = reports.classifier().as_json()
    model = found["models"][0]
    {"report": found, "model": model, "score": model["scores"]["accuracy"]}[where]["colour"] = "red"
    with pytest.raises(ValidationError, match="colour"):
        Report.model_validate(found)


@pytest.mark.parametrize("change", [{"colour": "red"}, {"models": 3}, {"rows": None}])
def test_a_report_of_another_version_is_refused_with_its_place_and_what_to_do(tmp_path, change):
    write_json(tmp_path / "report.json", sealed({**reports.classifier().as_json(), **change}))
    with pytest.raises(InputError) as refused:
        build.load(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / 'report.json'}: written by another version of distilpeft; run the recipe again"
    )


def test_a_report_without_a_verdict_is_refused(tmp_path):
    write_json(tmp_path / "report.json", sealed(PLAIN["classifier"]))
    with pytest.raises(InputError, match="written by another version"):
        build.load(tmp_path)


def test_what_quantizing_costs_can_be_told_for_the_main_metric_of_every_kind_of_task():
    for kind in KINDS.values():
        assert QuantizationCost(quantize="nf4", **{f"{kind.main}_lost": 0.5}).lost(kind.main) == 0.5
