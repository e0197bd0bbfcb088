"""The command line: verbs become function calls; torch is imported only inside the verbs that compute.

Exit codes: 0 done; 2 something the user can fix; 3 the figures stopped the run; 75 or 130 stopped by a signal,
resumable; 1 a bug (with a traceback).
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from distilpeft.cli import bundles, recipes, runs, storage, targets
from distilpeft.errors import Crash, Terminated, outcome
from distilpeft.machine.host import prepare_imports

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="One recipe in; a small, fast, proven model out."
)
for part in (recipes.app, runs.app, storage.app, bundles.app):
    app.add_typer(part)
app.add_typer(targets.targets_app, name="targets")


@app.command()
def version() -> None:
    """Print the version."""
    from distilpeft import __version__

    print(__version__)


def _version(value: bool) -> None:
    if value:
        version()
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)] = False,
) -> None:
    """One recipe in; a small, fast, proven model out."""


def main() -> None:
    """Entry point: faults that users can fix become one line on stderr and an exit code."""
    prepare_imports()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminate)
    try:
        code = app(standalone_mode=False)  # of typer.Exit, which does not come through here
        if code:
            sys.exit(code)
    except Crash as crash:
        print(crash, file=sys.stderr)  # a traceback already
        sys.exit(1)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        result = outcome(error)
        if result is None:
            raise
        message, code = result
        if message:
            print(" ".join(message.split()), file=sys.stderr)
        sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave in order; what trains or writes soft targets has a handler of its own meanwhile."""
    raise Terminated(130 if number == signal.SIGINT else 75)
