"""What a training watches itself for: losses that jump, and rows that spoil a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

WINDOW, FACTOR = 50, 5.0
MOST_TOLD = 3


class Spikes:
    """Warns of a loss that is `FACTOR` times the median of the last `WINDOW` steps.

    Args:
        label: of the training, for the message.
        say: told of the first few.
        earlier: losses before a resumption; None for a step that was skipped.

    Attributes:
        steps: at which the loss jumped, from 1.
    """

    def __init__(self, label: str, say: Callable[[str], None], earlier: Iterable[float | None] = ()) -> None:
        self.steps: list[int] = []
        self._label, self._say = label, say
        self._last: deque[float] = deque(maxlen=WINDOW)
        for step, loss in enumerate(earlier, 1):
            self.see(step, loss, again=True)

    def see(self, step: int, loss: float | None, *, again: bool = False) -> None:
        """Look at the loss of a step; nothing is said of one that was seen `again`."""
        if loss is None:
            return
        usual = median(self._last) if len(self._last) == WINDOW else None
        if usual is not None and loss > FACTOR * usual:
            self.steps.append(step)
            if len(self.steps) <= MOST_TOLD and not again:
                self._say(
                    f"  {self._label}: step {step}: the loss jumped to {loss:.4g}, from {usual:.4g} in the {WINDOW} "
                    "steps before; if it stays there, try a lower lr or a longer warmup"
                )
        self._last.append(loss)
