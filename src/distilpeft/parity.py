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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.data.pictures import Reader
from distilpeft.deployed import Deployed
from distilpeft.errors import InputError, machine_fault
from distilpeft.machine.host import alone
from distilpeft.metrics.probabilities import divergence, log_softmax
from distilpeft.recipe import Recipe
from distilpeft.recipe.export import FORMS, Limits
from distilpeft.runners import Runner, TransformersRunner, generate
from distilpeft.tasks.rows import TaskData, Tokens, inputs_of

UNRANKED = ("values", "vectors")
"""What answers can be that have no likeliest class."""
BATCH_SIZES = (1, 2, 3, 8, 16)
LOGITS_BYTES, CALL_BYTES = 256 << 20, 1 << 30
"""Bytes of the logits that are compared, at most, so that of a large vocabulary fewer positions are; and of those of
all positions of one call, if it has more than one row."""
MAX_POSITIONS = 2048
BLOCK = 64  # positions compared at once, in float64
MASKED = -1e8  # see `losses`
NEW_TOKENS = 50
NUM_PROMPTS, PROMPT_TOKENS = 2, 16
NUM_WORST, NUM_TEXTS, DISTANCE_CALLS = 3, 64, 16


@dataclass(frozen=True)
class Call:
    """One batch: what goes in, which positions count, and what the student says there.

    Attributes:
        inputs: name → array.
        at_N: flat positions b * S + s.
        labels_N: the right answers.
        rows_N: row ids.
        logits_NV: the student's.
        cut: send it through the cache, cut here; None sends it whole.
        allowed_NV: which ids can be answers, where not all can.
    """

    inputs: Mapping[str, NDArray[Any]]
    at_N: NDArray[np.int64]
    labels_N: NDArray[Any]
    rows_N: NDArray[np.int64]
    logits_NV: NDArray[np.float32]
    cut: int | None = None
    allowed_NV: NDArray[np.bool_] | None = None

    def masked(self, logits_NV: NDArray[Any]) -> NDArray[Any]:
        """Logits with those of impossible answers out of reach."""
        return logits_NV if self.allowed_NV is None else np.where(self.allowed_NV, logits_NV, MASKED)


@dataclass
class Verdict:
    """What the gate found.

    Attributes:
        figures: see `Gate.check`.
        faults: what is beyond its limit, in words; none if the export counts.
        worst: (row, largest difference of a logit, KL) of the rows that differ most.
    """

    figures: dict[str, Any]
    faults: list[str] = field(default_factory=list)
    worst: list[tuple[int, float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        told = "; ".join(self.faults)
        rows = ", ".join(f"{row} (logit off by {gap:.3g}, KL {kl:.3g})" for row, gap, kl in self.worst)
        return f"{told}. Validation rows that differ most: {rows}" if rows else told


class Gate:
    """The student's answers, computed once, to hold exports against.

    Args:
        recipe: its `export` section.
        data: the rows.
        student: the model in transformers.
        tokenizer: its tokenizer.
        rows: the validation rows as it reads them.
    """

    def __init__(self, recipe: Recipe, data: TaskData, student: Any, tokenizer: Any, rows: Tokens) -> None:
        self._gate_rows, self._language = recipe.export.gate_rows, recipe.kind.language
        self._family, self._answers = recipe.kind.family, data.task.answers
        self._data, self._student, self._caches = data, student, recipe.kind.caches
        self._runner = TransformersRunner(student, caching=self._language)
        width = student.config.get_text_config(decoder=True).vocab_size if self._language else 1
        self.calls = self._calls(rows, width)
        self._reader = tokenizer if isinstance(tokenizer, Reader) else None
        self._texts = [] if self._reader else data.texts("validation", NUM_TEXTS)
        self._ids = list(tokenizer(self._texts)["input_ids"]) if self._caches else _first_rows(rows, self._texts)
        self._tokens: dict[str, int] = {} if self._reader else tokenizer.get_vocab()
        self.prompts = self._prompts()
        self._told = [generate(self._runner, ids, NEW_TOKENS, ()) for ids in self.prompts]

    def _calls(self, rows: Tokens, width: int) -> list[Call]:
        """Batches of the first rows, until there are enough positions with `width` logits each."""
        calls: list[Call] = []
        sizes, positions, start = cycle(BATCH_SIZES), 0, 0
        most, end = min(MAX_POSITIONS, LOGITS_BYTES // (4 * width)), min(len(rows.lengths_N), self._gate_rows)
        while start < end and positions < most:
            ids = np.arange(start, min(start + next(sizes), end))
            ids = ids[: max(1, CALL_BYTES // (4 * width * int(rows.lengths_N[ids].max())))]
            start = int(ids[-1]) + 1
            batch = rows.load_batch(ids)
            inputs = {name: tensor.numpy() for name, tensor in inputs_of(self._data, self._student, batch).items()}
            labels_N = batch["labels_N"].numpy()
            if "at_N" in batch:
                at_N, rows_N = batch["at_N"].numpy(), ids[batch["rows_N"].numpy()]
            else:
                at_N, rows_N = np.arange(len(ids)), ids
            if not len(at_N):
                continue
            logits = self._runner.run(inputs)[0]
            logits_NV = logits.reshape(-1, logits.shape[-1])[at_N]
            positions += len(at_N)
            allowed_NV = batch["allowed_NS"].numpy() if "allowed_NS" in batch else None
            calls.append(Call(inputs, at_N, labels_N, rows_N, logits_NV, allowed_NV=allowed_NV))
            if self._caches and len(calls) <= 2 * len(BATCH_SIZES) and "position_ids" not in inputs:
                cut = max(1, inputs["input_ids"].shape[1] // 2)
                calls.append(Call(inputs, at_N, labels_N, rows_N, logits_NV, cut))
        return calls

    def _prompts(self) -> list[list[int]]:
        """The beginnings of the first rows, for a language model to go on with."""
        if not self._language:
            return []
        rows = [call.inputs for call in self.calls if call.cut is None]
        found = [row["input_ids"][0][row["attention_mask"][0] == 1 if "attention_mask" in row else ...].tolist()
                 for row in rows]  # fmt: skip
        found = found if not self._caches else [ids[:PROMPT_TOKENS] for ids in found]
        return found[:NUM_PROMPTS]

    def check(self, folder: Path, limits: Limits, *, exact: bool) -> Verdict:
        """Hold an exported folder against the student.

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
            told = json.loads((Path(scratch) / "tokens.json").read_text(encoding="utf-8"))
            verdict = compare(self.calls, Path(scratch), self._family, self._answers)
        if verdict.figures:
            verdict.faults += faults(verdict.figures, limits)
        if self._language:
            same = [_common(one, two) for one, two in zip(self._told, told, strict=True)]
            verdict.figures |= {"same_tokens": min(same, default=0), "new_tokens": NEW_TOKENS}
            if exact and min(same, default=NEW_TOKENS) < NEW_TOKENS:
                verdict.faults.append(f"writes another token than the student after {min(same)} of {NEW_TOKENS}")
        verdict.faults += self._misread(folder)
        return verdict

    def distance(self, runner: Runner) -> float:
        """Mean KL(student ‖ model) over the first calls: for comparing, not for judging."""
        found = []
        for call in [call for call in self.calls if call.cut is None][:DISTANCE_CALLS]:
            logits = runner.run(call.inputs)[0]
            told_NV = logits.reshape(-1, logits.shape[-1])[call.at_N]
            one_NV, two_NV = (
                self._answers(call.masked(array), call.labels_N)[0] for array in (call.logits_NV, told_NV)
            )
            for start in range(0, len(two_NV), BLOCK):
                part = slice(start, start + BLOCK)
                found.append(_divergence(self._family, one_NV[part], two_NV[part]))
        return float(np.concatenate(found).mean())

    def _ask(self, folder: Path, scratch: Path) -> str | None:
        """Have a new process answer all calls into `scratch`; what went wrong, if it did."""
        arrays: dict[str, Any] = {"new_tokens": np.int64(NEW_TOKENS)}
        for number, call in enumerate(self.calls):
            arrays |= {f"{number}.{name}": array for name, array in call.inputs.items()} | {f"{number}.at": call.at_N}
            if call.cut is not None:
                arrays[f"{number}.cut"] = np.int64(call.cut)
        arrays |= {f"prompt.{number}": np.array(ids, np.int64) for number, ids in enumerate(self.prompts)}
        np.savez(scratch / "calls.npz", **arrays)
        return answered(folder, scratch / "calls.npz", scratch)

    def _misread(self, folder: Path) -> list[str]:
        """Whether the exported tokenizer reads text, or pictures, otherwise than the student's."""
        deployed = Deployed(folder)
        if self._reader is not None:
            same = deployed.reader is not None and deployed.reader.settings == self._reader.settings
            return [] if same else ["its preprocessor_config.json is not the student's"]
        found = []
        reading = deployed.encode(self._texts)
        wrong = [row for row, (one, two) in enumerate(zip(reading, self._ids, strict=True)) if one != two]
        if wrong:
            found.append(f"its tokenizer reads {len(wrong)} texts otherwise, such as that of validation row {wrong[0]}")
        form = FORMS[deployed.manifest["format"]]
        if form.file.endswith(".gguf"):
            inside = gguf_tokens(folder / form.file)
            other = [(token, at) for token, at in self._tokens.items() if inside[at : at + 1] != [token]]
            if other:
                found.append(f"the file's token {other[0][1]} is not the tokenizer's {other[0][0]!r}")
        return found


def _first_rows(rows: Tokens, texts: Sequence[Any]) -> list[list[int]]:
    """Token ids of the first texts; of one that became several rows, of the first of these."""
    if not texts:
        return []
    whole_N = rows.column("window") == 0 if "window" in rows.dataset.column_names else np.ones(len(rows.lengths_N))
    return list(rows.dataset.select(np.flatnonzero(whole_N)[: len(texts)].tolist())["input_ids"])


def gguf_tokens(file: Path) -> list[str]:
    """The token of each id in a GGUF file, by the package's own reader.

    transformers' reader would not do: it takes the tokenizer.json that lies beside the file.
    """
    import gguf

    found: list[str] = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    return found


def answered(folder: Path, calls: Path, out: Path) -> str | None:
    """Answer calls in a process of its own; its last words if it failed."""
    command = [sys.executable, "-m", "distilpeft.runners", str(folder), str(calls), str(out)]
    done = subprocess.run(command, env=alone(), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return " ".join((lines[-1] if lines else f"exit code {done.returncode}").split())[:300]


Answers = Callable[[NDArray[Any], NDArray[Any]], tuple[NDArray[Any], NDArray[Any]]]
"""Outputs and labels of a model's positions → a distribution's logits, or a number, and the right one; see tasks."""


def compare(calls: Sequence[Call], told: Path, family: str, answers: Answers) -> Verdict:
    """The figures of `Gate.check` that come from logits; calls through the cache count for difference and KL only.

    Args:
        calls: with the student's logits.
        told: folder of the export's, N.npy.
        family: what answers are, see `Kind.family`: the metric is the share of right ones, nats per token of
            `language`, the root mean squared error of `values`.
        answers: the task's.
    """
    sums = _Compared(family, _spread(calls) if family == "values" else 1.0)
    for number, call in enumerate(calls):
        found_NV = np.load(told / f"{number}.npy", allow_pickle=False)
        if found_NV.shape != call.logits_NV.shape:
            return Verdict({}, [f"gives logits of shape {found_NV.shape}, the student of {call.logits_NV.shape}"])
        if not np.isfinite(found_NV).all():
            bad = call.rows_N[~np.isfinite(found_NV).all(-1)]
            return Verdict({}, [f"gives logits that are not finite, such as for validation row {bad[0]}"])
        one_MV, labels_M = answers(call.masked(call.logits_NV), call.labels_N)
        two_MV, _ = answers(call.masked(found_NV), call.labels_N)
        rows_M = np.repeat(call.rows_N, len(one_MV) // len(call.rows_N))  # several answers of a position
        for start in range(0, len(one_MV), BLOCK):
            part = slice(start, start + BLOCK)
            sums.add(one_MV[part], two_MV[part], labels_M[part], rows_M[part], whole=call.cut is None)
    return sums.verdict()


def _spread(calls: Sequence[Call]) -> float:
    """Standard deviation of the labels, in which numbers are compared."""
    return float(np.concatenate([call.labels_N for call in calls]).std()) or 1.0


def _divergence(family: str, one_NV: NDArray[Any], two_NV: NDArray[Any]) -> NDArray[np.float64]:
    """KL(one ‖ two) of each answer, in nats; of numbers that of normal distributions of width 1 around them.

    Of vectors likewise: since their length is 1, it is 1 less their cosine.
    """
    if family in UNRANKED:
        half_N: NDArray[np.float64] = 0.5 * np.square(one_NV.astype(np.float64) - two_NV).sum(-1)
        return half_N
    return divergence(log_softmax(one_NV), log_softmax(two_NV))


class _Compared:
    """What is kept of every answer: largest difference, KL, row; of calls that go in whole also who is right."""

    def __init__(self, family: str, unit: float) -> None:
        self._family, self._unit = family, unit
        self._gaps: list[NDArray[np.float64]] = []
        self._kl: list[NDArray[np.float64]] = []
        self._rows: list[NDArray[np.int64]] = []
        self._agree: list[NDArray[np.bool_]] = []
        self._ours: list[NDArray[np.float64]] = []
        self._theirs: list[NDArray[np.float64]] = []

    def add(
        self, one_NV: NDArray[Any], two_NV: NDArray[Any], labels_N: NDArray[Any], rows_N: NDArray[np.int64], *,
        whole: bool,
    ) -> None:  # fmt: skip
        """Compare some answers of a call; `whole`: it did not go through the cache."""
        one_NV, two_NV = (array.astype(np.float64) / self._unit for array in (one_NV, two_NV))
        self._gaps.append(np.abs(one_NV - two_NV).max(-1))
        self._kl.append(_divergence(self._family, one_NV, two_NV))
        self._rows.append(rows_N)
        if whole and self._family == "vectors":
            self._ours.append(np.ones(len(one_NV)))
            self._theirs.append((one_NV * two_NV).sum(-1))
        elif whole:
            self._agree.append(one_NV.argmax(-1) == two_NV.argmax(-1))
            self._ours.append(self._measure(one_NV, labels_N))
            self._theirs.append(self._measure(two_NV, labels_N))

    def _measure(self, answers_NV: NDArray[np.float64], labels_N: NDArray[Any]) -> NDArray[np.float64]:
        if self._family == "values":
            squared_N: NDArray[np.float64] = np.square(answers_NV[:, 0] - labels_N / self._unit)
            return squared_N
        if self._family == "language":
            nats_N: NDArray[np.float64] = -log_softmax(answers_NV)[np.arange(len(labels_N)), labels_N]
            return nats_N
        right_N: NDArray[np.float64] = (answers_NV.argmax(-1) == labels_N).astype(np.float64)
        return right_N

    def _kept(self, student: float, export: float) -> float:
        """How much of the student's metric the export keeps."""
        if self._family == "values":
            return float(np.sqrt(student / export)) if export else 1.0
        if self._family == "language":
            return float(np.exp(student - export))
        return export / student if student else 1.0

    def verdict(self) -> Verdict:
        """The figures, and the rows that differ most."""
        gap_N, kl_N, row_N = (np.concatenate(parts) for parts in (self._gaps, self._kl, self._rows))
        student, export = (float(np.concatenate(parts).mean()) for parts in (self._ours, self._theirs))
        agree = {} if self._family in UNRANKED else {"top1_agreement": float(np.concatenate(self._agree).mean())}
        figures = {
            "rows": len(np.unique(row_N)),
            "positions": sum(map(len, self._ours)),
            "max_abs_diff": float(gap_N.max()),
            "kl": float(max(kl_N.mean(), 0.0)),
            **agree,
            "metric_student": student,
            "metric_export": export,
            "metric_kept": self._kept(student, export),
        }
        worst: dict[int, tuple[int, float, float]] = {}
        for at in np.lexsort((gap_N, kl_N))[::-1]:
            worst.setdefault(int(row_N[at]), (int(row_N[at]), float(gap_N[at]), float(kl_N[at])))
            if len(worst) == NUM_WORST:
                break
        return Verdict(figures, worst=list(worst.values()))


def faults(figures: Mapping[str, Any], limits: Limits) -> list[str]:
    """What is beyond its limit, in words that name the recipe's key."""
    found = []
    for name, word in (("max_abs_diff", "a logit differs by"), ("kl", "KL to the student is")):
        limit = getattr(limits, name)
        if limit is not None and not figures[name] <= limit:
            found.append(f"{word} {figures[name]:.3g} ({name} allows {limit:.3g})")
    for name, word in (("top1_agreement", "same answer on only"), ("metric_kept", "keeps only")):
        limit = getattr(limits, name)
        if limit is not None and not figures[name] >= limit:
            found.append(f"{word} {figures[name]:.2%} ({name} asks for {limit:.2%})")
    return found


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """Tokens that two continuations have in common at their beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
