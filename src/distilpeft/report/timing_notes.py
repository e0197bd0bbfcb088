"""How latencies were measured, and what speaks against them, in words."""

from __future__ import annotations

from distilpeft.report.figures import Benchmark

MANY = 0.2
"""Share of slow rounds from which on it is reported."""


def timing_notes(benchmark: Benchmark) -> list[str]:
    """How latency was measured, what speaks against it, and what was not timed."""
    return [how_timed(benchmark), *doubts(benchmark), *untimed(benchmark)]


def how_timed(benchmark: Benchmark) -> str:
    """How latency, throughput and memory were measured."""
    arm = benchmark.main_arm(benchmark.reference)
    assert arm is not None, "ratios are over the reference"
    sizes = [cell.batch_size for cell in arm.cells]
    language = benchmark.new_tokens is not None
    most = max(len(cell.round_ms) for cell in arm.cells)
    rounds = f"{benchmark.rounds} to {most}" if most > benchmark.rounds else str(most)
    unit = "the first token after a prompt" if language else "a pass"
    twice = benchmark.noise.same_model_ratio
    alike = f"; two models of the same architecture differed by {abs(twice - 1):.1%}" if twice is not None else ""
    return (
        f"Latency: {unit} over {counted(min(sizes), 'row')}; throughput: {counted(max(sizes), 'row')} at once. "
        f"Every model ran in a process of its own on {counted(arm.threads, 'thread')}, in turns over {rounds} rounds"
        f"{alike}. Memory: the most that its process held."
    )


def counted(count: int | None, noun: str, plural: str = "") -> str:
    """A number and what it counts."""
    return f"{'–' if count is None else count} {noun if count == 1 else plural or f'{noun}s'}"


def untimed(benchmark: Benchmark | None) -> list[str]:
    """The models that could not be timed, and why."""
    return [f"{model.role} was not timed: {model.why}." for model in benchmark.skipped] if benchmark else []


def doubts(benchmark: Benchmark | None) -> list[str]:
    """What speaks against the latencies, to be read next to them."""
    if benchmark is None:
        return []
    noise, lines = benchmark.noise, []
    if noise.disturbed > MANY:
        lines.append(
            f"In {noise.disturbed:.0%} of rounds a model ran at least 20% slower than usual. Latencies include those "
            "rounds; ratios exclude them."
        )
    if noise.noisy:
        lines.append(
            f"The machine was noisy while latencies were measured: {'; '.join(noise.why)}. Measure again before you "
            "rely on small differences."
        )
    return lines
