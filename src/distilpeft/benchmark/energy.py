"""Joules that the processors and GPUs of this machine have used, where it keeps count.

Intel's and AMD's RAPL counters through Linux's powercap files (often readable by root only), and NVIDIA's through the
package nvidia-ml-py (extra `energy`). The counters are of the whole package, idle power included.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Counts joules from its making on.

    Attributes:
        sources: what is counted; empty where the machine does not tell.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package; intel-rapl:0:1 a part of it that would count twice.
        zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._zones = [zone for zone in zones if _microjoules(zone) is not None]
        self._gpus = _gpus()
        self.sources = [zone.name for zone in self._zones] + [f"gpu {at}" for at in range(len(self._gpus))]
        self._last = [_microjoules(zone) or 0 for zone in self._zones]
        self._sum = 0.0
        self._base = self._gpu_joules()

    def read(self) -> float | None:
        """Joules since the making; None where nothing is counted. To be read at least once a minute: counters wrap."""
        if not self.sources:
            return None
        for at, zone in enumerate(self._zones):
            now = _microjoules(zone)
            if now is not None:
                gone = now - self._last[at]
                self._sum += (gone if gone >= 0 else gone + _range(zone)) / 1e6
                self._last[at] = now
        return self._sum + self._gpu_joules() - self._base

    def _gpu_joules(self) -> float:
        return float(sum(nvml.nvmlDeviceGetTotalEnergyConsumption(device) for nvml, device in self._gpus)) / 1e3


def _microjoules(zone: Path) -> int | None:
    try:
        return int((zone / "energy_uj").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _range(zone: Path) -> int:
    try:
        return int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _gpus() -> list[tuple[Any, Any]]:
    """NVML and a handle for each GPU that counts its energy."""
    if importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(at) for at in range(pynvml.nvmlDeviceGetCount())]
        for device in devices:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
    except pynvml.NVMLError:
        return []
    return [(pynvml, device) for device in devices]
