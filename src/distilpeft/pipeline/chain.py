"""The whole chain as plain calls: teacher → targets → distil → evaluate → export → benchmark → bundle."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from distilpeft.data.sources import model_config
from distilpeft.distillation.store import SoftTargets
from distilpeft.errors import GateError
from distilpeft.export.formats.writers import check_exports
from distilpeft.export.graph_module import load_export
from distilpeft.machine.artifact import Artifact, Figures, Published
from distilpeft.machine.host import busy_elsewhere, cores
from distilpeft.machine.locks import in_use
from distilpeft.machine.runtime import Runtime, device_name
from distilpeft.metrics.timings import summary
from distilpeft.models.checks import (
    check_lengths,
    check_prompts,
    check_readers,
    check_targets,
    check_tokenizers,
    check_words,
    check_writing,
)
from distilpeft.models.context import Context, pair_of
from distilpeft.models.pair import MODEL, Loaded, Pair
from distilpeft.models.soft_targets import open_targets
from distilpeft.models.student import load_student, new_student
from distilpeft.models.teacher import load_teacher, load_teacher_merged, load_teacher_unquantized
from distilpeft.pipeline.jobs import Finished, Job, check_shared, jobs_of, next_job
from distilpeft.pipeline.stages import (
    audit,
    benchmark,
    bundle,
    compare,
    distil,
    evaluate,
    export,
    lead,
    targets,
    teacher,
)
from distilpeft.planning.models import check_models, model_lines
from distilpeft.planning.plan import Plan, Step
from distilpeft.planning.roles import (
    ARMS,
    CE_ONLY,
    FULL,
    MAJORITY,
    MERGED,
    STUDENT,
    TEACHER,
    TRAINING_STAGES,
    UNTRAINED,
    format_of,
)
from distilpeft.recipe import Recipe
from distilpeft.recipe.export import HUB, together
from distilpeft.tasks.rows import TaskData
from distilpeft.training.features import check_features
from distilpeft.training.step import Watch

BUSY = 0.5
"""Processors taken by other programs, from which on a run says so."""


def run(plan: Plan, until: str | None = None) -> None:
    """Do every step of the plan that is not done.

    Args:
        plan: what there is to do.
        until: stop after the last step of this stage.

    Raises:
        InputError, GateError, StoppedBySignal: see the stages.
    """
    jobs = jobs_of(plan, until)
    runtime = runtime_of(plan.recipe)
    check_shared(runtime, plan.folder)
    for error in do(jobs, runtime).values():
        raise error
    runtime.accelerator.wait_for_everyone()


def make(plan: Plan, steps: Sequence[Step]) -> None:
    """Do some steps of the plan that are not done, in their order, and nothing else."""
    runtime = runtime_of(plan.recipe)
    check_shared(runtime, plan.folder)
    for error in do([Job(plan, step) for step in steps], runtime).values():
        raise error
    runtime.accelerator.wait_for_everyone()


def runtime_of(recipe: Recipe, label: str = "") -> Runtime:
    """The machine as the recipe wants it used; says so if there are several processes."""
    runtime = Runtime(label, devices=recipe.devices, parallel=recipe.parallel, deterministic=recipe.deterministic)
    count = runtime.accelerator.num_processes
    if count > 1:
        runtime.say(f"{count} processes, each on {device_name(runtime.device)}; {runtime.parallel}")
    busy = None if label or count > 1 else busy_elsewhere()
    if busy is not None and busy >= BUSY and runtime.device.type == "cpu":
        runtime.say(f"other programs keep {busy:.1f} of {cores()} busy: training is slower, latencies less certain")
    return runtime


def do(
    jobs: Sequence[Job],
    runtime: Runtime,
    watch: Watch | None = None,
    failed: Mapping[Path, GateError] | None = None,
) -> dict[Path, GateError]:
    """Do all jobs that are not done, together with whoever else is at the same ones.

    Any number of processes, on this machine or on others that share the folder, may be given the same jobs. Each takes
    the first one that is free and has all that it needs, under a lock of its own, and waits while there is none. So a
    process that dies loses nothing but its own step since the last checkpoint, and another one takes it up.
    Latency is measured last and then reported, by one process at a time on each machine.

    Args:
        jobs: in the order in which they are to be done.
        runtime: the machine; its processes do every job together.
        watch: sees the validations of every student's training, and may raise to give it up.
        failed: what the figures have stopped before.

    Returns:
        What the figures have stopped, now and before: path → why. No other job of its plans was started after it.
    """
    with contextlib.ExitStack() as locks:
        for folder in {job.plan.folder for job in jobs} if runtime.is_main else ():
            locks.enter_context(in_use(folder))
        return _do(jobs, runtime, watch, dict(failed or {}))


def _do(
    jobs: Sequence[Job], runtime: Runtime, watch: Watch | None, failed: dict[Path, GateError]
) -> dict[Path, GateError]:
    users = Counter(job.artifact.path for job in jobs)
    steps: StepRunner | None = None
    published, announced = Published(), set[Path]()
    while True:
        live = [job for job in jobs if not any(step.artifact.path in failed for step in job.plan.own)]
        ready = next_job(live, runtime, published, announced)
        if isinstance(ready, Finished):
            return failed
        job = ready.job
        try:
            if steps is None or steps.plan is not job.plan:
                steps = StepRunner(job.plan, runtime, watch, steps)
            whose = f" of {job.label}" if job.label and users[job.artifact.path] == 1 else ""
            runtime.say(f"[{ready.num_done + 1}/{ready.num_all}] {job.step.name}{whose} → {job.artifact.path}")
            steps.do(job.step)
        except GateError as error:
            failed[job.artifact.path] = error.with_traceback(None)  # which would keep the models alive
        finally:
            ready.release()


LOADERS = {TEACHER: load_teacher, FULL: load_teacher_unquantized, MERGED: load_teacher_merged}
"""How each form of the teacher is loaded."""


class StepRunner:
    """Does single steps; rows and the model in hand are kept between steps that need the same ones."""

    def __init__(
        self, plan: Plan, runtime: Runtime, watch: Watch | None = None, before: StepRunner | None = None
    ) -> None:
        self.plan, self._runtime, self._watch = plan, runtime, watch
        same = before is not None and (before.plan.recipe.task, before.plan.recipe.data) == (
            plan.recipe.task, plan.recipe.data,
        )  # fmt: skip
        self._data: TaskData
        if before is not None and same:
            self._data = before._data
        else:
            with runtime.accelerator.main_process_first():
                cache = plan.cache
                self._data = TaskData(plan.recipe, plan.data_digest, cache, runtime.accelerator.main_process_first)
        pair = pair_of(plan.recipe, self._data, runtime)
        self.context = Context(runtime, self._data, pair)
        self._check_models(pair)
        check_words(pair, self._data)
        check_prompts(pair, self._data)
        check_targets(pair, self._data)
        check_exports(pair)
        check_features(pair)
        check_lengths(pair)
        check_writing(pair, self._data)
        elsewhere = plan.recipe.targets.source
        if elsewhere is not None and plan.recipe.distil.alpha > 0:
            open_targets(pair, self._data, Path(elsewhere).expanduser(), None).verify()
        self._loaded: tuple[str, Loaded] | None = None
        self._live: Loaded | None = None  # the teacher, while other models are compared with it token by token

    def _check_models(self, pair: Pair) -> None:
        """Look at the models again: files of the hub, and tokenizers without a tokenizer.json, are at hand only now."""
        fetched = any(model_config(source) is None for source in (pair.teacher, pair.student))
        check_tokenizers(pair)
        lines = check_readers(pair, self._data)
        check_models(pair.recipe)
        for line in [*lines, *(model_lines(pair.recipe) if fetched else ())]:
            self._runtime.say(f"  {line}")

    def do(self, step: Step) -> None:
        """Make the artifact of a step and publish it."""
        runtime, out = self._runtime, step.artifact
        if runtime.is_main:
            out.partial.mkdir(parents=True, exist_ok=True)
        runtime.accelerator.wait_for_everyone()
        begin = time.monotonic()
        try:
            figures = self._figures(step)
            runtime.accelerator.wait_for_everyone()
            if runtime.is_main:
                out.publish(figures, runtime.environment(), time.monotonic() - begin)
            runtime.accelerator.wait_for_everyone()
        finally:
            if out.stage in TRAINING_STAGES:  # Accelerate holds on to what it has prepared
                runtime.accelerator.free_memory()

    def _figures(self, step: Step) -> Figures:
        context = self.context
        stage, role, out = step.stage, step.role, step.artifact
        if stage in ("audit", "benchmark", "lead"):
            return {"audit": self._audit, "benchmark": self._benchmark, "lead": self._lead}[stage]()
        if stage == "teacher":
            return teacher.run(context, out)
        if stage == "targets":
            return targets.run(context, self._verified(self.plan.step("teacher")), out)
        if stage == "distil":
            return self._distil(role, out)
        if stage == "export":
            student = self._verified(self.plan.weights_of(self.plan.recipe.export.of))
            return export.run(context, form=role, student=student, out=out)
        if stage == "bundle":
            return self._bundle(role, out)
        if stage == "compare":
            evaluated = {name: self.plan.artifact("evaluate", name) for name in self.plan.roles()}
            return self._runtime.on_main(lambda: compare.run(context, evaluated, out))
        return self._evaluate(role, out)

    def _audit(self) -> Figures:
        layout = SoftTargets(self.plan.artifact("targets").path).layout
        loaded = self._load(STUDENT)
        assert loaded is not None
        return audit.run(self.context, layout=layout, student=loaded, teacher=self._teacher())

    def _lead(self) -> Figures:
        """The teacher and the student on labels alone, one after the other on the validation rows."""
        values = {}
        for role in (TEACHER, CE_ONLY):
            loaded = self._load(role)
            assert loaded is not None
            values[role] = lead.values_of_validation(self.context, loaded)
        return lead.run(self.context, teacher_NK=values[TEACHER], student_NK=values[CE_ONLY])

    def _evaluate(self, role: str, out: Artifact) -> Figures:
        recipe = self.plan.recipe
        loaded = self._load(role)
        reference = self.plan.artifact("evaluate", TEACHER) if role != TEACHER else None
        compared = recipe.kind.is_compared_live and loaded is not None and role != TEACHER
        live = self._teacher() if compared else None
        return evaluate.run(self.context, loaded=loaded, teacher=live, reference=reference, role=role, out=out)

    def _benchmark(self) -> Figures:
        """All models side by side, in the main process's children."""
        self._loaded = self._live = None  # they would only take memory
        gc.collect()
        torch.cuda.empty_cache()
        folders = {role: self._verified(self.plan.weights_of(role)).path for role in self.plan.timed()}
        return self._runtime.on_main(lambda: benchmark.run(self.context, folders, STUDENT))

    def _distil(self, role: str, out: Artifact) -> Figures:
        recipe = self.plan.recipe
        taught = ARMS[role].teacher is not None and recipe.distil.alpha > 0
        cached = taught and recipe.targets.mode == "cached"
        return distil.run(
            self.context, role=role, teacher=self._verified(self.plan.step("teacher")),
            targets=self._targets() if cached else None, out=out, watch=self._watch,
        )  # fmt: skip

    def _bundle(self, name: str, out: Artifact) -> Figures:
        plan = self.plan
        forms = together(plan.recipe.export.formats) if name == HUB else (name,)
        roles = [role for role in plan.roles() if format_of(role) in (None, *forms)]
        figures = {role: plan.artifact("evaluate", role).figures() for role in roles}
        timings = plan.artifact("benchmark").figures()
        timed = {role: timing for role in roles if (timing := summary(timings, role)) is not None}
        exports = {form: self._verified(plan.step("export", form)) for form in forms}
        keys = {
            "teacher": plan.step("teacher").key,
            "student": plan.step("distil", plan.recipe.export.of).key,
            "data": plan.data_digest,
        }
        return self._runtime.on_main(
            lambda: bundle.run(plan.recipe, exports, figures=figures, timed=timed, keys=keys, out=out)
        )

    def _targets(self) -> Path:
        """The store of soft targets: the recipe's own, or one made elsewhere (checked when the run began)."""
        elsewhere = self.plan.recipe.targets.source
        return Path(elsewhere).expanduser() if elsewhere else self._verified(self.plan.step("targets")).path

    def _verified(self, step: Step) -> Artifact:
        """The artifact of a step, whose files are what they were when they were written."""
        if self._runtime.is_main:
            step.artifact.verify()
        return step.artifact

    def _load(self, role: str) -> Loaded | None:
        """The frozen model of a role."""
        if role == MAJORITY:
            return None
        if self._loaded is None or self._loaded[0] != role:
            self._loaded = None  # let go of the last model before the next one is loaded
            self._loaded = (role, self._load_role(role))
        return self._loaded[1]

    def _teacher(self) -> Loaded:
        if self._live is None:
            self._live = self._load_role(TEACHER)
        return self._live

    def _load_role(self, role: str) -> Loaded:
        runtime, pair = self._runtime, self.context.pair
        if role in LOADERS:
            path = self._verified(self.plan.weights_of(role)).path
            return LOADERS[role](runtime, pair, path, pair.recipe.evaluate.precision, placed=True)
        if role == UNTRAINED:
            loaded = new_student(self.context, self.plan.artifact("teacher").path)
            loaded.model.requires_grad_(False).eval()
            return loaded
        path = self._verified(self.plan.weights_of(role)).path / MODEL
        return load_student(runtime, pair, path) if role in ARMS else load_export(runtime, pair, path)
