"""Latency figures of a run as the report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def main_arm(found: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """The arm that tables show of a role: uncompiled, on the first device, with the most threads."""
    arms = [arm for arm in found["arms"] if arm["role"] == role and not arm["compiled"]]
    own = [arm for arm in arms if arm["device"] == arms[0]["device"]]
    return max(own, key=lambda arm: int(arm["threads"])) if own else None


def summary(found: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """One line of a role: latency of the smallest batch and throughput of the largest, at the first length."""
    arm = main_arm(found, role)
    if arm is None:
        return None
    cells = [cell for cell in arm["cells"] if cell["length"] == arm["cells"][0]["length"]]
    one, many = (choose(cells, key=lambda cell: int(cell["batch_size"])) for choose in (min, max))
    return {
        **{name: arm[name] for name in ("memory_bytes", "gpu_memory_bytes", "load_s", "device", "threads")},
        "machine": found["machine"],
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
