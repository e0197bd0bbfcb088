"""What plots show: the front, which models are on it, and the same figures in words."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import reports

from distilpeft.recipe.export import FORMS
from distilpeft.report.page import scales
from distilpeft.report.plots import charts, training_charts
from distilpeft.report.plots.charts import Point, front
from distilpeft.report.plots.markers import ROLES, mark
from distilpeft.report.schema import Calibration

PLACES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@given(PLACES, st.booleans())
def test_the_front_holds_the_models_that_no_other_beats_and_only_those(places, lower):
    """Against the definition, pair by pair."""
    points = [Point(float(x), float(y)) for x, y in places]

    def beats(one: Point, two: Point) -> bool:
        good = one.y <= two.y if lower else one.y >= two.y
        return one.x <= two.x and good and (one.x, one.y) != (two.x, two.y)

    unbeaten = {(p.x, p.y) for p in points if not any(beats(other, p) for other in points)}
    found = front(points, lower)
    assert {(p.x, p.y) for p in found} == unbeaten
    assert [p.x for p in found] == sorted(p.x for p in found)


def series_of(chart, kind):
    return [one for one in chart.series if one.kind == kind]


def test_every_timed_model_is_a_point_with_its_interval():
    report = reports.classifier()
    (chart,) = charts.latency([report])
    points = {one.label: one.points[0] for one in series_of(chart, "points")}
    timed = {model.name: model for model in report.models if model.latency_ms}
    assert points.keys() == timed.keys()
    for name, model in timed.items():
        score = model.scores["accuracy"]
        point = points[name]
        assert (point.x, point.y) == (model.latency_ms.p50, score.value)
        assert (point.low, point.high) == (score.low, score.high)
        assert name in point.text
        assert f"{score.value:.4f}".rstrip("0") in point.text


def test_the_table_of_a_chart_holds_its_points_and_says_which_are_on_the_front():
    (chart,) = charts.latency([reports.classifier()])
    on = [row[0] for row in chart.rows if row[-1] == "yes"]
    assert on == ["teacher", "onnx-int8", "openvino"]
    assert len(chart.rows) == len(series_of(chart, "points"))
    assert all(len(row) == len(chart.titles) for row in chart.rows)


def test_lower_nats_are_better_and_the_axis_says_so():
    (chart,) = charts.latency([reports.language_model()])
    assert (chart.better, "lower is better" in chart.y.label) == ("down", True)
    (edge,) = series_of(chart, "step")
    ys = [point.y for point in edge.points]
    assert ys == sorted(ys, reverse=True)


def test_two_runs_share_a_chart_and_are_told_apart():
    (chart,) = charts.latency(reports.two_runs())
    labels = [one.label for one in series_of(chart, "points")]
    assert "quickstart/student" in labels
    assert "quickstart-small/student" in labels
    marks = {one.label: one.mark for one in series_of(chart, "points")}
    assert marks["quickstart/student"] != marks["quickstart-small/student"]
    assert len({(one.mark.colour, one.mark.shape, one.mark.fill) for one in series_of(chart, "points")}) == len(labels)


def test_the_models_of_three_runs_are_all_told_apart():
    (chart,) = charts.latency([*reports.two_runs(), reports.classifier("third")])
    points = series_of(chart, "points")
    assert (
        len({one.mark for one in points})
        == len(points)
        == 3 * len([model for model in reports.classifier().models if model.latency_ms])
    )


def test_runs_of_one_name_get_names_that_differ():
    one, two = reports.classifier(), reports.classifier()
    assert charts.names([one, two]) == ["quickstart (seed 17) #1", "quickstart (seed 17) #2"]
    assert charts.names([one, reports.changed(two, seed=18)]) == ["quickstart (seed 17)", "quickstart (seed 18)"]


def test_tasks_with_different_metrics_get_charts_of_their_own():
    found = charts.latency([reports.classifier(), reports.language_model()])
    assert len({chart.name for chart in found}) == len(found) == 2


def test_without_figures_there_is_no_chart_and_that_is_said():
    bare = reports.classifier()
    untimed = {"latency_ms": None, "memory_bytes": None}
    bare = bare.model_copy(update={"models": [model.model_copy(update=untimed) for model in bare.models]})
    assert charts.latency([bare]) == charts.memory([bare]) == []
    assert charts.missing([bare]) == [
        "plot of latency and score: no model was timed",
        "plot of memory and score: no model's memory was measured",
    ]


def test_training_has_a_loss_a_gradient_and_a_validation_chart_for_every_model():
    found = training_charts.training(reports.classifier(), "")
    assert len(found) == len({chart.name for chart in found}) == 6
    assert len(training_charts.gradients(reports.classifier(), "")) == 3
    loss = next(chart for chart in found if "loss" in chart.title)
    assert loss.series[0].points[0].x == 2


def test_the_ring_is_on_the_curve_of_the_metric_that_the_checkpoint_is_picked_by():
    report = reports.classifier()
    trained = report.training["teacher"].model_copy(update={
        "kept_step": 4, "validations": ({"step": 2, "accuracy": 0.9, "log_loss": 0.5},
                                        {"step": 4, "accuracy": 0.8, "log_loss": 0.3}),
    })  # fmt: skip
    settings = {**report.settings, "teacher": {"fit": {"monitor": "log_loss"}}}
    report = report.model_copy(update={"training": {"teacher": trained}, "settings": settings, "curves": {}})
    (chart,) = training_charts.training(report, "")
    assert chart.y.label == "log loss (lower is better)"
    (ring,) = series_of(chart, "ring")
    assert [(point.x, point.y) for point in ring.points] == [(4, 0.3)]
    settings["teacher"] = {"fit": {"monitor": "kl"}}
    (chart,) = training_charts.training(report.model_copy(update={"settings": settings}), "")
    assert chart.y.label == "accuracy (higher is better)", "of a training that does not know the distance"


def test_bins_of_a_few_rows_are_not_drawn_and_counted():
    calibration = Calibration(confidence=(0.6, 0.7, 0.9), accuracy=(0.0, 0.7, 0.9), count=(1, 10, 89))
    model = reports.classifier().model("student").model_copy(update={"calibration": calibration})
    untrained = model.model_copy(update={"role": "untrained"})
    report = reports.classifier().model_copy(update={"models": (model, untrained)})
    (chart,) = training_charts.calibration(report, "")
    (line,) = series_of(chart, "line")
    assert [point.x for point in line.points] == [0.7, 0.9]
    assert [point.text.splitlines()[0] for point in line.points] == ["student, 10 rows", "student, 89 rows"]
    assert "Not drawn: bins of fewer than 10 rows (1 in all)" in chart.note
    assert len(chart.rows) == 3, "the table has all of them"


def test_every_role_and_format_has_a_marker_of_its_own_and_timed_ones_a_colour():
    every = [*ROLES, *(f"export:{form}" for form in FORMS)]
    assert len({(mark(role).colour, mark(role).shape) for role in every}) == len(every)
    timed = [role for role in ROLES if role not in ("untrained", "majority", "teacher_merged")]
    timed += [f"export:{form}" for form in ("safetensors", "onnx", "onnx-int8")]
    assert len({mark(role).colour for role in timed}) == len(timed)


def test_the_calibration_chart_has_its_bins_and_the_diagonal():
    found = training_charts.calibration(reports.classifier(), "")
    assert found
    assert all(series_of(chart, "guide") for chart in found)
    assert training_charts.calibration(reports.language_model(), "") == []


@given(
    st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.booleans(), st.integers(3, 9),
)  # fmt: skip
@example(1.0000000000000002e-06, 1e-06, False, 3)
def test_ticks_are_within_the_scale_and_rise(one, two, log, count):
    found = scales.scale([one, two], 0.0, 100.0, log)
    ticks = found.ticks(count)
    assert ticks == sorted(set(ticks))
    assert all(-0.1 <= found(tick) <= 100.1 for tick in ticks)
    assert len(ticks) <= count + 3


@pytest.mark.parametrize("name", ["classifier", "language_model"])
def test_labels_lie_on_no_other_label(name):
    """The plot's hardest part, at the size it is drawn in."""
    from distilpeft.report.page import sections, svg

    (chart,) = charts.latency([getattr(reports, name)()])
    plot = svg._plot(chart, sections.WIDE)
    places = [(one.label, *plot.at(one.points[0])) for one in series_of(chart, "points")]
    font = sections.WIDE.font
    labels = scales.place(places, [], (plot.x.start, plot.y.end, sections.WIDE.width, plot.y.start), font)
    boxes = [(one.x, one.y - font * 0.8, one.x + len(one.text) * font * scales.LETTER, one.y) for one in labels]
    for at, box in enumerate(boxes):
        assert 0 <= box[0] <= box[2] <= sections.WIDE.width
        for other in boxes[at + 1 :]:
            assert min(box[2], other[2]) <= max(box[0], other[0]) or min(box[3], other[3]) <= max(box[1], other[1])
