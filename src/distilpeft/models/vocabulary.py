"""A student's vocabulary cut to the task: counted, cut, kept next to the tokenised rows, and reported.

What is counted are the rows that the student learns from, as its tokenizer reads them, with and without a label. The
cut is a function of these rows, the tokenizer and the recipe, so a run that is resumed, and every process, finds the
same. Validation and test rows are never counted.

A language model's soft targets are over the kept ids that its teacher has, too: the teacher's distribution given these,
as where vocabularies differ in length. The teacher reads the ids that it knows; see `CutVocabulary`.

    R  rows    K  ids kept    V  ids before
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from numpy.typing import NDArray

from distilpeft.data.cut_vocabulary import kept, rewrite
from distilpeft.data.sources import TOKENIZER_FILES, Source
from distilpeft.data.unlabelled import unlabelled_digest
from distilpeft.errors import InputError
from distilpeft.machine.artifact import Figures
from distilpeft.machine.files import digest_json, write_json, write_text
from distilpeft.machine.runtime import Runtime
from distilpeft.models import loading
from distilpeft.models.bases.embeddings import named_ids
from distilpeft.models.pair import CutVocabulary, Pair
from distilpeft.tasks.rows import TAUGHT, RowReader, TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
KEPT, TOKENIZER = "kept.npy", "tokenizer.json"
BATCH_ROWS = 5_000  # looked at at once
SPLITS = {"train": TAUGHT, "validation": "validation", "test": "test"}
"""Split of the report → the rows that are compared."""


def cut_to_data(pair: Pair, data: TaskData, runtime: Runtime | None = None) -> Pair:
    """The pair with its student's vocabulary cut to the data, if the recipe says so.

    Args:
        pair: the recipe's models.
        data: its rows.
        runtime: shows how far counting has come; None: nothing is shown.

    Raises:
        InputError: the tokenizer cannot be cut, or not far enough; or rows that are taught token by token would change.
    """
    if pair.recipe.student.vocabulary is None:
        return pair
    cut = _cut(pair, data, runtime)
    if runtime is not None:
        runtime.say(
            f"  student.vocabulary: {len(cut.kept_K):,} of {len(cut.before.tokenizer.get_vocab()):,} tokens kept"
        )
    return replace(pair, cut=cut)


def _cut(pair: Pair, data: TaskData, runtime: Runtime | None) -> CutVocabulary:
    settings, before = pair.recipe.student.vocabulary, pair.student_reader
    assert settings is not None
    name, spec = pair.student_tokenizer.title, spec_of(before.tokenizer, pair.student_tokenizer.title)
    kept.check_kind(spec, name)
    _count(data, before, runtime)
    extra = _extra_ids(pair, spec)
    digest = digest_json(
        [FORMAT, data.digest, unlabelled_digest(pair.recipe.data), before.digest, pair.recipe.data.max_tokens,
         sorted(extra), settings.model_dump(mode="json")]
    )  # fmt: skip

    def write(folder: Path) -> None:
        counts_V = counts(data.tokens(TAUGHT, before).dataset)
        kept_K = kept.kept_ids(spec, counts_V, extra, settings)
        _save(before.tokenizer, rewrite.cut(spec, kept_K, name), rewrite.numbers(kept_K), folder)
        np.save(folder / KEPT, kept_K, allow_pickle=False)

    folder = data.folder(f"vocabulary-{digest[:16]}", write)
    tokenizer = loading.load_tokenizer(Source(str(folder), folder))
    cut = CutVocabulary(RowReader(tokenizer, digest), before, np.load(folder / KEPT, allow_pickle=False))
    _check_loaded(cut, folder)
    changed = _changed(data, TAUGHT, cut)["changed"] if pair.recipe.kind.same_tokens else 0
    if changed:
        raise InputError(
            f"student.vocabulary: {changed} training rows would be encoded differently by the cut tokenizer of {name}, "
            f"and {pair.recipe.task.kind} is taught token by token; leave it out"
        )
    return cut


def spec_of(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer, without the length that rows were last cut to.

    Raises:
        InputError: it has none.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"student.vocabulary: {type(tokenizer).__name__}, the tokenizer of {name}, is written in Python and has no "
            "tokenizer.json; only tokenizers of the library tokenizers can be cut"
        )
    core: Any = tokenizer.backend_tokenizer
    return {**json.loads(core.to_str()), "truncation": None, "padding": None}


def _count(data: TaskData, reader: RowReader, runtime: Runtime | None) -> None:
    """Tokenise the rows that are counted, if that was not done before."""
    total = sum(data.num_rows(split) for split in data.taught_splits)
    with contextlib.ExitStack() as stack:
        bar = None if runtime is None else stack.enter_context(runtime.bar("vocabulary: read the rows", total))
        data.tokens(TAUGHT, reader, lambda count: None if bar is None else bar.advance(count))


def _extra_ids(pair: Pair, spec: dict[str, Any]) -> set[int]:
    """The ids that are kept whether texts have them or not."""
    tokenizer = pair.student_reader.tokenizer
    vocabulary = set(tokenizer.get_vocab().values())
    ids = {*tokenizer.all_special_ids, *rewrite.framing_ids(spec["post_processor"])}
    ids |= named_ids(pair.configurations()[1])
    if pair.recipe.needs_template and isinstance(tokenizer.chat_template, str):
        # Other roles than those of the training rows are written in it; so is what stands before an answer.
        ids |= set(tokenizer(tokenizer.chat_template, add_special_tokens=False, verbose=False)["input_ids"])
    return ids & vocabulary


def counts(rows: datasets.Dataset) -> NDArray[np.int64]:
    """How often each id occurs in encoded rows, [V]."""
    counts_V = np.zeros(0, dtype=np.int64)
    for ids, _ in _encoded(rows):
        more = np.bincount(ids, minlength=len(counts_V))
        more[: len(counts_V)] += counts_V
        counts_V = more
    return counts_V


def _encoded(rows: datasets.Dataset) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The ids of some thousand rows, one behind the other, and where each row ends."""
    for table in rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=BATCH_ROWS):
        column = table.column(0).combine_chunks()
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        yield column.flatten().to_numpy(zero_copy_only=False).astype(np.int64), np.cumsum(lengths)


def _save(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any], new: dict[int, int], folder: Path) -> None:
    """The folder of a tokenizer whose tokenizer.json is this."""
    tokenizer.save_pretrained(str(folder))
    stale = {file for pattern in (*TOKENIZER_FILES, "added_tokens.json") for file in folder.glob(pattern)}
    for file in stale:
        file.unlink()
    write_text(folder / TOKENIZER, json.dumps(spec, ensure_ascii=False))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"].items()
        settings["added_tokens_decoder"] = {str(new[int(index)]): token for index, token in listed}
    write_json(file, settings)


def _check_loaded(cut: CutVocabulary, folder: Path) -> None:
    """Refuse a class of tokenizers that makes something else of the file."""
    before = {index: token for token, index in cut.before.tokenizer.get_vocab().items()}
    expected = {before[int(old)]: new for new, old in enumerate(cut.kept_K)}
    spec = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    loaded = spec_of(cut.reader.tokenizer, str(folder))
    if cut.reader.tokenizer.get_vocab() != expected or loaded["model"] != spec["model"]:
        raise InputError(
            f"student.vocabulary: transformers reads the cut tokenizer as another one "
            f"({type(cut.reader.tokenizer).__name__}); leave it out"
        )


def figures(pair: Pair, data: TaskData, num_weights: int) -> Figures:
    """What a cut has kept and what it changed; `num_weights` are those that it took from the model.

    Returns:
        `tokens_before`, `tokens_after`, `weights_saved`; by split: `rows`, how many of them are encoded differently
        (`changed`), tokens and unknown tokens before and after.
    """
    assert pair.cut is not None
    return {
        "tokens_before": len(pair.cut.before.tokenizer.get_vocab()),
        "tokens_after": len(pair.cut.kept_K),
        "weights_saved": num_weights,
        "splits": {name: _changed(data, split, pair.cut) for name, split in SPLITS.items()},
    }


def _changed(data: TaskData, split: str, cut: CutVocabulary) -> dict[str, int]:
    """How a split is encoded before and after."""
    before, after = (data.tokens(split, reader).dataset for reader in (cut.before, cut.reader))
    new_V = np.full(1 + max(int(cut.kept_K[-1]), *(int(ids.max(initial=0)) for ids, _ in _encoded(before))), -1)
    new_V[cut.kept_K] = np.arange(len(cut.kept_K))
    rows = Counter(_keys((new_V[ids], ends) for ids, ends in _encoded(before)))
    # Rows may be stretches of a text, of which there are more where a text takes more tokens.
    same = (rows & Counter(_keys(_encoded(after)))).total()
    numbers = {"rows": len(before), "changed": len(before) - same}
    for name, encoded, reader in (("before", before, cut.before), ("after", after, cut.reader)):
        unknown = reader.tokenizer.unk_token_id
        numbers[f"tokens_{name}"] = sum(len(ids) for ids, _ in _encoded(encoded))
        numbers[f"unknown_{name}"] = sum(int((ids == unknown).sum()) for ids, _ in _encoded(encoded))
    return numbers


def _keys(encoded: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> Iterator[bytes]:
    """Each row's ids as something to compare."""
    for ids, ends in encoded:
        yield from (part.tobytes() for part in np.split(ids, ends[:-1]))
