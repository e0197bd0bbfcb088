"""What a training watches itself for: a loss that jumps and stays up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

WINDOW, RECENT, FACTOR = 50, 5, 2.0
"""Single batches are noise, above all where the loss is small: only a level of several steps says something."""
MOST_SAID = 3


class Spikes:
    """Warns when the loss leaves its level.

    That is where the median of the last `RECENT` steps is above everything in the `WINDOW` steps before them, and at
    least `FACTOR` times their median. It warns once, until the loss is back.

    Args:
        label: of the training, for the message.
        say: gets the first few warnings.
        earlier: losses before a resumption; None for a step that was skipped.

    Attributes:
        steps: the first steps of such levels, from 1.
    """

    def __init__(self, label: str, say: Callable[[str], None], earlier: Iterable[float | None] = ()) -> None:
        self.steps: list[int] = []
        self._label, self._say = label, say
        self._before: deque[float] = deque(maxlen=WINDOW)
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._is_up = False
        for step, loss in enumerate(earlier, 1):
            self.see(step, loss, again=True)

    def see(self, step: int, loss: float | None, *, again: bool = False) -> None:
        """Look at the loss of a step; nothing is said of one that was seen `again`."""
        if loss is None:
            return
        if len(self._recent) == RECENT and not self._is_up:  # what is up is no level to compare with
            self._before.append(self._recent[0][1])
        self._recent.append((step, loss))
        if len(self._before) < WINDOW:
            return
        level, usual = median(value for _, value in self._recent), median(self._before)
        is_up = level > max(self._before) and level >= FACTOR * usual
        if is_up and not self._is_up:
            first = next(at for at, value in self._recent if value > max(self._before))
            self.steps.append(first)
            if len(self.steps) <= MOST_SAID and not again:
                self._say(
                    f"  {self._label}: step {first}: the loss jumped to {level:.4g}, from {usual:.4g} in the {WINDOW} "
                    "steps before, and stayed there; try a lower lr or a longer warmup"
                )
        self._is_up = is_up or (self._is_up and level >= FACTOR * usual)
