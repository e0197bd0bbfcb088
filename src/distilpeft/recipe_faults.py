"""What is wrong between the sections of a recipe, each of which is right by itself; found before anything runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from distilpeft.forms import FORMS
from distilpeft.recipe import Distil, Recipe


def cross_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong between sections, each fault with the key that it is placed at."""
    known = recipe.kind.metrics
    judged = recipe.kind.scored
    for name in recipe.evaluate.metrics or ():
        if name not in judged and not (recipe.kind.hub_metrics and name.startswith("hub:")):
            hub = "; a hub metric is written hub:NAME" if recipe.kind.hub_metrics else ""
            yield ("evaluate", "metrics"), f"{name!r} is none of {', '.join(judged)}{hub}"
    for section, fit in (("teacher", recipe.teacher.fit), ("distil", recipe.distil.fit)):
        live = recipe.kind.language and recipe.targets.mode == "online" and recipe.distil.alpha > 0
        allowed = (*known, "kl") if section == "distil" and live else known
        if fit is not None and fit.monitor is not None and fit.monitor not in allowed:
            why = (
                " (kl is measured where targets.mode is online)" if fit.monitor == "kl" and section == "distil" else ""
            )
            yield (section, "fit", "monitor"), f"{fit.monitor!r} is none of {', '.join(allowed)}{why}"
    if recipe.distil.alpha > 0 and recipe.targets.mode == "cached":
        yield from _target_faults(recipe)
    yield from _export_faults(recipe)
    yield from _other_faults(recipe)


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
    if recipe.kind.language and recipe.benchmark.compile:
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
        why = "rows of language models are cut and packed" if recipe.kind.language else "long texts become several rows"
        yield ("evaluate", "groups"), f"is not for {recipe.task.kind}: {why}"
    if not recipe.kind.language and recipe.student.tokenizer == "teacher":
        yield ("student", "tokenizer"), "only language models can take over the teacher's tokenizer"
    if recipe.kind.values:
        yield from _value_faults(recipe)
    if not recipe.kind.labels:
        yield from _label_faults(recipe)
    if recipe.distil.features is not None:
        yield from _feature_faults(recipe)


def _picture_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go with pictures, or with views of them."""
    augment = getattr(recipe.task, "augment", None)
    if augment is not None and recipe.distil.alpha > 0 and recipe.targets.mode == "cached":
        yield ("task", "augment"), "soft targets on disk are of the pictures as they are; set targets.mode: online"
    if recipe.kind.images and set(recipe.benchmark.lengths) != {"data"}:
        yield ("benchmark", "lengths"), "are of texts; a model reads pictures of one size"


def _feature_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What learning from inside the teacher cannot go with."""
    at = ("distil", "features")
    if not recipe.kind.inner:
        yield at, f"is not for {recipe.task.kind}"
    if recipe.distil.alpha == 0 or recipe.targets.mode != "online":
        yield at, "is learnt from the running teacher: set targets.mode: online, and alpha above 0"
    if recipe.student.gradient_checkpointing:
        yield at, "does not go with student.gradient_checkpointing, which forgets what layers gave"
    if recipe.distil.fit.compile:
        yield at, "does not go with distil.fit.compile, which hides what layers give"
    if getattr(recipe.task, "pack", False) and recipe.distil.features and recipe.distil.features.relations:
        yield (*at, "relations"), "would relate tokens of different documents; set task.pack: false"


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
    for name in recipe.export.formats:
        form = FORMS[name]
        if form.language and not recipe.kind.caches:
            yield ("export", "formats"), f"{name} is for causal_lm"
        if form.missing():
            needs = ", ".join(form.missing())
            yield ("export", "formats"), f'{name} needs {needs}: pip install "distilpeft[{form.extra}]"'


def _target_faults(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Soft targets on disk that the loss could not use."""
    targets, distil = recipe.targets, recipe.distil
    if not recipe.kind.language:
        for name in ("format", "k", "draws", "temperatures", "value_bits"):
            if name in targets.model_fields_set and (name, targets.format) != ("format", "full"):
                yield ("targets", name), "is for causal_lm; of classes all logits are kept"
        return
    at = targets.temperatures
    if at is not None and distil.temperature not in at:
        listed = ", ".join(f"{one:g}" for one in at)
        yield ("targets", "temperatures"), f"distil.temperature is {distil.temperature:g}, but only {listed} are listed"
    fault = format_fault(targets.format, distil)
    if fault is not None and targets.source is None:
        yield ("targets", "format"), fault


def format_fault(form: str, distil: Distil) -> str | None:
    """Why a form of soft targets cannot serve a loss."""
    kind = distil.divergence.kind
    if form == "sampled" and kind != "forward_kl":
        return f"sampled targets estimate forward_kl and nothing else; {kind} needs top_k or full"
    if form == "top_k" and kind == "logit_mse":
        return "logit_mse compares single logits, but top_k keeps the tail as one class; take full or mode: online"
    return None
