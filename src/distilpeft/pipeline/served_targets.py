"""`distilpeft targets import`: log-probabilities from a served teacher → the store that a recipe reads.

A JSONL file holds a server's answer per training row. Nothing is trusted: the tokens must be those of the recipe's row,
every token to be predicted needs an entry, ids must be of the vocabulary, probabilities may not exceed 1. What is not
among an entry's ids is one class, the tail. Served log-probabilities are at temperature 1, and usable there only;
and only by students that have all of the teacher's tokens.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import track

from distilpeft.data.sources import model_config
from distilpeft.distillation.codec import RANGE, Kept, Layout, quantized
from distilpeft.distillation.store import TEACHER_VOCABULARY, Contents, Writer, row_hashes, shard_edges
from distilpeft.errors import InputError
from distilpeft.machine.files import JsonObject, publish_folder
from distilpeft.planning.plan import Plan
from distilpeft.recipe.distil import format_fault
from distilpeft.tasks.rows import TAUGHT, TaskData, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUM_TOLERANCE = 1e-3
"""Servers round: kept probabilities may sum to this much over 1, and are then scaled down."""
Entry = dict[int, float]


def run(plan: Plan, source: Path, out: Path, teacher: str, console: Console) -> None:
    """Convert a file of answers into a store at `out`.

    Args:
        plan: of the recipe, for its rows and tokenizer.
        source: the JSONL file.
        out: a folder that is not there yet.
        teacher: what to note as the teacher's name.
        console: for progress.

    Raises:
        InputError: the recipe cannot use served targets, or an answer does not fit its row; with file and line.
    """
    _check(plan, source, out)
    from distilpeft.models.pair import Pair
    from distilpeft.models.soft_targets import text_binding

    recipe, pair = plan.recipe, Pair(plan.recipe)
    tokenizer = pair.teacher_reader.tokenizer
    data = TaskData(recipe, plan.data_digest, plan.cache)
    rows = data.tokens(TAUGHT, pair.teacher_reader)
    positions_R = data.task.num_positions(rows)
    tokens = max(tokenizer.get_vocab().values()) + 1
    width = max(int((model_config(pair.teacher) or {}).get("vocab_size", 0)), tokens)
    shared = _shared(pair.student_vocabulary or width, width, tokens)
    layout = Layout("top_k", shared, recipe.targets.value_bits or 12, (1.0,), recipe.targets.k, ragged=True)
    reader = _Reader(source, rows, tokenizer, layout)
    blocks: dict[int, tuple[bytes, dict[str, float]]] = {}
    for number, line in track(_lines(source), "reading", total=len(positions_R), console=console, transient=True):
        row, kept, sums = reader.read(number, line)
        if row in blocks:
            raise InputError(f"{source}:{number}: row {row} has been answered before")
        blocks[row] = layout.encode(kept), sums
    missing = [row for row in range(len(positions_R)) if row not in blocks]
    if missing:
        raise InputError(
            f"{source}: {len(missing)} of {len(positions_R)} rows have no answer, such as row {missing[0]}"
        )
    bound = {"teacher": teacher, **text_binding(tokenizer)}
    edges = shard_edges(rows.lengths_N, positions_R * layout.bytes_per_position(layout.count))
    contents = Contents(layout, bound, row_hashes(rows.dataset), positions_R, edges)
    notes: dict[str, object] = {"tokenizer": {"model": recipe.teacher.model, "revision": recipe.teacher.revision}}
    if shared < width:
        notes[TEACHER_VOCABULARY] = width
    _write(contents, blocks, out, notes)
    console.print(f"{len(positions_R)} rows in {out}; use them with --set targets.source={out}", soft_wrap=True)


def _shared(student_ids: int, teacher_ids: int, tokens: int) -> int:
    """How many ids the answers are over: those that the student has too.

    Ids behind the last token only fill up the teacher's embeddings. No text has them, so a trained teacher gives them
    no probability, and a student may lack them.

    Raises:
        InputError: the student lacks tokens, of whose probability an answer does not speak.
    """
    if student_ids < tokens:
        raise InputError(
            f"student: has {student_ids} token ids, the served teacher {tokens}; answers do not say how likely those "
            "are that the student lacks: take a student with all of the teacher's tokens"
        )
    return min(student_ids, teacher_ids)


def _check(plan: Plan, source: Path, out: Path) -> None:
    """What can be refused before anything is read."""
    recipe = plan.recipe
    if not recipe.kind.has_cache:
        raise InputError("targets import: is for causal_lm recipes; classifiers' targets are all their logits")
    if recipe.distil.temperature != 1:
        raise InputError(
            f"distil.temperature: is {recipe.distil.temperature:g}, but served log-probabilities are at temperature 1; "
            "set it to 1"
        )
    fault = format_fault("top_k", recipe.distil)
    if fault is not None:
        raise InputError(f"distil.divergence: {fault}")
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if out.exists():
        raise InputError(f"--out {out}: is there already; give a new folder")


def _lines(source: Path) -> Iterator[tuple[int, JsonObject]]:
    with source.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{source}:{number}: not JSON: {error}") from None
                if not isinstance(line, dict):
                    raise InputError(f"{source}:{number}: not a JSON object")
                yield number, line


def _write(
    contents: Contents, blocks: dict[int, tuple[bytes, dict[str, float]]], out: Path, notes: Mapping[str, object]
) -> None:
    """Write next to `out`, then publish."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = Writer(partial, contents)
    for shard in range(writer.num_shards):
        start, stop = writer.rows(shard)
        kept, sums = [], []
        for row in range(start, stop):
            block, measured = blocks[row]
            num_positions = int(contents.positions_R[row])
            kept.append(contents.layout.decode(np.frombuffer(bytearray(block), np.uint8), num_positions))
            sums.append(measured)
        writer.write(shard, kept, _added(sums))
    writer.finish(notes)
    publish_folder(partial, out)


def _added(sums: list[dict[str, float]]) -> dict[str, float]:
    names = ("positions", "ids", "mass", "error")
    largest = max((part["max_error"] for part in sums), default=0.0)
    return {**{name: math.fsum(part[name] for part in sums) for name in names}, "max_error": largest}


@dataclass(frozen=True)
class _Answer:
    """A server's answer: what it expected as each token, and which tokens those were, as far as it says."""

    entries: list[object]
    token_ids: list[object] | None = None
    tokens: list[object] | None = None
    generated: bool = False
    names_chosen: bool = False  # each entry also holds the token that was there


class _Reader:
    """Reads answers for the rows of one recipe."""

    def __init__(self, source: Path, rows: Tokens, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
        self._source, self._dataset, self._tokenizer, self._layout = source, rows.dataset, tokenizer, layout

    def read(self, number: int, line: Mapping[str, object]) -> tuple[int, Kept, dict[str, float]]:
        """One line → its row, what is kept of its positions, and their figures."""
        where = f"{self._source}:{number}"
        row = line.get("row", number - 1)
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(self._dataset):
            raise InputError(f"{where}: row {row!r}: the training split has rows 0 to {len(self._dataset) - 1}")
        cells = self._dataset[row]
        ids, positions = cells["input_ids"], [s for s, flag in enumerate(cells["target"]) if flag]
        answer = _answer(line.get("response", line), where)
        at = self._places(answer, ids, positions, f"{where}: row {row}")
        entries = []
        for s, entry in zip(positions, at, strict=True):
            place = f"{where}: row {row}, token {s}"
            logps = self._entry(entry, place)
            if answer.names_chosen and answer.token_ids is None and ids[s] not in logps:
                raise InputError(f"{place}: the recipe has token {ids[s]} here, the answer speaks of {list(logps)[:5]}")
            entries.append(logps)
        kept, sums = self._likeliest(entries)
        return row, kept, sums

    def _places(self, answer: _Answer, ids: list[int], positions: list[int], where: str) -> list[object]:
        """The entries of the tokens to be predicted, once the tokens are known to be the recipe's."""
        expected = [ids[s] for s in positions] if answer.generated else ids
        entries, token_ids = answer.entries, answer.token_ids
        if token_ids is None and answer.tokens is not None:
            token_ids = [self._id(token, where) for token in answer.tokens]
        if not answer.generated and len(entries) == len(ids) + 1:  # echo also reports the token it adds
            entries, token_ids = entries[:-1], None if token_ids is None else token_ids[: len(ids)]
        if len(entries) != len(expected):
            raise InputError(f"{where}: {len(entries)} entries, but the recipe's row has {len(expected)} tokens")
        if token_ids is None and not answer.names_chosen:
            raise InputError(f"{where}: nothing tells which tokens these are; add token_ids")
        if token_ids is not None and token_ids[: len(expected)] != expected:
            pairs = enumerate(zip([*token_ids, *[None] * len(expected)], expected, strict=False))
            place, (theirs, ours) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            raise InputError(
                f"{where}: token {place} is {theirs} in the answer, {ours} in the recipe; it was made with another "
                "tokenizer, template or cut"
            )
        return entries if answer.generated else [entries[s] for s in positions]

    def _entry(self, entry: object, place: str) -> Entry:
        """Id → log-probability."""
        if isinstance(entry, dict):
            pairs: list[tuple[Any, object]] = [(self._number(key, place), value) for key, value in entry.items()]
        elif isinstance(entry, list) and all(isinstance(top, dict) for top in entry):
            pairs = [
                (top["id"] if "id" in top else self._id(top.get("token"), place), top.get("logprob")) for top in entry
            ]
        else:
            raise InputError(f"{place}: no log-probabilities, but this token is to be predicted")
        logprobs: Entry = {}
        for key, value in pairs:
            logprob = self._checked(key, value, place)
            if logprobs.get(key, logprob) != logprob:
                raise InputError(f"{place}: id {key} has two log-probabilities, {logprobs[key]} and {logprob}")
            if logprob > -RANGE:
                logprobs[key] = logprob
        mass = math.fsum(math.exp(logprob) for logprob in logprobs.values())
        if not logprobs or mass > 1 + SUM_TOLERANCE:
            raise InputError(f"{place}: {len(logprobs)} ids with probabilities that sum to {mass:.4f}")
        return logprobs

    def _checked(self, key: object, value: object, place: str) -> float:
        """The log-probability of an id."""
        logprob = value.get("logprob") if isinstance(value, dict) else value
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < self._layout.vocabulary:
            raise InputError(f"{place}: id {key!r}: the vocabulary has ids 0 to {self._layout.vocabulary - 1}")
        if isinstance(logprob, bool) or not isinstance(logprob, int | float) or not logprob <= SUM_TOLERANCE:
            raise InputError(f"{place}: {logprob!r} is not a log-probability")
        return min(float(logprob), 0.0)

    def _number(self, key: str, place: str) -> int:
        """A key of a mapping: an id as a number, or a token as text."""
        text = key.removeprefix("token_id:")
        return int(text) if text.isdecimal() and text.isascii() else self._id(key, place)

    def _id(self, token: object, place: str) -> int:
        """The id of a token given as text."""
        text = str(token)
        if text.startswith("token_id:") and text.removeprefix("token_id:").isdecimal():
            return int(text.removeprefix("token_id:"))
        ids = self._texts.get(text, [])
        if len(ids) != 1:
            what = "no token" if not ids else f"{len(ids)} tokens"
            raise InputError(
                f"{place}: {what} of this vocabulary read {text!r}; let the server name ids "
                "(vLLM: return_tokens_as_token_ids)"
            )
        return ids[0]

    @functools.cached_property
    def _texts(self) -> dict[str, list[int]]:
        """Text → the ids that are shown as it."""
        ids_by_text: dict[str, list[int]] = {}
        ids = sorted(set(self._tokenizer.get_vocab().values()))
        for number, text in zip(ids, self._tokenizer.batch_decode([[i] for i in ids]), strict=True):
            ids_by_text.setdefault(text, []).append(number)
        return ids_by_text

    def _likeliest(self, entries: list[Entry]) -> tuple[Kept, dict[str, float]]:
        """The likeliest `k` of each entry, and figures; the lse of what is stored gives the exact mass."""
        layout = self._layout
        best = [sorted(entry.items(), key=lambda pair: (-pair[1], pair[0]))[: layout.count] for entry in entries]
        sizes_N = np.array([len(row) for row in best], dtype=np.int64)
        ids_M = np.array([key for row in best for key, _ in row], dtype=np.int64)
        exact_M = np.array([value for row in best for _, value in row], dtype=np.float64)
        values_M = quantized(exact_M, layout.value_bits)
        edges = np.concatenate([[0], np.cumsum(sizes_N)])
        lse_N1 = np.zeros((len(best), 1), np.float32)
        for n in range(len(best)):
            part = slice(edges[n], edges[n + 1])
            mass = min(0.0, float(np.logaddexp.reduce(exact_M[part])))
            lse_N1[n] = np.logaddexp.reduce(values_M[part].astype(np.float64)) - mass
        error_M = np.abs(values_M - exact_M)
        sums = {
            "positions": float(len(best)), "ids": float(len(ids_M)), "mass": float(np.exp(exact_M).sum()),
            "error": float((np.exp(exact_M) * error_M).sum()), "max_error": float(error_M.max(initial=0.0)),
        }  # fmt: skip
        return Kept(values_M, ids_M, sizes_N, lse_N1, np.empty(0, np.int64)), sums


def _answer(line: Any, where: str) -> _Answer:
    """Recognise the form of an answer."""
    choices = line.get("choices") if isinstance(line, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    for owner in (choice, line):
        entries = owner.get("prompt_logprobs") if isinstance(owner, dict) else None
        if isinstance(entries, list):  # vLLM
            ids = owner.get("prompt_token_ids")
            return _Answer(entries, ids if isinstance(ids, list) else None, names_chosen=True)
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):  # a chat's answer
        entries = [item.get("top_logprobs") if isinstance(item, dict) else None for item in logprobs["content"]]
        return _Answer(entries, tokens=[item.get("token") for item in logprobs["content"]], generated=True)
    if isinstance(logprobs, dict) and isinstance(logprobs.get("top_logprobs"), list):  # a completion's echo
        entries = [_by_text(entry) for entry in logprobs["top_logprobs"]]
        return _Answer(entries, tokens=logprobs.get("tokens"))
    if isinstance(line, dict) and isinstance(line.get("logprobs"), list):
        ids = line.get("token_ids")
        return _Answer(line["logprobs"], ids if isinstance(ids, list) else None)
    raise InputError(f"{where}: no logprobs, prompt_logprobs or choices[0].logprobs with top_logprobs in this answer")


def _by_text(entry: object) -> object:
    """Keys of an echo are texts, also those that look like numbers."""
    if not isinstance(entry, dict):
        return entry
    return [{"token": token, "logprob": logprob} for token, logprob in entry.items()]
