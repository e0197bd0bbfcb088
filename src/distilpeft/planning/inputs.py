"""What a plan starts from: rows, models and soft targets made elsewhere, checked as far as their files tell.

Also the settings that its keys hold. Torch-free, and no weight is read: headers and descriptions are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from distilpeft.data.model_files.quantized import logical_shapes
from distilpeft.data.model_files.recipe_models import student_of, teacher_of, token_key
from distilpeft.data.model_files.tokens import embedding_units
from distilpeft.data.model_files.widths import narrowed
from distilpeft.data.published import known_model
from distilpeft.data.reading import data_sources
from distilpeft.data.sources import (
    Source,
    check_model,
    digest,
    is_gguf,
    model_config,
    model_folder,
    num_layers,
)
from distilpeft.data.vocabulary import Vocabulary, check_same, check_templates
from distilpeft.distillation.store import STORE, ids_fault, read_store
from distilpeft.errors import InputError
from distilpeft.machine.files import digest_file, digest_json
from distilpeft.planning.models import own_head
from distilpeft.recipe import Recipe
from distilpeft.recipe.distil import format_fault
from distilpeft.recipe.recipe import result_settings
from distilpeft.recipe.training import Lora


def data_digest(recipe: Recipe) -> str:
    """What names the rows: their sources, and how they are read."""
    inputs = {split or "all": digest(source) for split, source in data_sources(recipe.data).items()}
    settings = {"task": result_settings(recipe.task), "data": {**result_settings(recipe.data), "source": None}}
    return digest_json([settings, {**inputs, **token_key(recipe)}])


def teacher_base(recipe: Recipe) -> Source:
    """The teacher's base, which has the layers and modules that the recipe names as far as its files tell."""
    source = teacher_of(recipe)
    config = model_config(source)
    depth = num_layers(config) if config else None
    cut = recipe.student.from_teacher
    if cut is not None and config and depth is not None:
        cut.of(depth)
        narrowed(cut, config)
    dim = recipe.student.static.dim if recipe.student.static else None
    units = embedding_units(config) if config else None
    if dim is not None and units is not None and dim > units:
        raise InputError(f"student.static.dim: {dim} are more than the {units} units of the teacher's embeddings")
    _check_lora(recipe.teacher.adapter, source, "teacher")
    return source


def student_origin(recipe: Recipe, teacher: str) -> dict[str, str]:
    """What the student starts from, checked as far as its files tell; `teacher` is the key of the tuned one."""
    student, source = recipe.student, student_of(recipe)
    if student.is_of_teacher:
        _check_lora(student.lora, source, "student")
        cut = student.from_teacher
        measured = cut is not None and cut.is_narrower  # earlier versions took the units with the largest weights
        return {"student": teacher, **({"units": "by activation"} if measured else {})}
    if student.from_config is not None:
        check_model(source, "student.from_config.model", weights=False)
        return {"student": digest(source)}
    check_model(source, "student.model")
    _check_lora(student.lora, source, "student")
    return {"student": digest(source), **head_key(recipe, source)}


def head_key(recipe: Recipe, source: Source) -> dict[str, str]:
    """What keys hold of a head whose classes are not the recipe's in their order; mostly nothing.

    The files of a hub model may come between two runs, so keys do not depend on them.
    """
    key = own_head(recipe, source).key if source.path is not None else ""
    return {"head": key} if key else {}


def student_ids(recipe: Recipe) -> dict[str, object]:
    """What the soft targets of a language model depend on because they are over ids that its student has, too."""
    settings: dict[str, object] = {}
    if recipe.student.vocabulary is not None:
        own = digest(student_of(recipe)) if recipe.student.model is not None else None
        settings["kept"] = {**result_settings(recipe.student.vocabulary), "of": own, "by": recipe.student.tokenizer}
    narrower = _narrower_vocabulary(recipe)
    return settings if narrower is None else {**settings, "vocabulary": narrower}


def _narrower_vocabulary(recipe: Recipe) -> int | None:
    """Ids of a student that has fewer than its teacher, whose soft targets are over these; None if it has not.

    Of hub models only published configurations are asked: a key may not depend on what has been downloaded.
    """
    student = recipe.student
    if student.is_of_teacher or not recipe.kind.is_language_model:
        return None
    theirs, ours = _num_ids(teacher_of(recipe)), _student_ids(recipe)
    return ours if theirs is not None and ours is not None and ours < theirs else None


def _student_ids(recipe: Recipe) -> int | None:
    """The ids of the student's output, as far as its files say."""
    config = recipe.student.from_config
    changed = config.overrides.get("vocab_size") if config is not None else None
    return changed if isinstance(changed, int) else _num_ids(student_of(recipe))


def _num_ids(source: Source) -> int | None:
    if is_gguf(source):
        return None  # its configuration is there only once a run has converted it
    if source.path is None:
        published = known_model(source)
        config = published[0] if published else None
    else:
        config = model_config(source)
    count = ((config or {}).get("text_config") or config or {}).get("vocab_size")
    return count if isinstance(count, int) else None


def check_tokens(recipe: Recipe) -> None:
    """Compare the token ids of the pair as far as its files tell; a run compares the loaded tokenizers in full."""
    if not recipe.kind.same_tokens or recipe.student.model is None:
        return
    sources = (teacher_of(recipe).reader, student_of(recipe).reader)
    vocabularies = [
        Vocabulary.of_folder(source.name, folder)
        for source in sources
        if (folder := model_folder(source)) is not None and folder.is_dir()
    ]
    if len(vocabularies) == len(sources) and vocabularies[0] is not None and vocabularies[1] is not None:
        check_same(vocabularies[0], vocabularies[1], chat=False, tokens_only=True)
        if recipe.needs_template and recipe.student.tokenizer != "teacher":
            check_templates(vocabularies[0], vocabularies[1])


def _check_lora(lora: Lora | None, source: Source, section: str) -> None:
    """Refuse target modules that the model's files do not know."""
    shapes = logical_shapes(source)
    if lora is None or isinstance(lora.target_modules, str) or shapes is None:
        return
    modules = {name.rpartition(".")[0] for name in shapes}
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            matrices = sorted({m.rpartition(".")[2] for m in modules if len(shapes.get(f"{m}.weight", ())) == 2})
            raise InputError(
                f"{section}.lora.target_modules: {source.name} has no module {target!r}; "
                f"its matrices are {', '.join(matrices)}"
            )


def source_of_targets(recipe: Recipe, source: str) -> str:
    """The digest of a store made elsewhere, checked as far as its description tells."""
    folder, key = Path(source).expanduser(), "targets.source"
    if not (folder / STORE).is_file():
        raise InputError(f"{key}: {source}: no soft targets here (no {STORE}); distilpeft targets import makes some")
    store = read_store(folder)
    layout = store["layout"]
    fault = format_fault(layout["kind"], recipe.distil)
    temperature = recipe.distil.temperature
    if layout["kind"] != "full" and temperature not in layout["temperatures"]:
        listed = ", ".join(f"{value:g}" for value in layout["temperatures"])
        fault = f"its targets are for temperature {listed}, but distil.temperature is {temperature:g}"
    student_ids = _student_ids(recipe) if recipe.kind.is_language_model else None
    if fault is None and student_ids is not None:
        fault = ids_fault(store, student_ids)
    if fault is not None:
        raise InputError(f"{key}: {source}: {fault}")
    return digest_file(folder / STORE)


def export_settings(recipe: Recipe, form: str) -> dict[str, object]:
    """What the files of one form depend on besides the student, and what they had to hold."""
    export = recipe.export
    settings: dict[str, object] = {"format": form, "gate_rows": export.gate_rows, "limits": asdict(recipe.limits(form))}
    if recipe.kind.reads_first:
        settings["generate"] = without(result_settings(recipe.evaluate.generate), "rows")
    if form == "safetensors":
        settings["dtype"] = export.dtype
    if form == "onnx-int8":
        settings["int8"] = export.int8
    if form in ("onnx-int8", "openvino-int8"):
        settings |= {"calibration_rows": export.calibration_rows, "seed": recipe.seed}
        settings |= {"portable": True} if export.portable else {}
    return settings


def digest_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as plain JSON values, so that a key is the same before and after a round trip through a manifest."""
    return {
        name: digest_settings(value)
        if isinstance(value, Mapping)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in settings.items()
    }


def target_settings(recipe: Recipe) -> dict[str, object]:
    """What soft targets depend on besides the teacher. All logits, which classes keep, serve every temperature."""
    targets = recipe.targets
    settings: dict[str, object] = {"precision": targets.precision}
    if not recipe.kind.is_language_model:
        return settings
    names = {"auto": ("k", "draws"), "top_k": ("k",), "sampled": ("draws",), "full": ()}[targets.format]
    settings |= {name: getattr(targets, name) for name in ("format", "value_bits", *names)}
    if targets.format != "full":
        settings["temperatures"] = targets.temperatures or (recipe.distil.temperature,)
    settings |= student_ids(recipe)
    if targets.format == "auto":  # the choice depends on what the loss can use
        settings["divergence"] = recipe.distil.divergence.kind
    return settings if targets.format in ("full", "top_k") else {**settings, "seed": recipe.seed}


def without(settings: Mapping[str, object], *names: str) -> dict[str, object]:
    """Settings less those of these names."""
    return {name: value for name, value in settings.items() if name not in names}
