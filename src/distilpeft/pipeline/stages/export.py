"""Write the student as files that run without us, and compare them with it before they count.

Leaves: `model/`, the files of one form, configuration, tokenizer, and manifest.json, which says how to open it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distilpeft.data.batches import chunks
from distilpeft.data.pictures import Reader
from distilpeft.errors import GateError, InputError
from distilpeft.export.comparison import Verdict
from distilpeft.export.formats import int8_sums, onnx_int8, openvino_files
from distilpeft.export.formats.onnx_int8 import Candidate
from distilpeft.export.formats.student import Student, is_typed
from distilpeft.export.formats.writers import WRITERS
from distilpeft.export.gate import Gate
from distilpeft.export.manifest import MANIFEST, ExportManifest
from distilpeft.export.runtimes import START, Inputs, open_onnx, open_runner
from distilpeft.machine.artifact import Artifact, Figures
from distilpeft.machine.files import files_below, sealed, write_json
from distilpeft.models.context import Context
from distilpeft.models.loading import head_modules
from distilpeft.models.pair import MODEL, Loaded
from distilpeft.models.student import load_student, save_tokenizer
from distilpeft.recipe import Recipe
from distilpeft.recipe.export import FORMS
from distilpeft.recipe.task import Embedding, QuestionAnswering, Seq2Seq
from distilpeft.tasks.language import seq2seq

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION_BATCH = 8


def run(context: Context, *, form: str, student: Artifact, out: Artifact) -> Figures:
    """Export the student into `out.partial` and prove it equal within the form's limits; the main process does it.

    Args:
        context: the run, with the recipe's `export` section.
        form: one of `export.formats`.
        student: the distilled student.
        out: where the files go.

    Returns:
        `parity`, see `parity.Gate.check`; `limits`; `worst` rows; `size_bytes` of the files that hold the model; for
        int8 graphs `way`, how it was made, `tried`, the ways that did not hold and why, and what `_elsewhere` found.

    Raises:
        GateError: the export is further from the student than the recipe allows; nothing is left.
        InputError: the model has no such form.
    """
    loaded = load_student(context.runtime, context.pair, student.path / MODEL)
    for split in ("train", "validation"):  # by all processes together; below they are at hand
        context.data.tokens(split, loaded.reader)
    figures: Figures = context.runtime.on_main(lambda: _export(context, form, loaded, student, out))
    return figures


def _export(context: Context, form: str, loaded: Loaded, student: Artifact, out: Artifact) -> Figures:
    runtime, recipe, architecture = context.runtime, context.recipe, context.pair.architecture
    shutil.rmtree(out.partial)  # what a killed run may have left
    folder = out.partial / MODEL
    folder.mkdir(parents=True)
    heads = tuple(head_modules(architecture, loaded.model.config))
    source = Student(recipe, student.path / MODEL, architecture.auto_class, loaded.tokenizer, heads)
    runtime.say(f"  export: writing {form}")
    _describe(context, loaded, form, folder)
    before = set(files_below(folder))
    limits = recipe.limits(form)
    figures: Figures = {}
    if form not in WAYS:
        WRITERS[form](source, form, folder)
        _describe_writing(recipe, loaded.model, folder)
    runtime.say(f"  export: comparing {form} with the student")
    gate = Gate(context, loaded)
    if form in WAYS:
        verdict, figures = _by_candidates(context, loaded, gate, source, form, folder)
    else:
        verdict = gate.check(folder, limits, exact=recipe.exactness(form) == "exact")
    for file in files_below(folder):
        file.chmod(0o644)  # some libraries let nobody else read what they write
    if verdict.faults:
        shutil.rmtree(out.partial)
        raise GateError(f"export: {form}: {verdict}")
    size = sum(file.stat().st_size for file in set(files_below(folder)) - before)
    return {
        **figures,
        "parity": verdict.figures,
        "limits": asdict(limits),
        "worst": [list(row) for row in verdict.worst],
        "size_bytes": size,
    }


def _describe(context: Context, loaded: Loaded, form: str, folder: Path) -> None:
    """Everything next to the model: configuration, tokenizer, and how to open it."""
    recipe, tokenizer, model, task = context.recipe, loaded.tokenizer, loaded.model, context.recipe.task
    model.config.save_pretrained(str(folder))
    _describe_writing(recipe, model, folder)
    save_tokenizer(recipe, tokenizer, folder)
    if not recipe.kind.reads_images and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"export.formats: the tokenizer {type(tokenizer).__name__} has no tokenizer.json to run without us"
        )
    manifest: ExportManifest = {
        "format": form,
        "file": FORMS[form].file,
        "name": recipe.name,
        "task": task.kind,
        "auto_class": context.pair.architecture.auto_class.__name__,
    }
    if not recipe.kind.reads_images:
        manifest["max_tokens"] = min(recipe.data.max_tokens, tokenizer.model_max_length)
        manifest["pad_token_id"] = tokenizer.pad_token_id
    write_json(folder / MANIFEST, sealed({**manifest, **_own_facts(recipe, model, tokenizer)}))


def _describe_writing(recipe: Recipe, model: PreTrainedModel, folder: Path) -> None:
    """How a language model writes; called again when its files are there, among which is the untouched one."""
    if recipe.kind.reads_first:
        model.generation_config = seq2seq.settings_of(model, recipe.evaluate.generate)
    if recipe.kind.is_language_model:
        model.generation_config.save_pretrained(str(folder))


def _own_facts(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What only some tasks need, to run without us."""
    task = recipe.task
    facts: dict[str, Any] = {"labels": list(task.labels)} if hasattr(task, "labels") else {}
    facts |= {"ignored_ids": list(model.config.ignored_ids)} if recipe.student.static is not None else {}
    if isinstance(task, QuestionAnswering):
        facts |= {name: getattr(task, name) for name in ("no_answer", "stride", "longest_answer")}
    if recipe.reads_pairs:
        facts |= {"pair": True, "typed": is_typed(recipe, tokenizer)}
    if recipe.kind.is_language_model:
        ends = model.generation_config.eos_token_id
        ends = [tokenizer.eos_token_id] if ends is None else ends
        facts["eos_token_ids"] = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
        facts["chat"] = recipe.needs_template
    if isinstance(tokenizer, Reader):
        facts |= {"pictures": dict(tokenizer.settings), "shape": tokenizer.shape}
    if isinstance(task, Embedding):
        facts["pooling"] = model.pooling
    if isinstance(task, Seq2Seq):
        facts |= {START: model.config.decoder_start_token_id, "prefix": task.prefix}
        facts["max_new_tokens"] = recipe.evaluate.generate.max_new_tokens
    return facts


def _by_candidates(
    context: Context, loaded: Loaded, gate: Gate, source: Student, form: str, folder: Path
) -> tuple[Verdict, dict[str, Any]]:  # fmt: skip
    """Make a form of several ways by the first that holds."""
    scratch = folder.with_name("float")
    scratch.mkdir(exist_ok=True)
    try:
        WRITERS["onnx"](source, "onnx", scratch)
        graph = scratch / FORMS["onnx"].file
        ways = WAYS[form](context, gate, graph, lambda: _calibration(context, loaded, graph))
        return _first_that_holds(context, gate, form, folder, ways)
    finally:
        shutil.rmtree(scratch)


def _onnx_ways(
    context: Context, gate: Gate, graph: Path, rows: Callable[[], Iterator[Inputs]]
) -> Iterator[Candidate]:  # fmt: skip
    recipe = context.recipe
    return onnx_int8.candidates(
        recipe.export.int8, graph, lambda path: gate.distance(open_onnx(path)), rows, portable=recipe.export.portable,
        trained=recipe.distil.quantization is not None and recipe.distil.quantization.form == "onnx-int8",
    )  # fmt: skip


def _openvino_ways(
    context: Context, gate: Gate, graph: Path, rows: Callable[[], Iterator[Inputs]]
) -> Iterator[Candidate]:  # fmt: skip
    del gate
    recipe = context.recipe
    return openvino_files.candidates(
        graph, rows, language=recipe.kind.has_cache, portable=recipe.export.portable,
        attends=recipe.student.static is None and not recipe.kind.reads_images,
    )  # fmt: skip


WAYS = {"onnx-int8": _onnx_ways, "openvino-int8": _openvino_ways}
"""The forms that are made in one of several ways."""


def _first_that_holds(
    context: Context, gate: Gate, form: str, folder: Path, ways: Iterator[Candidate]
) -> tuple[Verdict, dict[str, Any]]:
    file = folder / FORMS[form].file
    file.parent.mkdir(exist_ok=True)
    tried: list[dict[str, Any]] = []
    verdict = Verdict({})
    for way in ways:
        way.write(file)
        verdict = gate.check(folder, context.recipe.limits(form), exact=False)
        figures = {} if verdict.faults else _elsewhere(context, gate, form, folder, verdict)
        if not verdict.faults:
            return verdict, {"way": way.name, "tried": tried, **figures}
        context.runtime.say(f"  export: {form}, {way.name}: {'; '.join(verdict.faults)}")
        tried.append({"way": way.name, "faults": verdict.faults, "parity": verdict.figures})
        for part in file.parent.glob(file.stem + ".*"):
            part.unlink()
    verdict.faults = [f"{entry['way']}: {'; '.join(entry['faults'])}" for entry in tried]
    return verdict, {}


def _elsewhere(context: Context, gate: Gate, form: str, folder: Path, verdict: Verdict) -> dict[str, Any]:
    """What of the figures depends on this processor, and on the rows of a batch.

    Args:
        context: the run.
        gate: with the student's answers.
        form: of an int8 graph.
        folder: the export that holds here.
        verdict: of it; gets the faults that it has elsewhere, if it is to be portable.

    Returns:
        `batching`, see `Gate.batching`; of an ONNX graph also `processors` on which the figures hold, and, if it is
        portable, `exact_sums`: the figures of the same graph where no sum is cut.
    """
    name = FORMS[form].file
    batching = gate.batching(open_runner(folder))
    figures: dict[str, Any] = {} if batching is None else {"batching": batching}
    if form != "onnx-int8":
        return figures
    figures["processors"] = int8_sums.processors(folder / name)
    if context.recipe.export.portable:
        exact = folder.with_name("exact")
        shutil.copytree(folder, exact, ignore=shutil.ignore_patterns(Path(name).name + "*"))
        try:
            int8_sums.write_exact(folder / name, exact / name)
            again = gate.check(exact, context.recipe.limits(form), exact=False)
        finally:
            shutil.rmtree(exact)
        verdict.faults += [f"with exact sums, as on other processors: {fault}" for fault in again.faults]
        figures["exact_sums"] = again.figures
    return figures


def _calibration(context: Context, loaded: Loaded, graph: Path) -> Iterator[Inputs]:
    """Training rows, drawn by the recipe's seed, as the graph takes them."""
    recipe, rows = context.recipe, context.data.tokens("train", loaded.reader)
    count = min(recipe.export.calibration_rows, len(rows.lengths_N))
    picked = np.random.default_rng(recipe.seed).choice(len(rows.lengths_N), count, replace=False)
    runner = open_onnx(graph)
    for ids in chunks(picked, CALIBRATION_BATCH):
        tensors = context.task.inputs(loaded.model, rows.load_batch(ids))
        inputs = {name: tensor.numpy() for name, tensor in tensors.items()}
        if "input_ids" in inputs:  # packed rows have no mask
            inputs.setdefault("attention_mask", np.ones_like(inputs["input_ids"]))
        yield runner.feed(inputs)
