"""How much faster several processes are than one, where the time goes, and what a model of it says of larger machines.

    python benchmarks/scaling.py            # sentiment_reviews' distil stage in 1, 2 and 4 processes of one thread
    python benchmarks/scaling.py --table    # Markdown from the result file, and into docs/devices.md

Takes teacher and soft targets from runs/sentiment_reviews and makes them first where they are missing. Every launch
runs the loop's own optimizer_step on the stage's own student, rows and loss, in turns with the same step without
reduction of gradients (DDP's no_sync), whose difference is the communication that is not hidden. Launches take turns.

The paper model. With R rows a step on n processes:

    seconds(n) = (fixed + R / n * per_row) * max(1, n / cores) + what is not hidden of communicate(n)
    communicate(n) = 2 (n - 1) / n * gradient bytes / bandwidth + 2 (n - 1) * latency        (ring all-reduce)

fixed and per_row come from single processes with R, R/2 and R/4 rows, bandwidth and latency from a large and a small
all-reduce between two processes. gloo's threads share the cores with the computation, so nothing is hidden on CPUs; on
GPUs, as much as the student's backward pass takes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import page

RESULT = Path(__file__).parent / "results" / "scaling_cpu.json"
PAGE = Path(__file__).parent.parent / "docs" / "devices.md"
PROCESSES = (1, 2, 4)
NUM_BYTES = {"small": 4, "large": 32 << 20}
WARM = 3
FOUND: dict[str, Any] = {}


class Enough(Exception):
    """All steps were timed; holds what was found."""


def worker(options: argparse.Namespace) -> None:
    """One of several processes: time steps of the distil stage, and all-reduces."""
    import torch
    import torch.distributed as dist

    from distilpeft.pipeline import chain
    from distilpeft.pipeline.stages import distil
    from distilpeft.planning.plan import make_plan
    from distilpeft.planning.roles import STUDENT
    from distilpeft.recipe.yaml_file import load_recipe

    torch.set_num_threads(1)
    plan = make_plan(load_recipe(Path(options.recipe), options.set), Path(options.runs))
    runtime = chain.runtime_of(plan.recipe)
    made = plan.artifacts
    steps = functools.partial(time_steps, options)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(distil, "train", steps):
        out = mock.Mock(partial=Path(folder), path=Path(folder) / made[f"distil/{STUDENT}"].path.name)
        with contextlib.suppress(Enough):
            distil.run(
                chain.StepRunner(plan, runtime).context, role="student",
                teacher=made["teacher"], targets=made["targets"].path, out=out,
            )  # fmt: skip
    found = {"processes": runtime.accelerator.num_processes, **FOUND}
    if dist.is_initialized():
        found |= {f"reduce_{name}": reduced(torch.zeros(size // 4)) for name, size in NUM_BYTES.items()}
    if runtime.is_main:
        options.worker.write_text(json.dumps(found))


def time_steps(options: argparse.Namespace, runtime: Any, model: Any, work: Any) -> None:
    """In place of the loop: its steps one by one, as they come; then once more, with and without reduction in turns."""
    from distilpeft.data.batches import epoch_batches
    from distilpeft.models import parallel
    from distilpeft.training import step

    wrapped, optimizer = parallel.wrap(runtime, model), step.make_optimizer(model, work.optim)
    batches = epoch_batches(work.lengths_N, work.fit.batch_size, work.seed, 0)
    rows = work.fit.batch_size // options.divide
    alone = mock.patch.object(step, "no_sync", lambda wrapped, last: no_reduction(wrapped))
    ways: dict[str, Any] = {"with": contextlib.nullcontext(), "without": alone}
    times: dict[str, list[float]] = {name: [] for name in ("first", *ways)}

    def take(number: int, name: str) -> None:
        runtime.accelerator.wait_for_everyone()
        begin = time.perf_counter()
        step.optimizer_step(runtime, wrapped, optimizer, batches[number][:rows], work, 5)
        times[name].append(time.perf_counter() - begin)

    for number in range(options.steps + WARM):
        take(number, "first")
    for number in range(options.steps + WARM):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            with ways[name]:
                take(number, name)
    FOUND.update({name: found[WARM:] for name, found in times.items()})
    FOUND.update(parallel=parallel.kind(wrapped), rows=rows, precision=runtime.resolve_precision("auto"))
    FOUND["gradient_bytes"] = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    raise Enough


def no_reduction(wrapped: Any) -> Any:
    return wrapped.no_sync() if hasattr(wrapped, "no_sync") else contextlib.nullcontext()


def reduced(tensor: Any, repeats: int = 20) -> float:
    """Median seconds of an all-reduce."""
    import torch.distributed as dist

    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def launch(options: argparse.Namespace, processes: int, divide: int = 1) -> dict[str, Any]:
    """What so many processes of one thread found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        script = [__file__, "--worker", str(out), "--recipe", str(options.recipe), "--runs", str(options.runs)]
        script += ["--steps", str(options.steps), "--divide", str(divide)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), *script]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
    assert found["processes"] == processes, "the launcher did not start the processes it was asked for"
    assert found["parallel"] == ("ddp" if processes > 1 else "one process")
    print(
        f"{processes} processes, {found['rows']} rows: {statistics.mean(found['first']):.3f} s a step; once more "
        f"{statistics.mean(found['with']):.3f} s, without reduction {statistics.mean(found['without']):.3f} s",
        file=sys.stderr,
    )
    return found


def run(options: argparse.Namespace) -> None:
    subprocess.run(
        [sys.executable, "-m", "distilpeft", "run", options.recipe, "--runs", options.runs, "--until", "targets"],
        check=True,
    )
    launches = []
    for _ in range(options.repeats):
        launches += [launch(options, processes) for processes in PROCESSES]
    singles = [launch(options, 1, divide) for divide in (2, 4)]
    result = {"environment": environment(launches[0]), "launches": launches, "singles": singles}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"results in {RESULT}", file=sys.stderr)


def environment(found: dict[str, Any]) -> dict[str, Any]:
    import platform
    from importlib import metadata

    from distilpeft.machine.host import cpu_name, num_cpus

    return {
        "device": cpu_name(), "cores": num_cpus(), "threads_per_process": 1, "precision": found["precision"],
        "python": platform.python_version(), "versions": {n: metadata.version(n) for n in ("torch", "accelerate")},
    }  # fmt: skip


def seconds(launches: list[dict[str, Any]], processes: int, name: str = "first") -> float:
    """Mean of a launch's steps, whose rows differ in length but are the same in every launch; median of launches."""
    return statistics.median(statistics.mean(one[name]) for one in launches if one["processes"] == processes)


class Paper:
    """The model in the module's docstring, with what was measured here."""

    def __init__(self, result: dict[str, Any]) -> None:
        launches, self.cores = result["launches"], result["environment"]["cores"]
        self.rows = launches[0]["rows"]
        points = [(self.rows, seconds(launches, 1))]
        points += [(one["rows"], statistics.mean(one["first"])) for one in result["singles"]]
        mean_rows, mean_s = (statistics.mean(values) for values in zip(*points, strict=True))
        above = sum((rows - mean_rows) * (s - mean_s) for rows, s in points)
        self.per_row = above / sum((rows - mean_rows) ** 2 for rows, _ in points)
        self.fixed = max(0.0, mean_s - self.per_row * mean_rows)
        two = [one for one in launches if one["processes"] == 2]
        small, large = (statistics.median(one[f"reduce_{name}"] for one in two) for name in NUM_BYTES)
        self.latency = small / 2
        self.bandwidth = NUM_BYTES["large"] / max(large - small, 1e-9)
        self.gradient_bytes = launches[0]["gradient_bytes"]

    def compute(self, processes: int) -> float:
        """Seconds of a step's computation."""
        return (self.fixed + self.rows / processes * self.per_row) * max(1.0, processes / self.cores)

    def communicate(self, processes: int) -> float:
        """Seconds of a step's all-reduce."""
        return ring(processes, self.gradient_bytes, self.bandwidth, self.latency)


def ring(processes: int, num_bytes: float, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all-reduce."""
    if processes == 1:
        return 0.0
    return 2 * (processes - 1) / processes * num_bytes / bandwidth + 2 * (processes - 1) * latency


GPU = {
    "peak": 989e12,  # H100 SXM, dense bf16 (NVIDIA's data sheet)
    "used": 0.4,  # share of it that training reaches
    "nvlink": 360e9,  # bytes/s of an all-reduce inside a node: 80 % of 450 GB/s a direction
    "network": 40e9,  # bytes/s for each GPU between nodes: 80 % of 400 Gbit/s
    "latency": 10e-6,
}
PAIRS = {"7B nf4 → 0.5B, online": (0.5e9, 7.6e9), "7B → 0.5B, cached": (0.5e9, 0.0), "8B → 3B, cached": (3e9, 0.0)}


def predicted(student: float, teacher: float, gpus: int, tokens: int = 8192) -> tuple[float, float]:
    """(efficiency, seconds a step) with `tokens` on each GPU: 6 student + 2 teacher operations a token (2001.08361)."""
    operations = tokens * (6 * student + 2 * teacher)
    compute = operations / (GPU["peak"] * GPU["used"])
    backward = tokens * 4 * student / (GPU["peak"] * GPU["used"])
    bandwidth = GPU["nvlink"] if gpus <= 8 else GPU["network"]
    exposed = max(0.0, ring(gpus, 4 * student, bandwidth, GPU["latency"]) - backward)
    return compute / (compute + exposed), compute + exposed


def table() -> str:
    result = json.loads(RESULT.read_text())
    launches, where, paper = result["launches"], result["environment"], Paper(result)
    lines = ["| processes | rows/s | against one | reduction of gradients | paper model |", "| --- " * 5 + "|"]
    for processes in PROCESSES:
        step = seconds(launches, processes)
        ratios = [
            seconds(launches[i : i + len(PROCESSES)], 1) / seconds(launches[i : i + len(PROCESSES)], processes)
            for i in range(0, len(launches), len(PROCESSES))
        ]
        share = 1 - seconds(launches, processes, "without") / seconds(launches, processes, "with")
        modelled = paper.compute(processes) + paper.communicate(processes)
        lines.append(
            f"| {processes} | {paper.rows / step:.1f} | {statistics.median(ratios):.2f} x ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {max(0.0, share):.1%} of the step | {paper.rows / modelled:.1f} rows/s |"
        )
    lines += [
        "",
        f"The distil stage of sentiment_reviews, {paper.rows} rows a step, on {where['device']} with {where['cores']} "
        "cores, "
        f"one thread a process, {where['precision']}, torch {where['versions']['torch']}. Measured for the model: "
        f"{paper.fixed * 1e3:.0f} ms + {paper.per_row * 1e3:.1f} ms a row; all-reduce {paper.bandwidth / 1e9:.2f} GB/s "
        f"and {paper.latency * 1e6:.0f} µs between two processes; {paper.gradient_bytes / 1e6:.0f} MB of gradients.",
        "",
        "| pair | GPUs | step | efficiency |",
        "| --- | --- | --- | --- |",
    ]
    for name, (student, teacher) in PAIRS.items():
        for gpus in (8, 64):
            efficiency, step = predicted(student, teacher, gpus)
            lines.append(f"| {name} | {gpus} | {step * 1e3:.0f} ms | {efficiency:.0%} |")
    lines += [
        "",
        f"Predictions, not measurements: 8,192 tokens on each H100, {GPU['used']:.0%} of its 989 Tflop/s, gradients in "
        f"float32, {GPU['nvlink'] / 1e9:.0f} GB/s inside a node, {GPU['network'] / 1e9:.0f} GB/s a GPU between nodes.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/sentiment_reviews.yaml")
    parser.add_argument("--runs", default="runs")
    for name, default in (("--steps", 30), ("--repeats", 3), ("--divide", 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.worker:
        worker(options)
    elif options.table:
        page.insert(PAGE, "scaling", table())
        print(table())
    else:
        run(options)


if __name__ == "__main__":
    main()
