"""Distil a tiny student of every kind of task, through the real rows, losses and loop: with smoothed labels, or with
labels for a part of the rows.

    torchrun --nproc_per_node 2 tests/support/pupils.py SETTINGS.json OUT.json

SETTINGS: folder (of the workspaces that `workspace` makes), kinds, micro_batch_size, num_processes.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

from distilpeft.distillation.losses import Loss
from distilpeft.machine.runtime import Runtime
from distilpeft.models.context import Context
from distilpeft.models.pair import Pair
from distilpeft.models.student import new_student
from distilpeft.planning.inputs import data_digest
from distilpeft.recipe.training import Fit, Optim
from distilpeft.recipe.yaml_file import load_recipe
from distilpeft.tasks.rows import TASKS, TAUGHT, TaskData
from distilpeft.training.step import Work
from distilpeft.training.train import train
from support import commands, tiny, tiny_lm, tiny_tasks

SMOOTHING, UNLABELLED_WEIGHT = 0.05, 0.7
UNSMOOTHED = ("regression", "embedding")
"""Kinds without classes, whose recipes refuse smoothing."""
KINDS = tuple(TASKS)
ROWS, BATCH, SEED = 30, 8, 5  # batches of 8, 8, 8 and 6 rows
LR = {"sgd": 0.05, "adamw": 0.001}
Trace = list[tuple[float, float]]
"""Loss and grad_norm of every step."""


def workspace(folder: Path, kind: str, *, labelled: int | None = None, **more: object) -> Path:
    """A recipe of the kind, its base model and its rows: all with smoothed labels, or `labelled` with plain ones."""
    folder.mkdir(parents=True)
    changes: dict[str, object] = {} if kind in UNSMOOTHED else {"distil__label_smoothing": SMOOTHING}
    if labelled is not None:
        changes = {"data__labelled": labelled, "distil__unlabelled_weight": UNLABELLED_WEIGHT}
    changes |= more | {"student": {"model": str(folder / "base")}, "teacher__quantize": "none"}
    if kind not in ("text_classification", "causal_lm"):
        return tiny_tasks.workspace(folder, kind, **changes)
    if kind == "text_classification":
        tiny.save_model(folder / "base")
        tiny.write_csv(folder / "rows.csv", 60)
        return commands.workspace(folder, **changes)
    tiny_lm.model().save_pretrained(str(folder / "base"))
    tiny_lm.tokenizer().save_pretrained(str(folder / "base"))
    tiny_lm.write_jsonl(folder / "rows.jsonl", tiny_lm.pairs(60))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_lm.recipe_tree(folder, **changes)))
    return path


class Pupil:
    """Student and teacher of a recipe, with random heads and other weights, and its first rows."""

    def __init__(self, runtime: Runtime, recipe_path: Path) -> None:
        recipe = load_recipe(recipe_path)
        main_first = runtime.accelerator.main_process_first
        with main_first():
            data = TaskData(recipe, data_digest(recipe), recipe_path.parent / "cache", main_first)
        context = Context(runtime, data, Pair(recipe))
        loaded = new_student(context, None)
        self.student = loaded.model
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        torch.manual_seed(1)
        for parameter in self.teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        self.task, self.rows = context.task, data.tokens(TAUGHT, loaded.reader)
        self.lengths_N = self.rows.lengths_N[:ROWS]
        self.loss = Loss.of(recipe.distil, recipe.distil.alpha)

    def loss_sum(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        with torch.no_grad():
            soft = self.task.soft(self.teacher, batch)
        return self.task.loss_sum(model, batch, self.loss, soft)


def trace(runtime: Runtime, recipe_path: Path, micro_batch_size: int, optimizer: str) -> Trace:
    """Train for one pass over the rows."""
    pupil = Pupil(runtime, recipe_path)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(
            label="pupil",
            fit=Fit(
                epochs=1, batch_size=BATCH, micro_batch_size=micro_batch_size, precision="fp32", keep="last",
                batch_norm="frozen",
            ),
            optim=Optim(kind=optimizer, lr=LR[optimizer], schedule="constant", warmup_ratio=0, max_grad_norm=None),
            seed=SEED,
            lengths_N=pupil.lengths_N,
            load_batch=pupil.rows.load_batch,
            loss_sum=pupil.loss_sum,
            count_rows=pupil.task.count_rows,
            count_labelled=None if pupil.rows.num_labelled is None else pupil.task.count_labelled,
            validate=lambda _: {"accuracy": 0.5},
            folder=Path(folder),
        )  # fmt: skip
        train(runtime, pupil.student, work)
        runtime.accelerator.free_memory()
        log = Path(folder) / "train_log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if runtime.is_main else []
    return [(line["loss"], line["grad_norm"]) for line in lines]


def whole_traces(folder: Path, kinds: tuple[str, ...]) -> dict[str, Trace]:
    """The traces of whole batches in one process, by kind and optimizer."""
    runtime = Runtime()
    return {
        f"{kind} {optimizer}": trace(runtime, folder / kind / "tiny.yaml", BATCH, optimizer)
        for kind in kinds
        for optimizer in LR
    }


def expect_same(found: Trace, expected: Trace, name: str) -> None:
    """Two splits of the same batches are the same training, to rounding."""
    assert len(found) == len(expected) == 4
    np.testing.assert_allclose(found, expected, rtol=2e-4, err_msg=name)
    np.testing.assert_allclose([loss for loss, _ in found], [loss for loss, _ in expected], rtol=2e-5, err_msg=name)


def main(settings: dict, out: Path) -> None:
    torch.set_num_threads(1)
    runtime = Runtime()
    assert runtime.accelerator.num_processes == settings["num_processes"]
    found = {
        f"{kind} {optimizer}": trace(
            runtime, Path(settings["folder"]) / kind / "tiny.yaml", settings["micro_batch_size"], optimizer
        )
        for kind in settings["kinds"]
        for optimizer in LR
        if optimizer == "sgd" or kind in ("question_answering", "causal_lm")
    }
    if runtime.is_main:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
