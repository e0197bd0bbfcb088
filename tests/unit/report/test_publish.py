"""Pages and plots on disk, and several runs beside each other on the command line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console
from support import reports

from distilpeft import cli
from distilpeft.machine.files import sealed
from distilpeft.report import publish
from distilpeft.report.plots import plot_files


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    found = []
    for at, report in enumerate((*reports.two_runs(), reports.language_model())):
        run = tmp_path / f"run{at}"
        run.mkdir()
        (run / "report.json").write_text(json.dumps(sealed(report.as_json())))
        found.append(run)
    return found


@pytest.fixture(autouse=True)
def few_plots():
    with mock.patch.object(plot_files, "write", return_value=[]) as write:
        yield write


def verb(capsys, *arguments: object) -> str:
    with mock.patch.object(sys, "argv", ["distilpeft", "report", *map(str, arguments)]):
        cli.main()
    return capsys.readouterr().out


def test_a_runs_report_is_printed_and_its_page_written(runs, capsys, few_plots):
    out = " ".join(verb(capsys, runs[0]).split())
    assert f"Page: {runs[0] / 'report.html'}".replace(" ", "") in out.replace(" ", "")
    assert "Deploy onnx-int8: " in out
    assert "<h1>quickstart</h1>" in (runs[0] / "report.html").read_text()
    assert few_plots.call_args.args[1] == runs[0] / "plots"


def test_runs_stand_beside_each_other_in_one_table_and_on_one_page(runs, capsys, tmp_path):
    out = verb(capsys, *runs, "--out", tmp_path / "deep" / "joint")
    assert "quickstart-small" in out
    assert "smollm2-wikitext" in out
    assert "quickstart: Deploy onnx-int8: " in " ".join(out.split())
    text = (tmp_path / "deep/joint/report.html").read_text()
    assert "quickstart-small/onnx-int8" in text
    kept = json.loads((tmp_path / "deep/joint/report.json").read_text())
    assert [one["recipe"] for one in kept["reports"]] == ["quickstart", "quickstart-small", "smollm2-wikitext"]


def test_json_is_one_report_or_a_list(runs, capsys):
    assert json.loads(verb(capsys, runs[0], "--json"))["recipe"] == "quickstart"
    assert [one["recipe"] for one in json.loads(verb(capsys, *runs[:2], "--json"))] == [
        "quickstart",
        "quickstart-small",
    ]
    assert not (runs[0] / "report.html").exists()


def test_a_table_has_the_models_of_runs_with_one_metric_only(runs, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    publish.joint([reports.classifier(), reports.language_model()], tmp_path, console)
    shown = console.file.getvalue()
    assert "accuracy (95 %)" in shown
    assert "nats/token (95 %)" in shown
