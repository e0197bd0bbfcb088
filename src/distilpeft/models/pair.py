"""The two models of a recipe before any weights: where they come from, and how they read rows.

Everything here is resolved once for a `Pair` and handed down with it: sources, the architecture that the task asks for,
tokenizers, and the digests that name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distilpeft.data.model_files.recipe_models import student_of, teacher_of
from distilpeft.data.sources import TOKENIZER_FILES, Source
from distilpeft.machine.files import digest_file, digest_json
from distilpeft.models import loading
from distilpeft.models.loading import Architecture
from distilpeft.recipe import Recipe
from distilpeft.tasks.language.causal_lm import CausalLMTask
from distilpeft.tasks.prompts.prompt import Shot, prompt_of
from distilpeft.tasks.prompts.reader import PromptReader
from distilpeft.tasks.rows import RowReader, task_of
from distilpeft.tasks.task import Batch, InputReader, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL, ADAPTER, HEADS = "model", "adapter", "heads.json"
READER_FILES = (
    *TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "preprocessor_config.json",
)  # fmt: skip
"""Files that decide how rows are read, as patterns."""


@dataclass(frozen=True)
class CutVocabulary:
    """The tokens that a student keeps of its tokenizer's.

    Attributes:
        reader: the tokenizer with these tokens only.
        before: the tokenizer with all tokens.
        kept_K: by a token's new id its id before, ascending.
    """

    reader: RowReader
    before: RowReader
    kept_K: NDArray[np.int64]

    def as_before(self, batch: Batch) -> Batch:
        """A batch that the student reads, with the ids that its inputs had before, which its teacher knows."""
        ids_BS = batch["inputs"]["input_ids"]
        kept_K = torch.from_numpy(self.kept_K).to(ids_BS.device)
        return {**batch, "inputs": {**batch["inputs"], "input_ids": kept_K[ids_BS]}}

    def of_logits(self, width: int) -> Tensor:
        """Columns of logits with this width, by the ids before, that are kept: those of the first new ids."""
        return torch.from_numpy(self.kept_K[self.kept_K < width])


@dataclass(frozen=True)
class Pair:
    """Teacher and student as a recipe names them.

    Attributes:
        recipe: the recipe.
        cut: the student's tokens, where the recipe cuts them to the data (see `models.context.pair_of`).
        shots: training rows before the prompts of a teacher that is asked by them.
    """

    recipe: Recipe
    cut: CutVocabulary | None = None
    shots: tuple[Shot, ...] = ()

    @cached_property
    def task(self) -> Task:
        """The recipe's task."""
        return task_of(self.recipe)

    @cached_property
    def architecture(self) -> Architecture:
        """What the task asks of a model."""
        task = self.task
        return Architecture(task.auto_class, task.peft_task, task.model_options(), train_heads=task.trains_heads)

    @cached_property
    def teacher_architecture(self) -> Architecture:
        """What the task asks of the teacher: a language model's own head, if it is asked by a prompt."""
        if self.recipe.teacher.prompt is None:
            return self.architecture
        return Architecture(CausalLMTask.auto_class, CausalLMTask.peft_task, {}, train_heads=CausalLMTask.trains_heads)

    @cached_property
    def teacher(self) -> Source:
        """Where the teacher's base comes from."""
        return teacher_of(self.recipe)

    @cached_property
    def student(self) -> Source:
        """Where the student's weights, or its configuration, come from."""
        return student_of(self.recipe)

    @property
    def student_tokenizer(self) -> Source:
        """Where the student's tokenizer comes from."""
        return self.teacher if self.recipe.student.tokenizer == "teacher" else self.student

    @property
    def student_overrides(self) -> Mapping[str, Any]:
        """What `student.from_config` changes in the student's configuration."""
        return self.recipe.student.from_config.overrides if self.recipe.student.from_config else {}

    @cached_property
    def teacher_reader(self) -> RowReader:
        """How the teacher reads rows."""
        tokenizer, digest = self.load_reader(self.teacher), tokenizer_digest(self.teacher)
        prompt = prompt_of(self.recipe, self.shots)
        if prompt is None:
            return RowReader(tokenizer, digest)
        return RowReader(PromptReader(tokenizer, prompt), digest_json([digest, prompt.digest]))

    @cached_property
    def student_reader(self) -> RowReader:
        """How the student reads rows."""
        if self.cut is not None:
            return self.cut.reader
        source = self.student_tokenizer
        return RowReader(self.load_reader(source), tokenizer_digest(source))

    def load_reader(self, source: Source) -> InputReader:
        """What makes inputs out of rows: a model's tokenizer, or how it reads pictures."""
        return loading.load_picture_reader(source) if self.recipe.kind.reads_images else loading.load_tokenizer(source)

    @cached_property
    def student_vocabulary(self) -> int | None:
        """Ids of the student's output; None if its configuration does not say."""
        rows = self.student_rows
        return rows if rows is None or self.cut is None else int((self.cut.kept_K < rows).sum())

    @cached_property
    def student_rows(self) -> int | None:
        """Rows of the student's embeddings as it comes; None if its configuration does not say."""
        config = loading.configuration(self.student, self.architecture, self.student_overrides)
        size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
        return None if size is None else int(size)

    def configurations(self) -> tuple[Any, Any]:
        """The configurations of teacher and student, for the task."""
        return (
            loading.configuration(self.teacher, self.teacher_architecture, {}),
            loading.configuration(self.student, self.architecture, self.student_overrides),
        )


@dataclass(frozen=True)
class Loaded:
    """A frozen model ready to predict, and how it reads rows."""

    model: PreTrainedModel
    reader: RowReader

    @property
    def tokenizer(self) -> InputReader:
        """What its rows are read by."""
        return self.reader.tokenizer


def tokenizer_digest(source: Source) -> str:
    """Names a tokenizer: by the content of its files, or by hub id and revision."""
    source = source.reader
    if source.path is None:
        return digest_json([source.name, source.revision])
    if source.path.is_file():
        return digest_file(source.path)
    files = {file for name in READER_FILES for file in source.path.glob(name)}
    return digest_json({file.name: digest_file(file) for file in files})
