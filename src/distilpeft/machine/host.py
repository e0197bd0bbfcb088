"""What this machine is and gives to this process, without torch: names, shares, signals."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from distilpeft.errors import InputError

_WAIT, _OURS = "OMP_WAIT_POLICY", "DISTILPEFT_SET_WAIT_POLICY"
_SHORTEST_S, _LONGEST_S = 1.0, 60.0
"""How long others have to be watched to say how busy they are, and after which time that says nothing of now."""
_start: list[tuple[float, float, float]] = []
"""When this process began: time, `busy_s`, and its own part of it."""


def prepare_imports() -> None:
    """Set what libraries read while they are imported: who may be quiet, and how the threads of torch wait.

    Threads sleep while they wait for each other, unless the user has said how. Spinning costs most of the speed where
    other work keeps a processor busy, and gains little elsewhere (`benchmarks/threads.py`). From now on until the first
    training, `busy_elsewhere` watches what other processes do.
    """
    busy = busy_s()
    if not _start and busy is not None:
        _start.append((time.monotonic(), busy, _own_s()))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it lists every optional kernel that it lacks
    if _WAIT not in os.environ:
        os.environ |= {_WAIT: "passive", _OURS: "1"}


def cpu_info(field: str) -> str:
    """A field of /proc/cpuinfo, or an empty string where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 in hardware; emulated bf16 is several times slower than fp32."""
    flags = cpu_info("flags").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cpu_name() -> str:
    """The processor's model name."""
    return cpu_info("model name") or platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where things are kept that several runs share, such as converted models."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "distilpeft"


def num_cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> str:
    """`num_cpus` in words."""
    count = num_cpus()
    return f"{count} CPU core{'s' if count > 1 else ''}"


def busy_s() -> float | None:
    """Seconds since the start that the processors this process may use were not idle, added up.

    None where the system does not say.
    """
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    busy = 0
    for user, nice, system, _idle, _iowait, irq, softirq, steal in (line[1:9] for line in lines if line[0] in usable):
        busy += sum(map(int, (user, nice, system, irq, softirq, steal)))
    return busy / os.sysconf("SC_CLK_TCK")


def busy_elsewhere() -> float | None:
    """Processors that other programs kept busy since `prepare_imports`, on average; None where that is not known."""
    busy = busy_s()
    if not _start or busy is None:
        return None
    begin, before, own = _start[0]
    elapsed = time.monotonic() - begin
    if not _SHORTEST_S <= elapsed <= _LONGEST_S:
        return None
    return max(0.0, busy - before - (_own_s() - own)) / elapsed


def _own_s() -> float:
    """Seconds of processors that this process took, and its children that have ended."""
    return sum(os.times()[:4])


def is_first_process() -> bool:
    """Whether this is the process that speaks, of those that torchrun or Accelerate have started."""
    return os.environ.get("RANK", "0") == "0"


def gpu_names() -> list[str]:
    """Model names of the NVIDIA GPUs that the driver lists."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]


def gpu_memories() -> list[float]:
    """Bytes of each visible NVIDIA GPU, as the driver's own tool reports; none where there is no such tool."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if not visible_gpus() or shutil.which(command[0]) is None:
        return []
    sizes = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.split()
    return [float(number) * 2**20 for number in sizes if number.isdecimal()][: len(visible_gpus())]


def memory_bytes() -> float:
    """Main memory of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def machine_name() -> str:
    """One line that tells machines with different speed apart."""
    return " + ".join([f"{cpu_name()} x{num_cpus()}", *gpu_names()])


def num_launched() -> int:
    """Processes that torchrun, Accelerate or we have started as one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def alone() -> dict[str, str]:
    """The environment for a process that computes by itself, whatever this one is part of."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in names}


def for_timing() -> dict[str, str]:
    """The environment for a process whose speed is measured: as `alone`, with threads that wait as the user wants."""
    environment = alone()
    if environment.pop(_OURS, None) is not None:
        environment.pop(_WAIT, None)
    return environment


def num_processes(devices: str | int) -> int:
    """How many processes to start for a recipe's `devices`; one if this process was started as one of several.

    Raises:
        InputError: there are fewer GPUs.
    """
    if "RANK" in os.environ or devices == "cpu":
        return 1
    gpus = len(visible_gpus())
    if devices == "auto":
        return max(1, gpus)
    if gpus and int(devices) > gpus:
        raise InputError(f"devices: {devices}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}")
    return int(devices)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES leaves of this machine's NVIDIA GPUs, as it names them."""
    all_of_them = ",".join(map(str, range(len(gpu_names()))))
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", all_of_them).split(",") if name.strip()]


def take_share(index: int, count: int) -> None:
    """Keep to one of `count` equal shares of processors and GPUs; before torch is imported, or it does nothing.

    Thread counts that the user has set stay.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // count)))
    listed = visible_gpus()
    if listed:
        os.environ["CUDA_VISIBLE_DEVICES"] = listed[index % len(listed)]


def join(rank: int, count: int, port: int) -> None:
    """Be one of `count` processes of this machine that compute as one; before torch is imported.

    Thread counts that the user has set stay.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // count)))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` have SIGINT and SIGTERM for the block."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
