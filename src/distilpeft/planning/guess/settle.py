"""Settle what `distilpeft init` was not given: take what the data show, and ask where they allow several answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import typer

from distilpeft.errors import InputError
from distilpeft.planning.data_profile import Look, Wishes
from distilpeft.planning.guess.kinds import KEYS, guesses
from distilpeft.recipe.task import KINDS

MOST_OPTIONS = 5
"""Guesses that are offered."""
Ask = Callable[[str, Sequence[str]], int | None]
"""(question, choices) → the position of the answer; None if nobody is there to answer."""


def nobody(question: str, choices: Sequence[str]) -> None:
    """An `Ask` where nobody answers."""
    del question, choices


def ask_at_terminal(question: str, choices: Sequence[str]) -> int | None:
    """An `Ask` for people at a terminal; the first choice is the default."""
    if not sys.stdin.isatty():
        return None
    for number, choice in enumerate(choices, 1):
        typer.echo(f"  {number}  {choice}")
    while True:
        answer = str(typer.prompt(question, default="1")).strip()
        if answer.isdecimal() and 1 <= int(answer) <= len(choices):
            return int(answer) - 1
        if answer in choices:
            return choices.index(answer)


def settled(wishes: Wishes, data: Look, ask: Ask) -> tuple[Wishes, list[str]]:
    """The wishes with task and columns, found in the data or asked for; and lines that say why.

    Raises:
        InputError: a column is not there, or something has to be given; all of it is named at once.
    """
    columns = dict(wishes.columns or {})
    has = [*data.rows.column_names, *(name for name in data.pictures if name not in data.rows.column_names)]
    for key, column in columns.items():
        if key != "separator" and column not in has:
            raise InputError(f"--{key} {column}: {wishes.data} has {', '.join(has)}")
    choices = guesses(wishes.task, columns, data)[:MOST_OPTIONS]
    if not choices:
        return _ask_for_columns(wishes, columns, has, ask), []
    answer = 0 if len(choices) == 1 else ask(
        "Several kinds of task fit these data; which one is it?", [f"{guess.task}: {guess.why}" for guess in choices]
    )  # fmt: skip
    chosen = choices[answer or 0]
    wishes = replace(wishes, task=chosen.task, columns={**chosen.columns, **columns}, why=chosen.why)
    lines = [f"task: {chosen.task}, because {chosen.why}"]
    if answer is None:
        lines += [f"or {guess.flags(chosen)}: {guess.why}" for guess in choices if guess is not chosen]
    return wishes, lines


def _ask_for_columns(wishes: Wishes, columns: dict[str, str], has: Sequence[str], ask: Ask) -> Wishes:
    """Task and columns where the data show neither.

    Raises:
        InputError: nobody answers; the message names all that is needed.
    """
    task = wishes.task
    if task is None:
        answer = ask("These data show no kind of task; what is it?", list(KINDS))
        if answer is None:
            raise InputError(
                f"--task is needed, with the columns that it reads (such as --text and --label): one of "
                f"{', '.join(KINDS)}; {wishes.data} has the columns {', '.join(has)}"
            )
        task = list(KINDS)[answer]
    missing = [key for key in KEYS[task] if key not in columns]
    for key in missing:
        answer = ask(f"Which column holds what the recipe calls {key}?", has)
        if answer is None:
            flags = " and ".join(f"--{name}" for name in missing)
            verb = "is" if len(missing) == 1 else "are"
            raise InputError(f"{flags} {verb} needed for {task}: {wishes.data} has the columns {', '.join(has)}")
        columns[key] = has[answer]
    return replace(wishes, task=task, columns=columns)
