"""One model in a process of its own, timed call by call at its parent's word.

Started as `python -m distilpeft.benchmark.model_process SPEC.json`; commands and answers are JSON
lines. An exported
folder is opened in its own runtime and nothing else is imported, so that the memory of the process is what a deployment
needs; the run's other models load as the run itself loads them. The process ends when its parent does.

    B  rows    S  positions
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.export.bundle import padded
from distilpeft.export.runtimes import DECODER, PIXELS, Array, Runner, TransformersRunner, open_runner

WARM_CALLS, WARM_S, WARM_BAND = 30, 5.0, 0.05
"""Warming up ends when the median of three calls is within 5 % of that of the three before, after 30 calls or 5 s."""
ALIKE = 3
QUICK_S = 2.0
"""A graph that is loaded in less is loaded anew in every round."""
FAST_S, SLOW_S = 0.02, 0.1
"""Caches and threads have just served another model: calls of less than 20 ms get three calls before them that do not
count, calls of less than 100 ms get one, longer ones none, for which it is less than a hundredth."""


class Rows:
    """Token ids of real rows, or pictures, and batches of them that are the same for every model.

    Args:
        file: an .npz of `ids`, all rows behind each other, `ends` of each, and `pad`, the id to pad with; or of
            `pixel_values`. Next to it may be a .json with the rows' texts and the tokenizer, see `write_words`.
        left: pad before the row, as generation does.
    """

    def __init__(self, file: Path, *, left: bool) -> None:
        arrays = np.load(file, allow_pickle=False)
        self._pictures: NDArray[np.float32] | None = arrays.get(PIXELS)
        self._file = file.with_suffix(".json")
        if self._pictures is not None:
            return
        self._ids: NDArray[np.int64] = arrays["ids"]
        self._ends: NDArray[np.int64] = arrays["ends"]
        self._pad, self._left = int(arrays["pad"]), left

    def batch(self, size: int, length: int | str, seed: Sequence[int]) -> dict[str, Array]:
        """`size` random rows: as long as they are (`data`), or real tokens from the row on, cut to `length`."""
        if self._pictures is not None:
            return {PIXELS: self._pictures[np.random.default_rng(seed).integers(0, len(self._pictures), size)]}
        picked = np.random.default_rng(seed).integers(0, len(self._ends), size)
        rows = [self._row(int(row), length) for row in picked]
        width = max(len(row) for row in rows)
        ids_BS = np.full((size, width), self._pad, np.int64)
        mask_BS = np.zeros((size, width), np.int64)
        for at, row in enumerate(rows):
            part = slice(width - len(row), width) if self._left else slice(0, len(row))
            ids_BS[at, part], mask_BS[at, part] = row, 1
        return {"input_ids": ids_BS, "attention_mask": mask_BS}

    @cached_property
    def words(self) -> Words | None:
        """The texts, read when they are first asked for: a model's memory has been measured before."""
        return Words.read(self._file) if self._file.is_file() else None

    def encode(self, size: int, seed: Sequence[int]) -> float:
        """Seconds to encode and pad the texts of the rows that `batch` gives as they are."""
        assert self.words is not None
        picked = np.random.default_rng(seed).integers(0, len(self._ends), size)
        texts = [self.words.texts[row] for row in picked]
        begin = time.perf_counter()
        padded(self.words.tokenizer.encode_batch_fast(texts), self._pad, typed=self.words.typed)
        return time.perf_counter() - begin

    def _row(self, row: int, length: int | str) -> NDArray[np.int64]:
        start = int(self._ends[row - 1]) if row else 0
        if length == "data":
            return self._ids[start : self._ends[row]]
        return np.take(self._ids, range(start, start + int(length)), mode="wrap")


@dataclass(frozen=True)
class Words:
    """The texts of rows, or pairs of them, and the tokenizer that reads them.

    Attributes:
        texts: in the order of the rows.
        tokenizer: of the library tokenizers, cutting texts as in training.
        typed: whether the model tells two texts apart by their type.
    """

    texts: list[str | tuple[str, str]]
    tokenizer: Any
    typed: bool

    @classmethod
    def read(cls, file: Path) -> Words:
        """From what `write` has written."""
        from tokenizers import Tokenizer

        content = json.loads(file.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_str(content["tokenizer"])
        tokenizer.no_padding()
        tokenizer.enable_truncation(content["max_tokens"])
        texts = [text if isinstance(text, str) else (text[0], text[1]) for text in content["texts"]]
        return cls(texts, tokenizer, content["typed"])


def write_words(
    rows: Path, texts: Sequence[str | tuple[str, str]], tokenizer: str, max_tokens: int, *, typed: bool
) -> None:
    """Put the texts of rows, and the tokenizer.json as text, next to the rows' file."""
    content = {"texts": list(texts), "tokenizer": tokenizer, "max_tokens": max_tokens, "typed": typed}
    rows.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")


class Timed:
    """A loaded model that answers commands.

    Args:
        spec: `folder`, `recipe` and `role` (null for an exported folder), `threads`, `compiled`, `language`,
            `new_tokens`, `rows` (see `Rows`), `cells`: a list of [rows at once, length].
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec, self._cells = spec, spec["cells"]
        self._language, self._new_tokens = spec["language"], spec["new_tokens"]
        self.loaded: dict[str, Any] = {"rss_start_bytes": resident_bytes()}
        begin = time.perf_counter()
        self._runner, more = _open(spec)
        self._start = self._runner.start
        self._rows = Rows(Path(spec["rows"]), left=self._language and self._start is None)
        self.loaded |= {"load_s": time.perf_counter() - begin, "rss_loaded_bytes": resident_bytes(), **more}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what `command["do"]` says: `load`, `warm` a cell, `move`, `time` calls of a cell, or report `memory`."""
        match command["do"]:
            case "load":
                return self.loaded
            case "warm":
                return self._warm(command["cell"])
            case "move":
                return self._move()
            case "time":
                return self._time(command["cell"], command["round"], command["calls"], command["seconds"])
            case _:
                return {"memory_bytes": peak_bytes(), "gpu_memory_bytes": _gpu_bytes(), "cpu_s": time.process_time()}

    def _move(self) -> dict[str, Any]:
        """Put the weights somewhere else in memory.

        Where they happen to lie makes the same model up to 12 % faster or slower, from process to process, for as long
        as it runs (measured on a virtual machine: which physical pages share a cache set). Over rounds it evens out.
        """
        if isinstance(self._runner, TransformersRunner):
            self._runner.move()
        elif self.loaded["load_s"] < QUICK_S:
            self._runner, _ = _open(self._spec)
        return {}

    def _warm(self, cell: int) -> dict[str, Any]:
        seconds: list[float] = []
        begin, stable = time.perf_counter(), False
        while not stable and len(seconds) < WARM_CALLS and (len(seconds) < 2 or time.perf_counter() - begin < WARM_S):
            first, rest = self._call(cell, (0, cell, 0))  # the same rows: only the machine's state may differ
            seconds.append(first + sum(rest))
            if len(seconds) >= 2 * ALIKE:
                before, now = (median(part) for part in (seconds[-2 * ALIKE : -ALIKE], seconds[-ALIKE:]))
                stable = abs(now / before - 1) < WARM_BAND
        recent = median(seconds[-ALIKE:])
        return {"warmup_calls": len(seconds), "stable": stable, "seconds": recent, "first_s": seconds[0],
                "memory_bytes": peak_bytes()}  # fmt: skip

    def _time(self, cell: int, turn: int, calls: int, seconds: float) -> dict[str, Any]:
        for number in range(3 if seconds < FAST_S else 1 if seconds < SLOW_S else 0):
            self._call(cell, (turn, cell, number))
        timings = [self._call(cell, (turn, cell, number)) for number in range(calls)]
        batches = [self._batch(cell, (turn, cell, number)) for number in range(calls)]
        masks = [batch.get("attention_mask", np.ones((self._cells[cell][0], 1), np.int64)) for batch in batches]
        size, length = self._cells[cell]
        encodes = length == "data" and self._rows.words is not None
        return {
            "seconds": [total for total, _ in timings], "decode_s": [s for _, rest in timings for s in rest],
            "encode_s": [self._rows.encode(size, (turn, cell, number)) for number in range(calls * encodes)],
            "lengths": [mask_BS.shape[1] for mask_BS in masks], "tokens": sum(int(mask_BS.sum()) for mask_BS in masks),
        }  # fmt: skip

    def _batch(self, cell: int, seed: Sequence[int]) -> dict[str, Array]:
        size, length = self._cells[cell]
        return self._rows.batch(size, length, seed)

    def _call(self, cell: int, seed: Sequence[int]) -> tuple[float, list[float]]:
        """Seconds of a pass over a batch (of a language model, until its first token), and of every further token."""
        inputs = self._batch(cell, seed)
        if self._start is not None:
            inputs[DECODER] = np.full((len(inputs["input_ids"]), 1), self._start, np.int64)
        begin = time.perf_counter()
        logits, cache = self._runner.run(inputs, last=self._language)
        if not self._language:
            return time.perf_counter() - begin, []
        mask_BS = inputs["attention_mask"]
        token_B1 = logits[:, -1].argmax(-1)[:, None]
        seconds = [time.perf_counter() - begin]
        name = "input_ids" if self._start is None else DECODER
        for _ in range(self._new_tokens):
            if self._start is None:
                mask_BS = np.pad(mask_BS, ((0, 0), (0, 1)), constant_values=1)
            begin = time.perf_counter()
            logits, cache = self._runner.run({name: token_B1, "attention_mask": mask_BS}, cache, last=True)
            token_B1 = logits[:, -1].argmax(-1)[:, None]
            seconds.append(time.perf_counter() - begin)
        return seconds[0], seconds[1:]


def _open(spec: dict[str, Any]) -> tuple[Runner, dict[str, Any]]:
    """The model, and what only its loaded weights show."""
    folder, threads = Path(spec["folder"]), spec["threads"]
    if spec["recipe"] is None:
        runner = open_runner(folder, threads)
        if isinstance(runner, TransformersRunner) and spec["compiled"]:
            runner.compile()
        return runner, {}
    import torch

    from distilpeft.machine.runtime import Runtime
    from distilpeft.models import weights
    from distilpeft.models.pair import Pair
    from distilpeft.models.student import load_student
    from distilpeft.models.teacher import load_teacher, load_teacher_unquantized
    from distilpeft.recipe import Recipe

    torch.set_num_threads(threads)
    runtime, pair = Runtime(), Pair(Recipe.model_validate(spec["recipe"]))
    if spec["role"].startswith("teacher"):
        load = load_teacher_unquantized if spec["role"] == "teacher_full_precision" else load_teacher
        model = load(runtime, pair, folder, pair.recipe.evaluate.precision).model
    else:
        model = load_student(runtime, pair, folder).model
    loaded = TransformersRunner(model, caching=spec["language"])
    if spec["compiled"]:
        loaded.compile()
    return loaded, {"num_parameters": weights.num_parameters(model), "size_bytes": weights.size_bytes(model)}


def resident_bytes() -> int:
    """Memory that the process holds now; where the system does not say, the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most memory that the process ever held."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        pass  # getrusage would count what the parent held when it started this process
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gpu_bytes() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


def main() -> None:
    """Answer commands until stdin ends."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # Libraries that print would break the answers: they get stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity") and spec["processors"]:
        os.sched_setaffinity(0, spec["processors"])
    timed = Timed(spec)
    for line in sys.stdin:
        answers.write(json.dumps(timed.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
