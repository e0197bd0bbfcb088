"""Run a command's work on as many devices as the recipe says: in this process, or in several that compute as one.

Torch-free, so that the process that starts the others takes no memory of their devices. Under torchrun or Accelerate
nothing is started here: they have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from distilpeft.machine.host import is_first_process, num_processes
from distilpeft.machine.locks import in_use
from distilpeft.machine.processes import joined
from distilpeft.planning.plan import Plan, Step
from distilpeft.report import publish
from distilpeft.report.schema import Report
from distilpeft.storage import records

LOGS = "logs"
T = TypeVar("T")


def on_devices(devices: str | int, function: Callable[..., T], arguments: Sequence[object], folder: Path) -> T:
    """What `function(*arguments)` returns, computed on the recipe's `devices`.

    Args:
        devices: the recipe's.
        function: a module's function that every process calls.
        arguments: can be pickled.
        folder: the run's; what all but the first process print goes into its `logs`.

    Raises:
        InputError: there are not so many devices; or what the function raises.
    """
    count = num_processes(devices)
    return function(*arguments) if count == 1 else joined(count, function, arguments, folder / LOGS)


def make(plan: Plan, steps: Sequence[Step]) -> None:
    """`pipeline.make`, likewise."""
    from distilpeft.pipeline import chain

    chain.make(plan, steps)


def complete(plan: Plan, until: str | None = None) -> Report | None:
    """Run the steps of a plan that are not done, on its recipe's devices, and publish the report.

    Returns:
        The report; None with `until`, and in all but the first process.
    """
    record = plan.folder / records.PLAN
    with in_use(plan.folder):
        if is_first_process():
            records.save(record, plan.steps().values())
        on_devices(plan.recipe.devices, run_plan, (plan, until), plan.folder)
        if until is not None or not is_first_process():
            return None
        report = publish.finish(plan)
        record.unlink(missing_ok=True)  # the report says it from now on
        return report


def run_plan(plan: Plan, until: str | None = None) -> None:
    """`pipeline.run`, which imports torch only where it is called."""
    from distilpeft.pipeline import chain

    chain.run(plan, until)
