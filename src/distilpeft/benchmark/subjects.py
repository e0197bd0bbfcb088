"""Which models a run times, on which rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distilpeft.benchmark import measure
from distilpeft.benchmark.model_process import write_words
from distilpeft.export.formats.student import is_typed
from distilpeft.export.runtimes import PIXELS
from distilpeft.models.pair import MODEL, Pair
from distilpeft.planning.roles import TEACHERS, format_of
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import Embedding, Texts
from distilpeft.tasks.rows import RowReader, TaskData

MOST_ROWS, MOST_PICTURES = 512, 64
TWINS = {"student_ce_only": "student"}


def wanted(recipe: Recipe, device: str) -> measure.Settings:
    """What the recipe's `benchmark` section asks for; `device` is what `auto` means here."""
    settings = recipe.benchmark
    return measure.Settings(
        batch_sizes=sorted(settings.batch_sizes), lengths=settings.lengths,
        devices=list(dict.fromkeys(device if name == "auto" else name for name in settings.devices)),
        threads=measure.threads_of(settings.threads), rounds=settings.rounds, precision=settings.precision,
        new_tokens=settings.new_tokens, compiled=settings.compile, language=recipe.kind.is_language_model,
    )  # fmt: skip


def subjects(pair: Pair, data: TaskData, folders: Mapping[str, Path], scratch: Path) -> list[measure.Subject]:
    """The run's models as what is timed, with rows for each of its tokenizers in `scratch`."""
    recipe = pair.recipe
    plain = recipe.model_dump(mode="json", exclude_unset=True)
    files: dict[str, Path] = {}
    models = []
    for role, folder in folders.items():
        taught = role in TEACHERS
        reader = pair.teacher_reader if taught else pair.student_reader
        if reader.digest not in files:
            files[reader.digest] = scratch / f"{recipe.name}-{reader.digest[:16]}.npz"
            _write_rows(recipe, data, reader, files[reader.digest])
        content = None if format_of(role) is not None else plain
        where = folder if taught else folder / MODEL
        models.append(measure.Subject(role, where, content, files[reader.digest], TWINS.get(role)))
    return models


def _write_rows(recipe: Recipe, data: TaskData, reader: RowReader, file: Path) -> None:
    """Some rows of the evaluation split as one model's token ids, with their texts; the same rows for every model."""
    split = data.tokens(recipe.evaluate.split, reader)
    rows = split.dataset
    picks = np.random.default_rng(0).permutation(len(rows))[:MOST_ROWS]
    if recipe.kind.reads_images:
        batch = split.load_batch(picks[:MOST_PICTURES])
        np.savez(file, **{PIXELS: batch["inputs"][PIXELS].numpy()})  # type: ignore[arg-type]
        return
    pieces = []
    for row in rows.select(picks.tolist()):
        ends = np.cumsum(row["segments"])[:-1].tolist() if "segments" in row else []  # of texts packed into a row
        pieces += np.split(np.asarray(row["input_ids"], np.int64), ends)
    save_rows(file, pieces, reader.tokenizer.pad_token_id)
    core = getattr(reader.tokenizer, "backend_tokenizer", None)
    if isinstance(recipe.task, Texts | Embedding) and core is not None and all(map(len, pieces)):
        texts = [text for text in data.texts_of(recipe.evaluate.split, picks) if isinstance(text, str | tuple)]
        typed = is_typed(recipe, reader.tokenizer)
        write_words(file, texts, core.to_str(), recipe.data.max_tokens, typed=typed)


def save_rows(file: Path, rows: Sequence[NDArray[np.int64]], pad: int | None) -> None:
    """Write what `timed.Rows` reads; a model without a padding token gets 0, behind the mask."""
    nonempty = [ids for ids in rows if len(ids)]
    np.savez(file, ids=np.concatenate(nonempty), ends=np.cumsum([len(ids) for ids in nonempty]), pad=np.int64(pad or 0))
