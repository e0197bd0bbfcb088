"""What will happen, first of all: the run in a sentence, the table of its stages, and where its models come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from distilpeft.data.model_files.recipe_models import student_of, teacher_of
from distilpeft.data.reading import data_sources
from distilpeft.data.sources import Source, is_gguf, model_folder
from distilpeft.planning.choose_models import licence_of
from distilpeft.planning.forecast.duration import legend, place, spoken
from distilpeft.planning.forecast.lengths import Lengths
from distilpeft.planning.forecast.stages import Stage, in_bytes, machine_here, stages
from distilpeft.planning.forecast.vocabulary import Kept
from distilpeft.planning.plan import Plan
from distilpeft.planning.sizes import Size, lora_weights, size_of, student_size, teacher_size
from distilpeft.recipe import Recipe

HALF = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "smollm3")
"""Types of models that are published in two bytes a weight; others mostly in four."""
COLUMNS = ("stage", "done", "rows", "steps", "time", "memory", "disk")


def show_overview(
    plan: Plan, splits: Mapping[str, int] | None, rows: Lengths, console: Console, kept: Kept | None = None
) -> None:
    """Print what a run will do, what it takes, and what it downloads; `kept`: tokens of the student's vocabulary."""
    listed = stages(plan, splits, rows.mean)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("stage", "done") else "right", no_wrap=True)
    for row in listed:
        table.add_row(*row.cells())
    console.print(_summary(plan, listed), highlight=False, soft_wrap=True, markup=False)
    console.print(table)
    rough = any(row.duration is not None and row.duration.seconds and not row.duration.is_measured for row in listed)
    lines = [*_seeds(plan), *_models(plan.recipe, kept), *rows.lines]
    lines += [legend(machine_here(plan.recipe))] if rough else []
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _summary(plan: Plan, listed: Sequence[Stage]) -> str:
    """The run in a sentence."""
    every, missing = len(plan.steps()), len(plan.missing())
    name = f"{plan.recipe.name}: {every - missing} of {every} steps are done"
    if not missing:
        return f"{name}; nothing is left to do."
    remaining = [row for row in listed if not row.is_done]
    times = [row.duration for row in remaining]
    seconds = [time.seconds for time in times if time is not None]
    time = f"about {spoken(sum(seconds))}" if len(seconds) == len(times) else "an unknown time"
    memory, disk = _total((row.memory for row in remaining), max), _total((row.disk for row in remaining), sum)
    fetched = [size for _, size in downloads(plan.recipe)]
    network = f"downloads {_total(fetched, sum).replace('-', 'nothing')}"
    where = place(machine_here(plan.recipe))
    return f"{name}; the rest takes {time} on {where}, {memory} of memory and {disk} of disk, and {network}."


def _total(counts: Iterable[float | None], of: Callable[[list[float]], float]) -> str:
    numbers = list(counts)
    values = [count for count in numbers if count is not None]
    return in_bytes(of(values) if values else 0) if len(values) == len(numbers) else "?"


def downloads(recipe: Recipe) -> list[tuple[Source, float | None]]:
    """What a run fetches from the hub, and bytes, about; None where the size is not known here."""
    models = dict.fromkeys(model.base for model in (teacher_of(recipe), student_of(recipe)))
    sizes: list[tuple[Source, float | None]] = [
        (model, _bytes(size_of(model))) for model in models if _is_fetched(model)
    ]
    sections = [recipe.data, *([] if recipe.data.unlabelled is None else [recipe.data.unlabelled])]
    rows = {source for section in sections for source in data_sources(section).values()}
    return [*sizes, *((source, None) for source in rows if source.path is None)]


def _is_fetched(source: Source) -> bool:
    return source.path is None and model_folder(source) is None


def _bytes(size: Size | None) -> float | None:
    """Bytes of a model's files on the hub, about."""
    return None if size is None else float(size.total * (2 if size.config.get("model_type") in HALF else 4))


def _seeds(plan: Plan) -> list[str]:
    """What is repeated with further seeds."""
    if not plan.repeats:
        return []
    seeds = ", ".join(str(seed) for seed in (plan.recipe.seed, *plan.repeats))
    return [f"evaluate.seeds: done, time and disk are those of seeds {seeds} together; rows and steps those of each."]


def _models(recipe: Recipe, kept: Kept | None) -> list[str]:
    """Teacher and student: weights, licence, and where they are; what is kept of the student's vocabulary."""
    teacher, student = teacher_size(recipe), student_size(recipe, None if kept is None else kept.count)
    lora = recipe.teacher.lora if recipe.teacher.fit is not None else None
    tuned = "" if lora is None or teacher is None else f", {_millions(lora_weights(teacher, lora))} tuned (LoRA)"
    lines = [f"teacher: {recipe.teacher.model}, {_weights(teacher)}{tuned}, {origin(teacher_of(recipe))}"]
    if recipe.student.model is not None:
        lines.append(f"student: {recipe.student.model}, {_weights(student)}, {origin(student_of(recipe))}")
    else:
        static = recipe.student.static
        start = "layers of the teacher" if recipe.student.from_teacher is not None else "random weights"
        lines.append(f"student: {start if static is None else static}, {_weights(student)}")
    return lines if recipe.student.vocabulary is None else [*lines, _vocabulary(kept, student_size(recipe), student)]


def _vocabulary(kept: Kept | None, whole: Size | None, cut: Size | None) -> str:
    """What is kept of the student's vocabulary, and what that saves."""
    key = "student.vocabulary"
    if kept is None:
        return f"{key}: counted in a run; the rows or the tokenizer's file are not here"
    saved = "" if whole is None or cut is None else f", {in_bytes(4 * (whole.total - cut.total))} less in float32"
    return f"{key}: keeps about {kept.count:,} of {kept.of:,} tokens{saved} (counted in {kept.rows:,} rows)"


def _weights(size: Size | None) -> str:
    return "an unknown number of weights" if size is None else f"{_millions(size.total)} weights"


def _millions(count: int) -> str:
    millions = count / 1e6
    return f"{millions:.2f} million" if millions < 10 else f"{millions:.0f} million"


def origin(source: Source) -> str:
    """Licence, and where a model is."""
    licence = licence_of(source)
    terms = "no licence named" if licence is None else licence
    size = size_of(source)
    if _is_fetched(source):
        return f"{terms}, to be downloaded" + ("" if size is None else f" (about {in_bytes(_bytes(size))})")
    if is_gguf(source) and model_folder(source) is None:
        note = "" if size is None else f" ({in_bytes(size.total * 4)})"
        return f"{terms}, on this machine; a run converts the GGUF file once{note}"
    return f"{terms}, on this machine"
