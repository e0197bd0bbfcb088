"""Recipes: the one YAML file that describes a run, and the only source of settings.

Each class is one section, in the order in which the stages read them; `distilpeft schema` prints them as
JSON schema. Every value is checked here, before any weight is read; an unknown key is an error.
Fields marked `not in the key` cannot change a result, so changing them repeats no work.
This module imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field

from distilpeft.recipe.data import UNLABELLED_KEYS, Data
from distilpeft.recipe.distil import Distil, format_fault
from distilpeft.recipe.evaluate import Benchmark, Evaluate
from distilpeft.recipe.export import FORMS, LIMITS, Exactness, Export, Limits
from distilpeft.recipe.section import IN_KEY_IF_GIVEN, NOT_IN_KEY, Count, Index, Section, distinct
from distilpeft.recipe.student import Student
from distilpeft.recipe.task import (
    CausalLM,
    Kind,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    TaskSection,
    Texts,
)
from distilpeft.recipe.teacher import YES_NO, Targets, Teacher
from distilpeft.recipe.training import Fit

Parallel = Literal["ddp", "fsdp2"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Recipe(Section):
    """A whole run, section by section in the order in which the stages read them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="the run's folder is runs/NAME")
    seed: Index = 17
    deterministic: bool = Field(
        False, description="only operations that give the same bits each time on the same hardware and versions; "
        "slower on GPUs", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    devices: Literal["auto", "cpu"] | Count = Field(
        "auto", description="auto = all GPUs, a process each, or one process without any; cpu = one process without "
        "GPUs; a number = this many GPUs, or processes where there are none", json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    parallel: Parallel = Field(
        "ddp", description="weights in training: replicated in each process, or sharded over all",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    task: TaskSection
    data: Data
    teacher: Teacher
    targets: Targets = Targets()
    student: Student
    distil: Distil
    evaluate: Evaluate = Evaluate()
    benchmark: Benchmark = Benchmark()
    export: Export = Export()
    tracking: Annotated[tuple[Tracker, ...], distinct("trackers")] = Field(
        (), description="experiment trackers that see every training; each needs the extra of its name"
    )

    @property
    def kind(self) -> Kind:
        """What is known of the task's kind."""
        return self.task.traits

    @property
    def metrics(self) -> tuple[str, ...]:
        """What models are scored by."""
        own = self.kind.metrics
        always = (own[0], *(name for name in own if name == "accuracy"))
        return tuple(dict.fromkeys((*always, *(self.evaluate.metrics or self.kind.scored))))

    @property
    def reads_pairs(self) -> bool:
        """Whether a second text is read behind the first."""
        return isinstance(self.task, QuestionAnswering) or getattr(self.task, "pair", None) is not None

    @property
    def needs_template(self) -> bool:
        """Whether rows are rendered by the tokenizer's chat template."""
        return isinstance(self.task, CausalLM) and (self.task.chat or self.task.messages is not None)

    def exactness(self, form: str) -> Exactness:
        """How near an export stays to the student by nature; of safetensors, `export.dtype` decides."""
        rounded = form == "safetensors" and self.export.dtype != "fp32"
        return "half" if rounded else FORMS[form].exactness

    def limits(self, form: str) -> Limits:
        """What an export must hold: the recipe's own limits over the form's."""
        own = self.export.tolerance.get(form)  # type: ignore[call-overload]
        limits = {name: value for name, value in own if value is not None} if own else {}
        return replace(LIMITS[self.kind.family, self.exactness(form)], **limits)

    def monitor(self, fit: Fit) -> str:
        """The validation metric that picks the checkpoint."""
        return fit.monitor or self.kind.main


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    types = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
    return [part for part in types if issubclass(part, BaseModel)]


def result_settings(section: BaseModel) -> dict[str, Any]:
    """The section as plain data without the fields that cannot change a result (for artifact keys)."""
    settings: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value = getattr(section, name)
        if extra.get("not_in_key") or (extra.get("in_key_if_given") and value == field.default):
            continue
        settings[name] = result_settings(value) if isinstance(value, BaseModel) else value
    return settings


def cross_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong between sections, each fault with the key that it is placed at."""
    metrics = recipe.kind.metrics
    judged = recipe.kind.scored
    for name in recipe.evaluate.metrics or ():
        if name not in judged and not (recipe.kind.hub_metrics and name.startswith("hub:")):
            hub = "; a hub metric is written hub:NAME" if recipe.kind.hub_metrics else ""
            yield ("evaluate", "metrics"), f"{name!r} is none of {', '.join(judged)}{hub}"
    for section, fit in (("teacher", recipe.teacher.fit), ("distil", recipe.distil.fit)):
        live = recipe.kind.is_language_model and recipe.targets.mode == "online" and recipe.distil.alpha > 0
        allowed = (*metrics, "kl") if section == "distil" and live else metrics
        if fit is not None and fit.monitor is not None and fit.monitor not in allowed:
            why = (
                " (kl is measured where targets.mode is online)" if fit.monitor == "kl" and section == "distil" else ""
            )
            yield (section, "fit", "monitor"), f"{fit.monitor!r} is none of {', '.join(allowed)}{why}"
    if recipe.distil.alpha > 0 and recipe.targets.mode == "cached":
        yield from _target_faults(recipe)
    yield from _export_faults(recipe)
    yield from _static_faults(recipe)
    yield from _prompt_faults(recipe)
    yield from _other_faults(recipe)


def _prompt_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a teacher that is asked by a prompt cannot go with."""
    teacher, at = recipe.teacher, ("teacher", "prompt")
    if teacher.prompt is None:
        return
    if not isinstance(recipe.task, Texts):
        yield at, f"is for classes and numbers of texts, not for {recipe.task.kind}"
        return
    if recipe.reads_pairs != ("{pair}" in teacher.prompt):
        yield at, "needs the place {pair}, for the second text" if recipe.reads_pairs else "{pair} needs task.pair"
    if recipe.student.from_teacher is not None:
        yield (
            ("student", "from_teacher"),
            "a prompted teacher has no head for classes to hand on; take student.model or student.static",
        )
    if recipe.distil.features is not None:
        yield ("distil", "features"), "does not go with teacher.prompt: teacher and student read different texts"
    yield from _answer_faults(recipe, teacher.prompt)


def _answer_faults(recipe: Recipe, prompt: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Answers that are not those which the task has, and prompts that do not ask for them."""
    teacher, task, at = recipe.teacher, recipe.task, ("teacher", "answers")
    several = isinstance(task, MultiLabelClassification)
    if several != ("{label}" in prompt):
        why = "needs the place {label}: every class is asked for" if several else "{label} is for several classes"
        yield ("teacher", "prompt"), why
    elif several and prompt.count("{label}") > 1:
        yield ("teacher", "prompt"), "has the place {label} more than once"
    elif several and max(prompt.rfind("{text}"), prompt.rfind("{pair}")) > prompt.index("{label}"):
        yield ("teacher", "prompt"), "the texts must stand before {label}: they are read once for all classes"
    if several and teacher.shots:
        yield ("teacher", "shots"), "is not for several classes, each of which is a question of its own"
    if isinstance(task, Regression):
        if teacher.answers is None or not all(map(_is_number, teacher.answers)) or len(teacher.answers) < 2:
            yield at, 'write the numbers that it may answer, such as {1: " 1", 2: " 2", 3: " 3"}'
        return
    names = YES_NO if several else getattr(task, "labels", ())
    if teacher.answers is not None and set(teacher.answers) != set(names):
        whose = "" if several else "the classes of task.labels: "
        yield at, f"must name {whose}{', '.join(names)}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _other_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Trackers that are not there, settings that the task does not have, and code that a student would need."""
    if recipe.teacher.trust_remote_code and recipe.student.from_teacher is not None:
        yield (
            ("teacher", "trust_remote_code"),
            "the student would need that code, too, and whoever deploys it; give it a model of its own (student.model)",
        )
    for name in recipe.tracking:
        if importlib.util.find_spec(name) is None:
            yield ("tracking",), f'{name} is not installed: pip install "distilpeft[{name}]"'
    if recipe.kind.is_language_model and recipe.benchmark.compile:
        yield ("benchmark", "compile"), "is for classifiers; generation is not timed under torch.compile"
    yield from _kind_faults(recipe)


def _kind_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a kind of task does not have, and what its scores need."""
    modules, extra = recipe.kind.needs
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        yield ("task", "kind"), f'its scores need {", ".join(missing)}: pip install "distilpeft[{extra}]"'
    yield from _picture_faults(recipe)
    if "generate" in recipe.evaluate.model_fields_set and not recipe.kind.reads_first:
        yield ("evaluate", "generate"), f"is for seq2seq; {recipe.task.kind} is not scored on what it writes"
    if recipe.kind.same_tokens and not recipe.kind.reads_first and recipe.evaluate.groups is not None:
        why = (
            "rows of language models are cut and packed"
            if recipe.kind.is_language_model
            else "long texts become several rows"
        )
        yield ("evaluate", "groups"), f"is not for {recipe.task.kind}: {why}"
    if not recipe.kind.is_language_model and recipe.student.tokenizer == "teacher":
        yield ("student", "tokenizer"), "only language models can take over the teacher's tokenizer"
    if recipe.kind.is_numeric:
        yield from _value_faults(recipe)
    if not recipe.kind.has_labels:
        yield from _label_faults(recipe)
    if recipe.distil.features is not None:
        yield from _feature_faults(recipe)
    yield from _rounding_faults(recipe)
    yield from _unlabelled_faults(recipe)
    yield from _view_faults(recipe)
    yield from _vocabulary_faults(recipe)


def _vocabulary_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a student with fewer tokens than its tokenizer had cannot go with."""
    cut, kind, at = recipe.student.vocabulary, recipe.kind, ("student", "vocabulary")
    if cut is None:
        return
    if kind.reads_images or kind.reads_first:
        yield at, f"is not for {recipe.task.kind}"
    if recipe.student.from_config is not None:
        yield at, "is for pretrained students; from_config takes overrides: {vocab_size: ...} and any tokenizer"
    if recipe.distil.features is not None:
        yield at, "does not go with distil.features, which compares both models token by token"
    if kind.same_tokens and not cut.is_exact:
        name = "min_count" if cut.min_count > 1 else "max_size"
        why = f"{recipe.task.kind} is taught token by token, so training rows must keep their tokens"
        yield (*at, name), f"{why}; leave it out"
    if isinstance(recipe.task, CausalLM) and (recipe.task.text is not None or recipe.task.pack):
        yield at, "goes with pairs and chats without pack: other blocks of a held-out text could not be compared"
    if kind.is_language_model and recipe.targets.source is not None:
        yield (
            ("targets", "source"),
            "holds soft targets over all tokens; leave it out where student.vocabulary cuts them",
        )


def _unlabelled_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What rows without labels cannot go with, and what makes no sense without them."""
    data, distil, kind = recipe.data, recipe.distil, recipe.kind
    keys = [name for name in UNLABELLED_KEYS if data.gives_unlabelled(name)]
    for name in keys:
        if not kind.has_labels:
            yield ("data", name), f"{recipe.task.kind} has no labels: name all rows in data.source"
        elif distil.alpha == 0:
            yield ("data", name), "rows without labels teach nothing where distil.alpha is 0"
    if "on_empty_label" in keys and kind.is_language_model:
        yield ("data", "on_empty_label"), f"{recipe.task.kind} has no column of labels; see data.unlabelled"
    for name in ("unlabelled_weight", "controls"):
        if not keys and name in distil.model_fields_set:
            yield ("distil", name), "is for rows without labels, and would do nothing here; see data.unlabelled"
    if "hard_labels" in (distil.controls or ()) and not kind.has_likeliest_class:
        yield ("distil", "controls"), f"hard_labels are the teacher's likeliest classes; {recipe.task.kind} has none"


def _view_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Rows that cannot be changed, or not in this way."""
    views, kind = recipe.data.views, recipe.kind
    if views is None:
        return
    if kind.is_language_model:
        yield ("data", "views"), f"is not for {recipe.task.kind}: the answers of changed texts would be those of others"
    elif kind.reads_images:
        for name in sorted(views.model_fields_set - {"copies"}):
            yield ("data", "views", name), "is for texts; pictures vary by task.augment"
        if getattr(recipe.task, "augment", None) is None:
            yield ("data", "views"), "copies of pictures vary by task.augment: write task.augment: {flip: true}"


def _picture_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go with pictures, or with views of them."""
    augment = getattr(recipe.task, "augment", None)
    fixed = recipe.targets.mode == "cached" and recipe.data.views is None
    if augment is not None and recipe.distil.alpha > 0 and fixed:
        way = "set targets.mode: online, or data.views: {copies: 4}"
        yield ("task", "augment"), f"soft targets on disk are of the pictures as they are; {way}"
    if recipe.kind.reads_images and set(recipe.benchmark.lengths) != {"data"}:
        yield ("benchmark", "lengths"), "are of texts; a model reads pictures of one size"


def _feature_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What learning from inside the teacher cannot go with."""
    at = ("distil", "features")
    if not recipe.kind.allows_features:
        yield at, f"is not for {recipe.task.kind}"
    if recipe.distil.alpha == 0 or recipe.targets.mode != "online":
        yield at, "is learnt from the running teacher: set targets.mode: online, and alpha above 0"
    if recipe.student.gradient_checkpointing:
        yield at, "does not go with student.gradient_checkpointing, which forgets what layers gave"
    if recipe.distil.fit.compile:
        yield at, "does not go with distil.fit.compile, which hides what layers give"
    if getattr(recipe.task, "pack", False) and recipe.distil.features and recipe.distil.features.relations:
        yield (*at, "relations"), "would relate tokens of different documents; set task.pack: false"


def _rounding_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What training for an export's rounding cannot go with."""
    quantization, at = recipe.distil.quantization, ("distil", "quantization")
    if quantization is None:
        return
    form = quantization.form
    why = _not_rounded(form, recipe)
    if why is not None:
        yield (*at, "for"), why
    elif form not in recipe.export.formats:
        yield (*at, "for"), f"{form} is not among export.formats; add it"
    elif form == "onnx-int8" and not recipe.export.portable:
        yield (
            ("export", "portable"),
            "distil.quantization trains for weights in 7 bits, whose products no processor cuts off: write true",
        )
    others = {
        "student.lora": recipe.student.lora, "student.static": recipe.student.static,
        "distil.features": recipe.distil.features,
    }  # fmt: skip
    for name in (name for name, other in others.items() if other is not None):
        yield at, f"does not go with {name}"


def _not_rounded(form: str, recipe: Recipe) -> str | None:
    """Why a kind of task is not trained for the rounding of a form."""
    if recipe.kind.reads_first:
        return f"{recipe.task.kind} is not trained for a rounding; leave distil.quantization out"
    writes = isinstance(recipe.task, CausalLM)
    if form.startswith("gguf") and not writes:
        return f"a gguf form is for causal_lm; for {recipe.task.kind} name onnx-int8 or onnx-int4"
    return "onnx-int8 is not for causal_lm; name onnx-int4 or a gguf form" if form == "onnx-int8" and writes else None


def _static_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a bag of token vectors cannot learn, and settings that it does not have."""
    static, at = recipe.student.static, ("student", "static")
    if static is None:
        return
    if not recipe.kind.allows_static:
        yield at, f"is not for {recipe.task.kind}: a static student has one vector for a text; use from_teacher"
    if static.hidden is not None and not recipe.kind.has_labels:
        yield (*at, "hidden"), f"is for a head; the vectors of {recipe.task.kind} have none"
    if recipe.distil.features is not None:
        yield ("distil", "features"), "does not go with student.static, which has no layers"
    if recipe.parallel == "fsdp2":
        yield ("parallel",), "a static student has no layers to shard; write ddp"


def _label_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What needs labels, where there are none: the loss is the distance of vectors."""
    distil = recipe.distil
    if recipe.teacher.fit is not None:
        yield ("teacher", "fit"), "without labels there is nothing to tune on: write null, and leave optim out"
    if distil.alpha != 1:
        yield ("distil", "alpha"), "without labels there is only the teacher: write 1"
    if distil.temperature != 1:
        yield ("distil", "temperature"), "vectors have no temperature: write 1"
    for name in ("divergence", "label_smoothing"):
        if name in distil.model_fields_set:
            yield ("distil", name), "is for classes; see task.loss"


def _value_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What means nothing where answers are numbers: the loss is squared differences from teacher and label."""
    distil = recipe.distil
    if distil.temperature != 1:
        yield ("distil", "temperature"), "numbers have no temperature: the loss is squared differences; write 1"
    for name, means in (("divergence", "classes"), ("label_smoothing", "classes")):
        if name in distil.model_fields_set:
            yield ("distil", name), f"is for {means}; the loss of numbers is squared differences"


def _export_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Forms that the task does not have, or that cannot be written here."""
    if recipe.export.of != "student" and not (recipe.distil.ce_only_baseline and recipe.kind.has_labels):
        yield ("export", "of"), "no student is trained on labels alone; set distil.ce_only_baseline: true"
    if recipe.export.of == "student_ce_only_long" and not recipe.data.may_have_unlabelled:
        yield ("export", "of"), "is trained only where some rows have no label; take student_ce_only"
    for name in recipe.export.formats:
        form = FORMS[name]
        if form.language and not recipe.kind.has_cache:
            yield ("export", "formats"), f"{name} is for causal_lm"
        if form.static is not None and form.static != (recipe.student.static is not None):
            what = "is for static students (student.static)" if form.static else "quantizes layers; static has none"
            yield ("export", "formats"), f"{name} {what}"
        if form.static and recipe.reads_pairs:
            yield ("export", "formats"), f"{name} holds models of one text; this task reads pairs"
        if form.missing():
            needs = ", ".join(form.missing())
            yield ("export", "formats"), f'{name} needs {needs}: pip install "distilpeft[{form.extra}]"'


def _target_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Soft targets on disk that the loss could not use."""
    targets, distil = recipe.targets, recipe.distil
    if not recipe.kind.is_language_model:
        for name in ("format", "k", "draws", "temperatures", "value_bits"):
            if name in targets.model_fields_set and (name, targets.format) != ("format", "full"):
                yield ("targets", name), "is for causal_lm; of classes all logits are kept"
        return
    at = targets.temperatures
    if at is not None and distil.temperature not in at:
        listed = ", ".join(f"{value:g}" for value in at)
        yield ("targets", "temperatures"), f"distil.temperature is {distil.temperature:g}, but only {listed} are listed"
    fault = format_fault(targets.format, distil)
    if fault is not None and targets.source is None:
        yield ("targets", "format"), fault
