"""How a model looks in every plot: a colour that the colour-blind can tell apart, and a shape that says the same.

The first colours are those of Okabe and Ito (2008) but for yellow, which is lost on white paper; the others are from
Paul Tol's muted scheme.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distilpeft.planning.roles import short_name
from distilpeft.recipe.export import FORMS

INK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE, WINE, INDIGO, OLIVE, TEAL, BROWN = range(12)
COLOURS = (
    "#3d4451", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#882255", "#332288", "#808000",
    "#2aa198", "#8c564b",
)  # fmt: skip
"""By number, on white; the page lightens some of them in the dark."""
Outline = tuple[tuple[float, float], ...]


def _polygon(corners: int, turn: float = 0.0, inner: float | None = None) -> Outline:
    """Corners on the unit circle, the first one up, y pointing up; with `inner`, a star."""
    count = corners * (1 if inner is None else 2)
    points = []
    for at in range(count):
        radius = inner if inner is not None and at % 2 else 1.0
        angle = math.radians(90 + turn) + 2 * math.pi * at / count
        points.append((round(radius * math.cos(angle), 4), round(radius * math.sin(angle), 4)))
    return tuple(points)


def _cross(width: float) -> Outline:
    w = width
    return (
        (-w, 1), (w, 1), (w, w), (1, w), (1, -w), (w, -w), (w, -1), (-w, -1), (-w, -w), (-1, -w), (-1, w), (-w, w),
    )  # fmt: skip


SHAPES: dict[str, Outline] = {
    "circle": (),
    "square": ((-0.85, 0.85), (0.85, 0.85), (0.85, -0.85), (-0.85, -0.85)),
    "up": _polygon(3),
    "hexagon": _polygon(6),
    "diamond": _polygon(4),
    "down": _polygon(3, 180),
    "star": _polygon(5, inner=0.45),
    "pentagon": _polygon(5),
    "left": _polygon(3, 90),
    "right": _polygon(3, -90),
    "cross": _cross(0.36),
    "bar": ((-0.4, 1), (0.4, 1), (0.4, -1), (-0.4, -1)),
    "saltire": tuple((round((x - y) * 0.7071, 4), round((x + y) * 0.7071, 4)) for x, y in _cross(0.3)),
}
"""Corners of each shape within the unit circle; a circle has none."""
LARGER = {"up": 1.2, "down": 1.2, "left": 1.2, "right": 1.2, "star": 1.35, "diamond": 1.15, "pentagon": 1.1}
"""Shapes that would look smaller than a circle of the same radius."""


Fill = Literal["solid", "hollow", "dotted"]
FILLS: tuple[Fill, ...] = ("solid", "hollow", "dotted")
"""Of the first run of a page, the second and the third; a fourth begins again."""


@dataclass(frozen=True)
class Mark:
    """A marker.

    Attributes:
        colour: its number in `COLOURS`.
        shape: its name in `SHAPES`.
        fill: tells the models of several runs apart: filled, an outline, or an outline with a dot in it.
    """

    colour: int
    shape: str
    fill: Fill = "solid"

    def outline(self, radius: float) -> Outline:
        """The corners around the origin, y pointing up."""
        size = radius * LARGER.get(self.shape, 1.0)
        return tuple((x * size, y * size) for x, y in SHAPES[self.shape])


ROLES = {
    "student": (VERMILLION, "circle"),
    "student_ce_only": (ORANGE, "up"),
    "student_ce_only_long": (WINE, "down"),
    "student_hard_labels": (INDIGO, "pentagon"),
    "student_labelled_rows": (OLIVE, "star"),
    "teacher": (BLUE, "square"),
    "teacher_full_precision": (SKY, "hexagon"),
    "teacher_merged": (INK, "bar"),
    "untrained": (INK, "saltire"),
    "majority": (INK, "right"),
}
_COLOURS = (GREEN, PURPLE, TEAL, BROWN, INDIGO, WINE, OLIVE)  # of no role that is timed
_SHAPES = ("diamond", "cross", "star", "left", "bar")


def mark(role: str, run: int = 0) -> Mark:
    """The marker of a role: the same on every plot and in every report.

    Args:
        role: the model's role; of an export, its place in the list of forms decides.
        run: which of several reports the model is from.
    """
    if role in ROLES:
        colour, shape = ROLES[role]
    else:
        form = short_name(role)
        at = list(FORMS).index(form) if form in FORMS else len(FORMS)
        colour, shape = _COLOURS[at % len(_COLOURS)], _SHAPES[at % len(_SHAPES)]
    return Mark(colour, shape, FILLS[run % len(FILLS)])
