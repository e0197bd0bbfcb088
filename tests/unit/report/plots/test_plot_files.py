"""Plots as files: one PNG and one SVG for each chart of the page, the same in every run."""

from __future__ import annotations

import hashlib
from unittest import mock

import pytest
from support import reports

from distilpeft.report.plots import plot_files
from distilpeft.report.plots.charts import Axis, Chart, Point, Series
from distilpeft.report.plots.markers import mark


@pytest.mark.thorough
def test_every_chart_is_a_png_and_an_svg(tmp_path):
    pytest.importorskip("matplotlib")
    report = reports.classifier()
    few = tuple(m for m in report.models if m.role in ("student", "teacher", "export:onnx", "majority"))
    report = report.model_copy(update={"models": few})
    files = plot_files.write([report], tmp_path)
    names = {chart.name for chart in plot_files.every([report])}
    assert {file.name for file in files} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "latency.svg").read_text()
    assert "teacher" in text
    assert "accuracy (higher is better)" in text


def test_the_same_report_makes_the_same_files(tmp_path):
    pytest.importorskip("matplotlib")
    report = reports.language_model()
    (chart, *_) = plot_files.every([report])
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with mock.patch.object(plot_files, "every", return_value=[chart]):
            files = plot_files.write([report], tmp_path / name)
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


def test_without_matplotlib_there_are_no_files_and_no_fault(tmp_path):
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert plot_files.write([reports.classifier()], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("x", [0.1, 1.0, 10.0, 0.7])
def test_a_single_point_may_lie_on_a_power_of_ten(tmp_path, x, log):
    point = Point(x, 0.5, low=0.4, high=0.6)
    chart = Chart(
        "one", "one", Axis("x", log), Axis("y"), (Series("a", (point, point), mark("student")),), ("x", "y"), ()
    )
    assert plot_files.draw([chart], tmp_path)


def test_axes_leave_room_around_their_values():
    low, high = plot_files.room([1.0, 100.0], log=True)
    assert 0.5 < low < 1.0
    assert 100.0 < high < 200.0
    assert plot_files.room([0.0, 10.0], log=False) == pytest.approx((-0.5, 10.5))
    for log in (True, False):
        low, high = plot_files.room([3.0], log=log)
        assert low < 3.0 < high
