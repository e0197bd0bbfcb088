"""Experiment trackers, through Accelerate's: loss, grad_norm and lr of every step, and the validations of a training.

What they show is on disk anyway (`train_log.jsonl`, the manifests), so a failing tracker is reported once and dropped:
a server that is down must not cost a training. Only the recipe's own settings are sent, and only by trackers that the
recipe names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from distilpeft.machine.artifact import Artifact
from distilpeft.machine.runtime import Runtime
from distilpeft.recipe import Recipe

Track = Callable[[int, Mapping[str, float]], None]
FOLDER = "tracking"


@contextmanager
def tracked(runtime: Runtime, recipe: Recipe, artifact: Artifact) -> Iterator[Track]:
    """The recipe's trackers for the training that `artifact` will hold, each as a run `<stage>-<key>`.

    Yields:
        What takes a step and its figures. Trackers start with the first of these, so that a resumed training goes on
        at its own step.
    """
    # Accelerator.end_training would end the trackers, but the process group with them: each is ended by itself.
    trackers = [_Tracker(name, runtime, recipe, artifact) for name in recipe.tracking] if runtime.is_main else []

    def track(step: int, figures: Mapping[str, float]) -> None:
        for tracker in trackers:
            tracker.log(step, figures)

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


class _Tracker:
    """One tracker, until it fails."""

    def __init__(self, name: str, runtime: Runtime, recipe: Recipe, artifact: Artifact) -> None:
        self._name, self._runtime, self._recipe, self._artifact = name, runtime, recipe, artifact
        self._inner: Any = None
        self._failed = False

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send figures, and at the first time start."""

        def send() -> None:
            if self._inner is None:
                self._inner = _start(self._name, self._recipe, self._artifact, step)
            self._inner.log(dict(figures), step=step)

        self._try(send)

    def finish(self) -> None:
        """Write what is left, and close."""
        if self._inner is not None:
            self._try(self._inner.finish)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._runtime.say(
                f"  warning: tracking: {self._name} failed and is left out from here on ({lines[0][:200]})"
            )


def _start(name: str, recipe: Recipe, artifact: Artifact, step: int) -> Any:
    """A running tracker of Accelerate's, with the recipe's settings recorded."""
    project, run = recipe.name, artifact.path.name
    folder = artifact.path.parent / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    settings = recipe.model_dump(mode="json", exclude_unset=True)
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # Events of steps that a resumed training takes again are hidden by TensorBoard from `purge_step` on. It reads
        # files in the order of their names, which begin with the second.
        while any((folder / run).glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        tracker = kind(run, folder, purge_step=step)
        tracker.start()
        tracker.writer.add_text("recipe", f"```\n{yaml.safe_dump(settings, sort_keys=False)}```")
        return tracker
    options: dict[str, dict[str, Any]] = {
        "wandb": {"name": run, "id": run, "resume": "allow", "dir": str(folder), **_offline(name)},
        "mlflow": {"run_name": run},
        "trackio": {"name": run, "resume": "allow"},
    }
    if name == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        options["mlflow"]["logging_dir"] = (folder / "artifacts").resolve().as_uri()
    tracker = kind(project, **options[name])
    tracker.start()
    tracker.store_init_configuration(dict(_flat(settings)))
    return tracker


def _offline(name: str) -> dict[str, str]:
    """Without a key W&B would ask for one, and the run would wait for the answer."""
    if name != "wandb" or os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return {}
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return {} if netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8") else {"mode": "offline"}


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str | float]]:
    """Nested settings as dotted keys and plain values."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, (int, float, str)) else str(value)
