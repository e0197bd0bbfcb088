"""A score: a metric's value with its interval."""

from __future__ import annotations

from typing import TypedDict


class Score(TypedDict):
    """A metric's value, its 95 % interval (None for metrics of a hub), and the number of rows behind it."""

    value: float
    low: float | None
    high: float | None
    num_rows: int
