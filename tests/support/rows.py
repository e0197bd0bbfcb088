"""Rows for tests of tasks, checked as a run checks them."""

from __future__ import annotations

import datasets
import numpy as np

from distilpeft.data.reading import Places
from distilpeft.tasks.checked_rows import usable
from distilpeft.tasks.task import Task


def places(origin: str, count: int, numbers: object = None) -> Places:
    """Where rows come from: numbered from 1, or by `numbers`."""
    return Places(origin, np.arange(1, count + 1) if numbers is None else np.asarray(numbers))


def checked(
    task: Task, rows: datasets.Dataset, origin: str = "rows.csv", on_bad_row: str = "error", numbers: object = None
) -> datasets.Dataset:
    """The rows that the task can use."""
    return usable(task, rows, places(origin, len(rows), numbers), on_bad_row)
