"""Compare the evaluated models with each other row by row: by how much they differ, and whether that may be chance.

Leaves `rows.npz`: what each row adds to the metric by role, and under `ROLE weight` to what that is divided by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.data.reading import SPLITS
from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.metrics import significance
from distilpeft.metrics.probabilities import softmax
from distilpeft.models.context import Context
from distilpeft.planning.roles import COMPARED, MAJORITY, TEACHER, TEACHERS, format_of
from distilpeft.recipe.task import TextClassification
from distilpeft.tasks.task import Rows

ROWS, VALUES = "rows.npz", "values.npy"
MISTAKES, LONGEST, MOST_CONFUSED = 10, 300, 30
"""Mistakes that are shown, characters of each, and classes from which on a table of all pairs is too large."""


def run(context: Context, evaluated: Mapping[str, Artifact], out: Artifact) -> Figures:
    """Compare the models.

    Args:
        context: the run; its recipe names the metric and the split.
        evaluated: role → its evaluation.
        out: where what each row adds goes.

    Returns:
        `pairs`, see `paired.compare`, each with `role`, `against`, `metric` and `num_rows`; `calibration` by role;
        of tasks with classes `answers`, see `_answers`; with `evaluate.groups` also `groups`, see `_by_group`.
    """
    recipe, data = context.recipe, context.data
    ours, theirs = (
        data.tokens(recipe.evaluate.split, reader)
        for reader in (context.pair.student_reader, context.pair.teacher_reader)
    )
    added, calibration, answers = {}, {}, None
    for role, artifact in evaluated.items():
        rows = theirs if role in (*TEACHERS, MAJORITY) else ours  # as it read them
        values_NK = np.load(artifact.file(VALUES), allow_pickle=False).astype(np.float64)
        if role == recipe.export.of:
            answers = _answers(context, values_NK, rows)
        added[role] = significance.Added(*context.task.added(values_NK, rows))
        calibration[role] = context.task.calibration(values_NK, rows)
    kept = {role: sums.sum_N for role, sums in added.items()}
    kept |= {f"{role} weight": sums.weight_N for role, sums in added.items()}
    np.savez_compressed(out.partial / ROWS, allow_pickle=False, **kept)
    metric = recipe.kind.main
    pairs = [
        {
            "role": role, "against": against, "metric": metric,
            **significance.compare(added[role], added[against]), "num_rows": len(added[role].sum_N),
        }
        for role in added
        for against in ((recipe.export.of, TEACHER) if format_of(role) is not None else COMPARED.get(role, ()))
        if against in added
    ]  # fmt: skip
    groups_N = data.groups()
    groups = {} if groups_N is None else {"groups": _by_group(added, groups_N)}
    classes = {} if answers is None else {"answers": {"role": recipe.export.of, **answers}}
    return {"pairs": pairs, "calibration": calibration, **classes, **groups}


def _answers(context: Context, values_NK: NDArray[np.float64], rows: Rows) -> dict[str, Any] | None:
    """What the student answers, by class, and its surest mistakes; None for tasks without classes.

    `classes`: of each its name, `rows` of train, validation and test, and how many rows were `right` and `predicted`;
    `confusion`: rows by label and answer, of tasks with one class a row; `mistakes`: at most `MISTAKES` texts, each
    with `label`, `answer` and `probability`.
    """
    tally = context.task.by_class(values_NK, rows)
    if tally is None:
        return None
    counts = context.data.class_counts()
    classes = [
        {"name": name, "rows": dict(zip(SPLITS, counts[name], strict=True)), "present": int(tally.present_C[at]),
         "right": int(tally.right_C[at]), "predicted": int(tally.predicted_C[at])}
        for at, name in enumerate(counts)
    ]  # fmt: skip
    confusion = None if tally.confusion_CC is None or len(classes) > MOST_CONFUSED else tally.confusion_CC.tolist()
    return {"classes": classes, "confusion": confusion, "mistakes": _mistakes(context, values_NK, rows, list(counts))}


def _mistakes(
    context: Context, values_NC: NDArray[np.float64], rows: Rows, names: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows that the student is surest of, and wrong; none of tasks whose rows are no single text with one class."""
    if not isinstance(context.recipe.task, TextClassification):
        return []
    probabilities_NC, labels_N = softmax(values_NC), rows.column("label")
    answers_N, sure_N = probabilities_NC.argmax(-1), probabilities_NC.max(-1)
    wrong = np.flatnonzero(answers_N != labels_N)
    wrong = wrong[np.argsort(-sure_N[wrong], kind="stable")][:MISTAKES]
    texts = context.data.shown(context.recipe.evaluate.split, [int(row) for row in wrong])
    return [
        {"text": shortened(text), "label": names[labels_N[row]], "answer": names[answers_N[row]],
         "probability": float(sure_N[row])}
        for row, text in zip(wrong, texts, strict=True)
    ]  # fmt: skip


def shortened(text: str) -> str:
    """A text on one line, cut anywhere: not every language has spaces."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def _by_group(added: Mapping[str, significance.Added], groups_N: NDArray[np.str_]) -> list[dict[str, Any]]:
    """How each model differs from the teacher in each group, and `beyond`: by how much more than on all rows."""
    pairs = []
    for role in added:
        if role == TEACHER or not (role in COMPARED or format_of(role) is not None):
            continue
        overall = significance.difference(added[role], added[TEACHER])
        for name in np.unique(groups_N):
            mask_N = groups_N == name
            pair = significance.compare(added[role].of(mask_N), added[TEACHER].of(mask_N))
            beyond = pair["difference"] - overall
            pairs.append({"group": str(name), "role": role, "num_rows": int(mask_N.sum()), **pair, "beyond": beyond})
    return pairs
