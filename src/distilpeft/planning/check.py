"""What a run will need, estimated before any weight is read: rows, steps, parameters, memory and disk.

Parameters come from safetensors headers, or from published configurations of hub models (`known.json`); rows from the
data; memory is arithmetic on them, see `memory`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
from distilpeft.machine.files import size_text
from distilpeft.machine.host import gpu_memories, memory_bytes
from distilpeft.machine.host import num_processes as processes_of
from distilpeft.planning.memory import MARGIN, Machine, MemoryModel, Placement, best, settings, variants
from distilpeft.planning.models import check_texts, model_lines
from distilpeft.planning.plan import Plan
from distilpeft.planning.roles import ARMS, CE_ONLY, step_name
from distilpeft.planning.sizes import (
    Size,
    lora_weights,
    own_ways,
    student_load,
    student_size,
    targets_load,
    teacher_load,
    teacher_size,
)
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import CausalLM, QuestionAnswering
from distilpeft.recipe.training import Fit
from distilpeft.tasks import text_rows
from distilpeft.tasks.checked_rows import UNLABELLED, VIEWS
from distilpeft.tasks.rows import class_counts, read_task_rows, task_of
from distilpeft.tasks.task import Task

MOST_CLASSES = 30
TAUGHT_MORE = {UNLABELLED: "rows without a label", VIEWS: "changed copies"}
"""What the student learns from besides the rows with a label: split, and what its rows are called."""
LONGEST_CLASS = 24
"""Characters of a class's name that are shown."""


def machine_here(recipe: Recipe) -> Machine:
    """What this machine gives a run."""
    gpus = gpu_memories() if recipe.devices != "cpu" else []
    if gpus:
        count = len(gpus) if recipe.devices == "auto" else min(int(recipe.devices), len(gpus))
        return Machine(count, min(gpus[:count]))
    count = processes_of(recipe.devices)
    return Machine(count, memory_bytes() / count, "CPU")


def show_memory(recipe: Recipe, machine: Machine, console: Console) -> None:
    """Print the memory of each device for every choice, and the fastest that fits."""
    teacher, student = teacher_size(recipe), student_size(recipe)
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
    return [f"  {choice}{' *' if way == own else ''}", *map(_bytes, cells), "yes" if fits else "no"]


def _advice(stage: str, load: MemoryModel, own: Placement, machine: Machine, places: tuple[str, ...]) -> str:
    way = best(own, load, machine, places=places)
    if way is None:
        return (
            f"{stage}: nothing fits on {machine}; take a smaller model, shorter rows (data.max_tokens), LoRA or larger "
            "devices"
        )
    changed = settings(own, way, stage)
    total = _bytes(load.total(way, machine))
    if not changed:
        return f"{stage}: as the recipe says, {total} on each device"
    return f"{stage}: {total} on each device with " + " ".join(f"--set {one}" for one in changed)


def show(plan: Plan, console: Console, machines: Sequence[Machine] = (), *, full: bool = False) -> None:
    """Print a line per stage: done or not, and what it needs; then memory on each machine.

    Args:
        plan: the run.
        console: where.
        machines: what to plan memory for; this machine if there are none.
        full: also print the recipe with all defaults, last.

    Raises:
        InputError: the data cannot be used.
    """
    splits = count_rows(plan.recipe, console)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("stage", "done", "rows", "steps", "weights (trained)", "memory", "disk"):
        table.add_column(column, justify="left" if column in ("stage", "done") else "right", no_wrap=True)
    for row in stage_rows(plan, splits):
        table.add_row(*row)
    console.print(table)
    for machine in machines or [machine_here(plan.recipe)]:
        show_memory(plan.recipe, machine, console)
    console.print(
        "* = the recipe's own choice. model: weights, gradients, optimizer; activ.: kept for the backward pass. "
        "Sums count 0.6 GB for a GPU's context; a plan fills at most 90 % of a device.\n",
        highlight=False,
    )
    for line in cautions(plan.recipe):
        console.print(line, highlight=False, soft_wrap=True)
    if full:
        resolved = plan.recipe.model_dump(mode="json", exclude_none=True)
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).strip()
        console.print(text, highlight=False, markup=False)
    every = len(plan.steps())
    done = every - len(plan.missing())
    checked = "the recipe and its data are good" if splits else "the recipe is good (a run reads or cuts the rows)"
    console.print(
        f"distilpeft {__version__}: {checked}; {done} of {every} steps are done. "
        f"Results: {plan.folder}. Memory and disk are estimates; ? = not on this machine yet.",
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


def read_rows(recipe: Recipe, console: Console, *, download: bool = True) -> dict[str, datasets.Dataset]:
    """Read and check all rows, and the tokenizers on them; print what was skipped. Returns the rows of each split."""
    read = read_task_rows(recipe, download=download)
    for line in [*read.remarks(), *check_texts(recipe, read.splits)]:
        console.print(line, highlight=False, soft_wrap=True)
    return read.splits


def count_rows(recipe: Recipe, console: Console) -> dict[str, int] | None:
    """Rows of each split, checked; None for a data set on the hub, which only a run may download."""
    sections = [recipe.data, *([] if recipe.data.unlabelled is None else [recipe.data.unlabelled])]
    if any(source.path is None for section in sections for source in data_sources(section).values()):
        return None
    read = read_rows(recipe, console, download=False)
    _show_classes(recipe, read, console)
    splits = {name: len(rows) for name, rows in read.items()}
    if UNLABELLED in splits or VIEWS in splits:
        more = [f"{splits[name]} {what}" for name, what in TAUGHT_MORE.items() if name in splits]
        console.print(
            f"{splits['train']} training rows have a label: the teacher is tuned on them. It then labels "
            f"{' and '.join(more)}, and the student learns from all of them.", highlight=False,
        )  # fmt: skip
    # Documents and packed rows become another number of rows, which takes a tokenizer to find out.
    reshaped = isinstance(recipe.task, CausalLM) and (recipe.task.pack or recipe.task.text is not None)
    return None if reshaped else splits


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


def stage_rows(plan: Plan, splits: Mapping[str, int] | None) -> list[tuple[str, ...]]:
    """The table of `check`, cell by cell: a row per stage, and one per student to be trained."""
    recipe = plan.recipe
    teacher, student = teacher_size(recipe), student_size(recipe)
    train = splits["train"] if splits else None
    taught = train if splits is None or train is None else train + sum(splits.get(name, 0) for name in TAUGHT_MORE)
    students = {("distil", role): _student_needs(recipe, student, role, train, taught) for role in ARMS}
    scored = splits[recipe.evaluate.split] if splits else None
    # Bytes kept per row: all logits of a class; for tokens six sums, and never their logits.
    per_row = 24 if recipe.kind.is_language_model else 4 * _outputs(recipe)
    exported = sum(student.total * _export_bytes(recipe, form) for form in recipe.export.formats) if student else None
    needs = {
        ("teacher", ""): _teacher_needs(recipe, teacher, train),
        ("targets", ""): _targets_needs(recipe, teacher, taught),
        **students,
        ("lead", ""): (_known(splits["validation"] if splits else None), "-", "-", "-", "-"),
        ("audit", ""): ("-", "-", _count(student), "-", "-"),
        ("evaluate", ""): (_known(scored), "-", "-", "-", _bytes(scored and len(plan.roles()) * scored * per_row)),
        ("export", ""): (str(recipe.export.gate_rows), "-", _count(student), "-", _bytes(exported)),
        ("compare", ""): ("-", "-", "-", "-", "-"),
        ("benchmark", ""): ("-", str(recipe.benchmark.rounds), "-", "-", "-"),
        ("bundle", ""): ("-", "-", "-", "-", "-"),
    }
    rows = []
    for (stage, role), cells in needs.items():
        done = [step.artifact.done for step in plan.own if step.stage == stage and role in ("", step.role)]
        if done:
            rows.append((step_name(stage, role), f"{sum(done)}/{len(done)}", *cells))
    return rows


def _outputs(recipe: Recipe) -> int:
    """Numbers that a classifier says of a row; of words at most."""
    task, longest = recipe.task, recipe.data.max_tokens
    if isinstance(task, QuestionAnswering):
        return 2 * longest
    return (longest if recipe.kind.unit == "words" else 1) * len(getattr(task, "labels", ("a number",)))


def _target_bytes(recipe: Recipe, vocabulary: int) -> float:
    """Bytes of a row's soft targets; of tokens at most."""
    if not recipe.kind.is_language_model:
        return 4.0 * _outputs(recipe)
    targets, form = recipe.targets, recipe.targets.format
    if form == "full":
        return recipe.data.max_tokens * vocabulary * (targets.value_bits or 32) / 8
    count = targets.k if form == "top_k" else targets.draws
    return recipe.data.max_tokens * (8 + count * (vocabulary.bit_length() + 6 + (targets.value_bits or 12)) / 8)


def _export_bytes(recipe: Recipe, form: str) -> float:
    """Bytes per weight of an export."""
    return {"exact": 4.0, "half": 2.0, "int8": 1.06, "int4": 0.6}[recipe.exactness(form)]


def _teacher_needs(recipe: Recipe, size: Size | None, rows: int | None) -> tuple[str, ...]:
    teacher = recipe.teacher
    if teacher.fit is None:
        return (_known(rows), "-", _count(size), "-", "-")
    steps = _steps(rows, teacher.fit)
    if size is None:
        return (_known(rows), steps, "?", "?", "?")
    trained = lora_weights(size, teacher.lora) if teacher.lora else size.total
    machine = machine_here(recipe)
    memory = teacher_load(recipe, size, machine.kind).total(own_ways(recipe)[0], machine)
    return (_known(rows), steps, _count(size, trained), _bytes(memory), _bytes(trained * 4))


def _targets_needs(recipe: Recipe, size: Size | None, rows: int | None) -> tuple[str, ...]:
    if size is None:
        return (_known(rows), "-", "?", "?", "?")
    machine = machine_here(recipe)
    memory = targets_load(recipe, size, machine).total(own_ways(recipe)[1], machine)
    kept = None if rows is None else rows * _target_bytes(recipe, size.shape.vocabulary)
    return (_known(rows), "-", _count(size), _bytes(memory), _bytes(kept))


def _student_needs(
    recipe: Recipe, size: Size | None, role: str, train: int | None, taught: int | None
) -> tuple[str, ...]:
    """What a student needs that learns from these rows: with a label, or all."""
    fit, arm = recipe.distil.ce_only_fit if role == CE_ONLY else recipe.distil.fit, ARMS[role]
    rows = taught if arm.unlabelled else train
    steps = _steps(taught if arm.equal_steps else rows, fit)
    if size is None:
        return (_known(rows), steps, "?", "?", "?")
    lora = recipe.student.lora
    trained = lora_weights(size, lora) if lora else size.total
    machine, way = machine_here(recipe), own_ways(recipe)[-1]
    teacher = teacher_size(recipe)
    memory = student_load(recipe, size, teacher, machine.kind).total(way, machine)
    return (_known(rows), steps, _count(size, trained), _bytes(memory), _bytes(size.total * 4))


def _steps(rows: int | None, fit: Fit) -> str:
    if rows is None:
        return _known(fit.max_steps)
    steps = fit.epochs * math.ceil(rows / fit.batch_size)
    return str(min(steps, fit.max_steps) if fit.max_steps else steps)


def _known(count: int | None) -> str:
    return "?" if count is None else str(count)


def _count(size: Size | None, trained: int | None = None) -> str:
    if size is None:
        return "?"
    return f"{size.total / 1e6:.1f}M" + (f" ({trained / 1e6:.2f}M)" if trained is not None else "")


def _bytes(count: float | None) -> str:
    if count is None:
        return "?"
    return size_text(count) if count else "-"
