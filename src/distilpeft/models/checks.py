"""Checks of a pair before weights are loaded: tokenizers, words and lengths."""

from __future__ import annotations

import numpy as np

from distilpeft.data.vocabulary import Vocabulary, check_same
from distilpeft.errors import InputError
from distilpeft.models import loading
from distilpeft.models.pair import Pair
from distilpeft.tasks.rows import TaskData

OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


def check_tokenizers(pair: Pair) -> None:
    """Refuse a pair that reads token ids differently where it is taught or judged token by token; loads no weights.

    Raises:
        InputError: the first token, special token or place of the chat template that differs.
    """
    recipe = pair.recipe
    taken = recipe.student.tokenizer == "teacher"
    if not recipe.kind.same_tokens or (taken and recipe.student.from_config):
        return  # to random weights every id is as good as any other
    sources = (pair.teacher, pair.student)
    if sources[0] == sources[1]:
        return
    teacher, student = (Vocabulary.of_tokenizer(source.name, loading.load_tokenizer(source)) for source in sources)
    check_same(teacher, student, chat=recipe.needs_template, tokens_only=taken)


def check_words(pair: Pair, data: TaskData) -> None:
    """Refuse a pair that does not read the same words of every row, where words are taught; loads no weights.

    Raises:
        InputError: names the first row of which their tokenizers have room for different words.
    """
    if pair.recipe.kind.unit != "words" or pair.teacher == pair.student_tokenizer:
        return
    for split in ("train", "validation", "test"):
        theirs_N, ours_N = (
            data.tokens(split, reader).column("num_words") for reader in (pair.teacher_reader, pair.student_reader)
        )
        apart = np.flatnonzero(theirs_N != ours_N)
        if len(apart):
            row = int(apart[0])
            raise InputError(
                f"data.max_tokens: of row {row} of {split} the teacher reads {theirs_N[row]} words, the student "
                f"{ours_N[row]} ({len(apart)} such rows): their tokenizers need different numbers of tokens; raise "
                "max_tokens, or cut long rows"
            )


def check_lengths(pair: Pair) -> None:
    """Refuse benchmark lengths beyond what a model can read, before it is trained; loads no weights.

    Raises:
        InputError: names the length and the model.
    """
    recipe = pair.recipe
    asked = [length for length in recipe.benchmark.lengths if length != "data"]
    if not asked:
        return
    longest = max(asked) + (recipe.benchmark.new_tokens if recipe.kind.has_cache else 0)
    for source, config in zip((pair.teacher, pair.student), pair.configurations(), strict=True):
        most = getattr(config, "max_position_embeddings", None)
        # RoBERTa and its kin keep the positions up to the padding id for themselves
        reserved = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
        if most is not None and longest > most - reserved:
            raise InputError(
                f"benchmark.lengths: {longest} tokens (with new_tokens) are more than {source.name} reads, "
                f"{most - reserved}"
            )
