"""What `check` says of a run before anything else: time, downloads, the length of rows."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import yaml
from rich.console import Console
from support import commands, tiny, tiny_words

from distilpeft.data.sources import Source
from distilpeft.errors import InputError
from distilpeft.models.context import pair_of
from distilpeft.planning import check
from distilpeft.planning.forecast import duration
from distilpeft.planning.forecast.duration import Work, spoken
from distilpeft.planning.forecast.lengths import lengths
from distilpeft.planning.forecast.overview import downloads
from distilpeft.planning.forecast.stages import stages
from distilpeft.planning.forecast.vocabulary import Kept, kept_tokens
from distilpeft.planning.memory import Machine
from distilpeft.planning.plan import make_plan
from distilpeft.planning.sizes import size_of, student_size
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import TaskData, read_task_rows

SPLITS = {"train": 120, "validation": 40, "test": 40}
TEACHER, STUDENT = "FacebookAI/roberta-base", "distilbert/distilroberta-base"


def plan_of(folder, *changes: str):
    return make_plan(load_recipe(commands.workspace(folder), list(changes)), folder / "runs")


def shown(plan) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    check.show(plan, console)
    return console.file.getvalue().splitlines()


@pytest.fixture
def from_hub(tmp_path):
    """A recipe with models that are not here."""
    tree = tiny.recipe_tree(tmp_path)
    tree["teacher"]["model"], tree["student"] = TEACHER, {"model": STUDENT}
    tiny.write_csv(tmp_path / "rows.csv", 200)
    path = tmp_path / "hub.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_what_will_happen_comes_first(tmp_path):
    lines = shown(plan_of(tmp_path))
    assert re.match(r"tiny: 0 of \d+ steps are done; the rest takes about .* on \d+ CPU cores?, .* of memory", lines[0])
    assert "and downloads nothing." in lines[0]
    assert lines[2].split() == ["stage", "done", "rows", "steps", "time", "memory", "disk"]
    at = {line.split()[0]: index for index, line in reversed(list(enumerate(lines))) if line.strip()}
    assert at["stage"] < at["bundle"] < at["teacher:"] < at["class"] < at["choice"] < at["distilpeft"]
    assert any(line.startswith("~ = rough, perhaps off by a factor of 4") for line in lines)


def test_models_that_are_not_here_are_named_with_their_size_and_licence(from_hub, tmp_path):
    plan = make_plan(load_recipe(from_hub, []), tmp_path / "runs")
    lines = shown(plan)
    assert lines[0].endswith("and downloads 827 MB.")
    assert f"teacher: {TEACHER}, 125 million weights, mit, to be downloaded (about 499 MB)" in [
        re.sub(r", [\d.]+ million tuned \(LoRA\)", "", line) for line in lines
    ]
    assert any(line.startswith(f"student: {STUDENT}, 82 million weights, apache-2.0, to be down") for line in lines)
    assert [(source.name, round(size / 1e6)) for source, size in downloads(plan.recipe)] == [
        (TEACHER, 499), (STUDENT, 328)
    ]  # fmt: skip
    assert "?" not in "".join(line for line in lines if "distil/" in line or line.strip().startswith("teacher "))


@pytest.mark.parametrize(
    ("most", "cut"), [(16, "cuts no row (counted with the tokenizer of"), (6, "cuts rows: 30 of 120 in train, ")]
)
def test_rows_that_are_cut_are_counted_in_each_split(tmp_path, most, cut):
    recipe = commands.workspace(tmp_path)
    words = " ".join(tiny.PLAIN[:3])
    rows = [(words if at % 4 else f"{words} {words} {words}", str(at % 2)) for at in range(120)]
    for name in ("train", "validation", "test"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *[(f"{text} {name[0]}", label) for text, label in rows]])
    source = ", ".join(f"{name}: {tmp_path / f'{name}.csv'}" for name in ("train", "validation", "test"))
    splits = ["data.split=null", *(f"data.{name}={name}" for name in ("train", "validation", "test"))]
    loaded = load_recipe(recipe, [f"data.source={{{source}}}", *splits, f"data.max_tokens={most}"])
    (line,) = lengths(loaded, read_task_rows(loaded).splits).lines
    assert line.startswith(f"data.max_tokens: {most} {cut}")


def test_rough_times_follow_from_weights_tokens_and_rows(from_hub, tmp_path, monkeypatch):
    """At 1 GFLOP/s a row of 10 tokens takes 2 operations for each of 85 million weights and token: 1.7 seconds."""
    monkeypatch.setattr(duration, "speed", lambda machine: 1e9)
    plan = make_plan(load_recipe(from_hub, ["teacher.quantize=none"]), tmp_path / "runs")
    sizes = [size_of(Source(name, None)) for name in (TEACHER, STUDENT)]
    work = Work(plan, Machine(1, 1e9, "GPU"), *sizes, 10, {"train": 100, "validation": 10, "test": 10}, 100)
    ask = 2 * sizes[0].num_linear * 10 / 1e9
    assert ask == pytest.approx(1.7, abs=0.02)
    assert work.of(plan.step("targets")).seconds == pytest.approx(duration.LOAD_S + 100 * ask)
    epochs = plan.recipe.distil.fit.epochs
    half = 2 * sizes[1].num_linear * 10 / 1e9
    assert work.of(plan.step("distil", "student")).seconds == pytest.approx(duration.LOAD_S + 100 * epochs * 3 * half)
    assert not work.of(plan.step("targets")).is_measured


def test_an_earlier_run_gives_measured_times_and_what_is_done_takes_none(tmp_path):
    recipe = commands.workspace(tmp_path)
    assert commands.run(recipe, "--until", "distil") == 0
    tuned = make_plan(load_recipe(recipe, ["distil.optim.lr=0.00071"]), tmp_path / "runs")
    found = {stage.cells()[0]: stage for stage in stages(tuned, SPLITS, 8)}
    assert (found["teacher"].is_done, found["teacher"].cells()[4]) == (True, "-")
    again = found["distil/student"]
    assert again.duration.is_measured
    (one,) = [
        json.loads(file.read_text()) for file in (tmp_path / "runs/tiny").glob("distil-*/manifest.json")
        if "targets" in json.loads(file.read_text())["inputs"]
    ]  # fmt: skip
    rows = 120 * tuned.recipe.distil.fit.epochs
    assert again.duration.seconds == pytest.approx(rows / one["figures"]["rows_per_s"])
    assert not again.cells()[4].startswith("~")
    assert found["evaluate"].cells()[4].startswith("~"), "none was evaluated"
    more = make_plan(load_recipe(recipe, [f"evaluate.seeds=[{tuned.recipe.seed}, 18]"]), tmp_path / "runs")
    found = {stage.cells()[0]: stage for stage in stages(more, SPLITS, 8)}
    assert found["distil/student"].done == (1, 2)
    assert found["distil/student"].duration.seconds == pytest.approx(again.duration.seconds), "of the second seed"


def test_further_seeds_are_in_steps_time_and_disk(tmp_path):
    seed = plan_of(tmp_path).recipe.seed
    plans = [plan_of(tmp_path, f"evaluate.seeds={[seed, *more]}") for more in ([], [18, 19])]
    one, three = [{stage.cells()[0]: stage for stage in stages(plan, SPLITS, 8)} for plan in plans]
    assert [stage.done for stage in one.values()] != [stage.done for stage in three.values()]
    assert sum(stage.done[1] for stage in three.values()) == len(plans[1].steps())
    for name in ("teacher", "distil/student"):
        assert (one[name].done, three[name].done) == ((0, 1), (0, 3))
        assert three[name].disk == 3 * one[name].disk > 0
        assert three[name].duration.seconds == pytest.approx(3 * one[name].duration.seconds)
        assert (three[name].rows, three[name].steps) == (one[name].rows, one[name].steps)
    assert three["export"].done == one["export"].done
    lines = shown(plans[1])
    assert any(
        line.startswith(f"evaluate.seeds: done, time and disk are those of seeds {seed}, 18, 19 together;")
        for line in lines
    )
    assert not any("evaluate.seeds" in line for line in shown(plans[0]))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (99, "99 s"), (600, "10 min"), (7000, "2 h")]
)
def test_times_are_in_the_unit_that_suits_them(seconds, text):
    assert spoken(seconds) == text


def test_the_tokens_that_a_cut_vocabulary_keeps_are_counted_as_a_run_counts_them(tmp_path):
    tiny_words.save_classifier(tmp_path / "base")
    tiny.write_csv(tmp_path / "rows.csv", 60)
    plan = plan_of(tmp_path, "student.vocabulary.from=data")
    kept = kept_tokens(plan.recipe, read_task_rows(plan.recipe).splits)
    data = TaskData(plan.recipe, plan.data_digest, plan.cache)
    assert kept == Kept(len(pair_of(plan.recipe, data).cut.kept_K), len(tiny_words.wordpiece()), 36)
    lines = shown(plan)
    (line,) = [line for line in lines if line.startswith("student.vocabulary: ")]
    assert f"keeps about {kept.count} of {kept.of} tokens, " in line
    (student,) = [line for line in lines if line.startswith("student: ")]
    whole, left = student_size(plan.recipe), student_size(plan.recipe, kept.count)
    assert whole.total - left.total == (kept.of - kept.count) * 64
    assert f"{left.total / 1e6:.2f} million weights" in student


def test_a_tokenizer_that_cannot_be_cut_is_refused_before_anything_runs(tmp_path):
    tiny_words.save_language_model(tmp_path / "base")
    tiny.write_csv(tmp_path / "rows.csv", 60)
    file = tmp_path / "base/tokenizer.json"
    spec = json.loads(file.read_text())
    spec["model"]["dropout"] = 0.1
    file.write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"student.vocabulary: the tokenizer of .*base merges at random \(dropout\)"):
        plan_of(tmp_path, "student.vocabulary.from=data")
