"""What a training watches itself for: a loss that jumps and stays up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

RECENT, WINDOW, FEWEST = 20, 50, 20
"""How many last losses are compared with how many before them: at most, and at least. Single batches are noise."""
FACTOR, BACK = 2.0, 1.2
"""Medians: a jump is above `FACTOR` times the usual one, and over when it and the newest loss are at `BACK` times."""
ABOVE = 0.8
"""Share of all pairs in which the later loss is the higher one. By chance it is so in one of 10,000 such windows."""
HUGE = 100.0
"""Times the highest loss of the run so far."""
MOST_SAID = 3


class Spikes:
    """Warns once when the loss leaves its level.

    That is where the median of the last `RECENT` steps is `FACTOR` times the median of up to `WINDOW` before them, and
    most of the last are above most of those before, however widely these spread; or at once, where a loss is beyond
    anything that the run has seen.

    Args:
        label: of the training, for the message.
        say: gets the first few warnings.
        earlier: losses before a resumption; None for a step that was skipped.

    Attributes:
        steps: at which a jump was noticed, from 1.
    """

    def __init__(self, label: str, say: Callable[[str], None], earlier: Iterable[float | None] = ()) -> None:
        self.steps: list[int] = []
        self._label, self._say = label, say
        self._losses: deque[float] = deque(maxlen=RECENT + WINDOW)
        self._highest = 0.0
        self._back: float | None = None  # while the loss is up: where it no longer is
        for step, loss in enumerate(earlier, 1):
            self.see(step, loss, again=True)

    def see(self, step: int, loss: float | None, *, again: bool = False) -> None:
        """Look at the loss of a step; nothing is said of one that was seen `again`."""
        if loss is None:
            return
        self._losses.append(loss)
        jump = self._jump(loss)
        self._highest = max(self._highest, loss)
        if jump is None:
            return
        self.steps.append(step)
        if len(self.steps) <= MOST_SAID and not again:
            self._say(f"  {self._label}: step {step}: the loss {jump}; try a lower lr or a longer warmup")

    def _jump(self, loss: float) -> str | None:
        """What is to be said of the newest loss."""
        losses = np.array(self._losses)
        before, last = losses[:-RECENT], losses[-RECENT:]
        now = float(np.median(last))
        if self._back is not None:
            self._back = None if max(now, loss) <= self._back else self._back
            return None
        if len(losses) > FEWEST and 0 < HUGE * self._highest < loss:
            self._back = BACK * self._highest
            return f"is {loss:.4g}, more than {HUGE:g} times any loss before"
        if len(before) < FEWEST:
            return None
        usual = float(np.median(before))
        if now <= FACTOR * usual or (last[:, None] > before).mean() < ABOVE:
            return None
        self._back = BACK * usual
        return f"has been {now:.4g} for {RECENT} steps, {usual:.4g} before"
