"""The measurement on a tiny run: every model, runs beside bundles, several seeds; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from scipy import stats
from support import commands

from distilpeft import cli
from distilpeft.benchmark import measure
from distilpeft.benchmark import subjects as subjects_
from distilpeft.benchmark.model_process import Timed, peak_bytes, resident_bytes
from distilpeft.errors import InputError
from distilpeft.export.runtimes import TransformersRunner
from distilpeft.machine.runtime import Runtime
from distilpeft.models.pair import Pair
from distilpeft.models.student import load_student
from distilpeft.models.teacher import load_teacher
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import TaskData

SEEDS = ("--set", "evaluate.seeds=[3,5]")
TIMED = ["student_ce_only", "student", "teacher", "teacher_full_precision", "export:safetensors"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = commands.workspace(tmp_path_factory.mktemp("benchmark"), noise=0.2, benchmark__batch_sizes=[1, 4])
    assert commands.run(recipe, *SEEDS, brief=False) == 0
    return recipe.parent / "runs/tiny"


def report_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def verb(*arguments: str, own_process: bool = False) -> None:
    with mock.patch.object(sys, "argv", ["distilpeft", *arguments]):
        if own_process:
            cli.main()
        else:
            with mock.patch.object(measure, "start_process", commands.start_here):
                cli.main()


def test_every_model_is_timed_in_every_cell(finished):
    found = report_of(finished)["benchmark"]
    assert sorted(arm["role"] for arm in found["arms"]) == sorted(TIMED)
    for arm in found["arms"]:
        assert [(cell["batch_size"], cell["length"]) for cell in arm["cells"]] == [(1, "data"), (4, "data")]
        for cell in arm["cells"]:
            assert len(cell["round_ms"]) == found["rounds"] == 3
            text = cell["from_text"]
            together = cell["latency_ms"]["mean"] + text["encode_ms"]["mean"]
            assert text["latency_ms"]["mean"] == pytest.approx(together, abs=0.003)
            assert 0 < cell["latency_ms"]["p50"] <= cell["latency_ms"]["p95"] <= cell["latency_ms"]["max"]
            assert (cell["ratio"] is None) == (arm["role"] == "student")
            assert 3 < cell["mean_tokens"] <= 16
    assert found["noise"]["same_model_ratio"] is not None


def test_the_paired_test_is_that_of_the_models_own_answers(finished):
    """Against a count over what evaluation has kept, by scipy's own table test."""
    plan = make_plan(load_recipe(finished.parent.parent / "tiny.yaml", ["evaluate.seeds=[3,5]"]), finished.parent)
    with np.load(plan.artifacts["compare"].path / "rows.npz") as rows:
        right = {role: rows[role] for role in rows.files}
    for pair in report_of(finished)["comparisons"]:
        one, two = right[pair["role"]], right[pair["against"]]
        assert pair["difference"] == pytest.approx(one.mean() - two.mean())
        assert (pair["wins"], pair["losses"]) == (int((one > two).sum()), int((one < two).sum()))
        both = pair["wins"] + pair["losses"]
        assert pair["p_value"] == (pytest.approx(stats.binomtest(pair["wins"], both).pvalue) if both else 1.0)
    scored = {model["role"]: model["scores"]["accuracy"]["value"] for model in report_of(finished)["models"]}
    assert {role: pytest.approx(right[role].mean()) for role in scored} == scored
    assert all((right[f"{role} weight"] == 1).all() for role in scored)


def test_every_seed_is_a_whole_chain_of_its_own_in_the_same_folder(finished):
    found = report_of(finished)["seeds"]
    assert found["seeds"] == [3, 5]
    alone = finished.parent.parent / "tiny.yaml"
    plan = make_plan(load_recipe(alone, ["seed=5"]), finished.parent)
    assert plan.artifacts["distil/student"].done, "a run with that seed finds its student"
    values = {model["role"]: model["values"] for model in found["models"]}
    five = plan.artifacts["evaluate/student"].figures()["scores"]["accuracy"]["value"]
    assert values["student"][1] == five
    (pair,) = [one for one in found["comparisons"] if (one["role"], one["against"]) == ("student", "teacher")]
    assert pair["differences"] == pytest.approx(
        [s - t for s, t in zip(values["student"], values["teacher"], strict=True)]
    )
    assert pair["low"] <= pair["mean"] <= pair["high"]
    assert pair["mean"] == pytest.approx(np.mean(pair["differences"]))
    text = (finished / "report.md").read_text()
    assert "model | seed 3 | seed 5 | mean ± sd" in text


def test_seeds_belong_to_no_key_and_a_second_run_does_nothing(finished, capsys):
    recipe = finished.parent.parent / "tiny.yaml"
    one, many = (
        make_plan(load_recipe(recipe, overrides), finished.parent) for overrides in ([], ["evaluate.seeds=[3,5]"])
    )
    assert dict(one.artifacts) == dict(many.artifacts)
    assert many.missing() == []
    assert commands.run(recipe, *SEEDS) == 0
    assert "nothing to do, all" in capsys.readouterr().out


def test_the_calibration_is_that_of_the_ece(finished):
    for model in report_of(finished)["models"]:
        bins = model["calibration"]
        assert sum(bins["count"]) == 40
        right = np.dot(bins["accuracy"], bins["count"]) / 40
        assert right == pytest.approx(model["scores"]["accuracy"]["value"], abs=1e-5)


@pytest.mark.thorough
def test_runs_and_bundles_are_measured_beside_each_other_and_repeats_compared(finished, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("good film\n\nbad film indeed\n")
    settings = ["--set", "benchmark.rounds=3", "--set", "benchmark.batch_sizes=[1]"]
    verb("benchmark", str(finished), str(finished / "exports/safetensors"), "--repeat", "2", *settings,
         "--input", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out/b.json"))  # fmt: skip
    found = json.loads((tmp_path / "out/b.json").read_text())
    assert len(found["repeats"]) == 2
    names = [arm["role"] for arm in found["repeats"][0]["arms"]]
    assert sorted(names) == sorted([*(f"tiny/{role}" for role in TIMED), "safetensors/safetensors"])
    assert found["agreement"]["largest"] == max(found["agreement"]["apart"].values()) >= 0
    assert found["scores"]["tiny/student"] == found["scores"]["safetensors/safetensors"]
    assert "Over 2 repeats, the ratios differ by" in " ".join(capsys.readouterr().out.split())


@pytest.mark.thorough
def test_a_bundle_alone_in_a_process_of_its_own_tells_what_memory_it_needs(finished, capsys):
    bundle = finished / "exports/safetensors"
    verb("benchmark", str(bundle), "--set", "benchmark.rounds=3", "--set", "benchmark.lengths=[8]",
         "--set", "benchmark.batch_sizes=[1,2]", own_process=True)  # fmt: skip
    out = capsys.readouterr().out
    assert "1x8" in out
    assert "2x8" in out
    assert not (bundle / "benchmark.json").exists(), "a bundle accounts for its files"


@pytest.mark.thorough
def test_teacher_and_student_load_in_processes_of_their_own(finished, tmp_path):
    plan = make_plan(load_recipe(finished.parent.parent / "tiny.yaml"), finished.parent)
    data = TaskData(plan.recipe, plan.data_digest, finished / "cache")
    folders = {role: plan.weights_of(role).artifact.path for role in ("teacher", "student")}
    subjects = subjects_.subjects(Pair(plan.recipe), data, folders, tmp_path)
    runtime = Runtime()
    found = measure.measure(subjects, subjects_.wanted(plan.recipe, "cpu"), "student", runtime.say, runtime.bar)
    assert found["skipped"] == []
    assert [arm["role"] for arm in found["arms"]] == ["teacher", "student"]
    for arm in found["arms"]:
        assert 0 < arm["rss_start_bytes"] < arm["rss_loaded_bytes"] <= arm["memory_bytes"]
        assert arm["num_parameters"] > 0
        assert arm["load_s"] > 0
    assert found["noise"]["others"] is None or 0 <= found["noise"]["others"] <= 1


@pytest.mark.thorough
def test_measuring_again_changes_nothing_in_the_run(finished):
    before = {path.name for path in finished.iterdir()}
    report = (finished / "report.json").read_bytes()
    verb("benchmark", str(finished), "--set", "benchmark.rounds=3")
    assert {path.name for path in finished.iterdir()} == before | {"benchmark.json"}
    assert (finished / "report.json").read_bytes() == report


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}/nowhere"], "neither a finished run nor an exported folder"),
        (["{run}", "--set", "distil.temperature=3"], "--set distil.temperature=3: only keys of benchmark"),
        (["{run}", "--set", "benchmark.threads=[4096]"], "benchmark.threads: 4096 threads asked for"),
        (["{run}", "--set", "benchmark.lengths=[data,100000]"], "benchmark.lengths: 100000 tokens"),
        (["{run}", "--set", "benchmark.rounds=2"], "benchmark.rounds: input should be greater than or equal to 3"),
        (["{run}", "--set", "benchmark.batch_sizes=[1,1]"], "the values must differ from each other"),
        (["{run}/exports/safetensors", "--input", "{run}/nowhere.txt"], "No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(finished, capsys, arguments, said):
    with pytest.raises(SystemExit) as left:
        verb("benchmark", *(argument.format(run=finished) for argument in arguments))
    assert left.value.code == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert len(err.splitlines()) == 1


def test_lengths_beyond_the_models_are_refused_before_anything_is_trained(tmp_path):
    recipe = commands.workspace(tmp_path)
    assert commands.run(recipe, "--set", "benchmark.lengths=[data,5000]") == 2
    assert not list((tmp_path / "runs/tiny").glob("*-*/manifest.json"))


@pytest.mark.thorough
def test_a_process_ends_when_nobody_asks_it_any_more(finished, tmp_path):
    rows = tmp_path / "rows.npz"
    np.savez(rows, ids=np.array([5, 6, 7]), ends=np.array([3]), pad=np.int64(0))
    spec = {
        "folder": str(finished / "exports/safetensors"), "recipe": None, "role": "safetensors", "rows": str(rows),
        "threads": 1, "compiled": False, "language": False, "new_tokens": 1, "cells": [[1, "data"]], "processors": [],
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    child = subprocess.run(
        [sys.executable, "-m", "distilpeft.benchmark.model_process", str(tmp_path / "spec.json")],
        input='{"do": "load"}\n',
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    told = json.loads(child.stdout)
    assert 0 < told["rss_start_bytes"] < told["rss_loaded_bytes"]
    timed = Timed(spec)
    assert timed.answer({"do": "warm", "cell": 0})["warmup_calls"] >= 2
    found = timed.answer({"do": "time", "cell": 0, "round": 1, "calls": 2, "seconds": 0.01})
    assert (len(found["seconds"]), found["tokens"], found["decode_s"]) == (2, 6, [])
    assert resident_bytes() <= peak_bytes()


def test_generation_is_not_timed_under_torch_compile(tmp_path):
    recipe = commands.language_workspace(tmp_path)
    with pytest.raises(InputError, match=r"benchmark.compile: is for classifiers"):
        load_recipe(recipe, ["benchmark.compile=true"])


def test_the_recipes_own_run_is_told_apart_from_bundles_by_files(tmp_path, finished, capsys):
    """An export's artifact is no bundle: nothing accounts for its files yet."""
    made = next(finished.glob("export-*")) / "model"
    with pytest.raises(SystemExit):
        verb("benchmark", str(made))
    assert "not a complete bundle" in capsys.readouterr().err


def test_moved_weights_are_the_same_weights_elsewhere(finished):
    """4-bit ones too, after they have been packed for inference (trap 27)."""
    plan = make_plan(load_recipe(finished.parent.parent / "tiny.yaml"), finished.parent)
    inputs = {"input_ids": np.array([[3, 4, 5]]), "attention_mask": np.ones((1, 3), np.int64)}
    runtime = Runtime()
    teacher = load_teacher(runtime, Pair(plan.recipe), plan.artifacts["teacher"].path, "fp32").model
    student = load_student(runtime, Pair(plan.recipe), plan.artifacts["distil/student"].path / "model").model
    for model in (teacher, student):
        runner = TransformersRunner(model, caching=False)
        before, places = runner.run(inputs)[0], [one.data_ptr() for one in model.parameters()]
        runner.move()
        assert not {one.data_ptr() for one in model.parameters()} & set(places)
        np.testing.assert_array_equal(runner.run(inputs)[0], before)
