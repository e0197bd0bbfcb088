"""What is deployed: an export's files with a manifest that accounts for them and a card that tells of them.

Leaves: `model/`, the files of the export (the same bytes on disk, not copies, where the file system can), README.md,
and manifest.json with checksums, provenance, scores and latency.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from distilpeft import __version__
from distilpeft.export import card
from distilpeft.export.manifest import MANIFEST, ExportManifest
from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.machine.files import digest_file, read_sealed, sealed, write_json, write_text
from distilpeft.models.pair import MODEL
from distilpeft.planning.roles import export_role
from distilpeft.recipe import Recipe


def run(
    recipe: Recipe, form: str, export: Artifact, *, figures: Mapping[str, Any], timed: Mapping[str, Any],
    keys: Mapping[str, str], out: Artifact,
) -> Figures:  # fmt: skip
    """Put the bundle of one form into `out.partial`.

    Args:
        recipe: the run.
        form: the export's.
        export: its verified artifact.
        figures: evaluation figures by role: the models of the run, and this export as `export:FORM`.
        timed: benchmark figures likewise.
        keys: of the artifacts that it comes from, for the record.
        out: where it goes.

    Returns:
        `files`, how many, and `size_bytes` of all.
    """
    source, folder = export.path / MODEL, out.partial / MODEL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.name != MANIFEST:
            _link(file, folder / file.name)
    made, own = export.figures(), export_role(form)
    described = read_sealed(source / MANIFEST, f"delete {export.path} to make it again")
    text = card.render(recipe, cast("ExportManifest", described), figures, timed, made)
    write_text(folder / "README.md", text)
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": digest_file(file)} for file in sorted(folder.iterdir())
    }
    main = recipe.kind.main
    manifest = {
        **described,
        "files": files,
        "provenance": {
            "distilpeft": __version__,
            "recipe": recipe.model_dump(mode="json"),
            "given": recipe.model_dump(mode="json", exclude_unset=True),
            "artifacts": {**keys, "export": export.key},
        },
        "parity": made["parity"],
        "limits": made["limits"],
        "scores": figures[own]["scores"],
        "student_scores": figures[recipe.export.of]["scores"],
        "metric": main,
        "latency": timed[own],
    }
    write_json(folder / MANIFEST, sealed(manifest))
    return {"files": len(files) + 1, "size_bytes": sum(file.stat().st_size for file in folder.iterdir())}


def _link(file: Path, target: Path) -> None:
    """The same bytes under a second name; a copy where there are no hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)
