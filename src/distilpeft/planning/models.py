"""Check a recipe's models by their files: classes, quantization, adapters, tokenizers, positions.

Everything here works before any weight is read, and without torch. A model of the hub is checked when its files are on
this machine; a run looks again once it has fetched them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from distilpeft.data.cut_vocabulary.kept import check_kind
from distilpeft.data.model_files.adapters import continued_lora, is_continued, own_lora
from distilpeft.data.model_files.heads import SUFFIXES, Head, architecture_of, head_of
from distilpeft.data.model_files.positions import Side, reach_of
from distilpeft.data.model_files.quantized import Stored, stored_form
from distilpeft.data.model_files.recipe_models import Reading, readings, student_of, teacher_of, texts_of
from distilpeft.data.model_files.tokens import (
    SAMPLED_TEXTS,
    Words,
    check_tokenizer_files,
    embedding_rows,
    longest_text,
    refuse_unreadable,
    unknown_share,
    without_row,
)
from distilpeft.data.sources import Source, check_model, model_config
from distilpeft.errors import InputError
from distilpeft.recipe import Recipe
from distilpeft.recipe.task import Seq2Seq

PROBLEMS = {
    "text_classification": "single_label_classification",
    "multi_label_classification": "multi_label_classification",
    "regression": "regression",
}
"""Kind of task → what transformers calls it in a configuration."""


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what the teacher's files decide: how its weights are quantized, and the LoRA that it comes with.

    Raises:
        InputError: the files are damaged, or the recipe asks for something else.
    """
    source = teacher_of(recipe)
    check_model(source, "teacher.model")
    changes: dict[str, Any] = {}
    stored = stored_form(source)
    if stored is not None:
        _check_loadable(source, stored, "teacher.model")
        changes["quantize"] = _quantize(recipe, source, stored)
    lora = continued_lora(recipe.teacher, source.adapter) if source.adapter is not None else None
    if lora is not None:
        changes["lora"] = lora
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update=changes)}) if changes else recipe


def _quantize(recipe: Recipe, source: Source, stored: Stored) -> Literal["nf4", "int8", "none"]:
    """What `teacher.quantize` is for weights that were quantized before they were saved."""
    form = recipe.teacher.quantize if "quantize" in recipe.teacher.model_fields_set else None
    own = stored.form or "none"
    if form in (None, own, "none"):
        return "none" if form == "none" else own
    ways = f"write {own} to use them unchanged, or none to dequantize them" if stored.form else "leave it out"
    raise InputError(
        f"teacher.quantize: {form}, but the weights of {source.title} were quantized with {stored} before they were "
        f"saved; {ways}"
    )


def check_models(recipe: Recipe) -> None:
    """Refuse models that this recipe cannot use, as far as their files tell.

    Raises:
        InputError: a package that is missing, classes that do not fit, a tokenizer or positions that do not do; each
            names the recipe key and the way out.
    """
    teacher = teacher_of(recipe)
    _check_quantized_teacher(recipe, teacher)
    _check_adapter(recipe, teacher)
    student = student_of(recipe)
    if recipe.student.model is not None:
        _check_quantized_student(student)
    if recipe.teacher.prompt is not None:
        _check_writes(teacher)
    elif recipe.teacher.fit is None:
        _check_head_as_is(recipe, teacher)
    if not recipe.kind.reads_images:
        if recipe.student.vocabulary is not None:
            _check_vocabulary(readings(recipe)[-1])
        for reading in readings(recipe):
            check_tokenizer_files(reading.tokenizer, reading.key)
            _check_positions(recipe, reading)
            _check_special_tokens(recipe, reading)


def _check_quantized_teacher(recipe: Recipe, source: Source) -> None:
    stored, teacher = stored_form(source), recipe.teacher
    if stored is None:
        return
    _check_loadable(source, stored, "teacher.model")
    if not stored.stays_packed:
        return
    what = f"the weights of {source.title} are quantized with {stored} and stay packed"
    if recipe.student.is_of_teacher:
        way = "static" if recipe.student.static is not None else "from_teacher"
        raise InputError(f"student.{way}: {what}, so no student can be made of them; use student.model")
    if teacher.fit is not None and teacher.lora is None:
        raise InputError(f"teacher.lora: null tunes all weights, but {what}; tune it with LoRA")
    if teacher.place == "sharded":
        raise InputError(f"teacher.place: {what}, and have no shards; use replicated or offloaded")


def _check_loadable(source: Source, stored: Stored, key: str) -> None:
    fault = stored.fault()
    if fault is not None:
        raise InputError(f"{key}: {source.title}: {fault}")


def _check_quantized_student(source: Source) -> None:
    stored = stored_form(source)
    if stored is None:
        return
    _check_loadable(source, stored, "student.model")
    if stored.stays_packed:
        raise InputError(
            f"student.model: {source.title}: its weights are quantized with {stored} and stay packed, which cannot be "
            "trained; take the original"
        )


def _check_adapter(recipe: Recipe, source: Source) -> None:
    """Refuse to tune an adapter on a quantized base by another LoRA: neither can be merged into 4 bits exactly."""
    teacher = recipe.teacher
    if source.adapter is None or teacher.fit is None or is_continued(teacher, source):
        return
    stored = stored_form(source)
    if teacher.quantize == "none" and not (stored is not None and stored.stays_packed):
        return
    own = own_lora(source.adapter)
    if own is None:
        raise InputError(
            f"teacher.model: the PEFT adapter {source.adapter} is of a kind that cannot be tuned on a quantized base; "
            "set teacher.quantize: none, which merges it first"
        )
    raise InputError(
        f"teacher.lora: the PEFT adapter {source.adapter} was tuned with rank {own.rank}, alpha {own.alpha:g} on "
        f"{', '.join(own.target_modules)}; leave teacher.lora out to continue it, or set teacher.quantize: none, which "
        "merges it first"
    )


def _labels(recipe: Recipe) -> tuple[str, ...] | None:
    """The classes of a head; none for a single number; None for tasks without either."""
    return () if recipe.kind.is_numeric else getattr(recipe.task, "labels", None)


def _suffix(recipe: Recipe) -> str:
    """How architectures with this task's head end; empty for tasks whose heads are pretrained, or that have none."""
    return SUFFIXES.get(recipe.kind.pipeline, "")


def own_head(recipe: Recipe, source: Source) -> Head:
    """The head that a model brings for this recipe's classes."""
    labels, config = _labels(recipe), model_config(source)
    if recipe.teacher.prompt is not None and source == teacher_of(recipe):
        return Head("none")
    return Head("none") if labels is None or config is None else head_of(source, config, _suffix(recipe), labels)


def _check_writes(source: Source) -> None:
    """Refuse to ask a model that writes nothing, as far as its configuration tells."""
    architecture = architecture_of(model_config(source) or {})
    if architecture and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise InputError(
            f"teacher.prompt: {source.title} is a {architecture}, which writes no text; take a causal language model, "
            "or leave prompt out"
        )


def _check_head_as_is(recipe: Recipe, source: Source) -> None:
    config = model_config(source)
    if config is None or not _suffix(recipe):
        return
    at = f"teacher.fit: null uses {source.title} unchanged, but"
    head = own_head(recipe, source)
    architecture = architecture_of(config)
    if head.verdict == "none" and source.adapter is None and architecture and _suffix(recipe) not in architecture:
        raise InputError(
            f"{at} it is a {architecture}, without a head for {recipe.task.kind}; tune it, or take a "
            "model for this task"
        )
    if head.verdict == "other":
        raise InputError(f"{at} {head.fault}; name its own classes in task.labels, or tune it")


def _check_positions(recipe: Recipe, reading: Reading) -> None:
    for key, tokens, most in _long_texts(recipe, reading):
        if tokens > most:
            raise InputError(
                f"{key}: {tokens} tokens are more than the {most} positions of {reading.model.title}; set it to at "
                f"most {most}, or take a model for longer texts"
            )


def _long_texts(recipe: Recipe, reading: Reading, *, hard: bool = True) -> Iterator[tuple[str, int, int]]:
    """Key, tokens asked for and positions that a model has, for each length that the recipe sets."""
    config = model_config(reading.model)
    if config is None:
        return
    limit = longest_text(reading.tokenizer)
    for key, side, tokens, is_cut in _lengths(recipe):
        reach = reach_of({**config, **reading.overrides}, side)
        if reach is not None and reach.is_hard == hard:
            yield key, min(tokens, limit) if is_cut and limit is not None else tokens, reach.tokens


def _lengths(recipe: Recipe) -> list[tuple[str, Side, int, bool]]:
    """Recipe key, side of an encoder-decoder, tokens, and whether the tokenizer's own limit cuts them, too."""
    longest = recipe.data.max_tokens
    sizes: list[tuple[str, Side, int, bool]] = [("data.max_tokens", "encoder", longest, True)]
    if isinstance(recipe.task, Seq2Seq):
        own = recipe.task.max_target_tokens
        sizes.append(("data.max_tokens" if own is None else "task.max_target_tokens", "decoder", own or longest, True))
        new_tokens = recipe.evaluate.generate.max_new_tokens
        sizes.append(("evaluate.generate.max_new_tokens", "decoder", new_tokens, False))
    return sizes


def _check_vocabulary(reading: Reading) -> None:
    """Refuse to cut a tokenizer of another kind."""
    words = Words.of(reading.tokenizer)
    if words is not None:
        check_kind(json.loads(words.core.to_str()), reading.tokenizer.title)


def _check_special_tokens(recipe: Recipe, reading: Reading) -> None:
    """Refuse a padding token without an embedding, or an end token: they are in batches, not in the rows' texts."""
    rows, words = embedding_rows(reading.model, reading.overrides), Words.of(reading.tokenizer)
    if rows is None or words is None:
        return
    pad = "pad_token" if "pad_token" in words.special else "eos_token"  # as `load_tokenizer` does
    for name in (pad, "eos_token") if recipe.kind.is_language_model else (pad,):
        token = words.core.token_to_id(words.special.get(name, ""))
        if token is not None and token >= rows:
            what = without_row(reading.model.title, words.special[name], token, words.size, rows)
            raise InputError(f"{reading.key}: its {name} is {what}; or give it another {name}")


def check_texts(recipe: Recipe, splits: Any) -> list[str]:
    """Cautions about tokenizers that do not know all of the training texts, as far as their files are here.

    Args:
        recipe: the recipe.
        splits: its rows by split.

    Raises:
        InputError: one knows hardly any of them.
    """
    if recipe.kind.reads_images:
        return []
    first = splits["train"].select(range(min(SAMPLED_TEXTS, len(splits["train"]))))
    texts = [text for row in texts_of(recipe, first) for text in row]
    lines = []
    for reading in readings(recipe):
        words = Words.of(reading.tokenizer)
        shares = unknown_share(texts, words) if words is not None else (0.0, 0.0, "")
        lines.append(refuse_unreadable(shares, reading.tokenizer, reading.key, len(first)))
    return [line for line in lines if line is not None]


def model_lines(recipe: Recipe) -> list[str]:
    """How a model's own classes, quantized weights or adapter are used, where the recipe does not say."""
    teacher, student = teacher_of(recipe), student_of(recipe)
    lines = [_stored_line(recipe, "teacher.model", teacher), _adapter_line(recipe, "teacher.model", teacher)]
    lines += [_head_line(recipe, "teacher.model", teacher), _problem_line(recipe, teacher)]
    if recipe.student.model is not None:
        lines += [_stored_line(recipe, "student.model", student), _adapter_line(recipe, "student.model", student)]
        lines.append(_head_line(recipe, "student.model", student))
    for reading in readings(recipe) if not recipe.kind.reads_images else ():
        lines += [
            f"{reading.key}: {tokens} tokens ({key}) are more than {reading.model.title} was made for, {most}"
            for key, tokens, most in _long_texts(recipe, reading, hard=False)
            if tokens > most
        ]
    return [line for line in lines if line is not None]


def _stored_line(recipe: Recipe, key: str, source: Source) -> str | None:
    stored = stored_form(source)
    if stored is None:
        return None
    packed = stored.stays_packed or (key.startswith("teacher") and stored.form == recipe.teacher.quantize)
    use = "used unchanged" if packed else "dequantized when they are loaded"
    return f"{key}: the weights of {source.title} are quantized with {stored} in its files; they are {use}"


def _adapter_line(recipe: Recipe, key: str, source: Source) -> str | None:
    if source.adapter is None:
        return None
    use = "merged into its base"
    if key.startswith("teacher"):
        if is_continued(recipe.teacher, source):
            use = "tuned further"
        elif recipe.teacher.fit is None:
            use = "used unchanged"
        else:
            use = "merged into its base, which is then tuned"
    return f"{key}: {source.adapter} is a PEFT adapter on {source.name}; it is {use}"


def _problem_line(recipe: Recipe, source: Source) -> str | None:
    """A teacher's head that was trained for another kind of classes gives logits that mean something else."""
    own = (model_config(source) or {}).get("problem_type")
    problem = PROBLEMS.get(recipe.task.kind)
    if recipe.teacher.fit is not None or problem is None or own not in PROBLEMS.values() or own == problem:
        return None
    return f"teacher.model: its head was trained for {own}, which this task is not; consider tuning it"


def _head_line(recipe: Recipe, key: str, source: Source) -> str | None:
    head, labels = own_head(recipe, source), _labels(recipe) or ()
    names = ", ".join(head.names[:6]) + (", ..." if len(head.names) > 6 else "")
    if head.verdict == "matched":
        how = "its classes are in another order" if head.moved else "it spells its classes differently"
        return f"{key}: {how} ({names}); they are matched to task.labels by name"
    if head.verdict == "numbered" and labels:
        pairs = ", ".join(f"{index} = {label}" for index, label in enumerate(labels[:6]))
        more = ", ..." if len(labels) > 6 else ""
        return f"{key}: its head numbers its classes without naming them; task.labels gives their order ({pairs}{more})"
    if head.verdict == "other":
        return f"{key}: {head.fault}; training starts with a new output layer"
    return None
