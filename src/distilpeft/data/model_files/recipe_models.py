"""The models that a recipe names, and how they read its rows. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distilpeft.data.model_files.tokens import Unembedded, strings, unembedded
from distilpeft.data.sources import Source, resolve_model
from distilpeft.machine.files import digest_json
from distilpeft.recipe import Recipe

if TYPE_CHECKING:
    import datasets

BATCH_ROWS = 2_000  # in memory at a time
TEXT_COLUMNS = (
    "text", "pair", "words", "question", "context", "prompt", "completion", "messages", "source", "target",
)  # fmt: skip
"""Keys of `task` that name a column of texts."""


def teacher_of(recipe: Recipe) -> Source:
    """Where the teacher's base comes from."""
    source = resolve_model(recipe.teacher.model, "teacher.model", recipe.teacher.revision)
    return replace(source, trusted=recipe.teacher.trust_remote_code)


def student_of(recipe: Recipe) -> Source:
    """Where the student's weights, or its configuration, come from."""
    student = recipe.student
    if student.model is not None:
        return resolve_model(student.model, "student.model", student.revision)
    if student.from_config is not None:
        return resolve_model(student.from_config.model, "student.from_config.model", student.from_config.revision)
    return teacher_of(recipe)


@dataclass(frozen=True)
class Reading:
    """A model and the tokenizer that reads its rows.

    Attributes:
        key: the recipe key, for messages.
        tokenizer: whose tokenizer it is.
        model: the model.
        overrides: what the recipe changes in the model's configuration.
    """

    key: str
    tokenizer: Source
    model: Source
    overrides: Mapping[str, Any]


def readings(recipe: Recipe) -> list[Reading]:
    """The recipe's models with their tokenizers; a student made of its teacher reads as the teacher does."""
    teacher = teacher_of(recipe)
    models = [Reading("teacher.model", teacher, teacher, {})]
    student = recipe.student
    if not student.is_of_teacher:
        key = "student.model" if student.model is not None else "student.from_config.model"
        own = student_of(recipe)
        overrides = student.from_config.overrides if student.from_config else {}
        models.append(Reading(key, teacher if student.tokenizer == "teacher" else own, own, overrides))
    return models


def _without_embeddings(recipe: Recipe) -> list[Unembedded]:
    """Tokens without embeddings of all local models; of others the files may come while a run is at it."""
    if recipe.kind.reads_images:
        return []
    local = [
        reading
        for reading in readings(recipe)
        if reading.tokenizer.reader.path is not None and reading.model.path is not None
    ]
    missing = (unembedded(reading.tokenizer, reading.model, reading.overrides) for reading in local)
    return [tokens for tokens in missing if tokens is not None]


def token_faults(recipe: Recipe) -> Callable[[datasets.Dataset], Iterator[str | None]] | None:
    """A function that finds in each row a token without an embedding; None if all tokens have one."""
    missing = _without_embeddings(recipe)
    if not missing:
        return None
    # Language models write and cut rows by rules of their own; there every token counts.
    limit = None if recipe.kind.same_tokens else recipe.data.max_tokens

    def faults(rows: datasets.Dataset) -> Iterator[str | None]:
        for texts in texts_of(recipe, rows):
            yield next((fault for tokens in missing if (fault := tokens.fault(texts, limit))), None)

    return faults


def token_key(recipe: Recipe) -> dict[str, str]:
    """What the key of the rows also depends on where rows with such tokens are skipped; mostly nothing."""
    missing = _without_embeddings(recipe) if recipe.data.on_bad_row == "skip" else []
    if not missing:
        return {}
    return {"tokens": digest_json([[tokens.words.core.to_str(), tokens.rows] for tokens in missing])}


def texts_of(recipe: Recipe, rows: datasets.Dataset) -> Iterator[list[str]]:
    """All texts of each row that a tokenizer reads."""
    names = [getattr(recipe.task, key, None) for key in TEXT_COLUMNS]
    columns = [name for name in names if name is not None and name in rows.column_names]
    for batch in rows.select_columns(columns).iter(batch_size=BATCH_ROWS):
        for cells in zip(*(batch[column] for column in columns), strict=True):
            yield [text for cell in cells for text in strings(cell)]
