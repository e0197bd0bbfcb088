"""The whole chain as plain calls: teacher → targets → distil → evaluate → export → benchmark → report."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilpeft import report
from distilpeft.artifact import Artifact
from distilpeft.errors import InputError
from distilpeft.pair import MODEL, Loaded, check_tokenizers, load_student, load_teacher, new_student, open_targets
from distilpeft.plan import CE_ONLY, FULL, MAJORITY, STUDENT, TEACHER, UNTRAINED, Plan
from distilpeft.runtime import Runtime
from distilpeft.soft_targets import SoftTargets
from distilpeft.stages import audit, benchmark, distil, evaluate, export, targets, teacher
from distilpeft.tasks import TaskData


def run(plan: Plan, until: str | None = None, runtime: Runtime | None = None, *, write_report: bool = True) -> None:
    """Do every step of the plan that is not done, then write the report.

    Args:
        plan: what there is to do.
        until: stop after the last step of this stage.
        runtime: the machine, where several plans are run one after the other.
        write_report: whether this plan's report and student are to be the folder's.

    Raises:
        InputError, GateError, StoppedBySignal: see the stages.
    """
    names = _until(plan, until)
    plan.folder.mkdir(parents=True, exist_ok=True)
    runtime = runtime or Runtime()
    with _lock(plan.folder, runtime):
        steps = Steps(plan, runtime)
        for number, name in enumerate(names, 1):
            made = plan.artifacts[name]
            if made.done:
                continue
            runtime.say(f"[{number}/{len(names)}] {name} → {made.path}")
            steps.do(name, made)
        if until is None and write_report and runtime.is_main:
            report.finish(plan)
        runtime.accelerator.wait_for_everyone()


def _until(plan: Plan, until: str | None) -> list[str]:
    """The plan's steps up to the last one of a stage."""
    names = list(plan.artifacts)
    if until is None:
        return names
    last = [index for index, name in enumerate(names) if name.partition("/")[0] == until]
    if not last:
        raise InputError(f"--until {until}: this recipe has no such stage")
    return names[: last[-1] + 1]


class Steps:
    """Does single steps; rows and the model in hand are kept between steps that need the same ones."""

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        self._plan, self._runtime = plan, runtime
        with runtime.accelerator.main_process_first():
            cache = plan.folder / "cache"
            self._data = TaskData(plan.recipe, plan.data_digest, cache, runtime.accelerator.main_process_first)
        check_tokenizers(plan.recipe)
        elsewhere = plan.recipe.targets.source
        if elsewhere is not None and plan.recipe.distil.alpha > 0:
            open_targets(plan.recipe, self._data, Path(elsewhere).expanduser(), None).verify()
        self._held: tuple[str, Loaded] | None = None
        self._live: Loaded | None = None  # the teacher, while other models are compared with it token by token

    def do(self, name: str, out: Artifact) -> None:
        """Make one artifact and publish it."""
        runtime = self._runtime
        if runtime.is_main:
            out.partial.mkdir(parents=True, exist_ok=True)
        runtime.accelerator.wait_for_everyone()
        figures = self._figures(name, out)
        runtime.accelerator.wait_for_everyone()
        if runtime.is_main:
            out.publish(figures, runtime.environment())
        runtime.accelerator.wait_for_everyone()
        if out.stage in ("teacher", "distil"):  # Accelerate holds on to what it has prepared
            runtime.accelerator.free_memory()

    def _figures(self, name: str, out: Artifact) -> dict[str, Any]:
        runtime, recipe, data, made = self._runtime, self._plan.recipe, self._data, self._plan.artifacts
        stage, _, role = name.partition("/")
        if stage == "teacher":
            return teacher.run(runtime, recipe, data, out)
        if stage == "targets":
            return targets.run(runtime, recipe, data, self._verified("teacher"), out)
        if stage == "distil":
            return self._distil(role, out)
        if stage == "audit":
            layout = SoftTargets(made["targets"].path).layout
            loaded = self._load(STUDENT)
            assert loaded is not None
            return audit.run(runtime, recipe, data, layout=layout, student=loaded, teacher=self._teacher())
        if stage == "export":
            roles = [step.partition("/")[2] for step in made if step.startswith("evaluate/") and "export" not in step]
            figures = {role: made[f"evaluate/{role}"].figures() for role in roles}
            student = self._verified(f"distil/{STUDENT}")
            return export.run(runtime, recipe, data, student=student, figures=figures, out=out)
        loaded = self._load(role)
        if stage != "evaluate":
            self._live = None  # it would only take memory
        else:
            reference = made[f"evaluate/{TEACHER}"] if role != TEACHER else None
            compared = recipe.task.kind == "causal_lm" and loaded is not None and role != TEACHER
            live = self._teacher() if compared else None
            return evaluate.run(
                runtime, recipe, data, loaded=loaded, teacher=live, reference=reference, role=role, out=out
            )
        assert loaded is not None, f"{name} needs a model"
        return benchmark.run(runtime, recipe, data, loaded)

    def _distil(self, role: str, out: Artifact) -> dict[str, Any]:
        recipe = self._plan.recipe
        alpha = recipe.distil.alpha if role == STUDENT else 0.0
        cached = alpha > 0 and recipe.targets.mode == "cached"
        return distil.run(
            self._runtime, recipe, self._data, alpha=alpha, teacher=self._verified("teacher"),
            targets=self._targets() if cached else None, out=out,
        )  # fmt: skip

    def _targets(self) -> Path:
        """The store of soft targets: the recipe's own, or one made elsewhere (checked when the run began)."""
        elsewhere = self._plan.recipe.targets.source
        return Path(elsewhere).expanduser() if elsewhere else self._verified("targets").path

    def _verified(self, name: str) -> Artifact:
        """An artifact whose files are what they were when they were written."""
        made = self._plan.artifacts[name]
        if self._runtime.is_main:
            made.verify()
        return made

    def _load(self, role: str) -> Loaded | None:
        """The frozen model of a role."""
        if role == MAJORITY:
            return None
        if self._held is None or self._held[0] != role:
            self._held = None  # let go of the last model before the next one is loaded
            self._held = (role, self._load_role(role))
        return self._held[1]

    def _teacher(self) -> Loaded:
        if self._live is None:
            self._live = self._load_role(TEACHER)
        return self._live

    def _load_role(self, role: str) -> Loaded:
        runtime, recipe = self._runtime, self._plan.recipe
        if role in (TEACHER, FULL):
            path = self._verified("teacher").path
            return load_teacher(runtime, recipe, path, recipe.evaluate.precision, full_precision=role == FULL)
        if role == UNTRAINED:
            loaded = new_student(runtime, recipe, self._plan.artifacts["teacher"].path)
            loaded.model.requires_grad_(False).eval()
            return loaded
        step = f"distil/{role}" if role in (STUDENT, CE_ONLY) else role.replace(":", "/")
        return load_student(runtime, recipe, self._verified(step).path / MODEL)


@contextmanager
def _lock(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Keep two runs out of one folder; the processes of one run share it through their main process."""
    if not runtime.is_main:
        yield
        return
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InputError(f"{folder}: another run is at work here ({file.read().strip()}); wait for it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
