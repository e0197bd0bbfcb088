"""What every step of a run works with: the machine, the rows, and the two models, as far as rows decide on them."""

from __future__ import annotations

from dataclasses import dataclass

from distilpeft.machine.runtime import Runtime
from distilpeft.models.pair import Pair
from distilpeft.models.prompted import with_shots
from distilpeft.models.vocabulary import cut_to_data
from distilpeft.recipe import Recipe
from distilpeft.tasks.rows import TaskData
from distilpeft.tasks.task import Task


def pair_of(recipe: Recipe, data: TaskData, runtime: Runtime | None = None) -> Pair:
    """The recipe's models, with what they take from its rows: shots of a prompt, and the tokens that a student keeps.

    Args:
        recipe: the recipe.
        data: its rows.
        runtime: shows how far it has come; None: nothing is shown.

    Raises:
        InputError: see `prompted.with_shots` and `vocabulary.cut_to_data`.
    """
    return cut_to_data(with_shots(Pair(recipe), data), data, runtime)


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
