"""Latency figures of a run in one line per model, for the report, the model cards and the tables of sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """What a model was timed with: one arm of the benchmark."""

    role: str
    device: str
    threads: int
    compiled: bool


def main_place(settings: Sequence[Setting], role: str) -> int | None:
    """Where in a list the arm is that tables show of a role: uncompiled, on the first device, with the most threads."""
    places = [at for at, one in enumerate(settings) if one.role == role and not one.compiled]
    own = [at for at in places if settings[at].device == settings[places[0]].device]
    return max(own, key=lambda at: settings[at].threads) if own else None


def main_arm(found: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """The arm of a benchmark's figures that `main_place` chooses."""
    arms: list[dict[str, Any]] = found["arms"]
    settings = [Setting(arm["role"], arm["device"], int(arm["threads"]), arm["compiled"]) for arm in arms]
    at = main_place(settings, role)
    return None if at is None else arms[at]


def summary(found: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """One line of a role: latency of the smallest batch and throughput of the largest, at the first length.

    `noise` says what speaks against them: the reasons for which the machine was noisy, if it was.
    """
    arm = main_arm(found, role)
    if arm is None:
        return None
    cells = [cell for cell in arm["cells"] if cell["length"] == arm["cells"][0]["length"]]
    one, many = (choose(cells, key=lambda cell: int(cell["batch_size"])) for choose in (min, max))
    return {
        **{name: arm[name] for name in ("memory_bytes", "gpu_memory_bytes", "load_s", "device", "threads")},
        "machine": found["machine"],
        "noise": found["noise"]["why"],
        "latency_ms": one["latency_ms"],
        "latency_batch_size": one["batch_size"],
        "ratio": one["ratio"],
        "decode": one["decode"],
        "throughput_rows_per_s": many["rows_per_s"],
        "tokens_per_s": many["tokens_per_s"],
        "batch_size": many["batch_size"],
        "num_parameters": arm["num_parameters"],
        "size_bytes": arm["size_bytes"],
    }
