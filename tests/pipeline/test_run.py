"""The whole chain on a tiny model: results, reuse, and what each change makes anew."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import commands

from distilpeft import cli
from distilpeft.machine.files import read_sealed
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.report import build, text
from distilpeft.report.page import page

ROLES = [
    "majority",
    "untrained",
    "student_ce_only",
    "student",
    "teacher",
    "teacher_full_precision",
    "teacher_merged",
    "export:safetensors",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = commands.workspace(tmp_path_factory.mktemp("finished"))
    assert commands.run(recipe) == 0
    return recipe


def plan_of(recipe: Path, *overrides: str):
    return make_plan(load_recipe(recipe, overrides), recipe.parent / "runs")


def student_weights(recipe: Path, *overrides: str) -> dict[str, torch.Tensor]:
    return load_file(plan_of(recipe, *overrides).artifacts["distil/student"].path / "model" / "model.safetensors")


def test_the_report_names_every_model_with_scores_sizes_and_latency(finished):
    report = json.loads((finished.parent / "runs/tiny/report.json").read_text())
    assert [model["role"] for model in report["models"]] == ROLES
    for model in report["models"]:
        accuracy = model["scores"]["accuracy"]
        assert accuracy["num_rows"] == 40
        assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    models = {model["role"]: model for model in report["models"]}
    assert models["majority"]["latency_ms"] is None
    assert models["student"]["num_parameters"] < models["teacher_full_precision"]["num_parameters"]
    assert models["teacher"]["num_parameters"] == models["teacher_full_precision"]["num_parameters"]
    assert models["untrained"]["num_parameters"] == models["student"]["num_parameters"]
    assert models["teacher"]["size_bytes"] < models["teacher_full_precision"]["size_bytes"]
    assert 0 < models["student"]["latency_ms"]["p50"] <= models["student"]["latency_ms"]["p95"]
    assert models["export:safetensors"]["scores"] == models["student"]["scores"]
    teacher = models["teacher"]["scores"]["accuracy"]["value"]
    assert teacher > 0.9, "one word decides the class: a teacher that learns at all finds it"
    assert report["student_vs_teacher"] == models["student"]["scores"]["accuracy"]["value"] / teacher


def test_the_report_and_its_page_hold_what_the_run_has_found(finished):
    run = finished.parent / "runs/tiny"
    found = read_sealed(run / "report.json", "")
    report = build.load(run)
    assert json.dumps(report.as_json()) == json.dumps(found), "every key, in its order"
    assert report == build.build(plan_of(finished))
    assert (run / "report.md").read_text() == text.markdown(report)
    assert (run / "report.html").read_text() == page.render([report])


def test_the_manifest_tells_what_the_student_was_before(finished):
    start = plan_of(finished).artifacts["distil/student"].figures()["start"]
    assert start == {"from": "layers 1 of the teacher", "new_weights": []}


def test_scores_are_what_a_plain_count_over_the_exported_model_gives(finished):
    """Trap 25: the figures of the report against transformers alone, row by row."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from distilpeft.data.labels import LABEL
    from distilpeft.tasks.rows import read_task_rows

    rows = read_task_rows(load_recipe(finished)).splits["test"]
    folder = finished.parent / "runs/tiny/student"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=16)).logits
        right += int(logits.argmax()) == row[LABEL]
    report = json.loads((finished.parent / "runs/tiny/report.json").read_text())
    student = next(model for model in report["models"] if model["role"] == "student")
    assert student["scores"]["accuracy"]["value"] == right / len(rows)


@pytest.mark.thorough
def test_the_export_answers_through_a_plain_pipeline_without_this_package(finished):
    code = (
        "import sys; sys.modules['distilpeft'] = None\n"
        "from transformers import pipeline\n"
        f"classify = pipeline('text-classification', model={str(finished.parent / 'runs/tiny/student')!r})\n"
        "print(classify('the film and a superb story')[0]['label'], classify('a dull script')[0]['label'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["good", "bad"], done.stderr


def test_a_second_run_does_nothing_and_never_imports_torch(finished):
    folder = finished.parent / "runs/tiny"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*-*/manifest.json")}
    code = f"import sys; sys.argv = {commands.arguments_of(finished, ())!r}; from distilpeft.cli import main; main()"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to do, all 17 steps are done" in done.stdout
    assert done.stdout.split()[-1] == "False"
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*-*/manifest.json")} == before


def verb(capsys, *arguments: str) -> str:
    with mock.patch.object(sys, "argv", ["distilpeft", *arguments]):
        cli.main()
    return capsys.readouterr().out


def test_report_prints_the_table_and_as_json_the_very_file(finished, capsys):
    folder = finished.parent / "runs/tiny"
    assert json.loads(verb(capsys, "report", str(folder), "--json")) == read_sealed(folder / "report.json", "")
    table = verb(capsys, "report", str(folder))
    assert all(role in table for role in ROLES)
    assert "keeps" in table


def test_check_counts_rows_steps_weights_and_what_is_done(finished, capsys):
    printed = verb(capsys, "check", str(finished), "--runs", str(finished.parent / "runs"))
    cells = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert cells["teacher"][1:4] == ["1/1", "120", "16"]
    student = sum(tensor.numel() for tensor in student_weights(finished).values()) / 1e6
    (line,) = [line for line in printed.splitlines() if line.startswith("student: ")]
    assert float(re.search(r"([\d.]+) million weights", line)[1]) == pytest.approx(student, abs=0.006)
    assert "17 of 17 steps are done" in " ".join(printed.split())


def test_schema_prints_what_editors_need(capsys):
    schema = json.loads(verb(capsys, "schema"))
    assert schema["properties"]["distil"]["$ref"] == "#/$defs/Distil"
    assert schema["$defs"]["Distil"]["additionalProperties"] is False


@pytest.mark.parametrize("change", ["distil.temperature=4", "distil.alpha=0.7"])
def test_a_new_temperature_or_alpha_reuses_teacher_targets_and_baseline(finished, change):
    assert plan_of(finished, change).missing() == [
        "distil/student", "evaluate/student", "export/safetensors", "evaluate/export:safetensors", "compare",
        "benchmark", "bundle/safetensors",
    ]  # fmt: skip


def test_a_new_student_reuses_teacher_and_targets(finished):
    missing = plan_of(finished, "student.from_teacher.layers=[0]").missing()
    assert not {"teacher", "targets", "evaluate/teacher"} & set(missing)
    assert {"distil/student", "distil/student_ce_only", "evaluate/untrained"} <= set(missing)


@pytest.mark.parametrize(
    "change",
    ["teacher.fit.micro_batch_size=4", "distil.fit.save_every=50", "targets.micro_batch_size=3", "teacher.gate=warn"],
)
def test_what_cannot_change_a_result_changes_no_key(finished, change):
    assert plan_of(finished, change).missing() == []


def test_changed_rows_make_everything_anew(finished):
    """Trap 26: rows are named by their content, not by their file's name."""
    before = {made.path.name for made in plan_of(finished).artifacts.values()}
    source = finished.parent / "rows.csv"
    kept = source.read_bytes()
    try:
        source.write_bytes(kept.replace(b"film", b"movie", 1))
        after = {made.path.name for made in plan_of(finished).artifacts.values()}
    finally:
        source.write_bytes(kept)
    assert not before & after


def test_online_targets_teach_the_same_student_as_cached_ones(finished):
    """Traps 8, 9, 15: rows are shuffled, batches regrouped every epoch, and looked up by row id."""
    assert commands.run(finished, "--set", "targets.mode=online", "--until", "distil") == 0
    cached, online = student_weights(finished), student_weights(finished, "targets.mode=online")
    assert (
        plan_of(finished).artifacts["distil/student"].path
        != plan_of(finished, "targets.mode=online").artifacts["distil/student"].path
    )
    # AdamW makes steps of rounding where a gradient is next to 0 (2.7e-4 in attention keys on one CPU). Targets of
    # other rows move weights by its lr, 5e-3, in every step; with SGD tests/support/equality.py asks for 1e-6.
    for name, tensor in cached.items():
        torch.testing.assert_close(online[name], tensor, rtol=1e-3, atol=1e-3)


def test_cached_targets_are_the_tuned_teachers_logits_row_by_row(finished):
    """Trap 21: and not those of its base."""
    from distilpeft.distillation.store import SoftTargets
    from distilpeft.machine.runtime import Runtime
    from distilpeft.models.pair import Pair
    from distilpeft.models.teacher import load_teacher
    from distilpeft.tasks.rows import read_task_rows

    plan = plan_of(finished)
    stored = SoftTargets(plan.artifacts["targets"].path).lookup(np.arange(120)).values
    loaded = load_teacher(Runtime(), Pair(plan.recipe), plan.artifacts["teacher"].path, "fp32")
    rows = read_task_rows(plan.recipe).splits["train"]
    assert len(stored) == len(rows) == 120
    for index in (0, 7, 64, 119):
        inputs = loaded.tokenizer(rows[index]["text"], return_tensors="pt", truncation=True, max_length=16)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            logits = loaded.model(**inputs).logits[0].numpy()
        np.testing.assert_allclose(stored[index], logits, atol=1e-4)


def test_the_trained_student_is_not_the_untrained_one_nor_the_baseline(finished):
    plan = plan_of(finished)
    student = student_weights(finished)
    baseline = load_file(plan.artifacts["distil/student_ce_only"].path / "model" / "model.safetensors")
    assert set(student) == set(baseline)
    assert any(not torch.equal(student[name], baseline[name]) for name in student)


def test_no_checkpoint_is_left_in_a_published_artifact(finished):
    for made in plan_of(finished).artifacts.values():
        assert not list(made.path.rglob("checkpoints")), made.path


def test_altered_soft_targets_are_refused_before_they_teach(tmp_path, capfd):
    recipe = commands.workspace(tmp_path)
    assert commands.run(recipe, "--until", "targets") == 0
    logits = plan_of(recipe).artifacts["targets"].path / "shard-00000.bin"
    content = bytearray(logits.read_bytes())
    content[-5] ^= 1
    logits.write_bytes(content)
    capfd.readouterr()
    assert commands.run(recipe) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "shard-00000.bin: missing or altered" in error


def test_no_form_of_the_teacher_loses_its_tuning(finished):
    """Trap 21: the unquantized teacher is held against peft alone, the merged one against the 4-bit one."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from distilpeft.machine.runtime import Runtime
    from distilpeft.models.pair import Pair
    from distilpeft.models.teacher import load_teacher, load_teacher_merged, load_teacher_unquantized

    plan = plan_of(finished)
    folder = plan.artifacts["teacher"].path
    base = AutoModelForSequenceClassification.from_pretrained(str(finished.parent / "base"), num_labels=2)
    plain = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    ids = torch.randint(5, 25, (16, 10), generator=torch.Generator().manual_seed(0))

    def logits(load, quantize: str) -> torch.Tensor:
        teacher = plan.recipe.teacher.model_copy(update={"quantize": quantize})
        pair = Pair(plan.recipe.model_copy(update={"teacher": teacher}))
        with torch.no_grad():
            return load(Runtime(), pair, folder, "fp32").model(input_ids=ids).logits

    with torch.no_grad():
        expected = plain(input_ids=ids).logits
    torch.testing.assert_close(logits(load_teacher_unquantized, "nf4"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(load_teacher_merged, "none"), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load_teacher_merged, "nf4"), logits(load_teacher, "nf4"), atol=1e-4, rtol=1e-4)


def test_a_base_with_other_weights_makes_everything_anew(finished):
    """Trap 26: a model folder is named by its content too."""
    before = {made.path.name for made in plan_of(finished).artifacts.values()}
    weights = finished.parent / "base/model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        after = {made.path.name for made in plan_of(finished).artifacts.values()}
    finally:
        weights.write_bytes(kept)
    assert not before & after


def test_targets_of_another_teacher_are_refused_by_the_stage_itself(finished, tmp_path):
    """Trap 8: also where somebody hands the stage a store that the plan would not have chosen."""
    from dataclasses import replace

    from distilpeft.errors import InputError
    from distilpeft.machine.artifact import Artifact
    from distilpeft.machine.runtime import Runtime
    from distilpeft.models.context import Context
    from distilpeft.models.pair import Pair
    from distilpeft.pipeline.stages import distil
    from distilpeft.tasks.rows import TaskData

    plan = plan_of(finished)
    teacher = plan.artifacts["teacher"]
    other = replace(teacher, inputs={**teacher.inputs, "base": "another"})
    data = TaskData(plan.recipe, plan.data_digest, tmp_path)
    out = Artifact("distil", tmp_path / "distil-0", {}, {})
    store = plan.artifacts["targets"].path
    with pytest.raises(InputError, match=r"these soft targets belong to base .* \(.*\), not to .* \(another\)"):
        distil.run(Context(Runtime(), data, Pair(plan.recipe)), role="student", teacher=other, targets=store, out=out)
