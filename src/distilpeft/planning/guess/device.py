"""The device that `distilpeft init` writes a recipe for: what this machine has."""

from __future__ import annotations

from distilpeft.machine.host import cores, gpu_memories, gpu_names, memory_bytes


def device_here() -> tuple[str, str]:
    """`cpu`, or the memory of the smallest GPU such as `24GB`; and a line that says so."""
    gpus = gpu_memories()
    if gpus:
        device = f"{round(min(gpus) / 2**30)}GB"
        names = ", ".join(dict.fromkeys(gpu_names())) or "GPU"
        return device, f"device: {device}, because this machine has {len(gpus)} x {names}; --device changes it"
    memory = f"{memory_bytes() / 1e9:.0f} GB of memory"
    return "cpu", f"device: cpu, because this machine has {cores()}, {memory} and no GPU; --device changes it"
