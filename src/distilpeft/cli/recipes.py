"""Verbs that make, list and check recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from distilpeft.cli.options import Overrides, RecipePath, Runs
from distilpeft.errors import InputError

app = typer.Typer()
recipes_app = typer.Typer(help="List the recipes that come with distilpeft, or copy one.")
app.add_typer(recipes_app, name="recipes")


@app.command()
def init(  # noqa: PLR0913 - the command line's options
    out: Annotated[Path, typer.Argument(help="the recipe to write, such as mine.yaml", show_default=False)],
    data: Annotated[str, typer.Option(help="file, folder, hub id or package:NAME/path", show_default=False)],
    task: Annotated[
        str | None, typer.Option(help="a kind of task, such as causal_lm; default: what the columns show")
    ] = None,
    text: Annotated[str | None, typer.Option(help="column with the text")] = None,
    pair: Annotated[str | None, typer.Option(help="column with a second text")] = None,
    label: Annotated[str | None, typer.Option(help="column with the class, the list of classes, or the number")] = None,
    separator: Annotated[str | None, typer.Option(help="what stands between several classes in a text")] = None,
    words: Annotated[str | None, typer.Option(help="column with a list of words")] = None,
    tags: Annotated[str | None, typer.Option(help="column with a tag for each word")] = None,
    question: Annotated[str | None, typer.Option(help="column with the question")] = None,
    context: Annotated[str | None, typer.Option(help="column with the text that holds the answer")] = None,
    answers: Annotated[str | None, typer.Option(help="column with the answers")] = None,
    prompt: Annotated[str | None, typer.Option(help="column with the prompt")] = None,
    completion: Annotated[str | None, typer.Option(help="column with the completion")] = None,
    messages: Annotated[str | None, typer.Option(help="column with chat messages")] = None,
    image: Annotated[str | None, typer.Option(help="column with the picture")] = None,
    source: Annotated[str | None, typer.Option(help="column with the text that is read")] = None,
    target: Annotated[str | None, typer.Option(help="column with the text that is to be written")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, or a GPU's memory such as 24GB; default: what this machine has")
    ] = None,
    size_mb: Annotated[float | None, typer.Option(min=0.05, help="the student as int8, at most")] = None,
    latency_ms: Annotated[float | None, typer.Option(min=0.01, help="a row on this CPU, about, at most")] = None,
    language: Annotated[str | None, typer.Option(help="en, or many; default: what the texts are in")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="default: what 98 % of the rows need")] = None,
    packages: Annotated[bool, typer.Option("--packages", help="only models that come as Python packages")] = False,
    teacher: Annotated[str | None, typer.Option(help="instead of the catalogue's")] = None,
    student: Annotated[str | None, typer.Option(help="instead of the catalogue's")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="more rows, without labels: as --data")] = None,
) -> None:
    """Write a first recipe for your data, with the reason for every choice; asks where the data allow several."""
    from distilpeft.planning import first_recipe
    from distilpeft.planning.data_profile import Wishes
    from distilpeft.planning.guess.settle import ask_at_terminal
    from distilpeft.recipe.task import KINDS

    for flag, value, allowed in (
        ("task", task, tuple(KINDS)), ("language", language, ("en", "many")),
    ):  # fmt: skip
        if value is not None and value not in allowed:
            raise InputError(f"--{flag} {value}: one of {', '.join(allowed)}")
    given = {"text": text, "pair": pair, "label": label, "separator": separator, "words": words, "tags": tags,
             "question": question, "context": context, "answers": answers, "prompt": prompt,
             "completion": completion, "messages": messages, "source": source, "target": target,
             "image": image}  # fmt: skip
    columns = {key: column for key, column in given.items() if column is not None}
    wishes = Wishes(
        data, task, columns, device, size_mb, language, max_tokens, packages, teacher, student, latency_ms, unlabelled
    )  # fmt: skip
    for line in first_recipe.write(out, wishes, ask_at_terminal):
        typer.echo(line)
    typer.echo(f"next: distilpeft check {out}; distilpeft run {out}")


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="8x80GB", help="plan memory for such GPUs; default: this machine"),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="also print the recipe with all defaults")] = False,
) -> None:
    """Check a recipe and its data, and print what each stage is and what it will need. Loads no weights."""
    from rich.console import Console

    from distilpeft.planning import check
    from distilpeft.planning.memory import Machine
    from distilpeft.planning.plan import make_plan
    from distilpeft.recipe.yaml_file import load_recipe

    machines = [Machine.of(text) for text in on or []]
    plan = make_plan(load_recipe(recipe, overrides or []), runs)
    check.show(plan, Console(), machines, full=full)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="print the reference of all keys instead")] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from distilpeft.planning import recipe_reference
    from distilpeft.recipe import Recipe

    print(recipe_reference.markdown() if markdown else json.dumps(Recipe.model_json_schema(), indent=2), end="")


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the recipes that come with distilpeft, with what each needs first."""
    if context.invoked_subcommand is not None:
        return
    from distilpeft.recipe.shipped import shipped

    for one in shipped():
        typer.echo(f"{one.name}\n    {one.purpose}.")
        for command in one.setup:
            typer.echo(f"    $ {command}")
    typer.echo("\ndistilpeft run NAME runs one; distilpeft recipes copy NAME puts it into this folder, to be changed.")


@recipes_app.command("copy")
def copy_command(
    name: Annotated[str, typer.Argument(help="a name from `distilpeft recipes`", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="the folder to copy into")] = Path(),
) -> None:
    """Copy a recipe, with the scripts that make its data, to start your own from."""
    from distilpeft.recipe.shipped import copy

    for file in copy(name, out):
        typer.echo(str(file))
