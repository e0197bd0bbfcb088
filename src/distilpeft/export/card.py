"""The model card: what a stranger needs to use, judge and cite an exported student, in the hub's format.

The metadata block holds only what is known: `base_model` and `datasets` where they are hub ids, the licence if the
recipe names one, the scores as a model index. Of local paths the last part is shown: the rest means nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distilpeft.data.model_files.quantized import stored_form
from distilpeft.data.model_files.recipe_models import student_of, teacher_of
from distilpeft.data.reading import data_sources
from distilpeft.data.sources import Source
from distilpeft.export.card_code import javascript, snippet
from distilpeft.export.manifest import ExportManifest
from distilpeft.machine import markdown as md
from distilpeft.planning.choose_models import licence_of
from distilpeft.planning.roles import export_role, format_of
from distilpeft.recipe import Recipe
from distilpeft.recipe.export import FORMS, conditions
from distilpeft.recipe.task import (
    LOWER_IS_BETTER,
    CausalLM,
    Embedding,
    ImageClassification,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    Seq2Seq,
    Texts,
    TokenClassification,
    gap,
    gap_unit,
)

LIBRARIES = {
    "transformers": "transformers", "onnxruntime": "onnx", "openvino": "openvino", "model2vec": "model2vec",
}  # fmt: skip


def render(
    recipe: Recipe, manifest: ExportManifest, figures: Mapping[str, Any], timed: Mapping[str, Any],
    exports: Mapping[str, Any],
) -> str:  # fmt: skip
    """The card as Markdown with hub metadata.

    Args:
        recipe: the run.
        manifest: the manifest: its `format` and how to open it; of several forms the first one's, with `forms`.
        figures: evaluation figures by role (`scores`, maybe `against_teacher`).
        timed: benchmark figures by role.
        exports: form → the export's own figures: `parity`, `size_bytes`, maybe `way`.
    """
    own = export_role(manifest["format"])
    main, extra = recipe.kind.main, recipe.kind.generation_metrics[:2]
    num_rows = figures[own]["scores"][main]["num_rows"]
    what = _what(recipe)
    unit = recipe.kind.unit
    text = f"""# {recipe.name}

{_price(recipe, figures, timed, own, exports[manifest["format"]]["size_bytes"])}

A compact {md.plain(what)}, distilled by distilpeft from a larger teacher; as {", ".join(exports)}.

## Use

In this folder:

{_use(manifest)}

## Scores and latency

On {num_rows} {recipe.evaluate.split} {unit}; latency of one row{_where(timed)}.{_doubt(timed)}

| model | {" | ".join((f"{main} (95 % interval)", *extra))} | weights | size | latency p50 |
{"| --- " * (5 + len(extra))}|
{_table(figures, timed, exports, main, extra)}

{_groups(recipe, figures, own)}{_proof(recipe, exports)}

## How it was made

{_origin(recipe)}

## Intended use and limits

{_limits(recipe)}

## Licences

{_licences(recipe)}
"""
    metadata = _metadata(recipe, list(exports), figures[own]["scores"])
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{text}"


def _use(manifest: ExportManifest) -> str:
    """Code for each runtime that opens a file of the folder, and for JavaScript."""
    forms = manifest.get("forms", {manifest["format"]: manifest["file"]})
    ways: dict[str, str] = {}
    for form, file in forms.items():
        variant: ExportManifest = {**manifest, "format": form, "file": file}
        ways.setdefault(FORMS[form].runtime, snippet(variant))
    return "\n\n".join([*ways.values(), *javascript(manifest["task"], forms, pair=manifest.get("pair", False))])


def _metadata(recipe: Recipe, forms: Sequence[str], scores: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"license": recipe.export.license} if recipe.export.license else {}
    form = forms[0]
    library = "gguf" if form.startswith("gguf") else LIBRARIES[FORMS[form].runtime]
    metadata |= {"library_name": library, "pipeline_tag": recipe.kind.pipeline}
    metadata["tags"] = ["distilpeft", "knowledge-distillation", *forms]
    base = teacher_of(recipe)
    if base.path is None:
        metadata["base_model"] = base.name
    sources = _sources(recipe)
    hub = [source.name for source in sources if source.path is None]
    if hub:
        metadata["datasets"] = hub
    metadata["metrics"] = list(scores)
    task = {"type": recipe.kind.pipeline}
    data = {"name": _name(sources[0]), "type": hub[0] if hub else "local", "split": recipe.evaluate.split}
    metrics = [{"type": name, "value": round(score["value"], 6)} for name, score in scores.items()]
    metadata["model-index"] = [{"name": recipe.name, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]
    return metadata


def _price(
    recipe: Recipe, figures: Mapping[str, Any], timed: Mapping[str, Any], own: str, size: int
) -> str:  # fmt: skip
    """What this file scores, and what it costs and saves compared with its teacher."""
    main = recipe.kind.main
    scores = {role: figures[role]["scores"][main] for role in (own, "teacher", "student_ce_only") if role in figures}
    score, teacher = scores[own], scores.get("teacher")
    text = (
        f"**{main} {score['value']:.4f}** (95 % {score['low']:.4f} to {score['high']:.4f}) on {score['num_rows']} "
        f"{recipe.evaluate.split} {recipe.kind.unit}"
    )
    if teacher is not None:
        text += f"; its teacher has {teacher['value']:.4f}"
    if "student_ce_only" in scores:
        text += f", the same student trained on labels alone {scores['student_ce_only']['value']:.4f}"
    mine, theirs = timed.get(own), timed.get("teacher")
    if not mine or not theirs:
        return f"{text}."
    faster = theirs["latency_ms"]["p50"] / mine["latency_ms"]["p50"]
    doubt = " (on a noisy machine)" if mine.get("noise") else ""
    smaller = theirs["size_bytes"] / size
    sized = f"{smaller:.1f} times smaller" if smaller >= 1 else f"{1 / smaller:.1f} times larger"
    return f"{text}. {_times(faster)} times as fast as the teacher{doubt}, {sized}."


def _times(ratio: float) -> str:
    """A ratio with two digits or so."""
    return f"{ratio:.0f}" if ratio >= 20 else f"{ratio:.1f}"


def _table(
    figures: Mapping[str, Any], timed: Mapping[str, Any], exports: Mapping[str, Any], main: str, more: Sequence[str]
) -> str:
    lines: list[str] = []
    for role, results in figures.items():
        if role == "majority":
            continue
        time = timed.get(role, {})
        own = exports.get(format_of(role) or "")
        name = role if own is None else f"**{role}** (this)" if len(exports) == 1 else f"**{role}**"
        weights = (time.get("num_parameters") or timed["student"]["num_parameters"]) if time else 0
        size_bytes = time.get("size_bytes") if own is None else own["size_bytes"]
        cells = (
            name,
            _score(results, main),
            *(f"{results['scores'][name]['value']:.1f}" for name in more if name in results["scores"]),
            f"{weights / 1e6:.1f}M" if weights else "-",
            f"{size_bytes / 1e6:.1f} MB" if size_bytes else "-",
            f"{time['latency_ms']['p50']:.2f} ms" if time else "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(recipe: Recipe, figures: Mapping[str, Any], own: str) -> str:
    """The score in each of `evaluate.groups`, and which of them lose more to the teacher than all rows do."""
    column, margin, main = recipe.evaluate.groups, recipe.evaluate.group_margin, recipe.kind.main
    if column is None:
        return ""
    sign, unit = -1 if main in LOWER_IS_BETTER else 1, gap_unit(main)
    lines: list[tuple[str, ...]] = [(column, "rows", "teacher", "this", f"this − teacher{',' * bool(unit)}{unit}")]
    overall = figures[own]["scores"][main]["value"] - figures["teacher"]["scores"][main]["value"]
    worse = []
    for group, scores in figures[own]["groups"].items():
        teacher, score = figures["teacher"]["groups"][group][main], scores[main]
        lost = score["value"] - teacher["value"]
        worse += [group] if sign * (lost - overall) < -margin else []
        scored = (f"{side['value']:.4f}" for side in (teacher, score))
        lines.append((group, str(score["num_rows"]), *scored, gap(main, lost)))
    summary = (
        f"Distilling cost {md.plain(', '.join(worse))} more than {margin * 100:g} points beyond the rest."
        if worse
        else f"Distilling cost none of them more than {margin * 100:g} points beyond the rest."
    )
    return "\n".join([f"{main} by {md.plain(column)}:", "", *md.table(lines), "", summary, "", ""])


def _where(timed: Mapping[str, Any]) -> str:
    timing: Mapping[str, Any] = next(iter(timed.values()), {})
    return (
        f" on {md.plain(timing['machine'])}, {timing['threads']} thread{'s' * (timing['threads'] != 1)}"
        if "machine" in timing
        else ""
    )


def _doubt(timed: Mapping[str, Any]) -> str:
    """What speaks against the latencies."""
    timing: Mapping[str, Any] = next(iter(timed.values()), {})
    why = "; ".join(timing.get("noise", ()))
    return f" The machine was noisy while latencies were measured: {md.plain(why)}." if why else ""


def _proof(recipe: Recipe, exports: Mapping[str, Any]) -> str:
    """What the gate found of each form."""
    if len(exports) == 1:
        return "".join(_parity(recipe, "this file", export) for export in exports.values())
    return "\n".join(f"- {_parity(recipe, form, export)}" for form, export in exports.items())


def _parity(recipe: Recipe, what: str, export: Mapping[str, Any]) -> str:
    """What the gate found of one form, and on what it depends."""
    return " ".join([_compared(recipe, what, export), *conditions(export)])


def _compared(recipe: Recipe, what: str, export: Mapping[str, Any]) -> str:
    parity = export["parity"]
    way = f" (int8: {export['way']})" if "way" in export else ""
    intro = (
        f"Before it counted, {what}{way} was opened in a process of its own and compared with the student on "
        f"{parity['rows']} other held-out rows"
    )
    if not recipe.kind.has_labels:
        return f"{intro}: the mean cosine to the student's vectors is {parity['metric_export']:.6f}."
    if "top1_agreement" not in parity:  # numbers on a scale
        return (
            f"{intro}: a number differs by at most {parity['max_abs_diff']:.2g} standard deviations of the labels, the "
            f"root mean squared error of both is {np.sqrt(parity['metric_student']):.4f} and "
            f"{np.sqrt(parity['metric_export']):.4f} of them."
        )
    return (
        f"{intro}: a logit differs by at most {parity['max_abs_diff']:.2g}, KL {parity['kl']:.2g} nats, same answer on "
        f"{parity['top1_agreement']:.2%}, {parity['metric_kept']:.2%} of the score."
    )


def _what(recipe: Recipe) -> str:
    task = recipe.task
    if isinstance(task, CausalLM):
        return "language model"
    if isinstance(task, QuestionAnswering):
        return "model that finds the answers to questions in texts"
    if isinstance(task, TokenClassification):
        return f"tagger of words ({', '.join(f'{i} = {name}' for i, name in enumerate(task.labels))})"
    if isinstance(task, Regression):
        return f"model that gives {_inputs(task)} a number ({task.label})"
    if isinstance(task, ImageClassification):
        return f"classifier of pictures ({', '.join(f'{i} = {name}' for i, name in enumerate(task.labels))})"
    if isinstance(task, Embedding):
        return "model that gives texts a vector"
    if isinstance(task, Seq2Seq):
        return f"model that writes {task.target} out of {task.source}"
    labels = ", ".join(f"{i} = {name}" for i, name in enumerate(task.labels))
    several = "several classes for each: " if isinstance(task, MultiLabelClassification) else ""
    return f"classifier of {_inputs(task)} ({several}{labels})"


def _inputs(task: Texts) -> str:
    return "texts" if task.pair is None else "pairs of texts"


def _origin(recipe: Recipe) -> str:
    lora = recipe.teacher.adapter
    tuned = f"tuned with LoRA rank {lora.rank}" if lora else "tuned with all weights"
    if recipe.teacher.fit is None:
        tuned = "as it is"
    teacher = teacher_of(recipe)
    data = ", ".join(md.code(_name(source)) for source in _sources(recipe))
    cut = "" if recipe.kind.reads_images else f", texts cut to {recipe.data.max_tokens} tokens"
    adapter = f" with the adapter {md.code(teacher.adapter.name)}" if teacher.adapter is not None else ""
    form = stored_form(teacher)
    quantized = str(form) if form is not None and form.stays_packed else recipe.teacher.quantize
    asked = recipe.teacher.prompt
    asked = "" if asked is None else f", asked for the class by the prompt {md.code(asked.replace(chr(10), ' '))}"
    return f"""- Teacher: {md.code(_name(teacher))}{adapter}, quantized: {quantized}, {tuned}{asked}.
- Student: {_student(recipe)}.
- Loss: {_loss(recipe)}.
- Data: {data}{cut}, seed {recipe.seed}."""


def _loss(recipe: Recipe) -> str:
    task, distil = recipe.task, recipe.distil
    if isinstance(task, Embedding):
        return (
            "1 − cosine to the teacher's vector"
            if task.loss == "cosine"
            else "squared distance to the teacher's vector"
        )
    if recipe.export.of != "student":
        return "CE; this student learnt from labels alone, without the teacher"
    own = f"{distil.alpha:g} · T² · {_divergence(recipe)} + {1 - distil.alpha:g} · CE, T = {distil.temperature:g}"
    terms = [name for name in ("hidden", "relations") if distil.features and getattr(distil.features, name)]
    what = {"hidden": "hidden states", "relations": "relations in attention"}
    if recipe.data.may_have_unlabelled:
        own += "; of rows without labels the first term alone"
    return own + "".join(f"; the teacher's {what[name]} as well" for name in terms)


USES: dict[str, Callable[[Any], str]] = {
    "text_classification": lambda task: (
        f"It sorts {_inputs(task)} into {', '.join(task.labels)}, and gives each one of these, fitting or not."
    ),
    "image_classification": lambda task: (
        f"It sorts pictures into {', '.join(task.labels)}, and gives each one of these, fitting or not."
    ),
    "multi_label_classification": lambda task: (
        f"It says of {_inputs(task)} which of {', '.join(task.labels)} they are, by itself for each; maybe of none."
    ),
    "token_classification": lambda task: (
        f"It tags the words of texts, their parts between spaces, as {', '.join(task.labels)}."
    ),
    "question_answering": lambda task: (
        f"It answers questions with at most {task.longest_answer} tokens of a given text, "
        f"{'or says that there is none' if task.no_answer else 'and always gives one, right or not'}."
    ),
    "regression": lambda task: (
        f"It gives {_inputs(task)} a number, {task.label}, and knows neither bounds nor how sure it is."
    ),
    "embedding": lambda _: (
        "It gives texts vectors; texts that its teacher finds alike get a high cosine. Compare its vectors only."
    ),
    "seq2seq": lambda task: (
        f"It writes {task.target} out of {task.source}. It leaves out and invents things, more often than its teacher."
    ),
    "causal_lm": lambda _: "It continues text. It states falsehoods fluently, more often than its teacher.",
}
"""What a model of each kind of task does, and what it does not know, by its section."""


def _limits(recipe: Recipe) -> str:
    what, beyond = "text", f"; texts beyond {recipe.data.max_tokens} tokens were not seen in training"
    if recipe.kind.reads_images:
        what, beyond = "pictures", ""
    use = md.plain(USES[recipe.task.kind](recipe.task))
    return (
        f"{use} The scores hold for {what} like the data above{beyond}. What the teacher has learnt wrongly, and what "
        "is lopsided in the data, is in it too."
    )


def _sources(recipe: Recipe) -> list[Source]:
    """Where the rows come from, each once; those without labels last."""
    more = recipe.data.unlabelled
    unlabelled = {} if more is None else data_sources(more)
    return list(dict.fromkeys([*data_sources(recipe.data).values(), *unlabelled.values()]))


def _licences(recipe: Recipe) -> str:
    teacher = teacher_of(recipe)
    lines = [f"- Teacher's base {md.code(_name(teacher))}: {_licence(teacher)}."]
    if recipe.student.model is not None and student_of(recipe).name != teacher.name:
        lines.append(f"- Student's base {md.code(_name(student_of(recipe)))}: {_licence(student_of(recipe))}.")
    lines += [f"- Data {md.code(_name(source))}: {_licence(source)}." for source in _sources(recipe)]
    own = (
        f"This model: {md.plain(recipe.export.license)}." if recipe.export.license else "They apply to this model too."
    )
    return "\n".join([*lines, "", own])


def _name(source: Source) -> str:
    return Path(source.name).name if source.path is not None and ":" not in source.name else source.name


def _licence(source: Source) -> str:
    licence = licence_of(source)
    if source.path is None:
        page = f"see https://huggingface.co/{source.name}"
        return f"{md.plain(licence)}, {page}" if licence else page
    return md.plain(licence) if licence else "its files name none; ask where they come from"


def _divergence(recipe: Recipe) -> str:
    divergence = recipe.distil.divergence
    names = {
        "forward_kl": "KL(teacher ‖ student)",
        "reverse_kl": "KL(student ‖ teacher)",
        "jsd": f"JSD(β = {divergence.beta:g})",
        "skew_kl": f"skew KL(teacher ‖ student, {divergence.skew:g})",
        "skew_reverse_kl": f"skew KL(student ‖ teacher, {divergence.skew:g})",
        "total_variation": "TV(teacher, student)",
        "logit_mse": "MSE(logits)",
    }
    return names[divergence.kind]


def _score(results: Mapping[str, Any], name: str) -> str:
    score = results["scores"][name]
    return f"{score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f})"


def _student(recipe: Recipe) -> str:
    student = recipe.student
    if student.from_teacher is not None:
        return f"{student.from_teacher} of the teacher, adapter merged"
    if student.static is not None:
        return str(student.static)
    if student.from_config is not None:
        return f"the architecture of `{student.from_config.model}` with random weights"
    return f"`{student.model}`"
