"""What was done to a run, how it ended, and whether that was right."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """What was done to a run and how it ended; `fault` is empty if that was right."""

    what: str
    outcome: str
    fault: str = ""


@dataclass
class Found:
    """All cases of a command."""

    command: str
    seed: int
    cases: list[Case] = field(default_factory=list)
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, case: Case) -> None:
        """Take down a case and tell of it."""
        self.cases.append(case)
        mark = "FAIL" if case.fault else "ok  "
        sys.stdout.write(f"{len(self.cases):4d}  {mark} {case.what}: {case.outcome} {case.fault}\n")
        sys.stdout.flush()

    @property
    def failed(self) -> list[Case]:
        """Those that did not end right."""
        return [case for case in self.cases if case.fault]
