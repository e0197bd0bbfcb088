"""Verbs for exported models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from distilpeft.errors import InputError

app = typer.Typer()


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="an exported folder, such as runs/quickstart/student")],
    texts: Annotated[list[str] | None, typer.Argument(help="texts; without any, lines of --input")] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", metavar="FILE", help="any data file, or lines of text; -: stdin, the default"),
    ] = None,
    text: Annotated[str | None, typer.Option(help="column with the text; default: the recipe's")] = None,
    pair: Annotated[str | None, typer.Option(help="column with the second text; default: the recipe's")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="a file for the answers; default: stdout")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts at once")] = 32,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="of a language model's answer; default: what it was judged by, or 64")
    ] = None,
) -> None:
    """Answer texts with an exported model, as JSON lines."""
    from distilpeft.export import predict

    if texts and source is not None:
        raise InputError("--input: give texts or a file of them, not both")
    try:
        given = None if texts else sys.stdin if source in (None, "-") else Path(str(source))
        for line in predict.run(
            bundle, texts or [], given, out, batch_size=batch_size, max_new_tokens=max_new_tokens, text_column=text,
            pair_column=pair, say=lambda words: print(words, file=sys.stderr),
        ):  # fmt: skip
            print(line, flush=True)
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: not UTF-8 text (byte {error.start})") from None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file or folder") from None


@app.command()
def push(
    bundle: Annotated[Path, typer.Argument(help="an exported folder, such as runs/quickstart/student")],
    repo: Annotated[str, typer.Argument(help="the hub repository, OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="if the repository is new")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list everything, upload nothing")] = False,
) -> None:
    """Upload an exported model with its card to a hub repository."""
    from rich.console import Console

    from distilpeft.export import push

    push.push(bundle, repo, Console(), private=private, dry_run=dry_run)
