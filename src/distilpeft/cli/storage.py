"""Verbs for what runs leave on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distilpeft.cli.options import Overrides, Runs
from distilpeft.errors import InputError

if TYPE_CHECKING:
    from distilpeft.storage.cleaning import Cleaning

app = typer.Typer()


@app.command("runs")
def runs_command(
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="print the list as JSON on stdout, and nothing else")] = False,
) -> None:
    """List runs: steps done, who works on them, the student's score, the export to deploy, and size on disk."""
    from rich.console import Console

    from distilpeft import api
    from distilpeft.storage import overview

    states = api.runs(runs)
    if as_json:
        print(json.dumps(overview.as_json(states, runs), indent=2, ensure_ascii=False))
    else:
        overview.show(states, runs, Console())


@app.command()
def clean(
    given: Annotated[
        list[str], typer.Argument(metavar="RUN|RECIPE...", help="run folders, recipes, or both", show_default=False)
    ],
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    caches: Annotated[
        bool, typer.Option("--caches", help="also soft targets that nothing refers to, and tokenised rows")
    ] = False,
    keep: Annotated[
        Literal["all", "best"],
        typer.Option(help="of sweeps and searches, keep the models of all points or of the best one"),
    ] = "all",
    yes: Annotated[bool, typer.Option("--yes", help="remove without asking")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list everything, remove nothing")] = False,
) -> None:
    """Remove what no current recipe, report or sweep refers to, and what interrupted runs have left; asks first."""
    from rich.console import Console

    from distilpeft import api
    from distilpeft.storage import cleaning

    console = Console()

    def agree(cleanings: Sequence[Cleaning]) -> bool:
        cleaning.show(cleanings, console)
        if dry_run or not any(entry.items for entry in cleanings):
            return False
        if yes:
            return True
        if not sys.stdin.isatty():
            raise InputError("--yes: needed to remove anything where nobody can be asked; --dry-run only lists it")
        return typer.confirm("Remove them?")

    removed = api.clean(*given, overrides=overrides or (), runs=runs, caches=caches, keep=keep, agree=agree)
    if removed:
        console.print(f"removed: {cleaning.total(removed)}", highlight=False, soft_wrap=True)
