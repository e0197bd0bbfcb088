"""What `distilpeft sweep --search` may choose from, read and checked before anything runs. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilpeft.errors import InputError
from distilpeft.machine.files import digest_json
from distilpeft.planning.plan import Plan, make_plan
from distilpeft.planning.roles import STUDENT
from distilpeft.recipe import Recipe
from distilpeft.recipe.yaml_file import load_recipe, parse_values
from distilpeft.tuning.sweep_points import (
    label_of,
    named,
    parse_over,
    refuse_incomparable,
    settings_of,
    shared_temperatures,
)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `log`: even over orders of magnitude; `whole`: integers."""

    low: float
    high: float
    log: bool
    whole: bool


Space = Mapping[str, Range | tuple[object, ...]]
"""Key → range, or values to choose from."""


@dataclass(frozen=True)
class Search:
    """What is searched.

    Attributes:
        recipe: the file.
        overrides: `KEY=VALUE` for all trials.
        runs: the folder of all runs.
        space: the settings.
        trials: how many there are to be, of all processes together.
        storage: a database's URL or a journal file; None: a journal next to the results.
        corner: the plan of one end of the space, for what all trials have in common.
    """

    recipe: Path
    overrides: tuple[str, ...]
    runs: Path
    space: Space
    trials: int
    storage: str | None
    corner: Plan

    @property
    def monitor(self) -> str:
        """The validation metric that trials are judged by."""
        return self.corner.recipe.monitor(self.corner.recipe.distil.fit)

    @property
    def key(self) -> str:
        """Names the search by its space and by what its students depend on."""
        space = {key: vars(axis) if isinstance(axis, Range) else list(axis) for key, axis in self.space.items()}
        return digest_json([space, self.corner.weights_of(STUDENT).key, self.monitor])[:12]

    @property
    def folder(self) -> Path:
        """Where the table goes."""
        return self.corner.folder / f"search-{self.key}"

    def plan(self, values: Mapping[str, object], *more: str) -> Plan:
        """What there is to do for some values of the space, with more overrides behind those of the search."""
        with named("--search", values):
            return make_plan(load_recipe(self.recipe, [*self.overrides, *settings_of(values), *more]), self.runs)


def make(
    recipe: Path, ranges: Sequence[str], over: Sequence[str], overrides: Sequence[str], runs: Path, trials: int,
    storage: str | None = None,
) -> Search:  # fmt: skip
    """Read the options, and check the recipe at both ends of every range and at every value.

    Args:
        recipe: the file.
        ranges: `KEY=LOW..HIGH` or `KEY=LOW..HIGH:log` for each searched number.
        over: `KEY=V1,V2` for each key with values to choose from.
        overrides: `KEY=VALUE` for all trials.
        runs: the folder of all runs.
        trials: see `Search`.
        storage: see `Search`.

    Raises:
        InputError: an option cannot be read, or makes no good recipe; it is named.
    """
    base = load_recipe(recipe, overrides)
    options: list[tuple[str, Range | tuple[object, ...]]] = [
        *(_parse_range(text, base) for text in ranges),
        *(_parse_values(text) for text in over),
    ]
    space = dict(options)
    if len(space) < len(options):
        raise InputError("--search: a key is given twice")
    ends = {key: (axis.low, axis.high) if isinstance(axis, Range) else axis for key, axis in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    tried = [first, *({**first, key: value} for key, values in ends.items() for value in values[1:])]
    recipes = []
    for values in tried:
        with named("--search", values):
            recipes.append(load_recipe(recipe, [*overrides, *settings_of(values)]))
    refuse_incomparable("--search", tried, recipes)
    shared = shared_temperatures(recipes)
    if shared and isinstance(space.get("distil.temperature"), Range):
        raise InputError(
            "--search distil.temperature: these soft targets serve only temperatures that are listed, so every trial "
            "would make its own; use --over distil.temperature=1,2,4 or --set targets.format=full"
        )
    settings = (*overrides, *shared)
    with named("--search", first):
        corner = make_plan(load_recipe(recipe, [*settings, *settings_of(first)]), runs)
    search = Search(recipe, settings, runs, space, trials, storage, corner)
    points: dict[str, Mapping[str, object]] = {}
    for values in tried:
        key = search.plan(values).weights_of(STUDENT).key
        if key in points:
            raise InputError(f"--search, at {label_of(values)}: trains the same student as at {label_of(points[key])}")
        points[key] = values
    return search


def _parse_values(text: str) -> tuple[str, tuple[object, ...]]:
    key, values = parse_over(text)
    return key, tuple(values)


def _parse_range(text: str, base: Recipe) -> tuple[str, Range]:
    flag = f"--search {text}"
    key, sep, ends = text.partition("=")
    ends, _, scale = ends.partition(":")
    low, dots, high = ends.partition("..")
    if not (sep and key and dots and low and high) or scale not in ("", "log"):
        raise InputError(f"{flag}: write it as key=low..high or key=low..high:log; values to choose from go to --over")
    numbers = parse_values(f"{low},{high}", flag)
    if len(numbers) != len("ab") or any(isinstance(end, bool) or not isinstance(end, int | float) for end in numbers):
        raise InputError(f"{flag}: both ends have to be numbers")
    if not numbers[0] < numbers[1]:
        raise InputError(f"{flag}: the first number has to be the smaller one")
    if scale == "log" and numbers[0] <= 0:
        raise InputError(f"{flag}: a logarithmic range begins above 0")
    value = _value_at(base, key)
    whole = isinstance(value, int) or (value is None and all(isinstance(end, int) for end in numbers))
    if whole and not all(isinstance(end, int) for end in numbers):
        raise InputError(f"{flag}: {key} is a whole number; write both ends without a point")
    return key, Range(numbers[0], numbers[1], scale == "log", whole)


def _value_at(recipe: Recipe, key: str) -> object:
    """The recipe's own value of a key, or None."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def own_values(search: Search) -> dict[str, object] | None:
    """The recipe's own values, which are tried first, if they are in the space."""
    base = load_recipe(search.recipe, search.overrides)
    values: dict[str, object] = {}
    for key, axis in search.space.items():
        value = _value_at(base, key)
        if isinstance(axis, Range):
            if not isinstance(value, int | float) or not axis.low <= value <= axis.high:
                return None
            values[key] = value
        elif value in axis:
            values[key] = axis[axis.index(value)]  # 1 for 1.0: as written in the option
        else:
            return None
    return values
