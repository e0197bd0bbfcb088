"""Compare the evaluated models with each other row by row: by how much they differ, and whether that may be chance.

Leaves `rows.npz`: what each row adds to the metric by role, and under `ROLE weight` to what that is divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.metrics import significance
from distilpeft.models.context import Context
from distilpeft.planning.roles import COMPARED, TEACHER, format_of

ROWS, VALUES = "rows.npz", "values.npy"


def run(context: Context, evaluated: Mapping[str, Artifact], out: Artifact) -> Figures:
    """Compare the models.

    Args:
        context: the run; its recipe names the metric and the split.
        evaluated: role → its evaluation.
        out: where what each row adds goes.

    Returns:
        `pairs`, see `paired.compare`, each with `role`, `against`, `metric` and `num_rows`; `calibration` by role;
        with `evaluate.groups` also `groups`, see `_by_group`.
    """
    recipe, data = context.recipe, context.data
    rows = data.tokens(recipe.evaluate.split, context.pair.student_reader)
    added, calibration = {}, {}
    for role, made in evaluated.items():
        values_NK = np.load(made.file(VALUES), allow_pickle=False).astype(np.float64)
        added[role] = significance.Added(*context.task.added(values_NK, rows))
        calibration[role] = context.task.calibration(values_NK, rows)
    kept = {role: one.sum_N for role, one in added.items()}
    kept |= {f"{role} weight": one.weight_N for role, one in added.items()}
    np.savez_compressed(out.partial / ROWS, allow_pickle=False, **kept)
    metric = recipe.kind.main
    pairs = [
        {
            "role": role, "against": other, "metric": metric,
            **significance.compare(added[role], added[other]), "num_rows": len(added[role].sum_N),
        }
        for role in added
        for other in ((recipe.export.of, TEACHER) if format_of(role) is not None else COMPARED.get(role, ()))
        if other in added
    ]  # fmt: skip
    groups_N = data.groups()
    groups = {} if groups_N is None else {"groups": _by_group(added, groups_N)}
    return {"pairs": pairs, "calibration": calibration, **groups}


def _by_group(added: Mapping[str, significance.Added], groups_N: NDArray[np.str_]) -> list[dict[str, Any]]:
    """How each model differs from the teacher in each group, and `beyond`: by how much more than on all rows."""
    found = []
    for role in added:
        if role == TEACHER or not (role in COMPARED or format_of(role) is not None):
            continue
        overall = significance.difference(added[role], added[TEACHER])
        for name in np.unique(groups_N):
            mask_N = groups_N == name
            pair = significance.compare(added[role].of(mask_N), added[TEACHER].of(mask_N))
            beyond = pair["difference"] - overall
            found.append({"group": str(name), "role": role, "num_rows": int(mask_N.sum()), **pair, "beyond": beyond})
    return found
