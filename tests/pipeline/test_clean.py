"""Clearing away on real runs: what is current stays, what was removed is made again, and nobody is disturbed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support import commands

import distilpeft
from distilpeft.errors import InputError
from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.training import train

WARMER = ("--set", "distil.temperature=3")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A run, and then one at another temperature in the same folder."""
    path = commands.workspace(
        tmp_path_factory.mktemp("clean"), teacher__fit__epochs=1, distil__fit__epochs=1, teacher__gate="warn",
        distil__ce_only_baseline=False,
    )  # fmt: skip
    assert commands.run(path) == 0
    assert commands.run(path, *WARMER) == 0
    return path


def folder_of(recipe: Path) -> Path:
    return recipe.parent / "runs/tiny"


def wanted(recipe: Path, *overrides: str) -> set[str]:
    plan = make_plan(load_recipe(recipe, overrides), recipe.parent / "runs")
    return {made.path.name for made in plan.steps().values()}


def artifacts(recipe: Path) -> set[str]:
    return {path.parent.name for path in folder_of(recipe).glob("*-*/manifest.json")}


def test_a_run_is_listed_with_the_score_of_its_report(recipe):
    (listed,) = distilpeft.runs(recipe.parent / "runs")
    assert listed.state == "finished"
    assert listed.deploy == "safetensors"
    assert not (folder_of(recipe) / "plan.json").exists(), "the report says it"


def test_nobody_cleans_while_a_run_is_at_work_and_its_finished_steps_are_listed(recipe, monkeypatch):
    log, seen = train._log, []

    def look(*arguments: object) -> None:
        if not seen:
            with pytest.raises(InputError, match=r"process .* is working on it; clean it when that is done"):
                distilpeft.clean(folder_of(recipe))
            seen.append(distilpeft.runs(recipe.parent / "runs")[0])
        log(*arguments)

    monkeypatch.setattr(train, "_log", look)
    hotter = ("--set", "distil.temperature=5")
    assert commands.run(recipe, *hotter, "--until", "distil") == 0
    (during,) = seen
    assert during.steps == len(wanted(recipe, hotter[1]))
    assert 0 < during.done < during.steps
    assert during.working
    unfinished = wanted(recipe, hotter[1]) - wanted(recipe, WARMER[1])
    assert unfinished & artifacts(recipe)
    assert not unfinished & {item.path.name for item in distilpeft.clean(folder_of(recipe), dry_run=True)}


def test_a_clean_that_is_killed_leaves_a_folder_in_which_the_run_works(recipe, capsys):
    kill = """
import os, signal, shutil
def die(path, **_):
    (path / "manifest.json").unlink(missing_ok=True)
    os.kill(os.getpid(), signal.SIGKILL)
shutil.rmtree = die
"""
    done = commands.run_apart(recipe, *WARMER, "--yes", verb="clean", before=kill)
    assert done.returncode == -signal.SIGKILL, done.output
    assert list(folder_of(recipe).glob("*.removed"))
    assert wanted(recipe, WARMER[1]) <= artifacts(recipe)
    assert commands.run(recipe, *WARMER) == 0
    assert "nothing to do" in capsys.readouterr().out
    distilpeft.clean(folder_of(recipe))
    assert not list(folder_of(recipe).glob("*.removed"))
    assert artifacts(recipe) == wanted(recipe, WARMER[1])
    assert (folder_of(recipe) / "student/manifest.json").is_file()


def test_what_was_removed_is_made_again_when_its_recipe_runs(recipe):
    kept = artifacts(recipe)
    assert commands.run(recipe) == 0
    assert artifacts(recipe) == kept | wanted(recipe)
    removed = {item.path.name for item in distilpeft.clean(recipe, runs=recipe.parent / "runs")}
    assert removed == wanted(recipe, WARMER[1]) - wanted(recipe)
