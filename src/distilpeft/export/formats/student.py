"""What writers of exported files get."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distilpeft.data.vocabulary import TYPES
from distilpeft.recipe import Recipe

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
        return self.recipe.reads_pairs and TYPES in self.tokenizer.model_input_names

    def load(self) -> Any:
        """The float32 model, new: a writer may change what it gets."""
        return self.auto_class.from_pretrained(str(self.folder), dtype=torch.float32).requires_grad_(False).eval()
