"""Parts of a report that are measured: scores, sizes and latency; see `schema` for the report itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from distilpeft.metrics.timings import Setting, main_place

Figure = int | float
"""A number that is written as it was read: 5 stays 5, and 5.0 stays 5.0."""


class Part(BaseModel):
    """Base of everything in a report: immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", defer_build=True)

    def as_json(self) -> dict[str, Any]:
        """The JSON object of this part; keys that were not given are left out."""
        return self.model_dump(mode="json", exclude_unset=True)


class Score(Part):
    """A metric with its 95 % interval, and the rows or tokens that it was measured on."""

    value: Figure
    low: Figure | None = None
    high: Figure | None = None
    num_rows: int | None = None


class Latency(Part):
    """Milliseconds of one call."""

    p50: Figure
    p90: Figure | None = None
    p95: Figure
    p99: Figure | None = None
    mean: Figure | None = None
    max: Figure | None = None


class Ratio(Part):
    """How many times as fast as another model, with its 95 % interval."""

    value: Figure
    low: Figure
    high: Figure
    rounds: int | None = None
    of_all_rounds: Figure | None = None


class TokenTimes(Part):
    """Milliseconds per generated token."""

    p50: Figure
    p95: Figure | None = None


class Decode(Part):
    """The speed of the tokens after the first."""

    ms_per_token: TokenTimes
    tokens_per_s: Figure | None = None


class Cell(Part):
    """What was measured for one batch size and one length."""

    batch_size: int
    length: int | str
    mean_tokens: Figure | None = None
    num_calls: int | None = None
    warmup_calls: int | None = None
    stable: bool | None = None
    first_call_ms: Figure | None = None
    memory_bytes: Figure | None = None
    latency_ms: Latency | None = None
    outliers: int | None = None
    round_ms: tuple[Figure, ...] = ()
    rows_per_s: Figure | None = None
    tokens_per_s: Figure | None = None
    decode: Decode | None = None
    ratio: Ratio | None = None
    decode_ratio: Ratio | None = None
    joules_per_row: Figure | None = None


class Arm(Part):
    """One model under one setting, in a process of its own."""

    role: str
    device: str
    threads: int
    compiled: bool = False
    num_parameters: int | None = None
    size_bytes: Figure | None = None
    gpu_memory_bytes: Figure | None = None
    load_s: Figure | None = None
    rss_start_bytes: Figure | None = None
    rss_loaded_bytes: Figure | None = None
    memory_bytes: Figure | None = None
    cells: tuple[Cell, ...] = ()


class Noise(Part):
    """How far the benchmark's figures can be trusted."""

    noisy: bool = False
    why: tuple[str, ...] = ()
    spread: Figure | None = None
    same_model_ratio: Figure | None = None
    others: Figure | None = None
    disturbed: Figure = 0
    unsteady: tuple[str, ...] = ()


class Skipped(Part):
    """A model that could not be timed, and why."""

    role: str
    why: str


class Benchmark(Part):
    """Latency, throughput and memory of all models; docs/benchmark.md describes the figures."""

    machine: str | None = None
    reference: str
    rounds: int
    new_tokens: int | None = None
    energy: tuple[str, ...] = ()
    noise: Noise = Noise()
    skipped: tuple[Skipped, ...] = ()
    arms: tuple[Arm, ...] = ()

    def main_arm(self, role: str) -> Arm | None:
        """The arm that tables show for a role; see `main_place`."""
        at = main_place([Setting(arm.role, arm.device, arm.threads, arm.compiled) for arm in self.arms], role)
        return None if at is None else self.arms[at]
