"""What a run will need, estimated before any weight is read: rows, steps, parameters, time, memory and disk.

Parameters come from the headers of files, or from published configurations of hub models (`known_models.json`); rows
from the data; memory and time are arithmetic on them, see `memory` and `forecast`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import datasets
import yaml
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilpeft import __version__
from distilpeft.data.labels import LABEL
from distilpeft.data.reading import SPLITS, data_sources
from distilpeft.planning.forecast.lengths import lengths
from distilpeft.planning.forecast.overview import show_overview
from distilpeft.planning.forecast.stages import TAUGHT_MORE, in_bytes, machine_here, stages
from distilpeft.planning.forecast.vocabulary import kept_tokens
from distilpeft.planning.memory import MARGIN, Machine, MemoryModel, Placement, best, settings, variants
from distilpeft.planning.models import check_texts, model_lines
from distilpeft.planning.plan import Plan
from distilpeft.planning.sizes import own_ways, student_load, student_size, targets_load, teacher_load, teacher_size
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import CausalLM, Texts
from distilpeft.tasks import text_rows
from distilpeft.tasks.checked_rows import UNLABELLED, VIEWS
from distilpeft.tasks.prompts.prompt import prompt_of
from distilpeft.tasks.rows import TaskRows, class_counts, read_task_rows, task_of
from distilpeft.tasks.task import Task

MOST_CLASSES = 30
LONGEST_CLASS = 24
"""Characters of a class's name that are shown."""
LONGEST_LINE = 400
"""Characters of a prompt's line that are shown."""


def show_memory(recipe: Recipe, machine: Machine, console: Console, kept: int | None = None) -> None:
    """Print the memory of each device for every choice, and the fastest that fits; `kept`: tokens of the student."""
    teacher, student = teacher_size(recipe), student_size(recipe, kept)
    if teacher is None or student is None:
        names = [name for name, size in ((recipe.teacher.model, teacher), (recipe.student.model, student))
                 if size is None and name is not None]  # fmt: skip
        console.print(f"Memory: unknown; {_unknown(names)}", highlight=False, markup=False)
        return
    places = (
        ("replicated", "offloaded") if recipe.teacher.quantize != "none" else ("replicated", "sharded", "offloaded")
    )
    tuning, giving, training = own_ways(recipe)
    tuned = recipe.teacher.fit is not None
    loads = {
        **({"teacher": (teacher_load(recipe, teacher, machine.kind), tuning, ("replicated",))} if tuned else {}),
        "targets": (targets_load(recipe, teacher, machine), giving, places),
        "distil": (student_load(recipe, student, teacher, machine.kind), training, places),
    }
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.title = (
        f"Memory of each device on {machine} {machine.kind}s"
        if machine.count > 1
        else f"Memory of {machine} {machine.kind}"
    )
    for column in ("choice", "model", "activ.", "logits", "teacher", "sum", "fits"):
        table.add_column(column, justify="left" if column in ("choice", "fits") else "right", no_wrap=True)
    advice = []
    for stage, (load, own, given) in loads.items():
        rows = f"{own.micro_batch_size} row{'s' if own.micro_batch_size > 1 else ''}"
        unused = " if cached" if stage == "targets" and training.mode == "online" else ""
        table.add_row(f"{stage}{unused}, {rows}{', checkpointing' if own.checkpointing else ''}")
        for way in variants(own, machine, given):
            table.add_row(*_memory_row(load, way, own, machine))
        if not unused:
            advice.append(_advice(stage, load, own, machine, given))
    console.print(table)
    for line in advice:
        console.print(line, highlight=False, soft_wrap=True)


def _unknown(names: Sequence[str]) -> str:
    """Why the memory of models is not known."""
    if not names:
        return "the student is made from a configuration that is built only in a run"
    verb = "is" if len(names) == 1 else "are"
    return f"the shapes of {' and '.join(names)} {verb} neither in files on this machine nor among those known"


def _memory_row(load: MemoryModel, way: Placement, own: Placement, machine: Machine) -> list[str]:
    parts = load.parts(way, machine)
    choice = {
        "tune": way.parallel,
        "give": way.place,
        "cached": f"cached, {way.parallel}",
        "online": f"online, {way.place}, {way.parallel}",
    }[way.mode]
    total = sum(parts.values())
    model = parts["weights"] + parts["moments"] + parts["gradients"] + parts["autocast"]
    cells = [model, parts["activations"], parts["logits"], parts["teacher"], total]
    fits = total <= MARGIN * machine.memory_bytes
    return [f"  {choice}{' *' if way == own else ''}", *map(in_bytes, cells), "yes" if fits else "no"]


def _advice(stage: str, load: MemoryModel, own: Placement, machine: Machine, places: tuple[str, ...]) -> str:
    way = best(own, load, machine, places=places)
    if way is None:
        return (
            f"{stage}: nothing fits on {machine}; take a smaller model, shorter rows (data.max_tokens), LoRA or larger "
            "devices"
        )
    changed = settings(own, way, stage)
    total = in_bytes(load.total(way, machine))
    if not changed:
        return f"{stage}: as the recipe says, {total} on each device"
    return f"{stage}: {total} on each device with " + " ".join(f"--set {one}" for one in changed)


def _show_prompt(recipe: Recipe, rows: Mapping[str, datasets.Dataset], console: Console) -> None:
    """What a prompted teacher is asked for the first training row."""
    prompt, teacher = prompt_of(recipe), recipe.teacher
    if prompt is None or not len(rows["train"]):
        return
    first = rows["train"].select(range(1))
    texts = [str(first[column][0]) for _, column in text_rows.columns(cast("Texts", recipe.task))]
    before = f", behind {teacher.shots} training rows with their answers" if teacher.shots else ""
    where = " as what a user says" if teacher.chat else ""
    console.print(f"The teacher is asked{where}{before}, for example:", highlight=False)
    for line in (prompt.of(texts) + prompt.endings[0]).splitlines():
        console.print(f"  {line[:LONGEST_LINE]}", highlight=False, markup=False)
    answers = " or ".join(map(repr, prompt.answers[:MOST_CLASSES]))
    more = " ..." if len(prompt.answers) > MOST_CLASSES else ""
    console.print(f"It answers {answers}{more}.\n", highlight=False, markup=False)


def show(plan: Plan, console: Console, machines: Sequence[Machine] = (), *, full: bool = False) -> None:
    """Print what will happen, a line per stage; then the data, and memory on each machine.

    Args:
        plan: the run.
        console: where.
        machines: what to plan memory for; this machine if there are none.
        full: also print the recipe with all defaults, last.

    Raises:
        InputError: the data cannot be used.
    """
    recipe = plan.recipe
    read = _local_rows(recipe)
    remarks = _remarks(recipe, read)
    rows = None if read is None else read.splits
    kept = kept_tokens(recipe, rows)
    show_overview(plan, _counts(recipe, rows), lengths(recipe, rows), console, kept)
    _say([*remarks, *cautions(recipe)], console)
    if rows is not None:
        _show_rows(recipe, rows, console)
        _show_prompt(recipe, rows, console)
    for machine in machines or [machine_here(recipe)]:
        show_memory(recipe, machine, console, None if kept is None else kept.count)
    console.print(
        "* = the recipe's own choice. model: weights, gradients, optimizer; activ.: kept for the backward pass. "
        "Sums count 0.6 GB for a GPU's context; a plan fills at most 90 % of a device.\n",
        highlight=False,
    )
    if full:
        resolved = recipe.model_dump(mode="json", exclude_none=True)
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).strip()
        console.print(text, highlight=False, markup=False)
    every = len(plan.steps())
    done = every - len(plan.missing())
    reshaped = rows is None or _counts(recipe, rows) is None
    checked = "the recipe is good (a run reads or cuts the rows)" if reshaped else "the recipe and its data are good"
    console.print(
        f"distilpeft {__version__}: {checked}; {done} of {every} steps are done. "
        f"Results: {plan.folder}. Time, memory and disk are estimates; ? = not known before a run.",
        highlight=False,
    )


def cautions(recipe: Recipe) -> list[str]:
    """What a user should know before a run: how models are used, code that it runs, and what is not deterministic."""
    lines = model_lines(recipe)
    if recipe.teacher.trust_remote_code:
        lines.append(
            f"warning: teacher.trust_remote_code: code that comes with {recipe.teacher.model} will be run on this "
            "machine, with all that you may do"
        )
    if recipe.deterministic:
        lines.append(
            "deterministic: the same weights, bit for bit, on the same hardware, versions, threads and number of "
            "processes; on GPUs an operation without such a form stops the run with its name."
        )
        if recipe.teacher.quantize != "none":
            kernels = f"{recipe.teacher.quantize} kernels"
            lines.append(f"deterministic: on GPUs, bitsandbytes promises nothing of its {kernels}.")
        if any(fit is not None and fit.compile for fit in (recipe.teacher.fit, recipe.distil.fit)):
            lines.append("deterministic: fit.compile gives the same only from the same cache of the compiler.")
    return lines


def read_rows(recipe: Recipe, console: Console) -> dict[str, datasets.Dataset]:
    """Read and check all rows, and the tokenizers on them; print what was skipped. Returns the rows of each split."""
    read = read_task_rows(recipe)
    _say(_remarks(recipe, read), console)
    return read.splits


def forecast(plan: Plan, console: Console) -> tuple[dict[str, int] | None, list[tuple[str, ...]]]:
    """Rows of each split, checked (None for a data set on the hub, which only a run may download); and the stages.

    Args:
        plan: the run.
        console: where remarks on the data are printed.

    Raises:
        InputError: the data cannot be used.
    """
    read = _local_rows(plan.recipe)
    rows = None if read is None else read.splits
    _say(_remarks(plan.recipe, read), console)
    counts = _counts(plan.recipe, rows)
    return counts, [stage.cells() for stage in stages(plan, counts, lengths(plan.recipe, rows).mean)]


def _remarks(recipe: Recipe, read: TaskRows | None) -> list[str]:
    """What is to be said of the rows: what was left out of them, and whether the tokenizers know them."""
    return [] if read is None else [*read.remarks(), *check_texts(recipe, read.splits)]


def _say(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _local_rows(recipe: Recipe) -> TaskRows | None:
    """The rows, read and checked; None for a data set on the hub, which only a run may download."""
    sections = [recipe.data, *([] if recipe.data.unlabelled is None else [recipe.data.unlabelled])]
    if any(source.path is None for section in sections for source in data_sources(section).values()):
        return None
    return read_task_rows(recipe, download=False)


def _counts(recipe: Recipe, rows: Mapping[str, datasets.Dataset] | None) -> dict[str, int] | None:
    """Rows of each split, as far as they are known."""
    # Documents and packed rows become another number of rows, which takes a tokenizer to find out.
    reshaped = isinstance(recipe.task, CausalLM) and (recipe.task.pack or recipe.task.text is not None)
    return None if rows is None or reshaped else {name: len(part) for name, part in rows.items()}


def _show_rows(recipe: Recipe, rows: Mapping[str, datasets.Dataset], console: Console) -> None:
    """Print the classes, and what the student learns from besides the rows with a label."""
    _show_classes(recipe, rows, console)
    if UNLABELLED in rows or VIEWS in rows:
        more = [f"{len(rows[name])} {what}" for name, what in TAUGHT_MORE.items() if name in rows]
        tuned = recipe.teacher.fit is not None
        use = ": the teacher is tuned on them. It then labels" if tuned else ". The teacher, used as it is, labels"
        console.print(
            f"{len(rows['train'])} training rows have a label{use} {' and '.join(more)}, and the student learns from "
            "all of them.", highlight=False,
        )  # fmt: skip


def _show_classes(recipe: Recipe, splits: Mapping[str, datasets.Dataset], console: Console) -> None:
    """Print how often each class comes, with a training row that has it, so that wrong labels can be seen."""
    counts = class_counts(recipe, splits)
    if not counts:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown = list(counts.items())[:MOST_CLASSES]
    table.add_column("class", no_wrap=True, overflow="ellipsis", max_width=LONGEST_CLASS)
    for column in SPLITS:
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    # What is left of the line, so that no count has to make room for an example.
    names = min(LONGEST_CLASS, max(len("class"), *(cell_len(name) for name, _ in shown)))
    left = console.width - names - sum(len(split) + 2 for split in SPLITS) - 4
    table.add_column("for example", no_wrap=True, overflow="ellipsis", max_width=max(left, len("for example")))
    examples = _examples(task_of(recipe), splits["train"], len(counts))
    for index, (name, numbers) in enumerate(shown):
        table.add_row(Text(name), *map(str, numbers), Text(examples.get(index, "")))
    console.print(table)
    if len(counts) > MOST_CLASSES:
        console.print(f"... and {len(counts) - MOST_CLASSES} more classes.", highlight=False)
    absent = [name for name, numbers in counts.items() if numbers[0] == 0]
    if absent:
        console.print(f"warning: no training row has {', '.join(map(repr, absent[:5]))}", highlight=False, markup=False)


def _examples(task: Task, rows: datasets.Dataset, num_classes: int) -> dict[int, str]:
    """Class id → the first row's text that has it."""
    examples: dict[int, str] = {}
    for label, text in zip(text_rows.cells(rows, LABEL), task.texts(rows), strict=True):
        for index in task.classes_in(label):
            examples.setdefault(index, _line(text))
        if len(examples) == num_classes:
            break
    return examples


def _line(text: object) -> str:
    """A text, or a pair of them, in one short line."""
    shown = " | ".join(text) if isinstance(text, tuple) else "a picture" if isinstance(text, bytes) else str(text)
    return " ".join(shown.split())[:80]
