"""The models of a report and the stages of a run, and how roles and steps are written as names.

A model is called by its role: `student`, `teacher`, and of an export `export:FORMAT`. A step is called by its stage and
by what it is about: `teacher`, `evaluate/student`, `export/onnx`. Nothing else in the package takes such names apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STUDENT, UNTRAINED, TEACHER, FULL, MERGED, MAJORITY = (
    "student", "untrained", "teacher", "teacher_full_precision", "teacher_merged", "majority",
)  # fmt: skip
CE_ONLY, CE_LONG, HARD, LABELLED = (
    "student_ce_only", "student_ce_only_long", "student_hard_labels", "student_labelled_rows",
)  # fmt: skip
TEACHERS = (TEACHER, FULL, MERGED)
"""Roles of the tuned teacher: as it was tuned, on the full-precision base, and merged."""
CONTROLS = (CE_LONG, HARD, LABELLED)
"""Students that show where a gain from rows without labels comes from."""
COMPARED: dict[str, tuple[str, ...]] = {
    STUDENT: (CE_ONLY, *CONTROLS, TEACHER),
    CE_ONLY: (TEACHER,),
    CE_LONG: (TEACHER,),
    TEACHER: (FULL,),
}
"""Role → the roles that it is compared with, row by row."""
IN_WORDS = {
    STUDENT: "the student",
    CE_ONLY: "labels alone",
    CE_LONG: "labels alone for as many steps",
    HARD: "the teacher's likeliest class as the label",
    LABELLED: "the teacher on labelled rows only",
    TEACHER: "the teacher",
    FULL: "the teacher before it was quantized",
}
"""Roles as they are called in sentences."""
UNTIMED = (MAJORITY, UNTRAINED, MERGED, *CONTROLS)
"""Roles without a latency: no model, some of the student's architecture, and one of the full-precision teacher's."""
STAGES = ("teacher", "targets", "distil", "lead", "audit", "evaluate", "export", "compare", "benchmark", "bundle")
"""In the order in which a run does them."""
TRAINING_STAGES = ("distil", "teacher")
"""Stages that train a model."""
LAST_STAGES = ("benchmark", "bundle")
"""Done when nothing else is left: latency is measured on a machine at rest, and bundles show it."""
_EXPORT = "export:"


@dataclass(frozen=True)
class Arm:
    """How a student learns; they differ in nothing else.

    Attributes:
        teacher: what it hears of the teacher: its probabilities, its likeliest class, or nothing.
        unlabelled: whether it also learns from the rows without labels.
        equal_steps: whether it is trained for as many steps as the student of the recipe, instead of as many epochs.
    """

    teacher: Literal["soft", "hard"] | None
    unlabelled: bool
    equal_steps: bool = False


ARMS = {
    CE_ONLY: Arm(None, unlabelled=False),
    STUDENT: Arm("soft", unlabelled=True),
    CE_LONG: Arm(None, unlabelled=False, equal_steps=True),
    HARD: Arm("hard", unlabelled=True),
    LABELLED: Arm("soft", unlabelled=False, equal_steps=True),
}
"""Every student that a run may train, in their order: the recipe's, and those that show where its gain comes from."""


def export_role(form: str) -> str:
    """The role of the student in an export format."""
    return f"{_EXPORT}{form}"


def format_of(role: str) -> str | None:
    """The format of an export's role; None for a role that is not an export."""
    return role.removeprefix(_EXPORT) if role.startswith(_EXPORT) else None


def short_name(role: str) -> str:
    """A role in tables and plots: of an export, its format."""
    return format_of(role) or role


def step_name(stage: str, role: str = "") -> str:
    """The name of a step; `role` is the format for the stages `export` and `bundle`, and "" for a stage of one step."""
    return f"{stage}/{role}" if role else stage


def trained_role(step: str) -> str:
    """The role of the model that a training step makes, by the name of the step."""
    stage, _, role = step.partition("/")
    return role or stage
