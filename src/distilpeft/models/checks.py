"""Checks of a pair before weights are loaded, by its tokenizers as transformers loads them."""

from __future__ import annotations

import numpy as np

from distilpeft.data.model_files.positions import reach_of
from distilpeft.data.model_files.recipe_models import Reading, readings, texts_of
from distilpeft.data.model_files.tokens import (
    SAMPLED_LETTERS,
    SAMPLED_TEXTS,
    Words,
    embedding_rows,
    refuse_unreadable,
    share_of,
    without_row,
)
from distilpeft.data.vocabulary import Vocabulary, check_same
from distilpeft.errors import InputError
from distilpeft.models import loading
from distilpeft.models.pair import Pair
from distilpeft.tasks.prompts.reader import PromptReader
from distilpeft.tasks.rows import TAUGHT, RowReader, TaskData


def check_tokenizers(pair: Pair) -> None:
    """Refuse a pair that reads token ids differently where it is taught or judged token by token; loads no weights.

    Raises:
        InputError: the first token, special token or place of the chat template that differs.
    """
    recipe = pair.recipe
    same_tokenizer = recipe.student.tokenizer == "teacher"
    if not recipe.kind.same_tokens or (same_tokenizer and recipe.student.from_config):
        return  # to random weights every id is as good as any other
    sources = (pair.teacher, pair.student)
    if sources[0] == sources[1]:
        return
    teacher, student = (Vocabulary.of_tokenizer(source.name, loading.load_tokenizer(source)) for source in sources)
    check_same(teacher, student, chat=recipe.needs_template, tokens_only=same_tokenizer)


def check_readers(pair: Pair, data: TaskData) -> list[str]:
    """Refuse a tokenizer that does not know the texts, or that gives ids for which its model has no embedding.

    The same is found before transformers is imported where a tokenizer.json is at hand; here are all others, and what
    chat templates and special tokens add to rows. Loads no weights.

    Returns:
        Cautions about tokenizers that do not know all of the texts.

    Raises:
        InputError: names the tokenizer; or the token, the row and both sizes.
    """
    recipe = pair.recipe
    if recipe.kind.reads_images:
        return []
    lines = []
    for reading, reader in zip(readings(recipe), (pair.teacher_reader, pair.student_reader), strict=False):
        lines.append(_unknown(data, reading, reader))
        _check_ids(data, reading, reader)
    return [line for line in lines if line is not None]


def _unknown(data: TaskData, reading: Reading, reader: RowReader) -> str | None:
    """See `refuse_unreadable`; only of tokenizers without a tokenizer.json."""
    tokenizer = reader.tokenizer
    if Words.of(reading.tokenizer) is not None or not tokenizer.is_fast:
        return None
    rows = data.first_rows("train", SAMPLED_TEXTS)
    texts = [text[:SAMPLED_LETTERS] for row in texts_of(data.recipe, rows) for text in row]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    encodings = zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
    return refuse_unreadable(share_of(encodings, tokenizer.unk_token_id), reading.tokenizer, reading.key, len(rows))


def _check_ids(data: TaskData, reading: Reading, reader: RowReader) -> None:
    """Look for ids without an embedding in the encoded rows, if the tokenizer has any."""
    rows, tokenizer = embedding_rows(reading.model, reading.overrides), reader.tokenizer
    size = 1 + max(tokenizer.get_vocab().values(), default=0)
    if rows is None or size <= rows:
        return
    pad = tokenizer.pad_token_id
    if pad is not None and pad >= rows:
        what = without_row(reading.model.title, tokenizer.pad_token, pad, size, rows)
        raise InputError(f"{reading.key}: its pad_token is {what}; or give it another pad_token")
    for split in ("train", "validation", "test"):
        encoded = data.tokens(split, reader).dataset
        for column in ("input_ids", "target_ids"):
            for number, ids in enumerate(encoded[column] if column in encoded.column_names else ()):
                token = max(ids, default=0)
                if token >= rows:
                    name = str(tokenizer.convert_ids_to_tokens(token))
                    what = without_row(reading.model.title, name, token, size, rows)
                    raise InputError(f"{reading.key}: row {number} of {split} holds {what}")


def check_prompts(pair: Pair, data: TaskData) -> None:
    """Refuse prompts that are longer than their model reads; loads no weights.

    Raises:
        InputError: names the longest one and the model.
    """
    reader = pair.teacher_reader
    if not isinstance(reader.tokenizer, PromptReader):
        return
    reach = reach_of(pair.configurations()[0].to_dict())
    longest = max(int(data.tokens(split, reader).lengths_N.max()) for split in (TAUGHT, "validation", "test"))
    longest += max(len(branch.ids) for branch in reader.tokenizer.branches) - 1
    if reach is not None and longest > reach.tokens:
        raise InputError(
            f"teacher.prompt: a prompt with its row has {longest} tokens, more than the {reach.tokens} of "
            f"{pair.teacher.title}; set data.max_tokens lower, or take fewer shots"
        )


def check_targets(pair: Pair, data: TaskData) -> None:
    """Refuse rows of a language model of which a whole split has nothing to learn; loads no weights.

    Raises:
        InputError: names the split.
    """
    if pair.recipe.kind.is_language_model:
        for reader in (pair.teacher_reader, pair.student_reader):
            for split in ("train", "validation", "test"):
                data.tokens(split, reader)


def check_words(pair: Pair, data: TaskData) -> None:
    """Refuse a pair that does not read the same words of every row, where words are taught; loads no weights.

    Raises:
        InputError: names the first row of which their tokenizers have room for different words.
    """
    if pair.recipe.kind.unit != "words" or (pair.teacher == pair.student_tokenizer and pair.cut is None):
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
    lengths = [length for length in recipe.benchmark.lengths if length != "data"]
    if not lengths:
        return
    longest = max(lengths) + (recipe.benchmark.new_tokens if recipe.kind.has_cache else 0)
    for source, config in zip((pair.teacher, pair.student), pair.configurations(), strict=True):
        reach = reach_of(config.to_dict())
        if reach is not None and longest > reach.tokens:
            raise InputError(
                f"benchmark.lengths: {longest} tokens (with new_tokens) are more than {source.name} reads, "
                f"{reach.tokens}"
            )


def check_writing(pair: Pair, data: TaskData) -> None:
    """Refuse rows after which a causal language model has no positions left to write; loads no weights.

    A model with a table of positions would fail at the end of a run, in the report's samples or when it is timed.

    Raises:
        InputError: names what asks for more tokens, and the model.
    """
    recipe = pair.recipe
    if not recipe.kind.has_cache:
        return
    readers = (pair.teacher_reader, pair.student_reader)
    for source, reader, config in zip((pair.teacher, pair.student), readers, pair.configurations(), strict=True):
        reach = reach_of(config.to_dict())
        if reach is None or not reach.is_hard:
            continue
        rows = data.tokens(recipe.evaluate.split, reader).dataset
        timed = max(max(sizes) for sizes in rows["segments"]) if "data" in recipe.benchmark.lengths else 0
        sampled = rows.select(range(min(recipe.evaluate.samples, len(rows))))
        prompt = max((next((at for at, flag in enumerate(row) if flag), 0) for row in sampled["target"]), default=0)
        for key, length, more in (
            ("benchmark.new_tokens", timed, recipe.benchmark.new_tokens),
            ("evaluate.sample_tokens", prompt, recipe.evaluate.sample_tokens),
        ):
            if length and length + more > reach.tokens:
                raise InputError(
                    f"{key}: {more} tokens written after a text of {length} are more than the {reach.tokens} positions "
                    f"of {source.title}; set data.max_tokens to at most {max(1, reach.tokens - more)}"
                )
