"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[
    Path, typer.Argument(help="the recipe: a YAML file, or a name from `distilpeft recipes`", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as distil.temperature=4"),
]
Runs = Annotated[Path, typer.Option("--runs", help="the folder that holds all runs")]
