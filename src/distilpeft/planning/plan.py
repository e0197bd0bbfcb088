"""The plan of a run: every artifact that a recipe leads to, named by its key before anything is computed.

Torch-free: `distilpeft check` and a finished `distilpeft run` need nothing heavier than this. A key holds the
recipe settings that the stage reads and the digests or keys of its inputs, and nothing that cannot change the
result. So a new student, alpha or temperature finds the teacher and its targets where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from distilpeft.data.model_files.quantized import stored_form
from distilpeft.data.model_files.recipe_models import teacher_of
from distilpeft.data.sources import Source, digest
from distilpeft.data.unlabelled import unlabelled_digest
from distilpeft.machine.artifact import Artifact, artifact
from distilpeft.machine.files import digest_json
from distilpeft.machine.host import machine_name
from distilpeft.planning.inputs import (
    check_tokens,
    data_digest,
    digest_settings,
    export_settings,
    head_key,
    source_of_targets,
    student_origin,
    target_settings,
    teacher_base,
    without,
)
from distilpeft.planning.models import check_models, settled
from distilpeft.planning.roles import (
    ARMS,
    CE_LONG,
    CE_ONLY,
    FULL,
    HARD,
    MAJORITY,
    MERGED,
    STUDENT,
    TEACHER,
    TEACHERS,
    UNTIMED,
    UNTRAINED,
    export_role,
    format_of,
    step_name,
)
from distilpeft.recipe import Recipe
from distilpeft.recipe.export import HUB, together
from distilpeft.recipe.recipe import result_settings

FORMAT = 6
COMPARED = 2
"""The format of what `compare` leaves; the other stages' is older."""
CACHE = "cache"
"""The folder of tokenised rows in a run's folder."""


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        artifact: what it leaves behind, with the settings and inputs that it depends on.
        role: the model that it makes or judges; the format for the stages `export` and `bundle`, or `hub` for the
            bundle of several; "" for a stage of one step.
    """

    artifact: Artifact
    role: str = ""

    @property
    def stage(self) -> str:
        """The verb."""
        return self.artifact.stage

    @property
    def key(self) -> str:
        """The key of its artifact."""
        return self.artifact.key

    @property
    def name(self) -> str:
        """The step in messages and reports."""
        return step_name(self.stage, self.role)


@dataclass(frozen=True)
class Plan:
    """What a run will leave behind.

    Attributes:
        recipe: the checked recipe.
        folder: runs/<name>.
        data_digest: names the rows.
        own: the steps of the recipe's own seed in the order in which they are done: teacher, targets, students, audit,
            evaluations, exports, comparison, benchmark, bundles.
        repeats: seed → the same chain up to `compare`, without exports, for `evaluate.seeds`.
    """

    recipe: Recipe
    folder: Path
    data_digest: str
    own: tuple[Step, ...]
    repeats: Mapping[int, Plan] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        """Tokenised rows, which can be made again."""
        return self.folder / CACHE

    @cached_property
    def artifacts(self) -> Mapping[str, Artifact]:
        """The artifacts of its own steps by the steps' names, in order."""
        return {step.name: step.artifact for step in self.own}

    def find(self, stage: str, role: str = "") -> Step | None:
        """Its own step of a stage, or None if the recipe has no such step."""
        return next((step for step in self.own if (step.stage, step.role) == (stage, role)), None)

    def step(self, stage: str, role: str = "") -> Step:
        """Its own step of a stage, which it has."""
        step = self.find(stage, role)
        assert step is not None, f"the plan has no step {step_name(stage, role)}"
        return step

    def artifact(self, stage: str, role: str = "") -> Artifact:
        """The artifact of its own step of a stage, which it has."""
        return self.step(stage, role).artifact

    def weights_of(self, role: str) -> Step:
        """The step that makes the weights of a role."""
        form = format_of(role)
        if form is not None:
            return self.step("export", form)
        return self.step("teacher") if role in TEACHERS else self.step("distil", role)

    def roles(self) -> list[str]:
        """The models of the report, in its order."""
        return [step.role for step in self.own if step.stage == "evaluate"]

    def timed(self) -> list[str]:
        """The models whose latency is measured, in the report's order."""
        return [role for role in self.roles() if role not in UNTIMED]

    def needs(self, step: Step) -> list[Step]:
        """The steps that have to be done before one of this plan's: those of earlier stages, and what it is judged by.

        A student waits for `lead` only if the recipe stops there.
        """
        earlier = [
            other for other in self.own[: self.own.index(step)] if other.stage != step.stage or other.role == TEACHER
        ]
        if step.stage == "distil" and (step.role != STUDENT or self.recipe.distil.gate != "stop"):
            return [other for other in earlier if other.stage != "lead"]
        return earlier

    def missing(self) -> list[str]:
        """Steps still to be done; those of repeats after their seed."""
        return [step for step, output in self.steps().items() if not output.done]

    def steps(self) -> dict[str, Artifact]:
        """Everything that the run makes, each once; steps of repeats are called `seed N: STEP`."""
        outputs = dict(self.artifacts)
        own = {output.path for output in outputs.values()}
        for seed, plan in self.repeats.items():
            more = {f"seed {seed}: {step}": output for step, output in plan.artifacts.items() if output.path not in own}
            own |= {output.path for output in more.values()}
            outputs |= more
        return outputs


def make_plan(recipe: Recipe, runs: Path) -> Plan:
    """Name all artifacts of a recipe.

    Raises:
        InputError: a source does not exist or does not fit the recipe.
    """
    recipe = settled(recipe)
    others = [seed for seed in recipe.evaluate.seeds if seed != recipe.seed]
    repeats = {seed: _plan(recipe.model_copy(update={"seed": seed}), runs, repeated=True) for seed in others}
    return replace(_plan(recipe, runs), repeats=repeats)


@dataclass(frozen=True)
class _Naming:
    """What all steps of a recipe have in common when their artifacts are named."""

    recipe: Recipe
    folder: Path
    data_digest: str

    @property
    def seeded(self) -> dict[str, object]:
        """The settings of every step that draws random numbers."""
        return {"seed": self.recipe.seed, **({"deterministic": True} if self.recipe.deterministic else {})}

    @property
    def unlabelled(self) -> dict[str, str]:
        """The input of every step that reads rows without labels, if there are any."""
        key = unlabelled_digest(self.recipe.data)
        return {} if key is None else {"unlabelled": key}

    @property
    def counted(self) -> dict[str, str]:
        """The input of students that learn from labels alone: the rows without, if their tokens are counted."""
        return {} if self.recipe.student.vocabulary is None else self.unlabelled

    def step(self, stage: str, settings: Mapping[str, object], inputs: Mapping[str, str], role: str = "") -> Step:
        """A step whose artifact is named by these settings and inputs, and by the rows."""
        all_inputs = {"data": self.data_digest, **inputs}
        return Step(artifact(self.folder, stage, FORMAT, digest_settings(settings), all_inputs), role)


@dataclass(frozen=True)
class _Model:
    """A model of the report.

    Attributes:
        role: its name there.
        inputs: name → key of what it is made from.
    """

    role: str
    inputs: Mapping[str, str]


def _plan(recipe: Recipe, runs: Path, *, repeated: bool = False) -> Plan:
    """The plan of one seed; a repeat ends with the comparison, and has neither an audit nor exports."""
    base = teacher_base(recipe)
    names = _Naming(recipe, runs / recipe.name, data_digest(recipe))

    teacher = _teacher(names, base)
    targets = _targets(names, teacher)
    check_tokens(recipe)
    origin = student_origin(recipe, teacher.key)
    check_models(recipe)
    students = _students(names, origin, _soft_inputs(recipe, teacher, targets))
    student = next(step for step in students if step.role == STUDENT)
    lead = [] if repeated else _lead(names, teacher, students)
    audit = [] if repeated else _audit(names, student, targets)

    untrained = _Model(UNTRAINED, {"seeded": digest_json([_student_settings(names), {**origin, **names.counted}])})
    trained = [_Model(step.role, {"model": step.key}) for step in students]
    models = [_Model(MAJORITY, {}), untrained, *trained, *_teacher_forms(recipe, teacher)]
    evaluations = _evaluations(names, models)
    first = [step for step in students if step.role == CE_ONLY]
    others = [step for step in students if step.role != CE_ONLY]
    steps = [teacher, *targets, *first, *lead, *others, *audit, *evaluations]
    if repeated:
        return Plan(recipe, names.folder, names.data_digest, (*steps, _comparison(names, evaluations)))

    exported_student = next(step for step in students if step.role == recipe.export.of)
    exports = [_export(names, form, exported_student) for form in recipe.export.formats]
    exported = [_Model(export_role(step.role), {"model": step.key}) for step in exports]
    judged = [_evaluation(names, model, evaluations[0]) for model in exported]
    comparison = _comparison(names, [*evaluations, *judged])
    benchmark = _benchmark(names, [*models, *exported])
    pairs = list(zip(exports, judged, strict=True))
    bundles = [_bundle(names, export, [*evaluations, evaluation, benchmark]) for export, evaluation in pairs]
    bundles += _hub(names, pairs, [*evaluations, benchmark])
    steps += [*(step for pair in pairs for step in pair), comparison, benchmark, *bundles]
    return Plan(recipe, names.folder, names.data_digest, tuple(steps))


def _teacher(names: _Naming, base: Source) -> Step:
    settings = without(result_settings(names.recipe.teacher), "gate", "model", "revision")
    inputs = {"base": digest(base), **head_key(names.recipe, base)}
    if base.path is None and names.recipe.teacher.fit is None and hasattr(names.recipe.task, "labels"):
        inputs["classes"] = "by name"  # not so in artifacts of earlier versions
    return names.step("teacher", {**settings, **names.seeded}, inputs)


def _targets(names: _Naming, teacher: Step) -> list[Step]:
    """The teacher's soft targets on disk, if this run is to make them."""
    recipe = names.recipe
    if not _is_cached(recipe) or recipe.targets.source is not None:
        return []
    return [names.step("targets", target_settings(recipe), {"teacher": teacher.key, **names.unlabelled})]


def _is_cached(recipe: Recipe) -> bool:
    """Whether the student learns from soft targets on disk."""
    return recipe.targets.mode == "cached" and recipe.distil.alpha > 0


def _soft_inputs(recipe: Recipe, teacher: Step, targets: list[Step]) -> dict[str, str]:
    """What the soft targets that the student learns from are made from."""
    if targets:
        return {"targets": targets[0].key}
    if _is_cached(recipe):
        assert recipe.targets.source is not None
        return {"targets": source_of_targets(recipe, recipe.targets.source)}
    if recipe.distil.alpha > 0:
        return {"teacher": teacher.key, "precision": recipe.targets.precision}
    return {}


def _students(names: _Naming, origin: Mapping[str, str], soft: Mapping[str, str]) -> list[Step]:
    """The student, and those that it is compared with."""
    recipe = names.recipe
    roles = {STUDENT, *_controls(recipe)}
    if recipe.distil.ce_only_baseline and recipe.kind.has_labels:
        roles.add(CE_ONLY)
    return [_student(names, origin, soft, role) for role in ARMS if role in roles]


def _student(names: _Naming, origin: Mapping[str, str], soft: Mapping[str, str], role: str) -> Step:
    arm = ARMS[role]
    settings = {**result_settings(names.recipe.distil), "student": _student_settings(names)}
    if arm.teacher is None:
        settings = {**without(settings, "temperature", "divergence", "features", "unlabelled_weight"), "alpha": 0.0}
    elif arm.teacher == "hard":
        settings = {**without(settings, "temperature", "divergence", "features"), "teacher": "hard"}
    if arm.equal_steps:
        settings["steps"] = "of the student"
    if role == CE_ONLY:
        settings["fit"] = result_settings(names.recipe.distil.ce_only_fit)
    more = names.unlabelled if arm.unlabelled or arm.equal_steps else names.counted
    taught = {} if arm.teacher is None else soft
    return names.step("distil", settings, {**origin, **taught, **more}, role)


def _controls(recipe: Recipe) -> tuple[str, ...]:
    """The students besides the one on labels alone that the recipe's is compared with."""
    if not recipe.data.may_have_unlabelled:
        return ()
    if recipe.distil.controls is not None:
        return tuple(f"student_{name}" for name in recipe.distil.controls)
    return (CE_LONG, HARD) if recipe.kind.has_likeliest_class else (CE_LONG,)


def _lead(names: _Naming, teacher: Step, students: list[Step]) -> list[Step]:
    """How far the teacher is ahead of the student on labels alone, on validation rows."""
    on_labels = [step for step in students if step.role == CE_ONLY]
    if not on_labels or names.recipe.distil.alpha == 0:
        return []
    settings = {"metric": names.recipe.kind.main, "precision": names.recipe.evaluate.precision}
    return [names.step("lead", settings, {"teacher": teacher.key, "student": on_labels[0].key})]


def _student_settings(names: _Naming) -> dict[str, object]:
    return {**without(result_settings(names.recipe.student), "model", "revision"), **names.seeded}


def _audit(names: _Naming, student: Step, targets: list[Step]) -> list[Step]:
    """For language models: how far the gradient from stored soft targets is from the one from all logits."""
    recipe = names.recipe
    if not targets or not recipe.kind.is_language_model:
        return []
    settings = {
        "temperature": recipe.distil.temperature, "precision": recipe.evaluate.precision, **names.seeded,
        "k": recipe.targets.k, "draws": recipe.targets.draws,
    }  # fmt: skip
    return [names.step("audit", settings, {"student": student.key, "targets": targets[0].key})]


def _teacher_forms(recipe: Recipe, teacher: Step) -> list[_Model]:
    """The teacher, and what its short cuts are compared with: unquantized, and merged as the student is cut from it."""
    models = [_Model(TEACHER, {"model": teacher.key})]
    quantized, base = recipe.teacher.quantize != "none", teacher_of(recipe)
    full = base.path is None or stored_form(base) is None  # else its files hold nothing better
    if recipe.evaluate.teacher_full_precision and quantized and full:
        models.append(_Model(FULL, {"model": teacher.key, "quantize": "none"}))
    if recipe.student.from_teacher and recipe.teacher.adapter and quantized:
        models.append(_Model(MERGED, {"model": teacher.key, "merged": "dequantized"}))
    return models


def _evaluations(names: _Naming, models: list[_Model]) -> list[Step]:
    """The teacher's evaluation first, since the others are compared with it."""
    teacher = next(model for model in models if model.role == TEACHER)
    reference = _evaluation(names, teacher, None)
    return [reference, *(_evaluation(names, model, reference) for model in models if model is not teacher)]


def _evaluation(names: _Naming, model: _Model, reference: Step | None) -> Step:
    settings = {**result_settings(names.recipe.evaluate), "metrics": names.recipe.metrics}
    against = {} if reference is None else {"teacher": reference.key}
    return names.step("evaluate", settings, {"role": model.role, **against, **model.inputs}, model.role)


def _export(names: _Naming, form: str, student: Step) -> Step:
    return names.step("export", export_settings(names.recipe, form), {"model": student.key}, form)


def _comparison(names: _Naming, evaluations: list[Step]) -> Step:
    settings = {"metrics": names.recipe.metrics, "format": COMPARED}
    return names.step("compare", settings, {step.role: step.key for step in evaluations})


def _benchmark(names: _Naming, models: list[_Model]) -> Step:
    recipe = names.recipe
    settings = {**result_settings(recipe.benchmark), "split": recipe.evaluate.split, "machine": machine_name()}
    timed = [model for model in models if model.role not in UNTIMED]
    inputs = {f"{model.role} {name}": key for model in timed for name, key in model.inputs.items()}
    return names.step("benchmark", settings, inputs)


def _bundle(names: _Naming, export: Step, steps: list[Step]) -> Step:
    """An export with a card, which shows the figures of these steps."""
    recipe = names.recipe
    settings = {"name": recipe.name, "license": recipe.export.license}
    figures = digest_json({step.name: step.key for step in steps})
    return names.step("bundle", settings, {"files": export.key, "figures": figures}, export.role)


def _hub(names: _Naming, pairs: Sequence[tuple[Step, Step]], steps: list[Step]) -> list[Step]:
    """The bundle of all exports that one folder can hold, if there are several."""
    recipe = names.recipe
    joined = [pair for pair in pairs if pair[0].role in together(recipe.export.formats)]
    if not joined:
        return []
    settings = {"name": recipe.name, "license": recipe.export.license, "forms": [export.role for export, _ in joined]}
    figures = digest_json({step.name: step.key for step in [*steps, *(evaluation for _, evaluation in joined)]})
    inputs = {export.role: export.key for export, _ in joined}
    return [names.step("bundle", settings, {**inputs, "figures": figures}, HUB)]
