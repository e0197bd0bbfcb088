"""The machine under a run: Accelerate, precision, seeds, signals, progress, and a record of the environment.

One `Runtime` per process lives for the whole command; every stage gets it. All human-facing lines go to stderr,
so that stdout stays clean for `--json`.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib import metadata
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from distilpeft.errors import GateError, InputError, StoppedBySignal
from distilpeft.machine.host import cpu_has_bf16, cpu_name, num_launched, on_signals
from distilpeft.recipe.recipe import Parallel
from distilpeft.recipe.training import Precision

T = TypeVar("T")
LINE_EVERY_S = 15.0  # without a terminal, progress is a line this often
ASK_EVERY = 8
"""Batches after which several processes ask each other whether one was told to stop."""
LONGEST_WAIT = timedelta(hours=2)
"""Others wait while the main process exports and measures. A process that dies closes its connections, which is noticed
at once; this is for machines that vanish."""


class Interrupted(Exception):
    """A signal came where work can be left and done again; see `Runtime.interruptible`."""


class Bar:
    """Progress of one long job: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, runtime: Runtime, label: str, total: int, done: int, live: Progress | None) -> None:
        self._runtime, self._label, self._total, self._done, self._live = runtime, label, total, done, live
        self._first = done
        self._begin = self._spoke = time.monotonic()
        self._task = live.add_task(label, total=total, completed=done, note="") if live else None

    def advance(self, count: int, note: str = "") -> None:
        """Say that `count` more units are done; `note` is shown behind the rate."""
        self._done += count
        now = time.monotonic()
        rate = (self._done - self._first) / max(now - self._begin, 1e-9)
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=self._done, note=f"{rate:.1f}/s {note}")
        elif now - self._spoke > LINE_EVERY_S:
            self._spoke = now
            seconds = (self._total - self._done) / max(rate, 1e-9)
            self._runtime.say(f"  {self._label}: {self._done}/{self._total}, {rate:.1f}/s, {seconds:.0f} s left {note}")


class Runtime:
    """One process's view of the machine.

    Args:
        label: put before every line, where several workers speak at once; bars are lines then.
        devices: the recipe's; `cpu` leaves GPUs alone.
        parallel: the recipe's; an `accelerate` configuration with FSDP2 comes first.
        deterministic: the recipe's.

    Raises:
        InputError: the processes were not joined, or by a strategy that there is not.
    """

    def __init__(
        self, label: str = "", *, devices: str | int = "auto", parallel: Parallel = "ddp", deterministic: bool = False
    ) -> None:
        quiet_libraries()
        _repeatable(deterministic)
        # A second copy of all gradients is not needed: DDP's buckets hold the first.
        options = [
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ]
        # Without cpu=True, Accelerate under torchrun on a machine without GPUs runs N lone processes.
        cpu = devices == "cpu" or not torch.accelerator.is_available()
        self.accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=options)
        self.parallel = self._strategy(parallel)
        launched = num_launched()
        if launched != self.accelerator.num_processes:
            raise InputError(
                f"launched as {launched} processes, but Accelerate joined {self.accelerator.num_processes}; "
                "start with torchrun --nproc_per_node N -m distilpeft run RECIPE"
            )
        self._label = label
        self.console = Console(stderr=True, highlight=False, force_terminal=False if label else None)
        self._signal: int | None = None
        self._interruptible = False

    def _strategy(self, parallel: Parallel) -> Parallel:
        """The recipe's strategy, or that of an `accelerate` configuration."""
        strategy = self.accelerator.distributed_type
        if strategy == DistributedType.FSDP:
            if not self.accelerator.is_fsdp2:
                raise InputError("accelerate's configuration asks for FSDP 1; set fsdp_version: 2 in it")
            return "fsdp2"
        if strategy in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise InputError(
                f"accelerate's configuration asks for {strategy.value}, which is not supported; parallel: fsdp2 in the "
                "recipe shards weights, gradients and optimizer as ZeRO-3 does"
            )
        return parallel

    def fsdp_options(self) -> dict[str, Any]:
        """Options of torch's `fully_shard`: those of an `accelerate` configuration, if it has any."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.accelerator.distributed_type != DistributedType.FSDP or plugin is None:
            return {}
        options = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return bool(self.accelerator.is_main_process)

    def say(self, message: str) -> None:
        """Print a line for the user, once over all processes."""
        if self.is_main:
            self.console.print(f"{self._label}{message}", soft_wrap=True, markup=False)

    @contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Show the progress of a job of `total` units, `done` of which were done earlier."""
        if not (self.is_main and self.console.is_terminal):
            yield Bar(self, label, total, done, None)
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=self.console) as live:
            yield Bar(self, label, total, done, live)

    def resolve_precision(self, precision: Precision) -> Precision:
        """Turn `auto` into bf16 where this device computes it in hardware, else fp32.

        Raises:
            InputError: the device has no such precision.
        """
        if precision == "tf32" and self.device.type != "cuda":
            raise InputError(f"precision: tf32 is for NVIDIA GPUs, and this is {device_name(self.device)}; use fp32")
        if precision != "auto":
            return precision
        if self.device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        return "bf16" if cpu_has_bf16() else "fp32"

    def autocast(self, precision: Precision) -> AbstractContextManager[object]:
        """Compute matrix products in bf16, fp16 or TF32, or leave everything in fp32."""
        resolved = self.resolve_precision(precision)
        if resolved == "tf32":
            return _tf32()
        return nullcontext() if resolved == "fp32" else torch.autocast(self.device.type, self.compute_dtype(resolved))

    def compute_dtype(self, precision: Precision) -> torch.dtype:
        """What matrix products are made in."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.resolve_precision(precision), torch.float32)

    def seed(self, *parts: int) -> None:
        """Make random numbers from here on a pure function of `parts` (and the process, where dropout needs it).

        Seeding every step, instead of saving generator states, is what lets a run resume bit for bit.
        """
        value = 0
        for part in parts:
            value = (value * 1_000_003 + part + 1) % (2**63)
        torch.manual_seed(value)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into `stop_requested`; a second one stops at once."""

        def note(number: int, _frame: FrameType | None) -> None:
            if self._signal is not None:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signal = number

        with on_signals(note):
            yield

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let `leave_if_asked` leave the block with `Interrupted`."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def leave_if_asked(self, turn: int) -> None:
        """Leave an interruptible block after a signal; all processes call it equally often, numbered by `turn`.

        Raises:
            Interrupted: on all processes.
        """
        if not self._interruptible:
            return
        if self.accelerator.num_processes > 1 and turn % ASK_EVERY:  # asking takes a round of messages
            return
        if self.any_stop_requested() if self.accelerator.num_processes > 1 else self.stop_requested:
            raise Interrupted

    @property
    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signal is not None

    def any_stop_requested(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        return self.count(self.stop_requested) > 0

    def count(self, what: bool) -> int:
        """Of how many processes it is true; the same answer on all."""
        return int(self.accelerator.reduce(torch.tensor(int(what), device=self.device), "sum"))

    def from_main(self, number: int) -> int:
        """The main process's number, on all processes."""
        return int(broadcast(torch.tensor(number, device=self.device)))

    def value_from_main(self, value: T) -> T:
        """The main process's value, whatever it is, on all processes."""
        theirs: T = broadcast_object_list([value])[0]
        return theirs

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something in the main process alone; every process gets its result, or its fault."""
        result: T | None = None
        fault: Exception | None = None
        if self.is_main:
            try:
                result = work()
            except (InputError, GateError) as error:
                fault = error
        result, fault = self.value_from_main((result, fault))
        if fault is not None:
            raise fault
        return cast("T", result)  # without a fault the main process has one

    def stop(self, where: str) -> None:
        """Leave the run after a checkpoint.

        Raises:
            StoppedBySignal: always; exit code 130 after Ctrl-C, else 75 (try again).
        """
        code = 130 if self._signal == signal.SIGINT else 75
        raise StoppedBySignal(f"stopped {where}; run the same command to resume", code)

    def environment(self) -> dict[str, object]:
        """Versions and hardware, for manifests and reports."""
        names = (
            "distilpeft",
            "torch",
            "transformers",
            "peft",
            "accelerate",
            "bitsandbytes",
            "datasets",
            "evaluate",
        )
        return {
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in names},
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "num_processes": self.accelerator.num_processes,
        }


def _repeatable(deterministic: bool) -> None:
    """Forbid operations that give other bits each time, or allow them; before anything is computed on a GPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass has no deterministic form
    torch.use_deterministic_algorithms(deterministic)
    # Nothing of ours reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def _tf32() -> Iterator[None]:
    """Let float32 matrix products and convolutions keep 10 bits of the mantissa, on NVIDIA GPUs."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def device_name(device: torch.device) -> str:
    """The accelerator's or processor's model name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def quiet_libraries() -> None:
    """Silence progress bars and notices of the libraries underneath; errors still show."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in (
        "bitsandbytes",
        "bitsandbytes.autograd._functions",
        "bitsandbytes.backends.cpu.ops",
        "accelerate",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # transformers' own deprecations between its modules: nothing that a user or we could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
