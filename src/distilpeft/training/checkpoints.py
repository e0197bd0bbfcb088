"""Checkpoints of a training: folders `step-00000012/` that are complete, byte for byte, or do not count.

`weights.safetensors`: what is trained.  `optimizer.safetensors`: its moments.  `train_log.jsonl`: a line for each step
so far.  `state.json`: where the loop stands, the SHA-256 of all three, and a checksum of itself. Random numbers and the
order of rows are functions of the seed and the step, so nothing else is needed. A checkpoint is written next to its
place, fsynced and renamed; what a crash has left, or what has changed on disk since, is reported and removed, and an
earlier one takes its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from distilpeft.errors import InputError
from distilpeft.machine.artifact import CHECKPOINTS, LOG
from distilpeft.machine.files import digest_file, publish_folder, read_sealed, sealed, write_json

FORMAT = 2
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


class Checkpoints:
    """The checkpoints below a stage's folder.

    Args:
        folder: the stage's.
        keep_last: how many of the newest stay, besides the best one.
    """

    def __init__(self, folder: Path, keep_last: int = 1) -> None:
        self.folder, self._keep_last = folder / CHECKPOINTS, keep_last

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, best_step: int, tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        state: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Write a checkpoint in full, put it in place, then drop those that are not kept.

        Args:
            step: steps that were taken.
            best_step: the one whose weights are the best so far; its checkpoint stays.
            tensors: weights, and the optimizer's.
            state: plain values.
        """
        fresh = self.path(step).with_suffix(".partial")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name, values in zip((WEIGHTS, OPTIMIZER), tensors, strict=True):
            save_file(dict(values), fresh / name)
        shutil.copyfile(self.folder.parent / LOG, fresh / LOG)
        files = {name: digest_file(fresh / name) for name in (WEIGHTS, OPTIMIZER, LOG)}
        content = {"format": FORMAT, "state": dict(state), "files": files}
        write_json(fresh / STATE, sealed(content))
        publish_folder(fresh, self.path(step), replace=True)
        for folder in self._all()[: -self._keep_last]:
            if folder != self.path(best_step):
                shutil.rmtree(folder)

    def newest(self, needs_best: bool, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The state of the newest complete checkpoint; all that is not complete is removed.

        Args:
            needs_best: the best checkpoint has to be complete as well, since its weights will be what is kept.
            say: reports a damaged checkpoint.

        Raises:
            InputError: another version wrote it.
        """
        for partial in self.folder.glob("*.partial"):
            shutil.rmtree(partial)
        while whole := self._all():
            state = self._checked(whole[-1], say)
            if state is not None and needs_best and 0 < state["best_step"] < state["step"]:
                best = self.path(state["best_step"])
                if self._checked(best, say) is None:
                    shutil.rmtree(best, ignore_errors=True)
                    state = None
            if state is not None:
                return state
            shutil.rmtree(whole[-1])
        return None

    def newest_step(self) -> int:
        """Steps of the newest checkpoint, unread; 0 without one."""
        folders = self._all()
        return int(folders[-1].name.rpartition("-")[2]) if folders else 0

    def weights(self, step: int) -> dict[str, Tensor]:
        """The weights of a checkpoint.

        Raises:
            InputError: they have changed since they were written.
        """
        return self._load(step, WEIGHTS)

    def optimizer(self, step: int) -> dict[str, Tensor]:
        """The optimizer's tensors of a checkpoint; see `weights`."""
        return self._load(step, OPTIMIZER)

    def restore_log(self, step: int) -> None:
        """Put the log back to where it was then; later steps will be taken, and logged, again."""
        self._verify(step, LOG)
        shutil.copyfile(self.path(step) / LOG, self.folder.parent / LOG)

    def _load(self, step: int, name: str) -> dict[str, Tensor]:
        self._verify(step, name)
        tensors: dict[str, Tensor] = load_file(self.path(step) / name)
        return tensors

    def _verify(self, step: int, name: str) -> None:
        file = self.path(step) / name
        content = read_sealed(self.path(step) / STATE, f"delete {self.path(step)} to resume at an earlier state")
        if not file.is_file() or digest_file(file) != content["files"][name]:
            raise InputError(f"{file}: missing or altered; run the same command to resume at an earlier state")

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")

    def _checked(self, path: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The state of a checkpoint if every byte of it is what was written."""
        damaged = self._damaged(path)
        if not damaged:
            return dict(read_sealed(path / STATE, "")["state"])
        say(f"  {path / damaged[0]}: altered since it was written; this checkpoint is dropped")
        return None

    def _damaged(self, path: Path) -> list[str]:
        try:
            content = read_sealed(path / STATE, "")
        except InputError:
            return [STATE]
        if content["format"] != FORMAT:
            raise InputError(
                f"{path}: another version of distilpeft made this checkpoint; delete {self.folder.parent} to begin "
                "again"
            )
        files = content["files"].items()
        return [name for name, sums in files if not (path / name).is_file() or digest_file(path / name) != sums]
