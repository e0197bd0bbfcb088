"""Verbs that run recipes, measure, and show what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distilpeft.cli.options import Overrides, RecipePath, Runs
from distilpeft.errors import InputError
from distilpeft.planning.roles import STAGES, TRAINING_STAGES
from distilpeft.recipe.export import ALIASES

app = typer.Typer()


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    until: Annotated[str | None, typer.Option(help=f"stop after a stage: {', '.join(STAGES)}")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a first look: one seed, latencies from a few rounds")] = False,
) -> None:
    """Run every step of the recipe that is not done yet. However it was stopped, run it again to resume."""
    from rich.console import Console

    from distilpeft import api
    from distilpeft.machine.host import is_first_process
    from distilpeft.report import publish, text

    console = Console(quiet=not is_first_process())
    result = api.run(recipe, overrides=overrides or (), runs=runs, until=until, quick=quick, console=console)
    if until is None and is_first_process():
        text.show(result.report, console)
        console.print(f"Page: {result.folder / publish.PAGE}   Model: {result.folder / 'student'}", highlight=False)


@app.command("tune-lr")
def tune_lr(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    stage: Annotated[str, typer.Option(help=" or ".join(TRAINING_STAGES))] = "distil",
    steps: Annotated[int, typer.Option(min=10, help="optimizer steps of the test")] = 100,
    low: Annotated[float | None, typer.Option(min=0, help="first rate; default by what is trained")] = None,
    high: Annotated[float | None, typer.Option(min=0, help="last rate")] = None,
) -> None:
    """Let the learning rate of a stage rise until the loss does, and suggest one; with a plot."""
    if stage not in TRAINING_STAGES:
        raise InputError(f"--stage {stage}: {' or '.join(TRAINING_STAGES)}")
    from distilpeft.tuning import tune_lr as tuning

    result, files = tuning.run(recipe, overrides or [], runs, stage=stage, steps=steps, low=low, high=high)
    typer.echo(f"{stage}: {result.words}; {', '.join(map(str, files))}")
    if result.suggestion is not None:
        typer.echo(f"suggestion: --set {stage}.optim.lr={result.suggestion:g}")


@app.command()
def sweep(  # noqa: PLR0913 - the command line's options
    recipe: RecipePath,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="KEY=V1,V2", help="a key and its values, such as distil.temperature=1,2,4"),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            "--point", metavar="{KEY: VALUE, ...}", help="several keys at once: one of the settings to compare"
        ),
    ] = None,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    jobs: Annotated[int, typer.Option(min=1, help="worker processes that share this machine")] = 1,
    search: Annotated[
        list[str] | None,
        typer.Option("--search", metavar="KEY=LOW..HIGH[:log]", help="let Optuna choose a number, and from --over"),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="trials of a search; default: 20")] = None,
    storage: Annotated[
        str | None, typer.Option(help="where machines share a search: a journal file, or a database's URL")
    ] = None,
) -> None:
    """Compare several settings on one teacher and one cache: every combination, or what Optuna chooses."""
    from rich.console import Console

    from distilpeft.machine.host import is_first_process, num_launched

    if jobs > 1 and num_launched() > 1:
        raise InputError("--jobs: torchrun spreads every training over its processes already; use one of the two")
    console = Console(quiet=not is_first_process())
    if search and point:
        raise InputError("--point: a search chooses from --search and --over only")
    if search:
        from distilpeft.tuning import search as searcher
        from distilpeft.tuning import search_space

        space = search_space.make(recipe, search, over or [], overrides or [], runs, trials or 20, storage)
        code = searcher.run(space, console, jobs)
    elif trials is not None or storage is not None:
        raise InputError("--trials and --storage belong to a search; give --search KEY=LOW..HIGH")
    else:
        from distilpeft.tuning import sweep as grid
        from distilpeft.tuning import sweep_points

        code = grid.run(sweep_points.points(recipe, over or [], overrides or [], runs, point or []), console, jobs)
    if code:
        raise typer.Exit(code)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a finished run's folder, such as runs/quickstart", show_default=False)],
    formats: Annotated[
        list[str] | None, typer.Option("--format", metavar="FORM", help="safetensors, onnx, onnx-int8, gguf-q8_0, ...")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Export a finished run's student in more forms; each is proven, scored, timed and bundled."""
    from rich.console import Console

    from distilpeft.pipeline import launch
    from distilpeft.planning.plan import make_plan
    from distilpeft.recipe.yaml_file import with_formats
    from distilpeft.report import build, publish, text

    if not formats:
        raise InputError("--format: give at least one, such as --format onnx-int8")
    recipe = build.load(run).given
    plan = make_plan(with_formats(recipe, formats, overrides or []), run.resolve().parent)
    report = launch.complete(plan)
    if report is not None:
        console = Console()
        text.show(report, console)
        for form in formats:
            console.print(f"{form}: {plan.folder / publish.EXPORTS / ALIASES.get(form, form)}", highlight=False)


@app.command()
def benchmark(
    targets: Annotated[
        list[Path], typer.Argument(help="finished runs' folders, exported folders, or both", show_default=False)
    ],
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option("--repeat", min=1, help="repeat the whole measurement this many times")] = 1,
    texts: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="lines of text that exported folders are timed on")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="a JSON file; default: RUN/benchmark.json")] = None,
) -> None:
    """Measure latency, throughput and memory of finished runs and exports side by side."""
    from rich.console import Console

    from distilpeft.machine.host import num_launched

    if num_launched() > 1:
        raise InputError("distilpeft benchmark starts a process for each model by itself; run it without torchrun")
    from distilpeft.benchmark import rerun

    rerun.run(targets, overrides or [], repeats=repeats, texts=texts, out=out, console=Console())


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="folders of finished runs", show_default=False)],
    as_json: Annotated[
        bool, typer.Option("--json", help="print the reports as JSON on stdout, and nothing else")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="the folder for the page; default: the run's; of several: joint-report")
    ] = None,
) -> None:
    """Print the reports of finished runs, and put one or several on a page."""
    from rich.console import Console

    from distilpeft.report import build, publish, text

    reports = [build.load(run) for run in runs]
    if as_json:
        print(build.as_json(reports))
    elif len(reports) == 1:
        text.show(reports[0], Console())
        folder = out or runs[0]
        folder.mkdir(parents=True, exist_ok=True)
        Console().print(f"Page: {publish.pages(folder, reports)}", highlight=False)
    else:
        publish.joint(reports, out or Path("joint-report"), Console())


@app.command()
def selftest(
    processes: Annotated[
        list[int] | None, typer.Option(min=1, help="numbers of processes to try; default: 1 and 2, or 1 and all GPUs")
    ] = None,
) -> None:
    """Prove on this machine that loss and gradient are the same for every split of a batch; exit code 1 if not."""
    from rich.console import Console

    from distilpeft.machine.host import gpu_names
    from distilpeft.training import selftest as proof

    gpus = len(gpu_names())
    counts = processes or sorted({1, gpus or 2})
    if not proof.run(counts, Console()):
        raise typer.Exit(1)
