"""Trackers see what is in the logs on disk, go on where a training goes on, and never stop one."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from unittest import mock

import pytest
from support import commands

from distilpeft.planning.plan import make_plan
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.training import tracking

SHORT = ("--set", "tracking=[tensorboard]", "--until", "distil")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """TensorBoard's own imports warn of things that neither we nor users can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.utils.tensorboard  # noqa: F401
    logging.getLogger("tensorboard").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    recipe = commands.workspace(tmp_path_factory.mktemp("tracking"))
    assert commands.run(recipe, *SHORT) == 0
    return recipe


def shown(recipe: Path, step: str) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a training: tag → step → value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = plan_of(recipe).artifacts[step]
    folder = recipe.parent / "runs/tiny/tracking/tensorboard" / made.path.name
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert "recipe/text_summary" in tags["tensors"]
    found = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags["scalars"]}
    assert all(len(dict(pairs)) == len(pairs) for pairs in found.values()), "each step once"
    return {tag: dict(pairs) for tag, pairs in found.items()}


def plan_of(recipe: Path, *overrides: str):
    return make_plan(load_recipe(recipe, overrides), recipe.parent / "runs")


def logged(recipe: Path, step: str) -> list[dict]:
    file = plan_of(recipe).artifacts[step].path / "train_log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def check(recipe: Path, step: str) -> None:
    found, lines = shown(recipe, step), logged(recipe, step)
    for name in ("loss", "grad_norm", "lr"):
        assert found[f"train/{name}"] == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-6)
    validations = plan_of(recipe).artifacts[step].figures()["validations"]
    expected = {one["step"]: one["accuracy"] for one in validations}
    assert found["validation/accuracy"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step", ["teacher", "distil/student", "distil/student_ce_only"])
def test_every_step_and_validation_of_every_training_is_shown(finished, step):
    check(finished, step)


@pytest.mark.thorough
def test_a_training_that_was_killed_goes_on_in_the_tracker_at_its_own_step(tmp_path):
    recipe = commands.workspace(tmp_path)
    stopped = commands.run_apart(recipe, *SHORT, before=commands.signal_at("teacher", 5, "SIGKILL"))
    assert stopped.returncode == -9
    assert commands.run(recipe, *SHORT) == 0
    assert len(logged(recipe, "teacher")) == 16
    check(recipe, "teacher")


def test_a_training_that_goes_on_within_the_same_second_comes_last(tmp_path, monkeypatch):
    made, recipe = plan_of(commands.workspace(tmp_path)).artifacts["teacher"], load_recipe(tmp_path / "tiny.yaml", ())
    numbers = []
    for pid, step in ((99, 1), (100, 3)):  # as texts, 100 comes before 99
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        tracker = tracking._start("tensorboard", recipe, made, step)
        tracker.log({"loss": float(step)}, step=step)
        tracker.finish()
        numbers.append(step)
    assert list(shown(tmp_path / "tiny.yaml", "teacher")["loss"]) == numbers


def test_a_tracker_changes_no_key(finished):
    with_one, without = (plan_of(finished, *more).artifacts for more in (["tracking=[tensorboard]"], []))
    assert dict(with_one) == dict(without)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(tmp_path, capsys):
    recipe = commands.workspace(tmp_path)
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert commands.run(recipe, "--set", "tracking=[mlflow]") == 2
    err = capsys.readouterr().err
    assert 'tracking: mlflow is not installed: pip install "distilpeft[mlflow]"' in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


class Broken:
    """A tracker whose server goes away after the third call."""

    def __init__(self, *_: object, **__: object) -> None:
        self.calls = 0
        self.writer = mock.MagicMock()

    def start(self) -> None: ...

    def log(self, values: dict, step: int) -> None:
        self.calls += 1
        if self.calls > 3:
            raise ConnectionError("the server is gone\nwith a long story")

    def finish(self) -> None:
        raise AssertionError("it is gone")


def test_a_tracker_that_fails_is_told_once_and_the_training_goes_on(tmp_path, capsys):
    recipe = commands.workspace(tmp_path)
    with mock.patch.dict(tracking.LOGGER_TYPE_TO_CLASS, tensorboard=Broken):
        assert commands.run(recipe, "--set", "tracking=[tensorboard]", "--until", "teacher") == 0
    said = " ".join(capsys.readouterr().err.split())
    warning = "warning: tracking: tensorboard failed and is left out from here on (the server is gone)"
    assert said.count(warning) == said.count("tracking: ") == 1
    assert plan_of(recipe).artifacts["teacher"].done


def test_one_that_cannot_even_start_is_told_likewise(tmp_path, capsys):
    recipe = commands.workspace(tmp_path)
    with mock.patch.dict(tracking.LOGGER_TYPE_TO_CLASS, tensorboard=mock.Mock(side_effect=OSError("no space"))):
        assert commands.run(recipe, "--set", "tracking=[tensorboard]", "--until", "teacher") == 0
    assert "tensorboard failed and is left out from here on (no space)" in " ".join(capsys.readouterr().err.split())


def test_settings_are_sent_flat():
    nested = {"distil": {"optim": {"lr": 1e-3}, "alpha": 0.5}, "labels": ["a", "b"], "name": "x"}
    assert dict(tracking._flat(nested)) == {
        "distil.optim.lr": 1e-3, "distil.alpha": 0.5, "labels": "['a', 'b']", "name": "x",
    }  # fmt: skip


def test_weights_and_biases_stays_offline_until_somebody_has_logged_in(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking._offline("wandb") == {"mode": "offline"}
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert tracking._offline("wandb") == {}
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking._offline("wandb") == {}
    assert tracking._offline("mlflow") == {}
