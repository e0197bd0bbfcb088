"""Verbs for soft targets on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distilpeft.cli.options import Overrides, RecipePath, Runs

targets_app = typer.Typer(no_args_is_help=True, help="Look into soft targets on disk, or bring them in from elsewhere.")


@targets_app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="a folder of soft targets, or a run's folder", show_default=False)],
    rows: Annotated[int, typer.Option(min=0, help="rows to show")] = 2,
) -> None:
    """Check every file of a store of soft targets, and print what it holds."""
    from rich.console import Console

    from distilpeft.distillation import inspect_store

    inspect_store.show(path, rows, Console())


@targets_app.command("import")
def import_command(
    recipe: RecipePath,
    answers: Annotated[Path, typer.Argument(help="JSONL, a server's answer for each training row", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="the folder to make")],
    teacher: Annotated[str, typer.Option(help="name of the served teacher, for the record")] = "served",
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
) -> None:
    """Turn log-probabilities of a served teacher into soft targets for a recipe's training rows."""
    from rich.console import Console

    from distilpeft.planning.plan import make_plan
    from distilpeft.recipe.yaml_file import load_recipe

    plan = make_plan(load_recipe(recipe, overrides or []), runs)
    from distilpeft.pipeline import served_targets

    served_targets.run(plan, answers, out, teacher, Console(stderr=True))
