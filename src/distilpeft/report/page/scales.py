"""From figures to places on paper: scales, their ticks, and where labels fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
LETTER = 0.57
"""Width of an average letter over the size of the font."""


@dataclass(frozen=True)
class Scale:
    """A range of figures along a range of places.

    Attributes:
        low: the figure at `start`.
        high: the figure at `end`.
        start: a place.
        end: another; less than `start` where figures rise upwards.
        log: whether equal ratios are equally long.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a figure."""
        low, high, at = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round figures within the range."""
        candidates = _log_ticks(self.low, self.high, count) if self.log else _round_ticks(self.low, self.high, count)
        slack = (self.high - self.low) * 1e-9
        return [tick for tick in candidates if self.low - slack <= tick <= self.high + slack]


def scale(values: Iterable[float], start: float, end: float, log: bool, pad: float = 0.07) -> Scale:
    """A scale that holds all values with some room on both sides."""
    figures = list(values)
    low, high = min(figures), max(figures)
    if log:
        room = max((high / low) ** pad, 1.08 if high > low else 1.5)
        return Scale(low / room, high * room, start, end, log=True)
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, end)


def _round_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return list(dict.fromkeys(round(at * step, 12) for at in range(first, last + 1)))  # nearly equal ones once


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [part * 10.0**power for power in powers for part in parts]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= count:
            break
    if len(inside) < 2:
        return _round_ticks(low, high, count)
    every = math.ceil(len(inside) / count)
    return inside[::every]


def tick_text(value: float) -> str:
    """A tick's label."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


@dataclass(frozen=True)
class Label:
    """A placed label: its left end and baseline, and where the line from its point ends, if it needs one."""

    text: str
    x: float
    y: float
    leader: tuple[float, float] | None


def place(points: Sequence[tuple[str, float, float]], lines: Sequence[Box], bounds: Box, font: float) -> list[Label]:
    """Put a label near each point so that none lies on another, on a marker, or outside.

    Greedy: each takes the cheapest of the places around its point, the most crowded points first.

    Args:
        points: label, x, y.
        lines: error bars and the like, which are better left free.
        bounds: where labels may be.
        font: the size of the letters.

    Returns:
        The labels, in the order of the points.
    """
    markers = [(x - 7, y - 7, x + 7, y + 7) for _, x, y in points]
    crowd = [sum(abs(x - x2) < 60 and abs(y - y2) < 30 for _, x2, y2 in points) for _, x, y in points]
    boxes: list[Box] = []
    labels: dict[int, Label] = {}
    for at in sorted(range(len(points)), key=lambda at: (-crowd[at], points[at][2], points[at][1])):
        text, x, y = points[at]
        others = [*markers[:at], *markers[at + 1 :]]
        best = min(
            _candidates(len(text) * font * LETTER, x, y, font),
            key=lambda box: _cost(box, (x, y), boxes, others, lines, bounds),
        )
        boxes.append(best)
        end = (best[2] + 1 if best[2] < x else best[0] - 1, (best[1] + best[3]) / 2)
        far = math.dist(end, (x, y)) > 14
        labels[at] = Label(text, best[0], best[3] - font * 0.25, end if far else None)
    return [labels[at] for at in range(len(points))]


def _candidates(width: float, x: float, y: float, font: float) -> list[Box]:
    """Places around a point: next to it first, then ever further up and down."""
    height = font * 1.15
    boxes = []
    for row in range(12):
        for up in (-1, 1):
            middle = y + up * row * height
            for gap in (10, 26, 46):
                for left in (x + gap, x - gap - width):
                    boxes.append((left, middle - height / 2, left + width, middle + height / 2))
    return boxes


def _cost(
    box: Box, point: tuple[float, float], boxes: Sequence[Box], others: Sequence[Box], lines: Sequence[Box], bounds: Box
) -> float:
    """How bad a place is: outside or on something, then far away."""
    end = (box[2] if box[2] < point[0] else box[0], (box[1] + box[3]) / 2)
    leader = [(point[0] + (end[0] - point[0]) * at / 8, point[1] + (end[1] - point[1]) * at / 8) for at in range(2, 8)]
    outside = sum(
        max(0.0, *gap) for gap in ((bounds[0] - box[0], box[2] - bounds[2]), (bounds[1] - box[1], box[3] - bounds[3]))
    )
    hits = sum(_overlap(box, area) for area in (*boxes, *others))
    crossed = sum(area[0] < x < area[2] and area[1] < y < area[3] for x, y in leader for area in (*boxes, *others))
    lined = sum(_overlap(box, area) > 0 for area in lines)
    return outside * 1000 + hits * 200 + crossed * 60 + lined * 25 + math.dist(end, point)


def _overlap(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return width * height if width > 0 and height > 0 else 0.0
