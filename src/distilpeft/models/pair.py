"""The two models of a recipe: load the tuned teacher in each of its forms, build, save and reload the student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from distilpeft.data.sources import Source, resolve
from distilpeft.machine.files import digest_file, digest_json
from distilpeft.models import loading
from distilpeft.models.loading import Architecture
from distilpeft.recipe import Recipe
from distilpeft.tasks.rows import task_of

MODEL, ADAPTER, HEADS = "model", "adapter", "heads.json"


@dataclass(frozen=True)
class Loaded:
    """A frozen model ready to predict, with the tokenizer that its rows need and the digest that names it."""

    model: Any
    tokenizer: Any
    tokenizer_digest: str


def architecture(recipe: Recipe) -> Architecture:
    """What the recipe's task asks of a model."""
    task = task_of(recipe)
    return Architecture(task.auto_class, task.peft_task, task.model_options(), train_heads=task.trains_heads)


def teacher_source(recipe: Recipe) -> Source:
    """Where the teacher's base comes from."""
    found = resolve(recipe.teacher.model, "teacher.model", recipe.teacher.revision)
    return replace(found, trusted=recipe.teacher.trust_remote_code)


def student_source(recipe: Recipe) -> Source:
    """Where the student's weights (or configuration) and its tokenizer come from."""
    student = recipe.student
    if student.model is not None:
        return resolve(student.model, "student.model", student.revision)
    if student.from_config is not None:
        return resolve(student.from_config.model, "student.from_config.model", student.from_config.revision)
    return teacher_source(recipe)


def tokenizer_source(recipe: Recipe) -> Source:
    """Where the student's tokenizer comes from."""
    return teacher_source(recipe) if recipe.student.tokenizer == "teacher" else student_source(recipe)


def load_reader(recipe: Recipe, source: Source) -> Any:
    """What makes inputs out of rows: the model's tokenizer, or how it reads pictures."""
    return loading.load_picture_reader(source) if recipe.kind.images else loading.load_tokenizer(source)


def tokenizer_digest(source: Source) -> str:
    """Names a tokenizer: by the content of its files, or by hub id and revision."""
    if source.path is None:
        return digest_json([source.name, source.revision])
    if source.path.is_file():
        return digest_file(source.path)
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "preprocessor_config.json",
    )
    files = [source.path / name for name in names]
    return digest_json({file.name: digest_file(file) for file in files if file.is_file()})
