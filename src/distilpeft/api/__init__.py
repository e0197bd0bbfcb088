"""distilpeft from Python: the verbs of the command line as functions that return what they made.

    import distilpeft

    run = distilpeft.run("recipes/quickstart.yaml", overrides={"distil.temperature": 4})
    print(run.scores["student"]["accuracy"])
    print(run.bundle("onnx-int8").answers(["A gripping, tender film."]))

Faults that users can fix are raised as `distilpeft.InputError`, figures that stop a run as `distilpeft.GateError`.
Torch is imported only where something is computed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from distilpeft.errors import InputError
from distilpeft.planning.plan import Plan, make_plan
from distilpeft.planning.roles import STAGES, STUDENT
from distilpeft.recipe import Recipe, yaml_file
from distilpeft.recipe.export import ALIASES
from distilpeft.report import build, publish
from distilpeft.report.schema import Report
from distilpeft.storage import cleaning, overview, records

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distilpeft.export.bundle import Bundle

Given: TypeAlias = "str | Path | Mapping[str, object] | Recipe"
"""A recipe's file, its content, or one that is loaded already."""
Overrides: TypeAlias = "Mapping[str, object] | Sequence[str]"
"""Keys to change: {"distil.temperature": 4}, or as on the command line ["distil.temperature=4"]."""
QUICK = {"evaluate.seeds": [], "benchmark.rounds": 3, "benchmark.precision": None}
"""What makes a run a first look."""


def load_recipe(recipe: Given, overrides: Overrides = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: a YAML file, or its content as a mapping.
        overrides: keys to change.

    Raises:
        InputError: one line: where, which key, what is wrong, what is allowed.
    """
    changes = _settings(overrides)
    if isinstance(recipe, Recipe):
        if not changes:
            return recipe
        recipe = recipe.model_dump(mode="json", exclude_unset=True)
    if isinstance(recipe, Mapping):
        return yaml_file.recipe_of(recipe, changes)
    return yaml_file.load_recipe(recipe, changes)


def _settings(overrides: Overrides) -> list[str]:
    """Keys to change as `--set` takes them."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return list(overrides)


@dataclass(frozen=True)
class Check:
    """What a run of a recipe would do.

    Attributes:
        plan: every artifact that it leads to.
        rows: rows of each split; None for data on the hub, which only a run downloads.
        stages: a line for each stage: name, done, rows, steps, time, memory, disk; `?` is not known yet.
    """

    plan: Plan
    rows: Mapping[str, int] | None
    stages: tuple[tuple[str, ...], ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe, with all defaults."""
        return self.plan.recipe

    @property
    def num_missing(self) -> int:
        """Steps that are not done."""
        return len(self.plan.missing())


def check(
    recipe: Given, *, overrides: Overrides = (), runs: str | Path = "runs", console: Console | None = None
) -> Check:
    """Check a recipe and its data, without loading weights.

    Args:
        recipe: the recipe.
        overrides: keys to change.
        runs: the folder that holds all runs.
        console: where remarks on the data are printed; default: nowhere.

    Raises:
        InputError: the recipe or a row cannot be used; it is named.
    """
    from rich.console import Console

    from distilpeft.planning import check as checking

    plan = make_plan(load_recipe(recipe, overrides), Path(runs))
    rows, stages = checking.forecast(plan, console or Console(quiet=True))
    return Check(plan, rows, tuple(stages))


@dataclass(frozen=True)
class Run:
    """A run; after `until`, one that is not finished has students, but no report.

    Attributes:
        plan: its recipe, and where every artifact is.
    """

    plan: Plan

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.plan.folder

    @cached_property
    def report(self) -> Report:
        """All figures; see docs/report.md.

        Raises:
            InputError: the run is not finished.
        """
        missing = self.plan.missing()
        if missing:
            raise InputError(f"report: {len(missing)} steps of this run are not done; run it without until")
        return build.build(self.plan)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Model → metric → score: `teacher`, `student`, `student_ce_only`, `export:onnx-int8`, ..."""
        return {
            model.role: {name: float(score.value) for name, score in model.scores.items()}
            for model in self.report.models
        }

    def student(self, role: str = STUDENT) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A student as an ordinary transformers model on the CPU, with its tokenizer.

        Args:
            role: which: `student`, or one that it is compared with, such as `student_ce_only`.

        Raises:
            InputError: the run has no such student, or has not trained it yet.
        """
        step = self.plan.find("distil", role)
        if step is None:
            roles = ", ".join(entry.role for entry in self.plan.own if entry.stage == "distil")
            raise InputError(f"student: this run has no {role!r}; its students are {roles}")
        if not step.artifact.done:
            raise InputError(f"student: {role} is not trained yet; run it until distil")
        import transformers

        from distilpeft.models.pair import MODEL
        from distilpeft.tasks.rows import task_of

        step.artifact.verify()
        folder = str(step.artifact.path / MODEL)
        reads = transformers.AutoImageProcessor if self.plan.recipe.kind.reads_images else transformers.AutoTokenizer
        model = getattr(transformers, task_of(self.plan.recipe).auto_class).from_pretrained(folder)
        return model.eval(), reads.from_pretrained(folder)

    def bundle(self, form: str | None = None) -> Bundle:
        """An export, ready to answer: `run.bundle("onnx-int8").answers([...])`.

        Args:
            form: a format of the recipe's `export.formats`; default: the first.

        Raises:
            InputError: the run has no such export or has not made it yet, or a file of it was altered.
        """
        from distilpeft.export.bundle import Bundle

        formats = self.plan.recipe.export.formats
        full_name = formats[0] if form is None else ALIASES.get(form, form)
        if full_name not in formats:
            raise InputError(f"bundle: this run has no {form}; its exports are {', '.join(formats)}")
        return Bundle(self.plan.artifact("bundle", full_name).path / "model")


def run(
    recipe: Given, *, overrides: Overrides = (), runs: str | Path = "runs", until: str | None = None,
    quick: bool = False, console: Console | None = None,
) -> Run:  # fmt: skip
    """Run every step of a recipe that is not done yet.

    Stopped, it resumes at its last checkpoint when it is called again; finished, it returns at once.

    Args:
        recipe: the recipe.
        overrides: keys to change.
        runs: the folder that holds all runs.
        until: stop after a stage, such as "distil".
        quick: a first look: one seed, and latencies from a few rounds; a later run without it adds what is missing.
        console: where progress is printed; default: standard output.

    Raises:
        InputError: something to fix in the recipe, the data or the machine.
        GateError: the figures stop the run: a teacher no better than chance, an export that is not equal.
    """
    from rich.console import Console

    from distilpeft.machine.host import is_first_process, num_launched, prepare_imports

    if until is not None and until not in STAGES:
        raise InputError(f"--until {until}: one of {', '.join(STAGES)}")
    prepare_imports()
    changes = [*(_settings(QUICK) if quick else ()), *_settings(overrides)]
    plan = make_plan(load_recipe(recipe, changes), Path(runs))
    console = console or Console(quiet=not is_first_process())
    missing = plan.missing()
    # torchrun's processes go on together: while others work here, each by itself might see another state
    if not missing and num_launched() == 1 and (plan.folder / build.REPORT).is_file():
        console.print(f"{plan.recipe.name}: nothing to do, all {len(plan.steps())} steps are done.")
        if is_first_process():
            publish.refresh(plan)
            (plan.folder / records.PLAN).unlink(missing_ok=True)  # of another recipe, before this one was asked for
        return Run(plan)
    from distilpeft.pipeline import launch
    from distilpeft.planning import check as checking

    for line in checking.cautions(plan.recipe):
        console.print(line, highlight=False, soft_wrap=True)
    checking.read_rows(plan.recipe, console)  # bad rows are found here, before torch is even imported
    console.print(f"{plan.recipe.name}: {len(missing)} of {len(plan.steps())} steps to do; results in {plan.folder}")
    launch.complete(plan, until)
    return Run(plan)


def runs(folder: str | Path = "runs") -> list[overview.RunState]:
    """List the runs of a folder: how far each is, who works on it, its score, and what it takes on disk.

    Args:
        folder: the folder that holds all runs.

    Raises:
        InputError: there is no such folder.
    """
    return overview.find(Path(folder))


def clean(
    *given: Given, overrides: Overrides = (), runs: str | Path = "runs", caches: bool = False,
    keep: Literal["all", "best"] = "all", dry_run: bool = False,
    agree: Callable[[Sequence[cleaning.Cleaning]], bool] | None = None,
) -> list[cleaning.Item]:  # fmt: skip
    """Remove the artifacts of runs that nothing refers to, and what interrupted runs have left.

    What the given recipes, the run's report, its sweeps and its searches refer to stays, and of a run's folder also
    what its last unfinished run was to make.

    Args:
        given: run folders, recipes, or both.
        overrides: keys of the recipes to change.
        runs: the folder that holds all runs, for recipes.
        caches: remove soft targets that nothing refers to, and tokenised rows.
        keep: `best` keeps, of sweeps and searches, the models of the best point only.
        dry_run: remove nothing.
        agree: asked before anything is removed; False removes nothing.

    Returns:
        What was removed, or with `dry_run` would be.

    Raises:
        InputError: a folder is not a run's, nothing says what to keep in it, or somebody works on it.
    """
    if keep not in ("all", "best"):
        raise InputError(f"--keep {keep}: all or best")
    scopes = _scopes(given, overrides, Path(runs), caches=caches, best_only=keep == "best")
    cleanings = [cleaning.look(scope) for scope in scopes]
    if dry_run or (agree is not None and not agree(cleanings)):
        return [item for entry in cleanings for item in entry.items] if dry_run else []
    return cleaning.remove(cleanings)


def _scopes(
    targets: Sequence[Given], overrides: Overrides, runs: Path, *, caches: bool, best_only: bool
) -> list[cleaning.Scope]:
    """What is asked of each run's folder, whichever way and however often it was given."""
    scopes: dict[Path, cleaning.Scope] = {}
    for target in targets:
        plan = None if _is_folder(target) else make_plan(load_recipe(target, overrides), runs)
        folder = Path(str(target)) if plan is None else plan.folder
        cleaning.check_run(folder)
        scope = scopes.get(folder.resolve(), cleaning.Scope(folder, (), recorded=False))
        scopes[folder.resolve()] = cleaning.Scope(
            scope.run, scope.plans if plan is None else (*scope.plans, plan),
            recorded=scope.recorded or plan is None, caches=caches, best_only=best_only,
        )  # fmt: skip
    return list(scopes.values())


def _is_folder(target: Given) -> bool:
    return isinstance(target, str | Path) and Path(target).is_dir()


def init(out: str | Path, data: str, *, task: str | None = None, overwrite: bool = False, **wishes: object) -> Recipe:
    """Write a first recipe for some data, with the reason next to every choice, and load it.

    Args:
        out: the recipe to write.
        data: a file, folder, hub id or package:NAME/path.
        task: a kind of task; default: what the columns show.
        overwrite: replace a file that is there.
        wishes: the options of `distilpeft init` by name: `text`, `label` and the other columns, `device`, `size_mb`,
            `latency_ms`, `language`, `max_tokens`, `packages`, `teacher`, `student`, `unlabelled`.

    Raises:
        InputError: something has to be given that the data do not show; the message names it.
    """
    from distilpeft.planning import first_recipe
    from distilpeft.planning.data_profile import READ, Wishes
    from distilpeft.planning.guess.settle import nobody

    out = Path(out)
    keys = (*READ, "label", "separator", "tags", "answers")
    columns = {key: str(wishes.pop(key)) for key in keys if key in wishes}
    known = set(Wishes.__dataclass_fields__) - {"data", "task", "columns", "why"}
    unknown = sorted(set(wishes) - known)
    if unknown:
        raise InputError(f"init: unknown {unknown[0]!r}; known are {', '.join(sorted({*known, *keys}))}")
    request = Wishes(data, task, columns, **wishes)  # type: ignore[arg-type]
    if overwrite and out.exists():
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # the old one stays until there is a new one
            fresh = Path(folder) / out.name
            first_recipe.write(fresh, request, nobody)
            fresh.replace(out)
    else:
        first_recipe.write(out, request, nobody)
    return load_recipe(out)
