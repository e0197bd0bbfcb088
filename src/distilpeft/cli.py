"""The command line: verbs become function calls; torch is imported only inside the verbs that compute.

Exit codes: 0 done; 2 something the user can fix; 3 the figures stopped the run; 75 or 130 stopped by a signal,
resumable; 1 a bug (with a traceback).
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from distilpeft.errors import Crash, InputError, Terminated, outcome
from distilpeft.machine.host import quiet_imports
from distilpeft.planning.roles import STAGES, TRAINING_STAGES
from distilpeft.recipe.export import ALIASES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One recipe in; a small, fast, proven model out.",
)
targets_app = typer.Typer(no_args_is_help=True, help="Look into soft targets on disk, or bring them in from elsewhere.")
app.add_typer(targets_app, name="targets")
RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, such as distil.temperature=4"),
]
Runs = Annotated[Path, typer.Option("--runs", help="the folder that holds all runs")]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: Runs = Path("runs"),
    until: Annotated[str | None, typer.Option(help=f"stop after a stage: {', '.join(STAGES)}")] = None,
) -> None:
    """Do everything the recipe says and is not done yet; stopped anyhow, the same command goes on."""
    from rich.console import Console

    from distilpeft.machine.host import is_first_process, num_launched
    from distilpeft.planning.plan import make_plan
    from distilpeft.recipe.yaml_file import load_recipe
    from distilpeft.report import publish, text

    if until is not None and until not in STAGES:
        raise InputError(f"--until {until}: one of {', '.join(STAGES)}")
    plan = make_plan(load_recipe(recipe, overrides or []), runs)
    console = Console(quiet=not is_first_process())
    missing = plan.missing()
    # torchrun's processes go on together: while others are at work here, each for itself might see another state
    unfinished = missing or num_launched() > 1 or not (plan.folder / "report.json").is_file()
    if unfinished:
        from distilpeft.pipeline import launch
        from distilpeft.planning import check

        for line in check.cautions(plan.recipe):
            console.print(line, highlight=False, soft_wrap=True)
        check.read_rows(plan.recipe, console)  # bad rows are found here, before torch is even imported
        console.print(
            f"{plan.recipe.name}: {len(missing)} of {len(plan.steps())} steps to do; results in {plan.folder}"
        )
        launch.on_devices(plan.recipe.devices, launch.run_plan, (plan, until), plan.folder)
    else:
        console.print(f"{plan.recipe.name}: nothing to do, all {len(plan.steps())} steps are done.")
    if not is_first_process() or (unfinished and until is not None):
        return
    report = publish.finish(plan) if unfinished else publish.refresh(plan)
    if until is None:
        text.show(report, console)
        console.print(f"Page: {plan.folder / publish.PAGE}   Model: {plan.folder / 'student'}", highlight=False)


@app.command()
def init(  # noqa: PLR0913 - the command line's options
    out: Annotated[Path, typer.Argument(help="the recipe to write, such as mine.yaml", show_default=False)],
    data: Annotated[str, typer.Option(help="file, folder, hub id or package:NAME/path", show_default=False)],
    task: Annotated[str | None, typer.Option(help="a kind of task, such as text_classification or causal_lm")] = None,
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
    device: Annotated[str, typer.Option(help="cpu, or a GPU's memory such as 24GB")] = "cpu",
    size_mb: Annotated[float | None, typer.Option(min=1, help="the student as int8, at most")] = None,
    latency_ms: Annotated[float | None, typer.Option(min=0.01, help="a row on this CPU, about, at most")] = None,
    language: Annotated[str | None, typer.Option(help="en, or many; default: what the texts are in")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="default: what 98 % of the rows need")] = None,
    packages: Annotated[bool, typer.Option("--packages", help="only models that come as Python packages")] = False,
    teacher: Annotated[str | None, typer.Option(help="instead of the catalogue's")] = None,
    student: Annotated[str | None, typer.Option(help="instead of the catalogue's")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="more rows, without labels: as --data")] = None,
) -> None:
    """Write a first recipe for your data, with the reason beside every choice; asks for what it cannot see."""
    from distilpeft.planning import first_recipe
    from distilpeft.planning.data_profile import Wishes, ask_at_terminal
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
    chosen = first_recipe.write(out, wishes, ask_at_terminal)
    typer.echo(f"{out}: {chosen}")
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
) -> None:
    """Check a recipe and its data, and print what each stage is and what it will need. Loads no weights."""
    from rich.console import Console

    from distilpeft.planning import check
    from distilpeft.planning.memory import Machine
    from distilpeft.planning.plan import make_plan
    from distilpeft.recipe.yaml_file import load_recipe

    machines = [Machine.of(text) for text in on or []]
    plan = make_plan(load_recipe(recipe, overrides or []), runs)
    check.show(plan, Console(), machines)


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

    found, files = tuning.run(recipe, overrides or [], runs, stage=stage, steps=steps, low=low, high=high)
    typer.echo(f"{stage}: {found.words}; {', '.join(map(str, files))}")
    if found.suggestion is not None:
        typer.echo(f"suggestion: --set {stage}.optim.lr={found.suggestion:g}")


@app.command()
def sweep(
    recipe: RecipePath,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="KEY=V1,V2", help="a key and its values, such as distil.temperature=1,2,4"),
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
    if search:
        from distilpeft.tuning import search as searcher
        from distilpeft.tuning import search_space

        asked = search_space.make(recipe, search, over or [], overrides or [], runs, trials or 20, storage)
        code = searcher.run(asked, console, jobs)
    elif trials is not None or storage is not None:
        raise InputError("--trials and --storage belong to a search; give --search KEY=LOW..HIGH")
    else:
        from distilpeft.tuning import sweep as grid
        from distilpeft.tuning import sweep_points

        code = grid.run(sweep_points.points(recipe, over or [], overrides or [], runs), console, jobs)
    if code:
        raise typer.Exit(code)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="print the reference of all keys instead")] = False,
) -> None:
    """Print the JSON schema of recipes, for editors."""
    from distilpeft.recipe import Recipe, reference

    print(reference.markdown() if markdown else json.dumps(Recipe.model_json_schema(), indent=2), end="")


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

    from distilpeft.machine.host import is_first_process
    from distilpeft.pipeline import launch
    from distilpeft.planning.plan import make_plan
    from distilpeft.recipe.yaml_file import with_formats
    from distilpeft.report import build, publish, text

    if not formats:
        raise InputError("--format: give at least one, such as --format onnx-int8")
    given = build.load(run).given
    plan = make_plan(with_formats(given, formats, overrides or []), run.resolve().parent)
    launch.on_devices(plan.recipe.devices, launch.run_plan, (plan,), plan.folder)
    if is_first_process():
        console = Console()
        text.show(publish.finish(plan), console)
        for form in formats:
            console.print(f"{form}: {plan.folder / publish.EXPORTS / ALIASES.get(form, form)}", highlight=False)


@app.command()
def benchmark(
    targets: Annotated[
        list[Path], typer.Argument(help="finished runs' folders, exported folders, or both", show_default=False)
    ],
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option("--repeat", min=1, help="measure the whole so many times")] = 1,
    texts: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="lines of text that exported folders are timed on")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="a JSON file; default: RUN/benchmark.json")] = None,
) -> None:
    """Measure latency, throughput and memory of finished runs and exports beside each other."""
    from rich.console import Console

    from distilpeft.machine.host import num_launched

    if num_launched() > 1:
        raise InputError("distilpeft benchmark starts a process for each model itself; run it without torchrun")
    from distilpeft.benchmark import rerun

    rerun.run(targets, overrides or [], repeats=repeats, texts=texts, out=out, console=Console())


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

    found = [build.load(run) for run in runs]
    if as_json:
        print(build.as_json(found))
    elif len(found) == 1:
        text.show(found[0], Console())
        folder = out or runs[0]
        folder.mkdir(parents=True, exist_ok=True)
        Console().print(f"Page: {publish.pages(folder, found)}", highlight=False)
    else:
        publish.joint(found, out or Path("joint-report"), Console())


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
    chosen = processes or sorted({1, gpus or 2})
    if not proof.run(chosen, Console()):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    from distilpeft import __version__

    print(__version__)


def main() -> None:
    """Entry point: faults that users can fix become one line on stderr and an exit code."""
    quiet_imports()
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
        found = outcome(error)
        if found is None:
            raise
        message, code = found
        if message:
            print(" ".join(message.split()), file=sys.stderr)
        sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave in order; what trains or writes soft targets has a handler of its own meanwhile."""
    raise Terminated(130 if number == signal.SIGINT else 75)
