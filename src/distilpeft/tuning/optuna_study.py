"""Optuna's side of a search: its study and storage, and which of the trials that it calls running are alive.

Optuna cannot know that the process behind a running trial was killed. Here every trial holds a lock, which the kernel
lets go of: a trial that runs without one has died, and its settings are tried again, from their checkpoint.
"""

from __future__ import annotations

import json
import secrets
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from distilpeft.errors import InputError
from distilpeft.machine.files import write_text
from distilpeft.machine.locks import POLL_S, Lock
from distilpeft.recipe.task import LOWER_IS_BETTER
from distilpeft.tuning.search_space import Range, Search, Space, own_values

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

THOUSANDTHS = 1000
"""Validations are reported by the share of the training that is done, so that trials of different length compare."""


@dataclass
class Trial:
    """One trial of Optuna's that this process is at.

    Attributes:
        values: key → value.
        found: Optuna's object.
        lock: tells others that the trial is alive.
    """

    values: dict[str, object]
    found: FrozenTrial
    lock: Lock

    @property
    def number(self) -> int:
        """Its place in the study, from 0."""
        return int(self.found.number)

    def is_hopeless(self, share: float, value: float) -> bool:
        """Report a validation; whether the trial is worse than the median of the others was at this point."""
        self.found.report(value, round(THOUSANDTHS * share))
        return bool(self.found.should_prune())


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: with a validation value, stopped by its figures, or given up early."""

    value: float | None = None
    stopped: str | None = None

    def said(self, monitor: str) -> str:
        """The outcome for the user."""
        if self.stopped is not None:
            return f"stopped: {self.stopped}"
        return f"{monitor} {self.value:.4f}" if self.value is not None else "given up: worse than most at this point"


FINISHED, WAIT = "finished", "wait"


class Study:
    """Optuna's study of a search, and which of its trials are alive.

    Raises:
        InputError: Optuna is missing, or its storage cannot be used.
    """

    def __init__(self, search: Search) -> None:
        self._search, self._optuna = search, _optuna()
        search.folder.mkdir(parents=True, exist_ok=True)
        with self._lock("study").held():
            token = search.folder / "folder.id"  # tells the trials of this folder from those of other machines' folders
            if not token.is_file():
                write_text(token, secrets.token_hex(8))
            self._folder = token.read_text(encoding="utf-8")
            self._study = self._open()
            own = own_values(search)
            if own is not None and not self._study.get_trials(deepcopy=False):
                self._study.enqueue_trial(_encoded(search.space, own), user_attrs={"own": True})

    def _lock(self, name: str) -> Lock:
        return Lock(self._search.corner.folder, f"search-{self._search.key}-{name}")

    def _open(self) -> optuna.Study:
        optuna, search = self._optuna, self._search
        try:
            return optuna.create_study(
                storage=_storage(optuna, search),
                study_name=f"{search.corner.recipe.name}-{search.key}",
                direction="minimize" if search.monitor in LOWER_IS_BETTER else "maximize",
                pruner=optuna.pruners.MedianPruner(),
                load_if_exists=True,
            )
        except Exception as error:  # whatever a database's driver raises
            where = (search.storage or str(search.folder)).partition("://")[0]  # the rest may hold a password
            raise InputError(f"--storage {where}: cannot be used: {' '.join(str(error).split())[:300]}") from None

    def counted(self) -> list[FrozenTrial]:
        """All trials but those that died and were restarted."""
        trials = self._study.get_trials(deepcopy=False)
        again = {trial.user_attrs.get("again") for trial in trials}
        return [trial for trial in trials if trial.number not in again]

    def trials_left(self) -> bool:
        """Whether there are trials to make, or to wait for."""
        trials = self.counted()
        return len(trials) < self._search.trials or any(self._is_waiting(one) or self._is_ours(one) for one in trials)

    def next(self) -> Trial | str:
        """A trial to make, `WAIT` while the last ones are being made in this folder, or `FINISHED`."""
        with self._lock("study").held():
            for trial in self.counted():
                if self._is_ours(trial) and self._has_died(trial):
                    # in this order: killed in between, it is not counted twice, and not lost
                    self._study.enqueue_trial(trial.params, user_attrs={**trial.user_attrs, "again": trial.number})
                    self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            trials = self.counted()
            if len(trials) < self._search.trials or any(map(self._is_waiting, trials)):
                return self._ask(len(trials))
            return WAIT if any(map(self._is_ours, trials)) else FINISHED

    def _is_waiting(self, trial: FrozenTrial) -> bool:
        return bool(trial.state == self._optuna.trial.TrialState.WAITING)

    def _is_ours(self, trial: FrozenTrial) -> bool:
        """Whether somebody in this folder is at the trial, or was when he died."""
        running = trial.state == self._optuna.trial.TrialState.RUNNING
        unnamed = self._search.storage is None and "folder" not in trial.user_attrs  # died in the middle of asking
        return running and (unnamed or trial.user_attrs.get("folder") == self._folder)

    def _has_died(self, trial: FrozenTrial) -> bool:
        lock = self._lock(f"trial-{trial.number}")
        free = lock.acquire()
        lock.release()
        return free

    def _ask(self, count: int) -> Trial:
        """A fresh sampler for every trial, seeded by how many there are: resumed, a search asks the same questions."""
        optuna, search = self._optuna, self._search
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(seed=search.corner.recipe.seed + count, constant_liar=True)
        trial = self._study.ask({key: _distribution(optuna, axis) for key, axis in search.space.items()})
        trial.set_user_attr("folder", self._folder)
        lock = self._lock(f"trial-{trial.number}")
        lock.acquire()
        return Trial(self.values(trial), trial, lock)

    def values(self, trial: FrozenTrial) -> dict[str, object]:
        """A trial's values for the recipe."""
        return {
            key: trial.params[key] if isinstance(axis, Range) else json.loads(trial.params[key])
            for key, axis in self._search.space.items()
        }

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """Record how a trial ended; one that its figures stopped counts as given up, so that Optuna learns of it."""
        if outcome.stopped is not None:
            trial.found.set_user_attr("stopped", outcome.stopped)
        state = self._optuna.trial.TrialState
        if outcome.value is None:
            self._study.tell(trial.found, state=state.PRUNED)
        else:
            self._study.tell(trial.found, outcome.value)

    def best(self) -> FrozenTrial | None:
        """The best trial that came to its end, or None."""
        state = self._optuna.trial.TrialState
        sign = 1 if self._search.monitor in LOWER_IS_BETTER else -1
        ended = [trial for trial in self.counted() if trial.state == state.COMPLETE]
        return min(ended, key=lambda trial: sign * trial.value, default=None)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise InputError("--search needs Optuna: pip install 'distilpeft[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna  # type: ignore[no-any-return]


def _storage(optuna: ModuleType, search: Search) -> BaseStorage:
    if search.storage is not None and "://" in search.storage:
        return optuna.storages.RDBStorage(search.storage)
    journal = Path(search.storage).expanduser() if search.storage else search.folder / "journal.log"
    journal.parent.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=_JournalLock(journal))
    return optuna.storages.journal.JournalStorage(backend)


class _JournalLock:
    """Optuna's own locks for journals outlive a killed holder; the kernel's do not."""

    def __init__(self, journal: Path) -> None:
        self._lock = Lock(journal.parent, journal.name)

    def acquire(self) -> bool:
        while not self._lock.acquire():
            time.sleep(POLL_S / 50)
        return True

    def release(self) -> None:
        self._lock.release()


def _distribution(optuna: ModuleType, axis: Range | tuple[object, ...]) -> BaseDistribution:
    if not isinstance(axis, Range):
        return optuna.distributions.CategoricalDistribution([json.dumps(value) for value in axis])
    if axis.whole:
        return optuna.distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log)


def _encoded(space: Space, values: Mapping[str, object]) -> dict[str, object]:
    return {key: values[key] if isinstance(axis, Range) else json.dumps(values[key]) for key, axis in space.items()}
