"""Run the command line inside this process, or in processes of its own.

A process of its own is forked from a server that has the libraries imported and nothing else done (see preloaded.py):
real enough to be killed, and without the seconds that importing torch costs each time.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import hashlib
import importlib
import io
import json
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from unittest import mock

import hypothesis  # noqa: F401 - its plugin for pytest looks for objects that `gc.freeze` hides
import torch
import yaml

from distilpeft import cli
from distilpeft.benchmark import measure
from distilpeft.export import gate
from distilpeft.export.formats import onnx_graph
from distilpeft.report.plots import plot_files
from support import tiny, tiny_lm

TESTS = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
CONTEXT = multiprocessing.get_context
FORKS.set_forkserver_preload(["support.preloaded"])
VERSION = functools.cache(metadata.version)
WRITE_GRAPH = onnx_graph.write
GRAPHS = Path(tempfile.mkdtemp(prefix="distilpeft-graphs-"))
atexit.register(shutil.rmtree, GRAPHS, ignore_errors=True)
BRIEF = (
    ("distilpeft.benchmark.measure.PAUSE_S", 0.0),
    ("distilpeft.benchmark.measure.MOST_CALLS", 1),
    ("distilpeft.benchmark.model_process.WARM_CALLS", 2),
    ("distilpeft.benchmark.model_process.QUICK_S", 0.0),
    ("distilpeft.benchmark.model_process.FAST_S", 0.0),
    ("distilpeft.benchmark.model_process.SLOW_S", 0.0),
)
"""The benchmark with one call per turn; tests/unit/benchmark and test_benchmark.py take all of them."""


@dataclass
class Done:
    """How a process ended: its exit code (minus the signal's number if it was killed) and all it printed."""

    returncode: int
    output: str


def workspace(folder: Path, count: int = 200, noise: float = 0.0, **changes: object) -> Path:
    """A base model, rows and a recipe in `folder`; returns the recipe's path."""
    if not (folder / "base").exists():
        tiny.save_pretrained(folder / "base")
        tiny.write_csv(folder / "rows.csv", count, noise=noise)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny.recipe_tree(folder, **changes)))
    return path


def language_workspace(folder: Path, **targets: object) -> Path:
    """The same for a language model, with these settings of `targets`; for plans: nothing is computed with it."""
    if not (folder / "base").exists():
        tiny_lm.model().save_pretrained(str(folder / "base"))
        tiny_lm.tokenizer().save_pretrained(str(folder / "base"))
        tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(20))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_lm.recipe_tree(folder, targets=targets)))
    return path


def arguments_of(recipe: Path, arguments: Sequence[str], verb: str = "run") -> list[str]:
    return ["distilpeft", verb, str(recipe), "--runs", str(recipe.parent / "runs"), *arguments]


def answer_here(folder: Path, calls: Path, out: Path) -> str | None:
    """`parity.answered` without the seconds that a process of its own takes to import; test_export.py takes those."""
    from distilpeft.export import gate_process

    try:
        gate_process.answer(folder, calls, out)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def answer_apart(folder: Path, calls: Path, out: Path) -> str | None:
    """The same in a forked process: nothing of the one that wrote the files can help to read them."""
    done = python("-m", "distilpeft.export.gate_process", str(folder), str(calls), str(out))
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else " ".join((lines or [f"exit code {done.returncode}"])[-1].split())[:300]


def write_graph(model: torch.nn.Module, file: Path, **options: object) -> None:
    """`onnx_graph.write`, which traces a model again only if its weights or the options are others: that takes seconds.

    `onnx` and `onnx-int8` of a run begin with the same graph; tests/parity/test_onnx.py takes the function itself.
    """
    digest = hashlib.sha256(repr((model.config.to_dict(), file.name, sorted(options.items()))).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    kept = GRAPHS / digest.hexdigest()
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=GRAPHS) as scratch:
            WRITE_GRAPH(model, Path(scratch) / file.name, **options)
            shutil.copytree(scratch, kept)
    shutil.copytree(kept, file.parent, dirs_exist_ok=True)


def start_here(spec: Path, environment: dict[str, str]) -> tuple[object, object]:
    """`timing.start_process` likewise: the model in this very process."""
    from distilpeft.benchmark.measure import TimedModelError
    from distilpeft.benchmark.model_process import Timed

    del environment
    loaded: list[Timed] = []

    def ask(command: dict[str, object]) -> dict[str, object]:
        try:
            if not loaded:
                # with another number of threads, what is trained later would sum in another order
                loaded.append(Timed({**json.loads(spec.read_text()), "threads": torch.get_num_threads()}))
            return json.loads(json.dumps(loaded[0].answer(json.loads(json.dumps(command)))))
        except Exception as error:
            raise TimedModelError(f"{type(error).__name__}: {error}") from None

    return ask, loaded.clear


def run(
    recipe: Path, *arguments: str, verb: str = "run", own_process: bool = False, apart: bool = False, brief: bool = True
) -> int:
    """`distilpeft run` (or another verb) in this process; returns the exit code; for the options see `call`."""
    return call(arguments_of(recipe, arguments, verb), own_process=own_process, apart=apart, brief=brief)


def call(argv: Sequence[str], *, own_process: bool = False, apart: bool = False, brief: bool = True) -> int:
    """The command line in this process; returns the exit code.

    `own_process`: let the gate of exports start one, as it does outside of tests. `apart`: let it fork one. Those of
    the benchmark are in test_benchmark.py. `brief`: see `BRIEF`.
    """
    gc.freeze()  # Accelerate collects garbage after every training, and the libraries' objects are many
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(sys, "argv", list(argv)))
        patches.enter_context(mock.patch("distilpeft.benchmark.measure.start_process", start_here))
        patches.enter_context(mock.patch("importlib.metadata.version", VERSION))
        patches.enter_context(mock.patch("distilpeft.export.formats.onnx_graph.write", write_graph))
        patches.enter_context(mock.patch("multiprocessing.get_context", forks))
        patches.enter_context(
            mock.patch("distilpeft.report.plots.plot_files.available", return_value=False)
        )  # seconds for each run
        for name, value in BRIEF if brief else BRIEF[:1]:
            patches.enter_context(mock.patch(name, value))
        if not own_process:
            patches.enter_context(mock.patch("distilpeft.export.gate.answered", answer_apart if apart else answer_here))
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


def forks(method: str | None = None) -> multiprocessing.context.BaseContext:
    """Processes of `devices` and `--jobs`, forked as well; tests/unit/machine/test_processes.py spawns them."""
    if method != "spawn":
        return CONTEXT(method)
    ensure_server()
    return FORKS


def run_apart(recipe: Path, *arguments: str, before: str = "", verb: str = "run") -> Done:
    """`distilpeft run` (or another verb) in a process of its own, after the Python statements `before`."""
    return apart([(recipe.parent / "output.txt", arguments_of(recipe, arguments, verb), before, {})])[0]


def signal_at(label: str, step: int, signal: str) -> str:
    """Statements that make the process send itself a signal when `label`'s training has logged `step`."""
    return f"""
import os, signal
import distilpeft.training.train as loop
log = loop._log
def log_then_signal(runtime, work, line):
    log(runtime, work, line)
    if work.label == {label!r} and line["step"] == {step}:
        os.kill(os.getpid(), signal.{signal})
loop._log = log_then_signal
"""


def joined(recipe: Path, processes: int, *arguments: str, verb: str = "run", before: str = "") -> list[Done]:
    """`distilpeft run` (or another verb) as processes joined as torchrun joins them, after the statements `before`."""
    argv = arguments_of(recipe, arguments, verb)
    return apart([(recipe.parent / f"output{i}.txt", argv, before, ranks) for i, ranks in ranked(processes)])


def side_by_side(recipe: Path, *arguments: str, verb: str, count: int = 2) -> list[Done]:
    """The same command several times at once, as from several terminals."""
    argv = arguments_of(recipe, arguments, verb)
    return apart([(recipe.parent / f"output{i}.txt", argv, "", {}) for i in range(count)])


def ranked(processes: int) -> list[tuple[int, dict[str, str]]]:
    """The environment that torchrun would give each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [(rank, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]


def run_script(script: Path, settings: dict[str, object], folder: Path, processes: int) -> dict[str, object]:
    """Run `script SETTINGS.json OUT.json` as joined processes."""
    (folder / "settings.json").write_text(json.dumps(settings))
    argv = [str(script), str(folder / "settings.json"), str(folder / "out.json")]
    done = apart([(folder / f"output{rank}.txt", argv, "", ranks) for rank, ranks in ranked(processes)])
    assert all(one.returncode == 0 for one in done), "\n".join(one.output[-2000:] for one in done)
    return json.loads((folder / "out.json").read_text())


def torchrun(script: Path, settings: dict[str, object], folder: Path, processes: int) -> dict[str, object]:
    """The same through the real launcher."""
    (folder / "settings.json").write_text(json.dumps(settings))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    paths = [str(folder / "settings.json"), str(folder / "out.json")]
    done = subprocess.run(
        [*launcher, str(script), *paths],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def predict(*arguments: str, lines: str | None = None) -> subprocess.CompletedProcess[str]:
    """`distilpeft predict` in a forked process."""
    return python("-m", "distilpeft", "predict", *arguments, stdin=lines)


def python(
    *arguments: str, stdin: str | None = None, folder: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` (`-m MODULE ...`, `-c CODE` or a file) in `folder`, forked with the libraries imported."""
    with tempfile.TemporaryDirectory() as scratch:
        streams = [Path(scratch) / name for name in ("in", "out", "err")]
        streams[0].write_text(stdin or "", encoding="utf-8")
        process = started(_interpret, (streams, list(arguments), folder or Path.cwd(), environment or {}))
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
        output, errors = (stream.read_text(encoding="utf-8") for stream in streams[1:])
    return subprocess.CompletedProcess(list(arguments), process.exitcode, output, errors)


def started(target: Callable[..., None], arguments: Sequence[object]) -> multiprocessing.process.BaseProcess:
    """A process that is forked from the server, which is started if there is none."""
    ensure_server()
    process = FORKS.Process(target=target, args=tuple(arguments))
    process.start()
    return process


def ensure_server() -> None:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": path}):  # the server does not take the path of this process
        multiprocessing.forkserver.ensure_running()


def stop_server() -> None:
    """Let the next process start a new server, which hands down the streams of that moment."""
    multiprocessing.forkserver._forkserver._stop()


def apart(commands: Sequence[tuple[Path, list[str], str, dict[str, str]]]) -> list[Done]:
    """Run commands side by side: (file for the output, argv, statements before, environment)."""
    processes = [started(_child, command) for command in commands]
    for process in processes:
        process.join(timeout=300)
    return [
        Done(process.exitcode, command[0].read_text()) for process, command in zip(processes, commands, strict=True)
    ]


def alone() -> None:
    """The command line with this process's arguments, without further processes for the gate and the benchmark."""
    gate.answered = answer_here
    measure.start_process = start_here
    for name, value in BRIEF:
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    plot_files.available = bool
    cli.main()


def _child(output: Path, argv: list[str], before: str, environment: dict[str, str]) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    sys.argv = argv
    exec(before, {})
    if argv[0].endswith(".py"):
        runpy.run_path(argv[0], run_name="__main__")
    else:
        alone()


def _interpret(streams: Sequence[Path], argv: list[str], folder: Path, environment: dict[str, str]) -> None:
    """What the interpreter does with its arguments."""
    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
    raw = io.FileIO(0, closefd=False)
    raw.name = "<stdin>"
    sys.stdin = io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8")
    os.environ.update(environment)
    os.chdir(folder)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *argv[2:]], [""]
        exec(argv[1], {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
