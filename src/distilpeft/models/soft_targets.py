"""Soft targets of a recipe: what they are bound to, and how a store is opened for the student's rows."""

from __future__ import annotations

from pathlib import Path

from distilpeft.data.pictures import Reader
from distilpeft.distillation.store import SoftTargets, ids_fault, row_hashes
from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import digest_json
from distilpeft.models.pair import Pair
from distilpeft.recipe.recipe import result_settings
from distilpeft.tasks.prompts.reader import PromptReader
from distilpeft.tasks.rows import TAUGHT, TaskData
from distilpeft.tasks.task import InputReader


def binding(pair: Pair, teacher: Artifact) -> dict[str, str]:
    """Everything that soft targets depend on besides the rows: the teacher's own files, and how it reads text."""
    recipe, files = pair.recipe, teacher.manifest()["files"]
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return {
        "teacher": teacher.key,
        "base": f"{recipe.teacher.model} ({str(teacher.inputs.get('base'))[:12]})",
        "adapter": digest_json(weights)[:12],
        "quantize": recipe.teacher.quantize,
        "task": digest_json([result_settings(recipe.task), recipe.data.max_tokens])[:12],
        **text_binding(pair.teacher_reader.tokenizer),
        **({"ids": pair.cut.reader.digest[:12]} if pair.cut is not None and recipe.kind.is_language_model else {}),
    }


def open_targets(pair: Pair, data: TaskData, folder: Path, teacher: Artifact | None) -> SoftTargets:
    """A store of soft targets for the recipe's training rows.

    Args:
        pair: the models.
        data: the rows.
        folder: the store.
        teacher: whose targets they must be; None for a store that was made elsewhere (`targets.source`).

    Raises:
        InputError: they belong to another teacher, to other tokens, or to a student of other ids; both sides are named.
    """
    store = SoftTargets(folder)
    student_ids = pair.student_vocabulary if pair.recipe.kind.is_language_model else None
    fault = ids_fault(store.store, student_ids) if student_ids is not None else None
    if fault is not None:
        way = "import or make them again for this student" if teacher is None else "delete this folder, and run again"
        raise InputError(f"{folder}: {fault}; {way}")
    if teacher is not None:
        expected = binding(pair, teacher)
    else:
        bound = store.store["bound"]
        expected = {name: value for name, value in text_binding(pair.teacher_reader.tokenizer).items() if name in bound}
        if not pair.recipe.needs_template:
            expected.pop("chat_template", None)
    # Tokens are looked up for the student's own reading of the rows, classes for the teacher's.
    ours = pair.student_reader if pair.cut is None else pair.cut.before  # rows keep their tokens, by other ids
    rows = data.tokens(TAUGHT, ours if pair.recipe.kind.same_tokens else pair.teacher_reader)
    store.check(expected, row_hashes(rows.dataset))
    return store


def text_binding(tokenizer: InputReader) -> dict[str, str]:
    """How text becomes ids: the token → id map, chat template and prompt; or how pictures are read."""
    if isinstance(tokenizer, Reader):
        return {"pictures": digest_json(dict(tokenizer.settings))[:12]}
    tokens = digest_json(tokenizer.get_vocab())
    template = tokenizer.chat_template
    asked = {"prompt": tokenizer.prompt.digest[:12]} if isinstance(tokenizer, PromptReader) else {}
    return {"vocabulary": tokens[:12], "chat_template": digest_json(template)[:12] if template else "none", **asked}
