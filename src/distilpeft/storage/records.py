"""What the commands that worked in a run's folder refer to there: the folders of their plans' artifacts, by name.

`run` writes `plan.json`, which its report replaces, a sweep `sweep-KEY/plans/N.json` for every point, a search the same
for every trial. Keys depend on the data and on the machine, so a plan that is made later may name other folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import JsonObject, names_in, read_json, read_sealed, sealed, write_json

PLAN, PLANS = "plan.json", "plans"
SWEEP, SEARCH = "sweep.json", "search.json"


@dataclass(frozen=True)
class Record:
    """One plan.

    Attributes:
        artifacts: the folders that it leads to.
        values: of a sweep's point or a search's trial.
    """

    artifacts: frozenset[str]
    values: Mapping[str, object]


@dataclass(frozen=True)
class Comparison:
    """A sweep or a search.

    Attributes:
        points: what it compares, also what was stopped or given up.
        is_finished: whether its table is written.
        best: the point that the validation rows chose; None while there is no table, or if no point was finished.
    """

    points: tuple[Record, ...]
    is_finished: bool
    best: Record | None


def save(file: Path, artifacts: Iterable[Artifact], values: Mapping[str, object] | None = None) -> None:
    """Write down what a plan leads to."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({artifact.path.name for artifact in artifacts})
    write_json(file, sealed({"artifacts": names, "values": dict(values or {})}))


def plan_of(run: Path) -> Record | None:
    """What the last `run` in this folder was to make; None if it is finished.

    Raises:
        InputError: it cannot be read.
    """
    return _read(run / PLAN, "run the recipe again") if (run / PLAN).is_file() else None


def comparisons_of(run: Path) -> list[Comparison]:
    """The sweeps and searches in a run's folder.

    Raises:
        InputError: one cannot be read, or does not say what it refers to.
    """
    comparisons = []
    for name in sorted(names_in(run)):
        folder = run / name
        if name.startswith(("sweep-", "search-")) and folder.is_dir() and not folder.is_symlink():
            comparisons.append(_comparison(folder))
    return comparisons


def _comparison(folder: Path) -> Comparison:
    advice = f"run the same {folder.name.partition('-')[0]} again, which repeats nothing, or delete {folder}"
    files = [folder / PLANS / name for name in sorted(names_in(folder / PLANS)) if name.endswith(".json")]
    points = tuple(_read(file, advice) for file in files)
    tables = [folder / name for name in (SWEEP, SEARCH) if (folder / name).is_file()]
    if not tables:
        return Comparison(points, is_finished=False, best=None)
    if not points:
        raise InputError(f"{folder}: does not say which artifacts it refers to; {advice}")
    values = _best_values(read_json(tables[0], advice))
    best = next((point for point in points if point.values == values), None)
    return Comparison(points, is_finished=True, best=best)


def _best_values(table: JsonObject) -> Mapping[str, object] | None:
    if "trials" in table:
        best = [trial["values"] for trial in table["trials"] if trial["number"] == table["best"]]
        return best[0] if best else None
    values: Mapping[str, object] = table["points"][table["best_by_validation"]]["values"]
    return values


def _read(file: Path, advice: str) -> Record:
    content = read_sealed(file, advice)
    return Record(frozenset(content["artifacts"]), content["values"])
