"""`distilpeft clean`: remove the artifacts that nothing refers to, and what interrupted commands have left.

A folder is renamed first and deleted then, so that no half-deleted artifact can be taken for a complete one, and only
while nobody works in the run's folder: everyone who does shares a lock, and this asks for it alone.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.errors import InputError
from distilpeft.machine.artifact import MANIFEST, PARTIAL
from distilpeft.machine.files import fsync, names_in, size_text, usage
from distilpeft.machine.locks import IN_USE, Lock, held_by_others
from distilpeft.planning.plan import CACHE, Plan
from distilpeft.report import build, publish
from distilpeft.storage import records
from distilpeft.storage.names import REMOVED, is_artifact, is_partial, is_removed, is_run, stage_of

MODELS = ("teacher", "distil", "export", "bundle")
"""Stages that leave models: nearly all that a sweep takes on disk."""
STALE, LEFT = "no recipe, report or sweep refers to it", "left by an interrupted run; no recipe refers to it"
BEGUN, TOKENS = "its removal was interrupted", "tokenised rows; made again when they are needed"
KEPT, RESUMES = "soft targets; removed with --caches", "interrupted; the next run resumes it"


@dataclass(frozen=True)
class Item:
    """A folder in a run's folder.

    Attributes:
        path: where it is.
        bytes: what it takes.
        why: it can be removed, or stays.
    """

    path: Path
    bytes: float
    why: str


@dataclass(frozen=True)
class Scope:
    """What counts as current, and what may go besides.

    Attributes:
        run: the run's folder.
        plans: of the recipes that were given.
        recorded: count what the last unfinished run there was to make, too.
        caches: remove soft targets that nothing refers to, and tokenised rows.
        best_only: of sweeps and searches, keep the models of the best point only.
    """

    run: Path
    plans: tuple[Plan, ...] = ()
    recorded: bool = True
    caches: bool = False
    best_only: bool = False


@dataclass(frozen=True)
class Cleaning:
    """What there is to clear away in one run's folder.

    Attributes:
        scope: what was asked for.
        items: to be removed.
        kept: what stays although nobody may miss it.
    """

    scope: Scope
    items: tuple[Item, ...]
    kept: tuple[Item, ...]


def check_run(run: Path) -> None:
    """Refuse a folder that is not a run's, or is elsewhere.

    Raises:
        InputError: it is one.
    """
    if run.is_symlink():
        raise InputError(f"{run}: a link; give the folder that it leads to, {run.resolve()}")
    if not is_run(run):
        raise InputError(f"{run}: not the folder of a run; `distilpeft runs` lists them")


def look(scope: Scope) -> Cleaning:
    """Find what can be removed; changes nothing.

    Raises:
        InputError: nothing says what is current, or it cannot be read.
    """
    current = _current(scope)
    items: list[Item] = []
    kept: list[Item] = []
    for name in sorted(names_in(scope.run)):
        path = scope.run / name
        if path.is_symlink() or not path.is_dir():
            continue
        why, goes = _judged(path, current, caches=scope.caches)
        if why is not None:
            (items if goes else kept).append(Item(path, usage(path).bytes, why))
    return Cleaning(scope, tuple(items), tuple(kept))


def _judged(path: Path, current: Collection[str], *, caches: bool) -> tuple[str | None, bool]:
    """Why a folder is worth a line, if it is, and whether it is removed."""
    name = path.name
    if is_removed(name):
        return BEGUN, True
    if name == CACHE:
        return (TOKENS, True) if caches else (None, False)
    if is_partial(name):
        final = name.removesuffix(PARTIAL)
        resumes = final in current and not (path.with_name(final) / MANIFEST).is_file()
        return (RESUMES, False) if resumes else (LEFT, True)
    if not is_artifact(name) or name in current:
        return None, False
    return (KEPT, False) if stage_of(name) == "targets" and not caches else (STALE, True)


def _current(scope: Scope) -> set[str]:
    """The names of all artifacts that something refers to."""
    run = scope.run
    names: set[str] = {artifact.path.name for plan in scope.plans for artifact in plan.steps().values()}
    recorded = records.plan_of(run) if scope.recorded else None
    if recorded is not None:
        names |= recorded.artifacts
    if (run / build.REPORT).is_file():
        names |= set(build.load(run).artifacts.values()) | _linked(run / publish.EXPORTS)
    for comparison in records.comparisons_of(run):
        names |= _of_comparison(comparison, best_only=scope.best_only)
    if not names:
        raise InputError(f"{run}: records no run, report or sweep that says what to keep; give the recipe")
    return names


def _linked(exports: Path) -> set[str]:
    """The bundles that the links to the exports lead to; usually those of the report."""
    links = [exports / name for name in names_in(exports)]
    return {link.readlink().parent.name for link in links if link.is_symlink()}


def _of_comparison(comparison: records.Comparison, *, best_only: bool) -> set[str]:
    names = {name for point in comparison.points for name in point.artifacts}
    if not best_only or comparison.best is None:
        return names
    return {name for name in names if name in comparison.best.artifacts or stage_of(name) not in MODELS}


def remove(cleanings: Sequence[Cleaning]) -> list[Item]:
    """Remove what was found, unless something refers to it by now; returns what was removed.

    Raises:
        InputError: somebody works on one of the runs; nothing is removed then.
    """
    removed, doomed = [], []
    with contextlib.ExitStack() as stack:
        for cleaning in cleanings:
            stack.enter_context(_alone(cleaning.scope.run))
        for cleaning in cleanings:
            still = {item.path for item in look(cleaning.scope).items}
            for item in cleaning.items:
                if item.path in still:
                    removed.append(item)
                    doomed.append(_renamed(item.path))
            fsync(cleaning.scope.run)
    for path in doomed:  # nobody looks there any more, so that others need not wait
        shutil.rmtree(path, ignore_errors=True)
    left = [path for path in doomed if path.exists()]
    if left:
        raise InputError(f"{left[0]}: cannot be deleted completely; look at its permissions and clean again")
    return removed


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Nobody else works in the run's folder during the block."""
    lock = Lock(run, IN_USE)
    last = lock.holder()
    if not lock.acquire():
        who = next(iter(held_by_others(run).values()), last)
        raise InputError(f"{run}: {who or 'another process'} is working on it; clean it when that is done")
    try:
        busy = held_by_others(run)
        if busy:
            name, who = next(iter(busy.items()))
            raise InputError(f"{run}: {who or 'another process'} is working on {name}; clean it when that is done")
        yield
    finally:
        lock.release()


def _renamed(path: Path) -> Path:
    if is_removed(path.name):
        return path
    return path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}{REMOVED}"))


def show(cleanings: Sequence[Cleaning], console: Console) -> None:
    """Print what will be removed, with sizes, and what stays."""
    for cleaning in cleanings:
        if cleaning.items or cleaning.kept:
            console.print(f"{cleaning.scope.run}:", highlight=False, soft_wrap=True)
        if cleaning.items:
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            table.add_column("remove", no_wrap=True)
            table.add_column("size", justify="right", no_wrap=True)
            table.add_column("why", overflow="fold")
            for item in cleaning.items:
                table.add_row(item.path.name, size_text(item.bytes), item.why)
            console.print(table)
        for item in cleaning.kept:
            line = f"kept: {item.path.name}, {size_text(item.bytes)}: {item.why}"
            console.print(line, highlight=False, soft_wrap=True)
    items = [item for cleaning in cleanings for item in cleaning.items]
    console.print(f"to remove: {total(items)}" if items else "nothing to remove", highlight=False, soft_wrap=True)


def total(items: Sequence[Item]) -> str:
    """A number of folders and their size."""
    count = f"{len(items)} folder{'s' if len(items) != 1 else ''}"
    return f"{count}, {size_text(sum(item.bytes for item in items))}"
