"""Write the student as files that run without us, and compare them with it before they count.

Leaves: `model/` with merged safetensors, configuration, tokenizer and a model card (README.md).
"""

from __future__ import annotations

from typing import Any

from distilpeft import card
from distilpeft.artifact import Artifact, write_text
from distilpeft.errors import GateError
from distilpeft.models import DTYPES
from distilpeft.pair import MODEL, load_student, save_student
from distilpeft.recipe import Recipe
from distilpeft.runtime import Runtime
from distilpeft.scoring import values_of
from distilpeft.tasks import TaskData


def run(
    runtime: Runtime,
    recipe: Recipe,
    data: TaskData,
    *,
    student: Artifact,
    figures: dict[str, Any],
    out: Artifact,
) -> dict[str, Any]:
    """Export the student into `out.partial` and prove it equal.

    Args:
        runtime: the machine.
        recipe: its `export` section.
        data: rows for the comparison.
        student: the distilled student.
        figures: evaluation figures by role, for the card.
        out: where the bundle goes.

    Raises:
        GateError: a logit of the reloaded export differs from the student's by more than `export.max_abs_diff`.
    """
    settings = recipe.export
    loaded = load_student(runtime, recipe, student.path / MODEL)
    folder = out.partial / MODEL
    if runtime.is_main:
        save_student(
            loaded.model, loaded.tokenizer, folder, DTYPES[settings.dtype]
        )  # in place: it is loaded anew below
        write_text(folder / "README.md", card.render(recipe, figures))
    runtime.accelerator.wait_for_everyone()
    loaded, exported = (load_student(runtime, recipe, path) for path in (student.path / MODEL, folder))
    rows = data.tokens(recipe.evaluate.split, loaded.tokenizer, loaded.tokenizer_digest)
    found = values_of(
        runtime, exported.model, rows, lambda model, batch: data.task.difference(model, loaded.model, batch),
        precision="fp32", micro_batch_size=recipe.evaluate.micro_batch_size, limit=settings.gate_rows,
    )  # fmt: skip
    difference = float(found.max())
    if not difference <= settings.max_abs_diff:
        raise GateError(
            f"export: the {settings.dtype} safetensors differ from the student by {difference:.3g} in a logit; "
            f"export.max_abs_diff allows {settings.max_abs_diff:.3g}"
        )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"max_abs_diff": difference, "compared_rows": len(found), "size_bytes": size}
