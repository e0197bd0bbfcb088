"""The gate of every export: what its files answer in their own runtime, against the student.

The calls are held-out rows in batches of one and of several, padded and packed as they come; language models also go
through their cache, token by token, and continue two prompts. A new process opens nothing but the exported folder and
answers; this one compares logit by logit, in float64.

    N  positions that count    V  classes or vocabulary
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from distilpeft.data.batches import chunks
from distilpeft.data.pictures import Reader
from distilpeft.errors import InputError, machine_fault
from distilpeft.export.bundle import Bundle
from distilpeft.export.comparison import (
    BLOCK,
    DISTANCE_CALLS,
    MASKED,
    NUM_TEXTS,
    UNRANKED,
    Call,
    Verdict,
    _divergence,
    compare,
    faults,
    spread,
)
from distilpeft.export.gate_process import TEXTS
from distilpeft.export.generation import generate
from distilpeft.export.manifest import read_manifest
from distilpeft.export.runtimes import Array, Runner, TransformersRunner
from distilpeft.machine.files import write_json
from distilpeft.machine.host import alone
from distilpeft.models.context import Context
from distilpeft.models.pair import Loaded
from distilpeft.recipe.export import Limits
from distilpeft.tasks.rows import Tokens

BATCH_SIZES = (1, 2, 3, 8, 16)
LOGITS_BYTES, CALL_BYTES = 256 << 20, 1 << 30
"""Bytes of the logits that are compared, at most, so that of a large vocabulary fewer positions are; and of those of
all positions of one call, if it has more than one row."""
MAX_POSITIONS = 2048
NEW_TOKENS = 50
BATCH, BATCHED_ROWS = 32, 256
"""Rows of a batch, and in all, that are compared with the same rows alone."""
NUM_PROMPTS, PROMPT_TOKENS = 2, 16


class Gate:
    """The student's answers, computed once, to compare exports with.

    Args:
        context: the run, with the recipe's `export` section.
        loaded: the student in transformers.
    """

    def __init__(self, context: Context, loaded: Loaded) -> None:
        recipe, data, student, tokenizer = context.recipe, context.data, loaded.model, loaded.tokenizer
        rows = data.tokens("validation", loaded.reader)
        self._gate_rows, self._language = recipe.export.gate_rows, recipe.kind.is_language_model
        self._rows = rows
        self._family, self._answers = recipe.kind.family, data.task.answers
        self._data, self._student, self._caches = data, student, recipe.kind.has_cache
        self._runner = TransformersRunner(student, caching=self._language)
        width = student.config.get_text_config(decoder=True).vocab_size if self._language else 1
        self.calls = self._calls(rows, width)
        self._reader = tokenizer if isinstance(tokenizer, Reader) else None
        self._texts = [] if self._reader else data.texts("validation", NUM_TEXTS)
        self._ids = list(tokenizer(self._texts)["input_ids"]) if self._caches else _first_rows(rows, self._texts)
        self._tokens: dict[str, int] = {} if self._reader else tokenizer.get_vocab()
        self.prompts = self._prompts()
        self._continuations = [generate(self._runner, ids, NEW_TOKENS, ()) for ids in self.prompts]

    def _calls(self, rows: Tokens, width: int) -> list[Call]:
        """Batches of the first rows, until there are enough positions with `width` logits each."""
        calls: list[Call] = []
        sizes, positions, start = cycle(BATCH_SIZES), 0, 0
        most, end = min(MAX_POSITIONS, LOGITS_BYTES // (4 * width)), min(len(rows.lengths_N), self._gate_rows)
        while start < end and positions < most:
            ids = np.arange(start, min(start + next(sizes), end))
            ids = ids[: max(1, CALL_BYTES // (4 * width * int(rows.lengths_N[ids].max())))]
            start = int(ids[-1]) + 1
            call = self._call(rows, ids, self._runner)
            if not len(call.at_N):
                continue
            positions += len(call.at_N)
            calls.append(call)
            inputs = call.inputs
            if self._caches and len(calls) <= 2 * len(BATCH_SIZES) and "position_ids" not in inputs:
                cut = max(1, inputs["input_ids"].shape[1] // 2)
                calls.append(replace(call, cut=cut))
        return calls

    def _call(self, rows: Tokens, ids: NDArray[np.int64], runner: Runner) -> Call:
        """Rows as one batch, with what a model says of them."""
        batch = rows.load_batch(ids)
        inputs = {name: tensor.numpy() for name, tensor in self._data.task.inputs(self._student, batch).items()}
        at_N, rows_N = np.arange(len(ids)), ids
        if "at_N" in batch:
            at_N, rows_N = batch["at_N"].numpy(), ids[batch["rows_N"].numpy()]
        logits = runner.run(inputs)[0]
        logits_NV = logits.reshape(-1, logits.shape[-1])[at_N]
        allowed_NV = batch["allowed_NS"].numpy() if "allowed_NS" in batch else None
        return Call(inputs, at_N, batch["labels_N"].numpy(), rows_N, logits_NV, allowed_NV=allowed_NV)

    def _prompts(self) -> list[list[int]]:
        """The beginnings of the first rows, for a language model to go on with."""
        if not self._language:
            return []
        rows = [call.inputs for call in self.calls if call.cut is None]
        prompts = [row["input_ids"][0][row["attention_mask"][0] == 1 if "attention_mask" in row else ...].tolist()
                   for row in rows]  # fmt: skip
        prompts = prompts if not self._caches else [ids[:PROMPT_TOKENS] for ids in prompts]
        return prompts[:NUM_PROMPTS]

    def check(self, folder: Path, limits: Limits, *, exact: bool) -> Verdict:
        """Compare an exported folder with the student.

        Args:
            folder: the files, with manifest.json.
            limits: how far it may be off.
            exact: a language model must also write the very same tokens.

        Returns:
            `rows`, `positions`, `max_abs_diff` of a logit, `kl` (KL(student ‖ export), nats per position),
            `top1_agreement` (not of numbers), `metric_kept`, `metric_student` and `metric_export` (share of right
            answers; of a language model nats per token; of numbers the mean squared error, in the labels' variance; of
            vectors the mean cosine to the student's),
            for language models `same_tokens` out of `new_tokens` in a row.

        Raises:
            InputError: the disk or memory is too small for it.
        """
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            failure = self._ask(folder, Path(scratch))
            fault = machine_fault(RuntimeError(failure)) if failure is not None else None
            if fault is not None:
                raise InputError(f"export: {fault}")
            if failure is not None:
                return Verdict({}, [f"its runtime cannot open or run it: {failure}"])
            continuations = json.loads((Path(scratch) / "tokens.json").read_text(encoding="utf-8"))
            verdict = compare(self.calls, Path(scratch), self._family, self._answers)
            if (Path(scratch) / TEXTS).is_file():
                verdict.faults += self._text_faults(Path(scratch), limits)
        if verdict.figures:
            verdict.faults += faults(verdict.figures, limits)
        if self._language:
            same = [_common(ours, theirs) for ours, theirs in zip(self._continuations, continuations, strict=True)]
            verdict.figures |= {"same_tokens": min(same, default=0), "new_tokens": NEW_TOKENS}
            if exact and min(same, default=NEW_TOKENS) < NEW_TOKENS:
                verdict.faults.append(f"writes another token than the student after {min(same)} of {NEW_TOKENS}")
        verdict.faults += self._misread(folder)
        return verdict

    def distance(self, runner: Runner) -> float:
        """Mean KL(student ‖ model) over the first calls: for comparing, not for judging."""
        divergences = []
        for call in [call for call in self.calls if call.cut is None][:DISTANCE_CALLS]:
            logits = runner.run(call.inputs)[0]
            logits_NV = logits.reshape(-1, logits.shape[-1])[call.at_N]
            ours_NV, theirs_NV = (
                self._answers(call.masked(array), call.labels_N)[0] for array in (call.logits_NV, logits_NV)
            )
            for start in range(0, len(theirs_NV), BLOCK):
                part = slice(start, start + BLOCK)
                divergences.append(_divergence(self._family, ours_NV[part], theirs_NV[part]))
        return float(np.concatenate(divergences).mean())

    def batching(self, runner: Runner) -> dict[str, Any] | None:
        """How the answers of an int8 graph depend on other rows of the batch, which share the range of activations.

        Returns:
            `rows`, compared alone and in padded batches of `batch_size`; `max_abs_diff` of a logit, of numbers in
            standard deviations of the labels; `changed`, the share of answers with another likeliest class. None of
            language models, which write one text at a time.
        """
        if self._language:
            return None
        ids = np.arange(min(len(self._rows.lengths_N), self._gate_rows, BATCHED_ROWS))
        arrays = []
        for size in (1, BATCH):
            calls = [self._call(self._rows, part, runner) for part in chunks(ids, size)]
            answers = [self._answers(call.masked(call.logits_NV), call.labels_N)[0] for call in calls]
            width = max(answer.shape[-1] for answer in answers)  # of answers in a text, as long as the longest row
            arrays.append(np.concatenate([_widened(answer.astype(np.float64), width) for answer in answers]))
        alone_MV, batched_MV = arrays
        ranked = (
            {}
            if self._family in UNRANKED
            else {"changed": float((alone_MV.argmax(-1) != batched_MV.argmax(-1)).mean())}
        )
        unit = spread(self.calls) if self._family == "values" else 1.0
        gap = float(np.abs(alone_MV - batched_MV).max()) / unit
        return {"rows": len(ids), "batch_size": BATCH, "max_abs_diff": gap, **ranked}

    def _ask(self, folder: Path, scratch: Path) -> str | None:
        """Have a new process answer all calls into `scratch`; what went wrong, if it did."""
        arrays: dict[str, Any] = {"new_tokens": np.int64(NEW_TOKENS)}
        for number, call in enumerate(self.calls):
            arrays |= {f"{number}.{name}": array for name, array in call.inputs.items()} | {f"{number}.at": call.at_N}
            if call.cut is not None:
                arrays[f"{number}.cut"] = np.int64(call.cut)
        arrays |= {f"prompt.{number}": np.array(ids, np.int64) for number, ids in enumerate(self.prompts)}
        np.savez(scratch / "calls.npz", **arrays)
        if read_manifest(folder)["format"] == "model2vec":
            write_json(scratch / TEXTS, {"texts": self._texts})
        return answered(folder, scratch / "calls.npz", scratch)

    def _text_faults(self, scratch: Path, limits: Limits) -> list[str]:
        """How libraries that tokenise by themselves answer texts differently from the student."""
        texts, vectors, others = (np.load(scratch / f"{name}.npy") for name in ("texts", "vectors", "others"))
        own = np.concatenate([self._logits(ids) for ids in self._ids])
        unit = spread(self.calls) if self._family == "values" else 1.0
        pairs = {
            "model2vec": (_unit(own), _unit(texts)) if self._family == "vectors" else (own / unit, texts / unit),
            "sentence-transformers": (_unit(vectors), _unit(others)),
        }
        messages = []
        for library, (ours, theirs) in pairs.items():
            gap_T = np.abs(ours.astype(np.float64) - theirs).max(-1)
            if limits.max_abs_diff is not None and not gap_T.max() <= limits.max_abs_diff:
                messages.append(
                    f"{library} reads validation row {gap_T.argmax()} differently: off by {gap_T.max():.3g} "
                    f"(max_abs_diff allows {limits.max_abs_diff:.3g})"
                )
        return messages

    def _logits(self, ids: Sequence[int]) -> Array:
        """The student's answer to one row."""
        ids_BS = np.array([ids], np.int64)
        return self._runner.run({"input_ids": ids_BS, "attention_mask": np.ones_like(ids_BS)})[0]

    def _misread(self, folder: Path) -> list[str]:
        """Whether the exported tokenizer reads text, or pictures, differently from the student's."""
        deployed = Bundle(folder)
        if self._reader is not None:
            same = deployed.reader is not None and deployed.reader.settings == self._reader.settings
            return [] if same else ["its preprocessor_config.json is not the student's"]
        messages = []
        reading = deployed.encode(cast("list[str | tuple[str, str]]", self._texts))
        wrong = [row for row, (theirs, ours) in enumerate(zip(reading, self._ids, strict=True)) if theirs != ours]
        if wrong:
            messages.append(f"its tokenizer encodes {len(wrong)} texts differently, such as validation row {wrong[0]}")
        file = deployed.manifest["file"]
        if file.endswith(".gguf"):
            inside = gguf_tokens(folder / file)
            mismatches = [(token, at) for token, at in self._tokens.items() if inside[at : at + 1] != [token]]
            if mismatches:
                messages.append(f"the file's token {mismatches[0][1]} is not the tokenizer's {mismatches[0][0]!r}")
        return messages


def _unit(vectors_ND: Array) -> Array:
    """Vectors of length 1; those of no length stay."""
    units_ND: Array = vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=-1, keepdims=True), 1e-12)
    return units_ND


def _first_rows(rows: Tokens, texts: Sequence[Any]) -> list[list[int]]:
    """Token ids of the first texts; of one that became several rows, of the first of these."""
    if not texts:
        return []
    whole_N = rows.column("window") == 0 if "window" in rows.dataset.column_names else np.ones(len(rows.lengths_N))
    return list(rows.dataset.select(np.flatnonzero(whole_N)[: len(texts)].tolist())["input_ids"])


def gguf_tokens(file: Path) -> list[str]:
    """The token of each id in a GGUF file, by the package's own reader.

    transformers' reader would not do: it takes the tokenizer.json next to the file.
    """
    import gguf

    tokens: list[str] = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    return tokens


def answered(folder: Path, calls: Path, out: Path) -> str | None:
    """Answer calls in a process of its own; its last words if it failed."""
    command = [sys.executable, "-m", "distilpeft.export.gate_process", str(folder), str(calls), str(out)]
    process = subprocess.run(command, env=alone(), capture_output=True, text=True, check=False)
    if process.returncode == 0:
        return None
    lines = process.stderr.strip().splitlines()
    return " ".join((lines[-1] if lines else f"exit code {process.returncode}").split())[:300]


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens that two continuations have in common at their beginning."""
    return next(
        (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )


def _widened(answers_MV: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Answers with further columns that nobody may choose."""
    return np.pad(answers_MV, ((0, 0), (0, width - answers_MV.shape[-1])), constant_values=MASKED)
