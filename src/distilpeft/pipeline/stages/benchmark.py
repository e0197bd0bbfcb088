"""Time every model of the run and every export beside each other, on real rows of the evaluation split.

Loads no model itself: see `timing`. Leaves nothing but figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from distilpeft.benchmark import measure
from distilpeft.benchmark.subjects import subjects, wanted
from distilpeft.machine.artifact import Figures
from distilpeft.models.context import Context


def run(context: Context, folders: Mapping[str, Path], reference: str) -> Figures:
    """Time all models.

    Args:
        context: the run, with the recipe's `benchmark` section.
        folders: role → the model's artifact: a teacher's, a student's, an export's.
        reference: the role that ratios are over.

    Returns:
        See `timing.measure`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        timed = subjects(context.pair, context.data, folders, Path(scratch))
        settings, runtime = wanted(context.recipe, context.runtime.device.type), context.runtime
        return measure.measure(timed, settings, reference, runtime.say, runtime.bar)
