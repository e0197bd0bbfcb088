"""What every step of a run works with."""

from __future__ import annotations

from dataclasses import dataclass

from distilpeft.machine.runtime import Runtime
from distilpeft.models.pair import Pair
from distilpeft.recipe import Recipe
from distilpeft.tasks.rows import TaskData
from distilpeft.tasks.task import Task


@dataclass(frozen=True)
class Context:
    """The machine, the rows and the two models of one recipe.

    Attributes:
        runtime: processes and devices.
        data: the rows.
        pair: sources and tokenizers of teacher and student.
    """

    runtime: Runtime
    data: TaskData
    pair: Pair

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.pair.recipe

    @property
    def task(self) -> Task:
        """The recipe's task."""
        return self.pair.task
