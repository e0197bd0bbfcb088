"""Sweeps on paper: how options are read, which cache serves which point, who is on a front, what is said."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
from rich.console import Console
from support import commands

from distilpeft.errors import InputError
from distilpeft.recipe.yaml_file import parse_values
from distilpeft.tuning import sweep_points, sweep_table


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("language")


def points(base: Path, targets: dict, *over: str) -> list[sweep_points.Point]:
    return sweep_points.points(commands.language_workspace(base, **targets), over, [], base / "runs")


def caches(found: list[sweep_points.Point]) -> list[str]:
    return [made.key for point in found if (made := point.plan.artifacts.get("targets")) is not None]


def test_values_are_read_as_the_recipe_reads_them():
    assert parse_values("2e-4, 1e-3,on", "--over x") == [2e-4, 1e-3, "on"]
    assert parse_values("[0, 1],{a: 2}", "--over x") == [[0, 1], {"a": 2}]


def test_points_are_the_product_of_the_values_in_their_order(base):
    found = points(base, {"mode": "online"}, "distil.alpha=0.5,1", "distil.optim.lr=2e-4,1e-3")
    assert [tuple(point.values.values()) for point in found] == [(0.5, 2e-4), (0.5, 1e-3), (1, 2e-4), (1, 1e-3)]
    assert [point.plan.recipe.distil.optim.lr for point in found] == [2e-4, 1e-3, 2e-4, 1e-3]
    assert {point.plan.recipe.targets.temperatures for point in found} == {None}


def test_points_of_several_keys_meet_every_swept_value(base):
    recipe = commands.language_workspace(base, mode="online")
    single = ["{distil.temperature: 2, distil.optim.lr: 0.1}", "{distil.alpha: 0.25}"]
    found = sweep_points.points(recipe, ["seed=1,2"], [], base / "runs", single)
    assert [dict(point.values) for point in found] == [
        {"distil.temperature": 2, "distil.optim.lr": 0.1, "seed": 1},
        {"distil.temperature": 2, "distil.optim.lr": 0.1, "seed": 2},
        {"distil.alpha": 0.25, "seed": 1},
        {"distil.alpha": 0.25, "seed": 2},
    ]
    distil = [point.plan.recipe.distil for point in found]
    assert [one.optim.lr for one in distil[:2]] == [0.1, 0.1]
    assert distil[2].optim.lr != 0.1
    assert len(sweep_points.points(recipe, [], [], base / "runs", single)) == 2


@pytest.mark.parametrize(
    ("single", "message"),
    [
        ("distil.temperature=2", "--point distil.temperature=2: write it as {key: value, key: value}"),
        ("{seed: 3}, {seed: 4}", "write it as {key: value, key: value}"),
        ("{seed: 3}", "--point {seed: 3}: seed is a key of --over as well"),
        ("{name: a}", "share one folder"),
        ("{distil.temprature: 2}", "did you mean distil.temperature"),
        ("{distil.temperature: -2}", "--point, at distil.temperature=-2, seed=1: "),
        ("{distil.temperature: 2", "--point {distil.temperature: 2: the value is not valid YAML"),
    ],
)
def test_a_point_that_cannot_be_read_is_refused_in_one_line(base, single, message):
    with pytest.raises(InputError) as caught:
        sweep_points.points(commands.language_workspace(base), ["seed=1,2"], [], base / "runs", [single])
    assert message in str(caught.value)


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_point_without_a_cache_does_not_keep_the_others_from_sharing_one(base, mode):
    found = points(base, {"mode": mode}, "targets.mode=online,cached", "distil.temperature=4,1")
    assert [point.plan.recipe.targets.temperatures for point in found] == [None, None, (1.0, 4.0), (1.0, 4.0)]
    assert (len(caches(found)), len(set(caches(found)))) == (2, 1)


def test_only_points_that_keep_some_of_a_distribution_list_temperatures(base):
    found = points(base, {"mode": "cached"}, "targets.format=full,top_k", "distil.temperature=1,2")
    assert [point.plan.recipe.targets.temperatures for point in found] == [None, None, (1.0, 2.0), (1.0, 2.0)]
    assert len(set(caches(found))) == 2


def test_whole_sections_share_a_cache_for_each_form(base):
    sections = "targets={mode: cached, format: top_k},{mode: cached, format: sampled}"
    found = points(base, {"mode": "online"}, sections, "distil.temperature=1,2")
    assert len(set(caches(found))) == 2


ROW = {
    "values": {"distil.temperature": 2},
    "monitor": "nats_per_token",
    "validation": 2.5,
    "score": {"value": 2.3456, "low": 2.01, "high": 2.99},
    "against_teacher": {"kl": 0.1234, "top1_agreement": 0.9},
    "num_parameters": 135_000_000,
    "size_bytes": 1_234_500_000,
    "latency_ms": 1234.5,
    "seconds": 86_400,
    "pareto_latency": True,
    "pareto_size": True,
}
JOINT = {
    "recipe": "tiny",
    "task": "causal_lm",
    "split": "test",
    "metric": "nats_per_token",
    "points": [ROW, {**ROW, "values": {"distil.temperature": 4}}],
    "others": [{**ROW, "role": "teacher", "values": {}, "against_teacher": None}],
    "budget": [],
    "frontier": [],
    "best_by_validation": 1,
    "artifacts": {"made": 7, "without_sharing": 12},
    "teachers": 1,
    "caches": 0,
}


def test_language_models_show_the_kl_to_the_teacher_within_80_characters():
    console = Console(file=io.StringIO(), width=80)
    sweep_table.show(JOINT, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line.split() for line in lines if "temperature=2" in line]
    assert row == ["temperature=2", "2.5000", "2.3456", "(2.01-2.99)", "0.1234", "1234.5MB", "1234.5", "speed+size"]
    assert "| KL |" in sweep_table.markdown(JOINT)
    rows = sweep_table.markdown(JOINT).splitlines()
    (teacher,) = [line.split(" | ") for line in rows if line.startswith("| teacher")]
    assert teacher[3] == "-"


def test_what_was_not_timed_has_a_dash_and_no_size_of_zero():
    untimed = {**ROW, "role": "student_ce_only_long", "num_parameters": 0, "size_bytes": 0, "latency_ms": None}
    rows = sweep_table.cells({**JOINT, "others": [untimed]})
    assert rows[-1][4:7] == ("-", "-", "-")


def test_only_what_is_true_is_said_of_the_rows_that_picked_and_of_what_was_shared():
    said = sweep_table.sentences(JOINT)
    assert said[0] == "2 points made 7 artifacts instead of 12: one teacher (86400 s)."
    assert said[1].endswith("distil.temperature=4. The test rows picked nothing.")
    joint = {**copy.deepcopy(JOINT), "split": "validation", "caches": 2}
    assert sweep_table.sentences(joint)[0].endswith("one teacher (86400 s), 2 caches of soft targets.")
    assert "picked nothing" not in " ".join(sweep_table.sentences(joint))


def test_a_front_holds_what_no_other_point_beats():
    assert sweep_table.pareto([1, 2, 3, 3], [0.5, 0.7, 0.6, 0.7], lower_is_better=False) == [True, True, False, False]
    assert sweep_table.pareto([1, 2, 3], [5.0, 4.0, 3.0], lower_is_better=True) == [True, True, True]
    assert sweep_table.pareto([1, 1], [2.0, 2.0], lower_is_better=True) == [True, True]
