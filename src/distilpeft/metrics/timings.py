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
    places = [at for at, setting in enumerate(settings) if setting.role == role and not setting.compiled]
    own = [at for at in places if settings[at].device == settings[places[0]].device]
    return max(own, key=lambda at: settings[at].threads) if own else None


def main_arm(figures: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """The arm of a benchmark's figures that `main_place` chooses."""
    arms: list[dict[str, Any]] = figures["arms"]
    settings = [Setting(arm["role"], arm["device"], int(arm["threads"]), arm["compiled"]) for arm in arms]
    at = main_place(settings, role)
    return None if at is None else arms[at]


def summary(figures: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """One line of a role: latency of the smallest batch and throughput of the largest, at the first length.

    `noise` says what speaks against them: the reasons for which the machine was noisy, if it was.
    """
    arm = main_arm(figures, role)
    if arm is None:
        return None
    cells = [cell for cell in arm["cells"] if cell["length"] == arm["cells"][0]["length"]]
    single, many = (choose(cells, key=lambda cell: int(cell["batch_size"])) for choose in (min, max))
    return {
        **{name: arm[name] for name in ("memory_bytes", "gpu_memory_bytes", "load_s", "device", "threads")},
        "machine": figures["machine"],
        "noise": figures["noise"]["why"],
        "latency_ms": single["latency_ms"],
        "latency_batch_size": single["batch_size"],
        "ratio": single["ratio"],
        "decode": single["decode"],
        **_from_text(single, many),
        "throughput_rows_per_s": many["rows_per_s"],
        "tokens_per_s": many["tokens_per_s"],
        "batch_size": many["batch_size"],
        "num_parameters": arm["num_parameters"],
        "size_bytes": arm["size_bytes"],
    }


def _from_text(single: Mapping[str, Any], many: Mapping[str, Any]) -> dict[str, Any]:
    """The same figures with the texts' encoding, where that was measured."""
    one, most = single.get("from_text"), many.get("from_text")
    return {
        "text_latency_ms": None if one is None else one["latency_ms"],
        "text_rows_per_s": None if most is None else most["rows_per_s"],
    }
