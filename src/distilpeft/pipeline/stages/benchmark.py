"""Time every model of the run and every export beside each other, on real rows of the evaluation split.

Loads no model itself: see `timing`. Leaves nothing but figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilpeft.benchmark import measure
from distilpeft.benchmark.subjects import subjects, wanted
from distilpeft.machine.runtime import Runtime
from distilpeft.recipe import Recipe
from distilpeft.tasks.rows import TaskData


def run(
    runtime: Runtime, recipe: Recipe, data: TaskData, folders: Mapping[str, Path], reference: str
) -> dict[str, Any]:
    """Time all models.

    Args:
        runtime: for telling how far it is.
        recipe: its `benchmark` section.
        data: the rows.
        folders: role → the model's artifact: a teacher's, a student's, an export's.
        reference: the role that ratios are over.

    Returns:
        See `timing.measure`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = subjects(recipe, data, folders, Path(scratch))
        return measure.measure(found, wanted(recipe, runtime.device.type), reference, runtime.say, runtime.bar)
