"""The models of a report, and the steps that make them."""

from __future__ import annotations

STUDENT, CE_ONLY, UNTRAINED, TEACHER, FULL, MERGED, MAJORITY = (
    "student", "student_ce_only", "untrained", "teacher", "teacher_full_precision", "teacher_merged", "majority",
)  # fmt: skip
LAST_STAGES = ("benchmark", "bundle")
"""For the end, when nothing else is left: latency on a machine at rest, and what tells of it."""
UNTIMED = (MAJORITY, UNTRAINED, MERGED)
"""Roles without a latency: no model, one of the student's architecture, and one of the full-precision teacher's."""


def step_of(role: str) -> str:
    """The step that makes a role's weights."""
    if role in (TEACHER, FULL, MERGED):
        return "teacher"
    return f"distil/{role}" if role in (STUDENT, CE_ONLY) else role.replace(":", "/")
