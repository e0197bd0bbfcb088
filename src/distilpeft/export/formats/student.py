"""What writers of exported files get."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distilpeft.data.vocabulary import TYPES
from distilpeft.recipe import Recipe
from distilpeft.tasks.text_rows import WHOLE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Student:
    """The model to export.

    Attributes:
        recipe: whose student it is.
        folder: its float32 files.
        auto_class: of transformers, that loads them.
        tokenizer: its tokenizer.
        heads: modules that are never quantized.
    """

    recipe: Recipe
    folder: Path
    auto_class: Any
    tokenizer: PreTrainedTokenizerBase
    heads: tuple[str, ...]

    @property
    def typed(self) -> bool:
        """Whether it reads pairs of texts, and tells them apart by token_type_ids."""
        return is_typed(self.recipe, self.tokenizer)

    @property
    def pooling(self) -> str | None:
        """How its hidden states become a text's vector, of a model of vectors."""
        if self.recipe.student.static is not None and not self.recipe.kind.has_labels:
            return WHOLE
        return getattr(self.recipe.task, "pooling", None)

    def load(self) -> Any:
        """The float32 model, new: a writer may change what it gets."""
        return self.auto_class.from_pretrained(str(self.folder), dtype=torch.float32).requires_grad_(False).eval()


def is_typed(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a student of pairs tells them apart by token_type_ids; static ones look at separators instead."""
    return recipe.reads_pairs and recipe.student.static is None and TYPES in tokenizer.model_input_names
