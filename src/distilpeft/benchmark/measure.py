"""Latency, throughput and memory of several models, measured so that they can be compared.

Each model runs in a process of its own (`timed`), which is loaded, then warmed until it is steady. After that the
models take turns, round by round, while the others wait: whatever drifts on the machine hits all alike. What counts is
the ratio of two models within a round, its median over the rounds, and a bootstrap interval over them. Calls that took
strangely long stay in, and are counted. What would make the figures doubtful is reported with them.

Torch-free: models live in the children.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distilpeft.benchmark.energy import Meter
from distilpeft.benchmark.ratios import _cell, _ratio, at_pace, paces
from distilpeft.errors import InputError
from distilpeft.machine.host import busy_s, for_timing, machine_name, num_cpus

TURN_S, MOST_CALLS, PAUSE_S = 0.1, 20, 0.05
"""A turn's length; and a rest before it, in which the threads of the model before give up waiting for work, busily."""
MOST_ROUNDS = 4
"""A cell is measured until its ratios are as precise as asked for, but in at most four times the rounds asked for."""
SPREAD, BAND, OTHERS = 0.15, 0.05, 0.1
"""Noisy: the reference's rounds spread over more than 15 % (quartiles), two models of one architecture differ by more
than 5 %, or other processes take more than 10 % of the processors."""
Tell = Callable[[str], None]


class Progress(Protocol):
    """A progress bar."""

    def advance(self, count: int) -> None:
        """Say that `count` more units are done."""


Bar = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Subject:
    """A model to be timed.

    Attributes:
        role: its name in the report.
        folder: the exported folder, or the artifact of the run that it loads from.
        recipe: the run's recipe as plain data; None for an exported folder.
        rows: see `timed.Rows`.
        twin: the name of another of the same architecture and runtime; their ratio tells how far the figures can be
            trusted.
        label: its name where models of several runs are timed.
    """

    role: str
    folder: Path
    recipe: Mapping[str, Any] | None
    rows: Path
    twin: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """What figures are reported under."""
        return self.label or self.role


@dataclass(frozen=True)
class Settings:
    """What is measured of every model: see the recipe's `benchmark`."""

    batch_sizes: Sequence[int]
    lengths: Sequence[int | str]
    devices: Sequence[str]
    threads: Sequence[int]
    rounds: int
    precision: float | None
    new_tokens: int
    compiled: bool
    language: bool

    @property
    def cells(self) -> list[tuple[int, int | str]]:
        """Rows at once and length, in the order in which they are measured: small ones first."""
        return [(size, length) for length in self.lengths for size in self.batch_sizes]


@dataclass
class TimedModel:
    """One model under one setting, in its process.

    Attributes:
        reported: what the process said on loading and memory.
        cells: per cell what warming up showed, and all that was measured.
    """

    subject: Subject
    device: str
    threads: int
    compiled: bool
    ask: Callable[[Mapping[str, Any]], dict[str, Any]]
    close: Callable[[], None]
    reported: dict[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)

    def same_setting(self, other: TimedModel) -> bool:
        """Whether two arms differ in the model only."""
        return (self.device, self.threads) == (other.device, other.threads)


class TimedModelError(Exception):
    """A model could not be loaded or run; the message is its process's last line."""


def measure(subjects: Sequence[Subject], settings: Settings, reference: str, tell: Tell, bar: Bar) -> dict[str, Any]:
    """Time all subjects.

    Args:
        subjects: the models.
        settings: what to measure.
        reference: the name of the subject that ratios are over.
        tell: where progress is reported.
        bar: makes a progress bar.

    Returns:
        The figures that docs/report.md describes under `benchmark`.

    Raises:
        InputError: not even the reference could be loaded.
    """
    meter = Meter()
    skipped: list[dict[str, str]] = []
    arms: list[TimedModel] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for number, setting in enumerate(_settings(subjects, settings, reference)):
                try:
                    _warm(_start(*setting, settings, Path(scratch) / f"{number}.json"), arms, settings, tell)
                except TimedModelError as error:
                    skipped.append({"role": setting[0].name, "why": str(error)})
            busy = _rounds(arms, settings, reference, meter, bar, tell)
        finally:
            for arm in arms:
                arm.close()
    if not any(arm.subject.name == reference for arm in arms):
        why = "; ".join(f"{entry['role']}: {entry['why']}" for entry in skipped)
        raise InputError(f"benchmark: {reference} could not be run ({why})")
    return {
        "machine": machine_name(),
        "reference": reference,
        "rounds": settings.rounds,
        "new_tokens": settings.new_tokens if settings.language else None,
        "energy": meter.sources,
        "noise": _noise(arms, reference, busy, settings.precision),
        "skipped": skipped,
        "arms": [_figures(arm, arms, reference, settings) for arm in arms],
    }


def _settings(subjects: Sequence[Subject], settings: Settings, reference: str) -> list[tuple[Subject, str, int, bool]]:
    """Every model on every device with every number of threads; the reference also compiled, if that is wanted."""
    return [
        (subject, device, threads, compiled)
        for device in settings.devices
        for threads in settings.threads
        for subject in subjects
        for compiled in ((False, True) if settings.compiled and subject.name == reference else (False,))
    ]


def _start(subject: Subject, device: str, threads: int, compiled: bool, settings: Settings, file: Path) -> TimedModel:
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    spec = {
        "folder": str(subject.folder), "recipe": subject.recipe, "role": subject.role, "rows": str(subject.rows),
        "threads": threads, "compiled": compiled, "language": settings.language, "new_tokens": settings.new_tokens,
        "cells": settings.cells, "processors": processors[:threads],
    }  # fmt: skip
    file.write_text(json.dumps(spec), encoding="utf-8")
    environment = {**for_timing(), "OMP_NUM_THREADS": str(threads)}
    if processors:  # else two threads may share a processor for a while
        environment |= {"OMP_PROC_BIND": "true", "OMP_PLACES": ",".join(f"{{{cpu}}}" for cpu in processors[:threads])}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    ask, close = start_process(file, environment)
    return TimedModel(subject, device, threads, compiled, ask, close)


def start_process(
    spec: Path, environment: Mapping[str, str]
) -> tuple[Callable[[Mapping[str, Any]], dict[str, Any]], Callable[[], None]]:
    """Start `timed`; returns how to ask it, and how to end it."""
    words = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by `close`
    child = subprocess.Popen(
        [sys.executable, "-m", "distilpeft.benchmark.model_process", str(spec)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=words, env=dict(environment), text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    output, commands = child.stdout, child.stdin

    def ask(command: Mapping[str, Any]) -> dict[str, Any]:
        try:
            commands.write(json.dumps(command) + "\n")
            commands.flush()
            line = output.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = child.wait()
            words.seek(0)
            last = [text for text in words.read().splitlines() if text.strip()][-1:]
            raise TimedModelError(" ".join((last or [f"its process ended with exit code {code}"])[0].split())[:300])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close() -> None:
        child.kill()
        child.wait()
        output.close()
        with contextlib.suppress(BrokenPipeError):
            commands.close()
        words.close()

    return ask, close


def _warm(arm: TimedModel, arms: list[TimedModel], settings: Settings, tell: Tell) -> None:
    """Load an arm, run every cell until it is steady, and put it among the others."""
    try:
        arm.reported = arm.ask({"do": "load"})
        for cell in range(len(settings.cells)):
            warm = arm.ask({"do": "warm", "cell": cell})
            empty: dict[str, Any] = {name: [] for name in ("rounds", "lengths", "decode", "encode")}
            arm.cells.append({**warm, **empty, "joules": 0.0, "tokens": 0})
        arm.reported |= arm.ask({"do": "memory"})  # before weights are moved about, which takes more
    except BaseException:
        arm.close()
        raise
    arms.append(arm)
    setting = f"{arm.device}, {arm.threads} threads" + (", compiled" if arm.compiled else "")
    calls = sum(cell["warmup_calls"] for cell in arm.cells)
    loaded = f"loaded in {arm.reported['load_s']:.1f} s, warm after {calls} calls"
    tell(f"  benchmark: {arm.subject.name} ({setting}) {loaded}")


def _rounds(
    arms: Sequence[TimedModel], settings: Settings, reference: str, meter: Meter, bar: Bar, tell: Tell
) -> float | None:  # fmt: skip
    """All rounds of all cells; returns the share of the processors that other processes took meanwhile."""
    before, own = busy_s(), sum(arm.ask({"do": "memory"})["cpu_s"] for arm in arms)
    begin, times = time.monotonic(), os.times()
    rng = np.random.default_rng(0)
    cells = list(range(len(settings.cells)))
    with bar("benchmark: rounds", settings.rounds) as progress:
        for turn in range(settings.rounds):
            _round(arms, cells, turn, rng, meter)
            progress.advance(1)
    more = (MOST_ROUNDS - 1) * settings.rounds
    with bar("benchmark: more rounds for precision, at most", more) as progress:
        for turn in range(settings.rounds, settings.rounds + more):
            widest = {cell: max(_widths(arms, reference, cell).values(), default=0.0) for cell in cells}
            wide = [cell for cell in cells if settings.precision is not None and widest[cell] > settings.precision]
            cells = [cell for cell in wide if _is_in_reach(widest[cell], turn, settings)]
            if len(cells) < len(wide):
                tell(
                    f"  benchmark: this machine is too busy or too uneven for ratios within {settings.precision:.0%}; "
                    f"stopped after {turn} rounds"
                )
            if not cells:
                break
            _round(arms, cells, turn, rng, meter)
            progress.advance(1)
    elapsed, end, after = time.monotonic() - begin, os.times(), busy_s()
    if before is None or after is None:
        return None
    own = sum(arm.ask({"do": "memory"})["cpu_s"] for arm in arms) - own
    own += end.user + end.system - times.user - times.system
    return float(max(0.0, (after - before - own) / (max(elapsed, 1e-9) * num_cpus())))


def _round(arms: Sequence[TimedModel], cells: Sequence[int], turn: int, rng: np.random.Generator, meter: Meter) -> None:
    for arm in arms:
        arm.ask({"do": "move"})
    for cell in cells:
        for at in rng.permutation(len(arms)):  # nobody always comes after the same one
            time.sleep(PAUSE_S)
            _turn(arms[at], cell, turn, meter)


def _imprecise(arms: Sequence[TimedModel], reference: str, cell: int, precision: float | None) -> list[str]:
    """The models whose ratio's interval in this cell is wider than wanted, as a share of the ratio."""
    if precision is None:
        return []
    return [name for name, width in _widths(arms, reference, cell).items() if width > precision]


def _widths(arms: Sequence[TimedModel], reference: str, cell: int) -> dict[str, float]:
    """How wide the interval of each model's ratio is in this cell, as a share of the ratio."""
    ratios = {
        arm.subject.name: _ratio(base.cells[cell], arm.cells[cell])
        for arm in arms
        if (base := _base(arm, arms, reference)) is not arm
    }
    return {name: (interval["high"] - interval["low"]) / interval["value"] for name, interval in ratios.items()}


def _is_in_reach(widest: float, turn: int, settings: Settings) -> bool:
    """Whether more rounds can make an interval of this width precise, if widths fall with the root of their number.

    After few rounds a width is a guess itself, so only what is far out of reach is given up before twice the rounds.
    """
    assert settings.precision is not None
    patience = 1 if turn >= 2 * settings.rounds else MOST_ROUNDS
    return turn * (widest / max(settings.precision, 1e-9)) ** 2 <= patience * MOST_ROUNDS * settings.rounds


def _base(arm: TimedModel, arms: Sequence[TimedModel], reference: str) -> TimedModel:
    """The reference under the same setting; without one, the arm itself."""
    return next(
        (peer for peer in arms if peer.subject.name == reference and not peer.compiled and peer.same_setting(arm)), arm
    )


def _turn(arm: TimedModel, cell: int, turn: int, meter: Meter) -> None:
    record = arm.cells[cell]
    calls = max(1, min(MOST_CALLS, round(TURN_S / record["seconds"])))
    before = meter.read()
    answer = arm.ask({"do": "time", "cell": cell, "round": turn, "calls": calls, "seconds": record["seconds"]})
    record["rounds"].append(answer["seconds"])
    record["lengths"].append(answer["lengths"])
    record["decode"].append(answer["decode_s"])
    record["encode"].append(answer["encode_s"])
    record["tokens"] += answer["tokens"]
    if before is not None:
        # Calls that do not count also took energy: the share of those that do is taken for the share of the time.
        record["joules"] += (meter.read() or 0.0) - before


def _figures(arm: TimedModel, arms: Sequence[TimedModel], reference: str, settings: Settings) -> dict[str, Any]:
    base = _base(arm, arms, reference)
    sizes = {name: arm.reported.get(name) for name in ("num_parameters", "size_bytes", "gpu_memory_bytes")}
    return {
        "role": arm.subject.name,
        "device": arm.device,
        "threads": arm.threads,
        "compiled": arm.compiled,
        **sizes,
        **{name: arm.reported[name] for name in ("load_s", "rss_start_bytes", "rss_loaded_bytes", "memory_bytes")},
        "cells": [
            _cell(size, length, arm.cells[at], base.cells[at] if base is not arm else None)
            for at, (size, length) in enumerate(settings.cells)
        ],
    }


def _noise(arms: Sequence[TimedModel], reference: str, busy: float | None, precision: float | None) -> dict[str, Any]:
    """What speaks against the figures, in words too."""
    if not arms:
        return {}
    base = next((arm for arm in arms if arm.subject.name == reference), arms[0])
    first = base.cells[0]
    q1, middle, q3 = np.percentile(paces(first["rounds"], first["lengths"]), [25, 50, 75])
    spread = float((q3 - q1) / middle)
    twin = next((arm for arm in arms if arm.subject.twin == reference and arm.same_setting(base)), None)
    same = _ratio(base.cells[0], twin.cells[0])["value"] if twin else None
    unsteady = [arm.subject.name for arm in arms if not all(cell["stable"] for cell in arm.cells)]
    disturbed = 1 - float(
        np.mean([at_pace(cell["rounds"], cell["lengths"]).mean() for arm in arms for cell in arm.cells])
    )
    wide = {name for cell in range(len(base.cells)) for name in _imprecise(arms, reference, cell, precision)}
    why = []
    if spread > SPREAD:
        why.append(f"the {reference}'s latency moved by {spread:.0%} between rounds (quartiles)")
    if same is not None and twin is not None and abs(same - 1) > BAND:
        why.append(f"{twin.subject.name}, of the same architecture as the {reference}, seemed {same:.2f}x as fast")
    if busy is not None and busy > OTHERS:
        why.append(f"other processes took {busy:.0%} of the processors")
    if wide:
        why.append(f"not all ratios became as precise as asked for ({', '.join(sorted(wide))})")
    return {
        "noisy": bool(why), "why": why, "spread": round(spread, 4), "same_model_ratio": same, "others": busy,
        "disturbed": round(disturbed, 4), "unsteady": unsteady,
    }  # fmt: skip


def threads_of(counts: Sequence[int] | None) -> list[int]:
    """Numbers of threads to measure with: those asked for, or as many as there are processors.

    Raises:
        InputError: more than there are.
    """
    limit = num_cpus()
    for count in counts or ():
        if count > limit:
            raise InputError(f"benchmark.threads: {count} threads asked for, but this process has {limit} processors")
    return list(counts) if counts else [limit]
