"""A plan: its steps in order, how they are found, and the names that people see."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support import commands

from distilpeft.planning.plan import Plan, make_plan
from distilpeft.planning.roles import (
    STAGES,
    export_role,
    format_of,
    short_name,
    step_name,
    trained_role,
)
from distilpeft.recipe.yaml_file import load_recipe

NAMES = [
    "teacher", "targets", "distil/student_ce_only", "lead", "distil/student", "evaluate/teacher", "evaluate/majority",
    "evaluate/untrained", "evaluate/student_ce_only", "evaluate/student", "evaluate/teacher_full_precision",
    "evaluate/teacher_merged", "export/safetensors", "evaluate/export:safetensors", "export/onnx-int8",
    "evaluate/export:onnx-int8", "compare", "benchmark", "bundle/safetensors", "bundle/onnx-int8",
    "bundle/hub",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    return commands.workspace(
        folder, teacher__quantize="nf4", export__formats=["safetensors", "onnx-int8"], evaluate__seeds=[1]
    )


@pytest.fixture(scope="module")
def plan(recipe) -> Plan:
    return make_plan(load_recipe(recipe), recipe.parent / "runs")


def test_steps_come_in_the_order_in_which_a_run_does_them(plan):
    assert [step.name for step in plan.own] == NAMES == list(plan.artifacts)
    assert [step.artifact for step in plan.own] == list(plan.artifacts.values())
    stages = list(dict.fromkeys(step.stage for step in plan.own))
    assert set(stages) == set(STAGES) - {"audit"}, "an audit is for language models"


def test_one_folder_for_several_forms_depends_on_these_and_is_made_only_where_there_are_several(recipe, plan):
    hub = plan.step("bundle", "hub").artifact
    assert {form: hub.inputs[form] for form in ("safetensors", "onnx-int8")} == {
        form: plan.artifact("export", form).key for form in ("safetensors", "onnx-int8")
    }
    for formats in ("[onnx-int8]", "[onnx-int8,bnb-nf4]"):
        alone = make_plan(load_recipe(recipe, [f"export.formats={formats}"]), recipe.parent / "runs")
        assert alone.find("bundle", "hub") is None, "nothing to put together"


def test_portable_int8_is_another_file_and_changes_no_other_export(recipe, plan):
    made = make_plan(load_recipe(recipe, ["export.portable=true"]), recipe.parent / "runs")
    assert made.step("export", "onnx-int8").key != plan.step("export", "onnx-int8").key
    assert made.step("export", "safetensors").key == plan.step("export", "safetensors").key
    same = make_plan(load_recipe(recipe, ["export.portable=false"]), recipe.parent / "runs")
    assert same.step("export", "onnx-int8").key == plan.step("export", "onnx-int8").key


def unlabelled(recipe: Path, **data: object) -> Plan:
    changes = [f"data.{name}={value}" for name, value in data.items()]
    return make_plan(load_recipe(recipe, ["evaluate.seeds=[]", *changes]), recipe.parent / "runs")


def test_rows_without_labels_change_what_the_student_reads_and_leave_the_teacher_alone(recipe, plan):
    more = recipe.parent / "more.csv"
    more.write_text("text\nsome text\nother text\n")
    found, fewer = (unlabelled(recipe, unlabelled=f"{{source: {more}, max_rows: {count}}}") for count in (2, 1))
    same = ("teacher", "distil/student_ce_only", "lead", "evaluate/teacher", "evaluate/student_ce_only")
    assert {name: found.artifacts[name].key for name in same} == {name: plan.artifacts[name].key for name in same}
    for one, two in ((found, plan), (found, fewer)):
        for name in ("targets", "distil/student", "evaluate/student"):
            assert one.artifacts[name].key != two.artifacts[name].key


def test_a_budget_of_labels_changes_everything_from_the_teacher_on(recipe, plan):
    found = unlabelled(recipe, labelled=20)
    assert found.artifacts["teacher"].key != plan.artifacts["teacher"].key


def test_controls_are_trained_after_the_student_unless_they_are_switched_off(recipe):
    def students(*more: str) -> list[str]:
        made = make_plan(load_recipe(recipe, ["data.labelled=20", "evaluate.seeds=[]", *more]), recipe.parent / "runs")
        assert {f"evaluate/{step.role}" for step in made.own if step.stage == "distil"} <= made.artifacts.keys()
        return [step.role for step in made.own if step.stage == "distil"]

    usual = ["student_ce_only", "student", "student_ce_only_long", "student_hard_labels"]
    assert students() == usual
    assert students("distil.controls=[]") == usual[:2]
    assert students("distil.controls=[labelled_rows]", "distil.ce_only_baseline=false") == [
        "student", "student_labelled_rows",
    ]  # fmt: skip


def test_an_export_of_the_student_on_labels_alone_is_made_of_its_weights(recipe, plan):
    found = unlabelled(recipe)
    other = make_plan(load_recipe(recipe, ["evaluate.seeds=[]", "export.of=student_ce_only"]), recipe.parent / "runs")
    assert found.artifacts["export/safetensors"].key != other.artifacts["export/safetensors"].key
    assert other.artifacts["export/safetensors"].inputs["model"] == other.step("distil", "student_ce_only").key
    assert other.artifacts["distil/student"].key == plan.artifacts["distil/student"].key


def test_a_step_knows_its_stage_and_its_role_and_stays_what_it_is(plan):
    step = plan.step("evaluate", export_role("onnx-int8"))
    assert (step.stage, step.role, step.name) == ("evaluate", "export:onnx-int8", "evaluate/export:onnx-int8")
    assert step.artifact == plan.artifacts["evaluate/export:onnx-int8"] == plan.artifact("evaluate", step.role)
    assert step.key == step.artifact.key
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.role = "student"


def test_a_step_that_the_recipe_does_not_have_is_none_or_our_fault(plan):
    assert plan.find("audit") is None
    assert plan.find("distil", "teacher") is None
    with pytest.raises(AssertionError, match="no step bundle/gguf-f16"):
        plan.artifact("bundle", "gguf-f16")


def test_the_weights_of_a_role_are_made_by_one_step(plan):
    assert {role: plan.weights_of(role).name for role in plan.timed()} == {
        "student_ce_only": "distil/student_ce_only", "student": "distil/student", "teacher": "teacher",
        "teacher_full_precision": "teacher", "export:safetensors": "export/safetensors",
        "export:onnx-int8": "export/onnx-int8",
    }  # fmt: skip
    assert plan.weights_of("teacher_merged") is plan.step("teacher")


def test_a_repeat_ends_with_the_comparison_and_shares_what_does_not_depend_on_the_seed(plan):
    repeat = plan.repeats[1]
    assert [step.name for step in repeat.own] == [
        name
        for name in NAMES
        if step_name("export") not in name and not name.startswith(("lead", "benchmark", "bundle"))
    ]
    more = list(plan.steps())[len(NAMES) :]
    assert more[0] == "seed 1: teacher"
    assert "seed 1: evaluate/majority" in more, "it is compared with another teacher"
    assert plan.missing() == list(plan.steps())


def test_an_export_is_called_by_its_format_and_everything_else_by_its_role():
    assert format_of(export_role("onnx-int8")) == short_name("export:onnx-int8") == "onnx-int8"
    assert format_of("student") is None
    assert short_name("student") == "student"
    assert [trained_role(step_name("distil", "student")), trained_role(step_name("teacher"))] == ["student", "teacher"]


def test_a_student_waits_for_the_teachers_lead_only_where_the_recipe_stops_there(recipe):
    """Or searches and rate tests, which train one student and nothing else, would wait for ever."""
    warn, stop = (
        make_plan(load_recipe(recipe, ["evaluate.seeds=[]", f"distil.gate={gate}"]), recipe.parent / "runs")
        for gate in ("warn", "stop")
    )
    student = "distil", "student"
    assert [step.name for step in warn.needs(warn.step(*student))] == ["teacher", "targets"]
    assert [step.name for step in stop.needs(stop.step(*student))] == ["teacher", "targets", "lead"]
    assert [step.name for step in stop.needs(stop.step("lead"))] == [
        "teacher", "targets", "distil/student_ce_only",
    ]  # fmt: skip
    ce_only = stop.step("distil", "student_ce_only")
    assert [step.name for step in stop.needs(ce_only)] == ["teacher", "targets"]
    assert {step.name for step in warn.needs(warn.step("compare"))} == set(NAMES[: NAMES.index("compare")])
    judged = warn.needs(warn.step("evaluate", "student"))
    assert "evaluate/teacher" in {step.name for step in judged}
    assert "evaluate/majority" not in {step.name for step in judged}
