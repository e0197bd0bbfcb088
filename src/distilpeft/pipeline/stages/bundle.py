"""What is deployed: exported files with a manifest that accounts for them and a card that describes them.

Leaves: `model/`, the files of one export, or of several that fit in one folder (the same bytes on disk, not copies,
where the file system can), README.md, and manifest.json with checksums, provenance, scores and latency.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from distilpeft import __version__
from distilpeft.errors import InputError
from distilpeft.export import card
from distilpeft.export.manifest import MANIFEST, ExportManifest
from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.machine.files import digest_file, files_below, read_sealed, sealed, write_json, write_text
from distilpeft.models.pair import MODEL
from distilpeft.planning.roles import export_role
from distilpeft.recipe import Recipe
from distilpeft.recipe.export import FORMS


def run(
    recipe: Recipe, exports: Mapping[str, Artifact], *, figures: Mapping[str, Any], timed: Mapping[str, Any],
    keys: Mapping[str, str], out: Artifact,
) -> Figures:  # fmt: skip
    """Put a bundle into `out.partial`.

    Args:
        recipe: the run.
        exports: form → its verified artifact. The first one is what `predict` opens, and what the manifest describes.
        figures: evaluation figures by role: the models of the run, and each export as `export:FORM`.
        timed: benchmark figures, also by role.
        keys: of the artifacts that it comes from, for the record.
        out: where it goes.

    Returns:
        `files`, how many, and `size_bytes` of all.

    Raises:
        InputError: an export of an earlier version cannot be brought into the common layout.
    """
    folder = out.partial / MODEL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    form = next(iter(exports))
    manifests = {name: _manifest(export) for name, export in exports.items()}
    # config.json names the type of the weights in model.safetensors, so that form's own comes first
    for name in sorted(exports, key=lambda name: name != "safetensors"):
        _gather(exports[name], manifests[name], folder, renamed=len(exports) > 1)
    described = manifests[form]
    if len(exports) > 1:
        described = {**described, "file": FORMS[form].file, "forms": {name: FORMS[name].file for name in exports}}
    export_figures = {name: export.figures() for name, export in exports.items()}
    write_text(folder / "README.md", card.render(recipe, described, figures, timed, export_figures))
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": digest_file(file)}
        for file in files_below(folder)
    }
    own = export_role(form)
    manifest = {
        **described,
        "files": files,
        "provenance": {
            "distilpeft": __version__,
            "recipe": recipe.model_dump(mode="json"),
            "given": recipe.model_dump(mode="json", exclude_unset=True),
            "artifacts": {**keys, "export": exports[form].key},
        },
        "parity": export_figures[form]["parity"],
        "limits": export_figures[form]["limits"],
        "scores": figures[own]["scores"],
        "student_scores": figures[recipe.export.of]["scores"],
        "metric": recipe.kind.main,
        "latency": timed[own],
    }
    write_json(folder / MANIFEST, sealed(manifest))
    return {"files": len(files) + 1, "size_bytes": sum(file.stat().st_size for file in files_below(folder))}


def _manifest(export: Artifact) -> ExportManifest:
    manifest = read_sealed(export.path / MODEL / MANIFEST, f"delete {export.path} to make it again")
    return cast("ExportManifest", manifest)


def _gather(export: Artifact, described: ExportManifest, folder: Path, *, renamed: bool) -> None:
    """Link an export's files into the folder, but for those that it has already.

    Args:
        export: the artifact.
        described: its manifest.
        folder: of the bundle.
        renamed: put the model where its form has it today; earlier versions had all graphs as model.onnx at the top.
    """
    source, file = export.path / MODEL, described["file"]
    moved = renamed and file != FORMS[described["format"]].file
    weights = (source / f"{file}.data", (source / file).with_suffix(".bin"))
    if moved and any(one.is_file() for one in weights):  # their name depends on that of the graph
        raise InputError(f"{export.path}: made by an earlier version; delete it to make it again")
    for path in files_below(source):
        name = path.relative_to(source).as_posix()
        target = folder / (FORMS[described["format"]].file if moved and name == file else name)
        if name == MANIFEST or target.exists():
            continue
        target.parent.mkdir(exist_ok=True)
        _link(path, target)


def _link(file: Path, target: Path) -> None:
    """The same bytes under a second name; a copy where there are no hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)
