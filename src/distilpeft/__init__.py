"""distilpeft: one recipe in; a small, fast, proven model out.

A large quantized teacher is tuned with LoRA, its soft logits are distilled into a compact student, both are
measured, and the student is exported. Start at `distilpeft.pipeline`; settings live in `distilpeft.recipe`.
Importing this package imports nothing heavy.

From Python: `load_recipe`, `check`, `run`, `runs`, `clean`, `init` (see `distilpeft.api`), `Bundle` for exported
models, and `distilpeft.losses` for one's own training loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distilpeft.api import Check, Run, check, clean, init, load_recipe, run, runs
    from distilpeft.errors import GateError, InputError
    from distilpeft.export.bundle import Bundle

__version__ = "0.1.0"
__all__ = ["Bundle", "Check", "GateError", "InputError", "Run", "check", "clean", "init", "load_recipe", "run", "runs"]
_HOMES = {"Bundle": "export.bundle", "GateError": "errors", "InputError": "errors"}


def __getattr__(name: str) -> object:
    """Import a name of the API when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
