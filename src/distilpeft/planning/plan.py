"""The plan of a run: every artifact that a recipe leads to, named by its key before anything is computed.

Torch-free: `distilpeft check` and a finished `distilpeft run` need nothing heavier than this. A key holds the
recipe settings that the stage reads and the digests or keys of its inputs, and nothing that cannot change the
result. So a new student, alpha or temperature finds the teacher and its targets where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distilpeft.data.reading import data_sources
from distilpeft.data.sources import (
    Source,
    check_model,
    digest,
    model_config,
    model_folder,
    num_layers,
    resolve,
    weight_shapes,
)
from distilpeft.data.vocabulary import Vocabulary, check_same
from distilpeft.distillation.store import STORE, read_store
from distilpeft.errors import InputError
from distilpeft.machine.artifact import Artifact, artifact
from distilpeft.machine.files import digest_file, digest_json
from distilpeft.machine.host import machine_name
from distilpeft.planning.roles import CE_ONLY, FULL, MAJORITY, MERGED, STUDENT, TEACHER, UNTIMED, UNTRAINED
from distilpeft.recipe import Recipe
from distilpeft.recipe.distil import format_fault
from distilpeft.recipe.recipe import result_settings
from distilpeft.recipe.training import Lora

FORMAT = 6
COMPARED = 2
"""The format of what `compare` leaves; the other stages' is older."""


@dataclass(frozen=True)
class Plan:
    """What a run will leave behind.

    Attributes:
        recipe: the checked recipe.
        folder: runs/<name>.
        data_digest: names the rows.
        artifacts: by step, in the order in which they are made: `teacher`, `targets`, `distil/<role>`,
            `audit`, `evaluate/<role>`, `export/<format>`, `compare`, `benchmark`, `bundle/<format>`.
        repeats: seed → the same chain up to `compare`, without exports, for `evaluate.seeds`.
    """

    recipe: Recipe
    folder: Path
    data_digest: str
    artifacts: Mapping[str, Artifact]
    repeats: Mapping[int, Plan] = field(default_factory=dict)

    def roles(self) -> list[str]:
        """The models of the report, in its order."""
        return [step.partition("/")[2] for step in self.artifacts if step.startswith("evaluate/")]

    def timed(self) -> list[str]:
        """The models whose latency is measured, in the report's order."""
        return [role for role in self.roles() if role not in UNTIMED]

    def missing(self) -> list[str]:
        """Steps still to be done; those of repeats after their seed."""
        return [step for step, made in self.steps().items() if not made.done]

    def steps(self) -> dict[str, Artifact]:
        """Everything that the run makes, each once; steps of repeats are called `seed N: STEP`."""
        found = dict(self.artifacts)
        own = {made.path for made in found.values()}
        for seed, plan in self.repeats.items():
            more = {f"seed {seed}: {step}": made for step, made in plan.artifacts.items() if made.path not in own}
            own |= {made.path for made in more.values()}
            found |= more
        return found


def make_plan(recipe: Recipe, runs: Path) -> Plan:
    """Name all artifacts of a recipe.

    Raises:
        InputError: a source does not exist or does not fit the recipe.
    """
    others = [seed for seed in recipe.evaluate.seeds if seed != recipe.seed]
    repeats = {seed: _plan(recipe.model_copy(update={"seed": seed}), runs, repeated=True) for seed in others}
    return replace(_plan(recipe, runs), repeats=repeats)


def _plan(recipe: Recipe, runs: Path, *, repeated: bool = False) -> Plan:
    folder = runs / recipe.name
    teacher_base = _teacher_base(recipe)
    data_inputs = {split or "all": digest(source) for split, source in data_sources(recipe.data).items()}
    rows = {"task": result_settings(recipe.task), "data": {**result_settings(recipe.data), "source": None}}
    data_digest = digest_json([rows, data_inputs])
    seeded = {"seed": recipe.seed, **({"deterministic": True} if recipe.deterministic else {})}

    def make(stage: str, settings: Mapping[str, Any], **inputs: str) -> Artifact:
        plain = digest_settings(settings)
        return artifact(folder, stage, FORMAT, plain, {"data": data_digest, **inputs})

    found: dict[str, Artifact] = {}
    teacher_settings = _without(result_settings(recipe.teacher), "gate", "model", "revision")
    teacher = found["teacher"] = make("teacher", {**teacher_settings, **seeded}, base=digest(teacher_base))
    cached = recipe.targets.mode == "cached" and recipe.distil.alpha > 0
    if cached and recipe.targets.source is None:
        found["targets"] = make("targets", _target_settings(recipe), teacher=teacher.key)
    _check_tokens(recipe)
    origin = _student_inputs(recipe, teacher)
    student = {**_without(result_settings(recipe.student), "model", "revision"), **seeded}
    distil = _without(result_settings(recipe.distil), "ce_only_baseline")
    soft = {"targets": found["targets"].key} if "targets" in found else {}
    if cached and recipe.targets.source is not None:
        soft = {"targets": _source_of_targets(recipe, recipe.targets.source)}
    if recipe.distil.alpha > 0 and not soft:
        soft = {"teacher": teacher.key, "precision": recipe.targets.precision}
    models: dict[str, dict[str, str]] = {MAJORITY: {}, UNTRAINED: {"seeded": digest_json([student, origin])}}
    if recipe.distil.ce_only_baseline and recipe.kind.labels:
        settings = {**_without(distil, "temperature", "divergence", "features"), "alpha": 0.0, "student": student}
        found[f"distil/{CE_ONLY}"] = made = make("distil", settings, **origin)
        models[CE_ONLY] = {"model": made.key}
    found[f"distil/{STUDENT}"] = made = make("distil", {**distil, "student": student}, **{**origin, **soft})
    models[STUDENT] = {"model": made.key}
    if "targets" in found and recipe.kind.language:
        audited = {"temperature": recipe.distil.temperature, "precision": recipe.evaluate.precision, **seeded}
        inputs = {"student": made.key, "targets": found["targets"].key}
        found["audit"] = make("audit", {**audited, "k": recipe.targets.k, "draws": recipe.targets.draws}, **inputs)
    models |= _teacher_forms(recipe, teacher)
    _evaluate(recipe, found, models, make, exports=not repeated)
    if not repeated:
        _measure(recipe, found, models, make)
    else:
        found.pop("audit", None)
    return Plan(recipe, folder, data_digest, found)


def _teacher_forms(recipe: Recipe, teacher: Artifact) -> dict[str, dict[str, str]]:
    """The teacher, and what its short cuts are held against: unquantized, and merged as the student is cut from it."""
    found = {TEACHER: {"model": teacher.key}}
    quantized = recipe.teacher.quantize != "none"
    if recipe.evaluate.teacher_full_precision and quantized:
        found[FULL] = {"model": teacher.key, "quantize": "none"}
    if recipe.student.from_teacher and recipe.teacher.adapter and quantized:
        found[MERGED] = {"model": teacher.key, "merged": "dequantized"}
    return found


def _evaluate(
    recipe: Recipe, found: dict[str, Artifact], models: dict[str, dict[str, str]], make: Any, *, exports: bool
) -> None:
    """Add evaluation and export of every model; the teacher first, the others are compared with it."""
    settings = {**result_settings(recipe.evaluate), "metrics": recipe.metrics}
    reference = make("evaluate", settings, role=TEACHER, **models[TEACHER])
    found[f"evaluate/{TEACHER}"] = reference
    for role, inputs in models.items():
        if role != TEACHER:
            found[f"evaluate/{role}"] = make("evaluate", settings, role=role, teacher=reference.key, **inputs)
    for form in recipe.export.formats if exports else ():
        made = make("export", _export_settings(recipe, form), **models[STUDENT])
        found[f"export/{form}"] = made
        role = f"export:{form}"
        models[role] = {"model": made.key}
        found[f"evaluate/{role}"] = make("evaluate", settings, role=role, teacher=reference.key, **models[role])
    evaluated = {step.partition("/")[2]: one.key for step, one in found.items() if step.startswith("evaluate/")}
    found["compare"] = make("compare", {"metrics": recipe.metrics, "format": COMPARED}, **evaluated)


def _measure(recipe: Recipe, found: dict[str, Artifact], models: dict[str, dict[str, str]], make: Any) -> None:
    """Add the benchmark of all models, and the bundles that tell of it."""
    bases = [role for role in models if not role.startswith("export:")]
    timed = {**result_settings(recipe.benchmark), "split": recipe.evaluate.split, "machine": machine_name()}
    inputs = {f"{role} {name}": key for role in models if role not in UNTIMED for name, key in models[role].items()}
    found["benchmark"] = make("benchmark", timed, **inputs)
    for form in recipe.export.formats:
        shown = [*(f"evaluate/{role}" for role in (*bases, f"export:{form}")), "benchmark"]
        figures = digest_json({step: found[step].key for step in shown if step in found})
        told = {"name": recipe.name, "license": recipe.export.license}
        found[f"bundle/{form}"] = make("bundle", told, files=found[f"export/{form}"].key, figures=figures)


def _export_settings(recipe: Recipe, form: str) -> dict[str, Any]:
    """What the files of one form depend on besides the student, and what they had to hold."""
    export = recipe.export
    settings: dict[str, Any] = {"format": form, "gate_rows": export.gate_rows, "limits": asdict(recipe.limits(form))}
    if recipe.kind.reads_first:
        settings["generate"] = _without(result_settings(recipe.evaluate.generate), "rows")
    if form == "safetensors":
        settings["dtype"] = export.dtype
    if form == "onnx-int8":
        settings |= {"int8": export.int8, "calibration_rows": export.calibration_rows, "seed": recipe.seed}
    return settings


def digest_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as plain JSON values, so that a key is the same before and after a round trip through a manifest."""
    return {
        name: digest_settings(value)
        if isinstance(value, Mapping)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in settings.items()
    }


def _target_settings(recipe: Recipe) -> dict[str, Any]:
    """What soft targets depend on besides the teacher. All logits, which classes keep, serve every temperature."""
    targets = recipe.targets
    settings: dict[str, Any] = {"precision": targets.precision}
    if not recipe.kind.language:
        return settings
    read = {"auto": ("k", "draws"), "top_k": ("k",), "sampled": ("draws",), "full": ()}[targets.format]
    settings |= {name: getattr(targets, name) for name in ("format", "value_bits", *read)}
    if targets.format != "full":
        settings["temperatures"] = targets.temperatures or (recipe.distil.temperature,)
    if targets.format == "auto":  # the choice depends on what the loss can use
        settings["divergence"] = recipe.distil.divergence.kind
    return settings if targets.format in ("full", "top_k") else {**settings, "seed": recipe.seed}


def _source_of_targets(recipe: Recipe, source: str) -> str:
    """The digest of a store made elsewhere, checked as far as its description tells."""
    folder, key = Path(source).expanduser(), "targets.source"
    if not (folder / STORE).is_file():
        raise InputError(f"{key}: {source}: no soft targets here (no {STORE}); distilpeft targets import makes some")
    layout = read_store(folder)["layout"]
    fault = format_fault(layout["kind"], recipe.distil)
    temperature = recipe.distil.temperature
    if layout["kind"] != "full" and temperature not in layout["temperatures"]:
        listed = ", ".join(f"{one:g}" for one in layout["temperatures"])
        fault = f"its targets are for temperature {listed}, but distil.temperature is {temperature:g}"
    if fault is not None:
        raise InputError(f"{key}: {source}: {fault}")
    return digest_file(folder / STORE)


def _without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _student_inputs(recipe: Recipe, teacher: Artifact) -> dict[str, str]:
    student = recipe.student
    if student.from_teacher is not None:
        _check_lora(student.lora, resolve(recipe.teacher.model, "teacher.model", recipe.teacher.revision), "student")
        return {"student": teacher.key}
    if student.from_config is not None:
        source = resolve(student.from_config.model, "student.from_config.model", student.from_config.revision)
        check_model(source, "student.from_config.model", weights=False)
    else:
        assert student.model is not None
        source = resolve(student.model, "student.model", student.revision)
        check_model(source, "student.model")
        _check_lora(student.lora, source, "student")
    return {"student": digest(source)}


def _teacher_base(recipe: Recipe) -> Source:
    """The teacher's base, checked as far as its files tell without loading them."""
    source = resolve(recipe.teacher.model, "teacher.model", recipe.teacher.revision)
    check_model(source, "teacher.model")
    config = model_config(source)
    depth = num_layers(config) if config else None
    cut = recipe.student.from_teacher
    if cut is not None and depth is not None:
        cut.of(depth)
    _check_lora(recipe.teacher.adapter, source, "teacher")
    return source


def _check_tokens(recipe: Recipe) -> None:
    """Compare the token ids of the pair as far as its files tell; a run compares the loaded tokenizers in full."""
    student = recipe.student
    name, revision = student.model, student.revision
    if not recipe.kind.same_tokens or name is None:
        return
    sources = (
        resolve(recipe.teacher.model, "teacher.model", recipe.teacher.revision),
        resolve(name, "student.model", revision),
    )
    found = [
        Vocabulary.of_folder(source.name, folder)
        for source in sources
        if (folder := model_folder(source)) is not None and folder.is_dir()
    ]
    if len(found) == len(sources) and found[0] is not None and found[1] is not None:
        check_same(found[0], found[1], chat=False, tokens_only=True)


def _check_lora(lora: Lora | None, source: Source, section: str) -> None:
    """Refuse target modules that the model's files do not know."""
    shapes = weight_shapes(source)
    if lora is None or isinstance(lora.target_modules, str) or shapes is None:
        return
    modules = {name.rpartition(".")[0] for name in shapes}
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            known = sorted({m.rpartition(".")[2] for m in modules if len(shapes.get(f"{m}.weight", ())) == 2})
            raise InputError(
                f"{section}.lora.target_modules: {source.name} has no module {target!r}; "
                f"its matrices are {', '.join(known)}"
            )
