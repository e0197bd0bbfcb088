"""The points of a sweep: parsed from `--over`, named, and checked for comparability."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilpeft.errors import InputError
from distilpeft.planning.plan import Plan, make_plan
from distilpeft.recipe import Recipe
from distilpeft.recipe.yaml_file import load_recipe, parse_values


@dataclass(frozen=True)
class Point:
    """One setting of the swept keys.

    Attributes:
        values: key → value.
        plan: what there is to do.
    """

    values: Mapping[str, Any]
    plan: Plan

    @property
    def label(self) -> str:
        """The values, shortly."""
        return label_of(self.values)


def short(value: object) -> str:
    """A value in a table."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {short(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(short, value)) + "]" if isinstance(value, list | tuple) else str(value)


def points(
    recipe: Path, over: Sequence[str], overrides: Sequence[str], runs: Path, single: Sequence[str] = ()
) -> list[Point]:
    """Every combination of the swept values, checked as a run checks it.

    Args:
        recipe: the file.
        over: `KEY=V1,V2` for each swept key.
        overrides: `KEY=VALUE` for all points.
        runs: the folder of all runs.
        single: `{KEY: VALUE, ...}` for each setting of several keys at once; every one meets every value of `over`.

    Raises:
        InputError: an option cannot be read, or a point is not a valid recipe; the option is named.
    """
    option = "--point" if single else "--over"
    swept = dict(parse_over(text) for text in over)
    if len(swept) < len(over):
        raise InputError("--over: a key is given twice")
    if not swept and not single:
        raise InputError("--over: give at least one key with its values, such as --over distil.temperature=1,2,4")
    products = [dict(zip(swept, combined, strict=True)) for combined in itertools.product(*swept.values())]
    values = [{**chosen, **combined} for chosen in _single(single, swept) for combined in products]
    settings = [[*overrides, *settings_of(point)] for point in values]
    recipes = []
    for point, options in zip(values, settings, strict=True):
        with named(option, point):
            recipes.append(load_recipe(recipe, options))
    refuse_incomparable(option, values, recipes)
    shared = shared_temperatures(recipes)
    result = []
    for point, options, own in zip(values, settings, recipes, strict=True):
        whole = [*options, *shared] if shared and _keeps_some(own) else options
        with named(option, point):
            result.append(Point(point, make_plan(load_recipe(recipe, whole), runs)))
    return result


@contextmanager
def named(option: str, values: Mapping[str, object]) -> Iterator[None]:
    """Let faults name the option and the values."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}, at {label_of(values)}: {error}") from None


def label_of(values: Mapping[str, object]) -> str:
    """Values in a line."""
    return ", ".join(f"{key}={short(value)}" for key, value in values.items())


def settings_of(values: Mapping[str, object]) -> list[str]:
    """Values as overrides of a recipe."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]  # JSON is YAML


def refuse_incomparable(option: str, values: Sequence[Mapping[str, object]], recipes: Sequence[Recipe]) -> None:
    """Refuse points that are one and the same, or that no single figure can rank.

    Raises:
        InputError: there are some; `option` is what to call them by.
    """
    pairs: list[tuple[Mapping[str, object], dict[str, Any]]] = []
    for point, recipe in zip(values, recipes, strict=True):
        whole = recipe.model_dump()
        same = next((earlier for earlier, content in pairs if content == whole), None)
        if same is not None:
            raise InputError(
                f"{option}, at {label_of(point)}: the same recipe as at {label_of(same)}; one key hides another"
            )
        pairs.append((point, whole))
    for what, kinds in (
        ("distil.fit.monitor", {recipe.monitor(recipe.distil.fit) for recipe in recipes}),
        ("evaluate.split", {recipe.evaluate.split for recipe in recipes}),
        ("task.kind", {recipe.task.kind for recipe in recipes}),
    ):
        if len(kinds) > 1:
            raise InputError(f"{option}: {what} is {' or '.join(sorted(kinds))}, and such points cannot be compared")


def _single(texts: Sequence[str], swept: Mapping[str, object]) -> list[dict[str, object]]:
    """Read `{KEY: VALUE, ...}` of each `--point`; one without keys if there are none.

    Raises:
        InputError: one cannot be read, or names a key of `--over`.
    """
    found: list[dict[str, object]] = []
    for text in texts:
        flag = f"--point {text}"
        (value, *more) = parse_values(text, flag)
        if more or not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise InputError(f"{flag}: write it as {{key: value, key: value}}")
        both = sorted(value.keys() & swept.keys())
        if both:
            raise InputError(f"{flag}: {both[0]} is a key of --over as well")
        found.append({key: _checked(key, [part], flag)[0] for key, part in value.items()})
    return found or [{}]


def parse_over(text: str) -> tuple[str, list[object]]:
    """Read `KEY=V1,V2`.

    Raises:
        InputError: it cannot be read.
    """
    key, sep, values = text.partition("=")
    flag = f"--over {text}"
    if not sep or not key or not values.strip():
        raise InputError(f"{flag}: write it as key=value,value")
    parsed = _checked(key, parse_values(values, flag), flag)
    if any(value == other for value, other in itertools.combinations(parsed, 2)):
        raise InputError(f"{flag}: a value is given twice")
    return key, parsed


def _checked(key: str, values: list[Any], flag: str) -> list[Any]:
    """Values of a key that a recipe can hold; students may be given by their names."""
    if key == "name":
        raise InputError(f"{flag}: the points of a sweep share one folder, which the name is")
    try:
        json.dumps(values)
    except TypeError as error:  # YAML has dates and sets, recipes do not
        raise InputError(f"{flag}: no recipe holds such a value: {error}") from None
    return [{"model": value} if key == "student" and isinstance(value, str) else value for value in values]


def _keeps_some(recipe: Recipe) -> bool:
    """Whether the point's cache serves only temperatures that are listed, and the recipe leaves the list open."""
    targets = recipe.targets
    cached = targets.mode == "cached" and targets.source is None and recipe.distil.alpha > 0
    return recipe.kind.is_language_model and cached and targets.format != "full" and targets.temperatures is None


def shared_temperatures(recipes: Sequence[Recipe]) -> list[str]:
    """What to set so that one cache serves every temperature of the sweep."""
    temperatures = sorted({recipe.distil.temperature for recipe in recipes if _keeps_some(recipe)})
    return settings_of({"targets.temperatures": temperatures}) if len(temperatures) > 1 else []
