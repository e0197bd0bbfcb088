"""The models of a report and the stages of a run, and how roles and steps are written as names.

A model is called by its role: `student`, `teacher`, and of an export `export:FORMAT`. A step is called by its stage and
by what it is about: `teacher`, `evaluate/student`, `export/onnx`. Nothing else in the package takes such names apart.
"""

from __future__ import annotations

STUDENT, CE_ONLY, UNTRAINED, TEACHER, FULL, MERGED, MAJORITY = (
    "student", "student_ce_only", "untrained", "teacher", "teacher_full_precision", "teacher_merged", "majority",
)  # fmt: skip
TEACHERS = (TEACHER, FULL, MERGED)
"""Roles of the tuned teacher: as it was tuned, on the full-precision base, and merged."""
UNTIMED = (MAJORITY, UNTRAINED, MERGED)
"""Roles without a latency: no model, one of the student's architecture, and one of the full-precision teacher's."""
STAGES = ("teacher", "targets", "distil", "audit", "evaluate", "export", "compare", "benchmark", "bundle")
"""In the order in which a run does them."""
TRAINING_STAGES = ("distil", "teacher")
"""Stages that train a model."""
LAST_STAGES = ("benchmark", "bundle")
"""Done when nothing else is left: latency is measured on a machine at rest, and bundles show it."""
_EXPORT = "export:"


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
