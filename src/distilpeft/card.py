"""The model card: what a stranger needs to use, judge and cite an exported student."""

from __future__ import annotations

from typing import Any

import yaml

from distilpeft.recipe import Recipe


def render(recipe: Recipe, figures: dict[str, Any]) -> str:
    """The card as Markdown with hub metadata.

    Args:
        recipe: the run.
        figures: evaluation figures by role (`scores`, maybe `against_teacher`).
    """
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["distilpeft", "distillation"],
    }
    rows = [f"| {role} | {_score(found)} |" for role, found in figures.items() if role != "majority"]
    labels = ", ".join(f"{i} = {name}" for i, name in enumerate(recipe.task.labels))
    lora = recipe.teacher.lora
    alpha = recipe.distil.alpha
    tuned = f"LoRA rank {lora.rank}" if lora else "all weights"
    text = f"""# {recipe.name}

A compact text classifier ({labels}), distilled by distilpeft from a larger teacher.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="PATH/TO/THIS/FOLDER")
print(classify("..."))
```

## Accuracy on {next(iter(figures.values()))["scores"]["accuracy"]["num_rows"]} {recipe.evaluate.split} rows

| model | accuracy (95 % interval) |
| --- | --- |
{chr(10).join(rows)}

## How it was made

- Teacher: `{recipe.teacher.model}`, quantized: {recipe.teacher.quantize}, tuned with {tuned}.
- Student: {_student(recipe)}.
- Loss: {alpha:g} · T² · KL(teacher ‖ student) + {1 - alpha:g} · CE, T = {recipe.distil.temperature:g}.
- Data: `{recipe.data.source}`, texts cut to {recipe.data.max_tokens} tokens, seed {recipe.seed}.

## Limits

The scores hold for text like the data above. The licences of the teacher's base model and of the data apply to
this model too.
"""
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{text}"


def _score(found: dict[str, Any]) -> str:
    accuracy = found["scores"]["accuracy"]
    return f"{accuracy['value']:.4f} ({accuracy['low']:.4f} to {accuracy['high']:.4f})"


def _student(recipe: Recipe) -> str:
    student = recipe.student
    if student.from_teacher is not None:
        return f"layers {', '.join(map(str, student.from_teacher.layers))} of the teacher, adapter merged"
    if student.from_config is not None:
        return f"the architecture of `{student.from_config.model}` with random weights"
    return f"`{student.model}`"
