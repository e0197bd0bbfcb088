"""The model card: what a stranger needs to use, judge and cite an exported student."""

from __future__ import annotations

from typing import Any

import yaml

from distilpeft.recipe import METRICS, Recipe, TextClassification

PIPELINES = {"text_classification": "text-classification", "causal_lm": "text-generation"}
TITLES = {"text_classification": "Accuracy", "causal_lm": "Nats per token"}


def render(recipe: Recipe, figures: dict[str, Any]) -> str:
    """The card as Markdown with hub metadata.

    Args:
        recipe: the run.
        figures: evaluation figures by role (`scores`, maybe `against_teacher`).
    """
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINES[recipe.task.kind],
        "tags": ["distilpeft", "distillation"],
    }
    main = METRICS[recipe.task.kind][0]
    rows = [f"| {role} | {_score(found, main)} |" for role, found in figures.items() if role != "majority"]
    what, usage = _what(recipe)
    lora = recipe.teacher.lora
    alpha = recipe.distil.alpha
    divergence = _divergence(recipe)
    tuned = f"LoRA rank {lora.rank}" if lora else "all weights"
    text = f"""# {recipe.name}

A compact {what}, distilled by distilpeft from a larger teacher.

```python
from transformers import pipeline

{usage}
```

## {TITLES[recipe.task.kind]} on {next(iter(figures.values()))["scores"][main]["num_rows"]} {recipe.evaluate.split} rows

| model | {main} (95 % interval) |
| --- | --- |
{chr(10).join(rows)}

## How it was made

- Teacher: `{recipe.teacher.model}`, quantized: {recipe.teacher.quantize}, tuned with {tuned}.
- Student: {_student(recipe)}.
- Loss: {alpha:g} · T² · {divergence} + {1 - alpha:g} · CE, T = {recipe.distil.temperature:g}.
- Data: `{recipe.data.source}`, texts cut to {recipe.data.max_tokens} tokens, seed {recipe.seed}.

## Limits

The scores hold for text like the data above. The licences of the teacher's base model and of the data apply to
this model too.
"""
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{text}"


def _what(recipe: Recipe) -> tuple[str, str]:
    """What the model is, and how to call it."""
    if isinstance(recipe.task, TextClassification):
        labels = ", ".join(f"{i} = {name}" for i, name in enumerate(recipe.task.labels))
        call = 'classify = pipeline("text-classification", model="PATH/TO/THIS/FOLDER")\nprint(classify("..."))'
        return f"text classifier ({labels})", call
    call = 'write = pipeline("text-generation", model="PATH/TO/THIS/FOLDER")\nprint(write("..."))'
    return "language model", call


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


def _score(found: dict[str, Any], name: str) -> str:
    score = found["scores"][name]
    return f"{score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f})"


def _student(recipe: Recipe) -> str:
    student = recipe.student
    if student.from_teacher is not None:
        return f"layers {', '.join(map(str, student.from_teacher.layers))} of the teacher, adapter merged"
    if student.from_config is not None:
        return f"the architecture of `{student.from_config.model}` with random weights"
    return f"`{student.model}`"
