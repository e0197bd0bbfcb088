"""The stages of a run, a row each: what is done, and what the rest takes in steps, time, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distilpeft.machine.files import size_text
from distilpeft.machine.host import gpu_memories, memory_bytes
from distilpeft.machine.host import num_processes as processes_of
from distilpeft.planning.forecast.duration import Duration, Work
from distilpeft.planning.memory import Machine
from distilpeft.planning.plan import Plan
from distilpeft.planning.roles import ARMS, CE_ONLY, step_name
from distilpeft.planning.sizes import (
    Size,
    lora_weights,
    own_ways,
    student_load,
    student_size,
    targets_load,
    teacher_load,
    teacher_size,
)
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import QuestionAnswering
from distilpeft.recipe.training import Fit
from distilpeft.tasks.checked_rows import UNLABELLED, VIEWS

TAUGHT_MORE = {UNLABELLED: "rows without a label", VIEWS: "changed copies"}
"""What the student learns from besides the rows with a label: split, and what its rows are called."""


def machine_here(recipe: Recipe) -> Machine:
    """What this machine gives a run."""
    gpus = gpu_memories() if recipe.devices != "cpu" else []
    if gpus:
        count = len(gpus) if recipe.devices == "auto" else min(int(recipe.devices), len(gpus))
        return Machine(count, min(gpus[:count]))
    count = processes_of(recipe.devices)
    return Machine(count, memory_bytes() / count, "CPU")


@dataclass(frozen=True)
class Stage:
    """A row of the table: a stage, or one student to be trained. None is not known yet; 0 is nothing.

    Attributes:
        stage: its name.
        role: of the student that it is about, or "".
        done: steps that are done, and all, of all seeds.
        rows: that it reads with one seed.
        steps: of its training with one seed, or rounds of the benchmark.
        duration: of the steps that are not done.
        memory: bytes.
        disk: bytes, of all seeds.
    """

    stage: str
    role: str
    done: tuple[int, int]
    rows: int | None = 0
    steps: int | None = 0
    duration: Duration | None = None
    memory: float | None = 0
    disk: float | None = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left."""
        return self.done[0] == self.done[1]

    def cells(self) -> tuple[str, ...]:
        """The row as text: name, done, rows, steps, time, memory, disk."""
        time = "-" if self.is_done else "?" if self.duration is None else str(self.duration)
        done = f"{self.done[0]}/{self.done[1]}"
        return (
            step_name(self.stage, self.role),
            done,
            _cell(self.rows),
            _cell(self.steps),
            time,
            in_bytes(self.memory),
            in_bytes(self.disk),
        )


def stages(plan: Plan, splits: Mapping[str, int] | None, tokens: float) -> list[Stage]:
    """The table of `check`: a row per stage, and one per student to be trained, over all seeds.

    Args:
        plan: the run.
        splits: rows of each split; None where they are not here.
        tokens: of a row, on average.
    """
    recipe, machine = plan.recipe, machine_here(plan.recipe)
    teacher, student = teacher_size(recipe), student_size(recipe)
    train, held, scored = (
        None if splits is None else splits[name] for name in ("train", "validation", recipe.evaluate.split)
    )
    taught = None if splits is None else splits["train"] + sum(splits.get(name, 0) for name in TAUGHT_MORE)
    work = None
    if splits is not None and taught is not None and teacher is not None and student is not None:
        work = Work(plan, machine, teacher, student, tokens, splits, taught)
    # Bytes kept per row: all logits of a class; for tokens six sums, and never their logits.
    per_row = 24 if recipe.kind.is_language_model else 4 * _outputs(recipe)
    exported = sum(student.total * _export_bytes(recipe, form) for form in recipe.export.formats) if student else None
    answers = None if scored is None else len(plan.roles()) * scored * per_row
    needs: dict[tuple[str, str], Needs] = {
        ("teacher", ""): _teacher_needs(recipe, teacher, train),
        ("targets", ""): _targets_needs(recipe, teacher, taught),
        **{("distil", role): _student_needs(recipe, student, role, train, taught) for role in ARMS},
        ("lead", ""): (held, 0, 0, 0),
        ("audit", ""): (0, 0, 0, 0),
        ("evaluate", ""): (scored, 0, 0, answers),
        ("export", ""): (recipe.export.gate_rows, 0, 0, exported),
        ("compare", ""): (0, 0, 0, 0),
        ("benchmark", ""): (0, recipe.benchmark.rounds, 0, 0),
        ("bundle", ""): (0, 0, 0, 0),
    }
    once = {step.artifact.path: step for part in (plan, *plan.repeats.values()) for step in part.own}
    table = []
    for (stage, role), cells in needs.items():
        steps = [step for step in once.values() if step.stage == stage and role in ("", step.role)]
        if steps:
            missing = [step for step in steps if not step.artifact.done]
            times = [] if work is None else [work.of(step) for step in missing]
            duration = None if work is None else Duration(
                sum(time.seconds for time in times), is_measured=all(time.is_measured for time in times)
            )  # fmt: skip
            done = (len(steps) - len(missing), len(steps))
            rows, count, memory, disk = cells
            seeds = len(steps) / sum(step.stage == stage and role in ("", step.role) for step in plan.own)
            disk = None if disk is None else disk * seeds
            table.append(Stage(stage, role, done, rows, count, duration, memory, disk))
    return table


Needs = tuple[int | None, int | None, float | None, float | None]
"""Rows, steps, bytes of memory and bytes of disk."""


def _outputs(recipe: Recipe) -> int:
    """Numbers that a classifier says of a row; of words at most."""
    task, longest = recipe.task, recipe.data.max_tokens
    if isinstance(task, QuestionAnswering):
        return 2 * longest
    return (longest if recipe.kind.unit == "words" else 1) * len(getattr(task, "labels", ("a number",)))


def _target_bytes(recipe: Recipe, vocabulary: int) -> float:
    """Bytes of a row's soft targets; of tokens at most."""
    if not recipe.kind.is_language_model:
        return 4.0 * _outputs(recipe)
    targets, form = recipe.targets, recipe.targets.format
    if form == "full":
        return recipe.data.max_tokens * vocabulary * (targets.value_bits or 32) / 8
    count = targets.k if form == "top_k" else targets.draws
    return recipe.data.max_tokens * (8 + count * (vocabulary.bit_length() + 6 + (targets.value_bits or 12)) / 8)


def _export_bytes(recipe: Recipe, form: str) -> float:
    """Bytes per weight of an export."""
    return {"exact": 4.0, "half": 2.0, "int8": 1.06, "int4": 0.6}[recipe.exactness(form)]


def _teacher_needs(recipe: Recipe, size: Size | None, rows: int | None) -> Needs:
    teacher = recipe.teacher
    if teacher.fit is None:
        return rows, 0, 0, 0
    steps = _steps(rows, teacher.fit)
    if size is None:
        return rows, steps, None, None
    trained = lora_weights(size, teacher.lora) if teacher.lora else size.total
    machine = machine_here(recipe)
    return rows, steps, teacher_load(recipe, size, machine.kind).total(own_ways(recipe)[0], machine), trained * 4


def _targets_needs(recipe: Recipe, size: Size | None, rows: int | None) -> Needs:
    if size is None:
        return rows, 0, None, None
    machine = machine_here(recipe)
    memory = targets_load(recipe, size, machine).total(own_ways(recipe)[1], machine)
    return rows, 0, memory, None if rows is None else rows * _target_bytes(recipe, size.shape.vocabulary)


def _student_needs(recipe: Recipe, size: Size | None, role: str, train: int | None, taught: int | None) -> Needs:
    """What a student needs that learns from these rows: with a label, or all."""
    fit, arm = recipe.distil.ce_only_fit if role == CE_ONLY else recipe.distil.fit, ARMS[role]
    rows = taught if arm.unlabelled else train
    steps = _steps(taught if arm.equal_steps else rows, fit)
    if size is None:
        return rows, steps, None, None
    machine = machine_here(recipe)
    load = student_load(recipe, size, teacher_size(recipe), machine.kind)
    return rows, steps, load.total(own_ways(recipe)[-1], machine), size.total * 4


def _steps(rows: int | None, fit: Fit) -> int | None:
    if rows is None:
        return fit.max_steps
    steps = fit.epochs * math.ceil(rows / fit.batch_size)
    return min(steps, fit.max_steps) if fit.max_steps else steps


def _cell(count: int | None) -> str:
    return "?" if count is None else str(count) if count else "-"


def in_bytes(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return "?"
    return size_text(count) if count else "-"
