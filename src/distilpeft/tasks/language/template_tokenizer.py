"""The tokenizer whose template renders chats, before any model is loaded or converted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distilpeft.data.model_files.gguf import gguf_template
from distilpeft.data.model_files.recipe_models import teacher_of
from distilpeft.data.sources import is_gguf, model_folder
from distilpeft.errors import InputError
from distilpeft.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_tokenizer(recipe: Recipe, *, download: bool) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer, or for a GGUF file that is not converted yet one with its template alone.

    Args:
        recipe: the recipe.
        download: as in a run, which may also use code that comes with the tokenizer if the recipe allows it.

    Returns:
        None if it is not on this machine, or needs code of its own, and this is no run.

    Raises:
        InputError: it cannot be loaded.
    """
    source = teacher_of(recipe)
    folder = model_folder(source)
    if folder is None and source.path is not None and is_gguf(source):
        return _bare(source.path, source.name)
    if folder is None and not download:
        return None
    import transformers

    where = source.location if folder is None else str(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            where, revision=source.revision, trust_remote_code=download and recipe.teacher.trust_remote_code
        )
    except Exception as error:
        if not download and recipe.teacher.trust_remote_code:
            return None
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"teacher.model: the tokenizer of {source.name} cannot be loaded: {reason}") from None
    tokenizer.name_or_path = source.name  # in messages
    return tokenizer


def _bare(path: Path, name: str) -> PreTrainedTokenizerBase | None:
    """A tokenizer that knows a GGUF file's template and special tokens, and no other token; None without a header.

    Converting the file takes half a minute: too long for `check`, and for finding a bad row.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    template = gguf_template(path)
    if template is None:
        return None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({})), **template.named)
    tokenizer.add_tokens(list(template.control), special_tokens=True)
    tokenizer.chat_template = template.text
    tokenizer.name_or_path = name
    return tokenizer


def why_absent(recipe: Recipe) -> str:
    """Why `check` does not use the tokenizer whose template renders chats."""
    source = teacher_of(recipe)
    if is_gguf(source) and model_folder(source) is None:
        return "is inside a GGUF file whose header cannot be read"
    return "needs code of its own" if model_folder(source) is not None else "is not on this machine yet"
