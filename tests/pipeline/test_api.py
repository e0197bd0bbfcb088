"""distilpeft from Python: a run, its figures, its models, and faults as exceptions."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from support import commands

import distilpeft
from distilpeft import api
from distilpeft.planning.plan import make_plan


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return commands.workspace(tmp_path_factory.mktemp("api"), export__formats=["safetensors", "onnx"])


@pytest.fixture(scope="module")
def finished(recipe) -> distilpeft.Run:
    assert commands.run(recipe) == 0  # the verb is `distilpeft.run` and a table
    return distilpeft.run(recipe, runs=recipe.parent / "runs", console=Console(file=io.StringIO()))


def test_a_run_returns_its_scores_and_its_report(finished):
    assert {"teacher", "student", "student_ce_only", "export:onnx"} <= set(finished.scores)
    assert 0 <= finished.scores["student"]["accuracy"] <= 1
    assert finished.report.metric == "accuracy"
    assert (finished.folder / "report.html").is_file()


def test_the_report_has_the_answers_by_class_and_the_surest_mistakes(finished):
    found = finished.report.answers
    rows = finished.report.model("student").scores["accuracy"].num_rows
    assert sum(one.right for one in found.classes) / rows == finished.scores["student"]["accuracy"]
    assert sum(one.present for one in found.classes) == sum(one.predicted for one in found.classes) == rows
    assert [one.right for one in found.classes] == [counts[at] for at, counts in enumerate(found.confusion)]
    assert sum(one.rows["train"] for one in found.classes) == finished.report.rows.train
    wrong = rows - sum(one.right for one in found.classes)
    assert len(found.mistakes) == min(10, wrong)
    assert all(one.label != one.answer for one in found.mistakes)
    sure = [one.probability for one in found.mistakes]
    assert sure == sorted(sure, reverse=True)
    texts = [one.text for one in found.mistakes]
    assert [one["label"] for one in finished.bundle("safetensors").answers(texts)] == [
        one.answer for one in found.mistakes
    ]
    assert set(finished.report.seconds) >= {"teacher", "distil", "benchmark"}


def test_a_student_is_a_transformers_model_that_answers_as_its_export_does(finished):
    model, tokenizer = finished.student()
    bundle = finished.bundle("onnx")
    texts = ["a good film", "the story was awful"]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    labels = [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
    assert [answer["label"] for answer in bundle.answers(texts)] == labels
    assert finished.bundle().answers(texts)[0]["label"] == labels[0]
    assert bundle.answers([]) == []
    assert type(finished.student("student_ce_only")[0]) is type(model)


def test_a_finished_run_returns_at_once_and_says_so(finished, recipe):
    said = io.StringIO()
    again = distilpeft.run(recipe, runs=recipe.parent / "runs", console=Console(file=said))
    assert "nothing to do" in said.getvalue()
    assert again.scores == finished.scores


def test_a_first_look_has_one_seed_and_few_rounds(recipe):
    tree = yaml.safe_load(recipe.read_text())
    quick = distilpeft.load_recipe({**tree, "evaluate": {"seeds": [1, 2]}}, api.QUICK)
    assert quick.evaluate.seeds == ()
    assert (quick.benchmark.rounds, quick.benchmark.precision) == (3, None)


def test_a_recipe_may_be_a_mapping_with_changes(recipe, finished):
    tree = yaml.safe_load(recipe.read_text())
    loaded = distilpeft.load_recipe(tree, {"distil.temperature": 3, "evaluate.seeds": [1, 2]})
    assert (loaded.distil.temperature, loaded.evaluate.seeds) == (3, (1, 2))
    assert distilpeft.load_recipe(loaded, ["distil.temperature=4"]).distil.temperature == 4
    checked = distilpeft.check(tree, runs=recipe.parent / "runs")
    assert checked.num_missing == 0
    assert checked.rows["train"] > 0
    assert "teacher" in {stage[0] for stage in checked.stages}


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda tree: distilpeft.load_recipe({**tree, "nam": 1}), r"recipe: nam: unknown key; did you mean name\?"),
        (lambda tree: distilpeft.load_recipe(tree, {"distil.alpha": 2}), "--set distil.alpha=2: distil.alpha: .*1"),
        (lambda tree: distilpeft.load_recipe({**tree, "distil": {"alpha": "x"}}), "recipe: distil"),
        (lambda tree: distilpeft.run(tree, until="never"), "until never: one of teacher, targets"),
        (lambda tree: distilpeft.run("missing.yaml"), "missing.yaml: No such file"),
    ],
)
def test_faults_are_one_line_that_names_the_place(recipe, call, why):
    with pytest.raises(distilpeft.InputError, match=why) as error:
        call(yaml.safe_load(recipe.read_text()))
    assert "\n" not in str(error.value)


def test_what_a_run_does_not_have_is_named_with_what_it_has(finished):
    with pytest.raises(distilpeft.InputError, match="no gguf; its exports are safetensors, onnx"):
        finished.bundle("gguf")
    with pytest.raises(distilpeft.InputError, match="no 'other'; its students are student_ce_only, student"):
        finished.student("other")


def test_a_run_that_is_not_finished_says_what_it_lacks(tmp_path, recipe):
    unfinished = distilpeft.Run(make_plan(distilpeft.load_recipe(recipe), tmp_path))
    with pytest.raises(distilpeft.InputError, match="steps of this run are not done"):
        assert unfinished.scores
    with pytest.raises(distilpeft.InputError, match="student: student is not trained yet"):
        unfinished.student()
    with pytest.raises(distilpeft.InputError):
        unfinished.bundle()


def test_init_writes_a_recipe_and_says_what_it_cannot_see(tmp_path):
    rows = "".join(f"a {'good' if at % 2 else 'bad'} film {at},{'pos' if at % 2 else 'neg'}\n" for at in range(60))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    wishes = {"packages": True, "language": "en"}
    made = distilpeft.init(tmp_path / "mine.yaml", str(tmp_path / "rows.csv"), **wishes)
    assert made.task.kind == "text_classification"
    with pytest.raises(distilpeft.InputError, match="is there already"):
        distilpeft.init(tmp_path / "mine.yaml", str(tmp_path / "rows.csv"), **wishes)
    distilpeft.init(tmp_path / "mine.yaml", str(tmp_path / "rows.csv"), overwrite=True, **wishes)
    before = (tmp_path / "mine.yaml").read_text()
    with pytest.raises(distilpeft.InputError):
        distilpeft.init(tmp_path / "mine.yaml", str(tmp_path / "gone.csv"), overwrite=True, **wishes)
    assert (tmp_path / "mine.yaml").read_text() == before, "the old recipe stays until there is a new one"
    with pytest.raises(distilpeft.InputError, match="init: unknown 'lable'"):
        distilpeft.init(tmp_path / "other.yaml", str(tmp_path / "rows.csv"), lable="label")
    (tmp_path / "odd.csv").write_text("a,b\n" + "1,2\n3,4\n" * 20)
    with pytest.raises(distilpeft.InputError, match="--task is needed, with the columns that it reads"):
        distilpeft.init(tmp_path / "odd.yaml", str(tmp_path / "odd.csv"), packages=True)


def test_importing_prints_nothing_and_brings_no_torch():
    code = (
        "import distilpeft, sys; from distilpeft import run, check, Run, InputError; "
        "assert 'torch' not in sys.modules; assert 'Bundle' in dir(distilpeft)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
