"""Write the recipe of `distilpeft init`, with the reasons for each choice."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distilpeft.data.files import SPLIT_NAMES
from distilpeft.errors import InputError
from distilpeft.machine.files import write_text
from distilpeft.planning.choose_models import PATCHES, Choice, choose, memory_gb
from distilpeft.planning.data_profile import Look, Wishes, look, plain, task_lines
from distilpeft.planning.guess.device import device_here
from distilpeft.planning.guess.settle import Ask, settled
from distilpeft.planning.text_profile import Count, counter, estimate, length
from distilpeft.recipe.export import FORMS
from distilpeft.recipe.task import KINDS, Kind
from distilpeft.recipe.yaml_file import load_recipe

LONGEST = {"cpu": 512, "GPU": 2048}
"""Tokens of a row that are chosen without being asked for."""
HELD_OUT = 2000
"""Rows are enough to validate, and to test."""
STATIC_RATE = "3e-3"
"""Of students of token vectors, which many steps pass by."""
STEPS = (300, 600)
"""Of the teacher and of the student, with few rows more than one epoch and with many one."""


def rate(millions: float, *, adapter: bool) -> str:
    """A learning rate to start from: adapters take about ten times that of whole models, larger models less."""
    edges = (50, 200, 1000)
    rates = ("1e-3", "5e-4", "2e-4", "1e-4") if adapter else ("2e-4", "5e-5", "2e-5", "1e-5")
    return rates[sum(millions > edge for edge in edges)]


def needed(wishes: Wishes, seen: Look, count: Count) -> int:
    """Tokens of a row; where source and target are read apart, of the longer."""
    columns = wishes.read()
    apart = wishes.task is not None and KINDS[wishes.task].reads_first
    if wishes.task is not None and KINDS[wishes.task].reads_images:
        return PATCHES
    return max(length(seen.rows, part, count) for part in ([[one] for one in columns] if apart else [columns]))


def power(value: float) -> int:
    """The largest power of two up to it, at least 1."""
    return int(2 ** max(0, math.floor(math.log2(max(value, 1)))))


def write(out: Path, wishes: Wishes, ask: Ask) -> list[str]:
    """Write a recipe that fits the wishes.

    Args:
        out: the file; it must not be there.
        wishes: what is known.
        ask: for the rest.

    Returns:
        What was chosen and why, a line each.

    Raises:
        InputError: the data cannot be read, nothing fits, or the file is there.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; init writes new recipes only")
    if not out.parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}")
    device, said = device_here() if wishes.device is None else (wishes.device, None)
    wishes = replace(wishes, device=device)
    if device != "cpu":
        memory_gb(device)
    seen = look(wishes.data)
    wishes, lines = settled(wishes, seen, ask)
    lines += [] if said is None else [said]
    images = KINDS[wishes.task or ""].reads_images
    if wishes.language is None:
        wishes = replace(wishes, language="en" if seen.language in (None, "English") else "many")
        if not images and wishes.teacher is None:  # it chooses the catalogue's models
            lines.append(_language_line(seen))
    longest = LONGEST["cpu" if device == "cpu" or wishes.packages else "GPU"]
    longest = PATCHES if images else longest
    max_tokens = wishes.max_tokens or min(needed(wishes, seen, estimate), longest)
    choice = choose(wishes, max_tokens)
    count = counter(choice.teacher["name"])
    if count is not None and wishes.max_tokens is None:
        max_tokens = min(needed(wishes, seen, count), longest)
        choice = choose(wishes, max_tokens)
    if wishes.max_tokens is None and not images:
        max_tokens = min(max_tokens, *(one["tokens"] for one in (choice.teacher, choice.student) if one))
    more = None if wishes.unlabelled is None else _unlabelled(wishes, look(wishes.unlabelled))
    text = render(out.stem, wishes, seen, choice, max_tokens, count, more)
    with tempfile.TemporaryDirectory() as folder:  # a recipe that is not good is never left behind
        (Path(folder) / out.name).write_text(text, encoding="utf-8")
        load_recipe(Path(folder) / out.name)
    write_text(out, text)
    rows = "pictures" if images else f"rows of {max_tokens} tokens"
    return [*lines, f"{out}: {wishes.task}: {choice.teacher['name']} into {choice.student_words}; {rows}"]


def _language_line(seen: Look) -> str:
    if seen.language is None:
        return "language: en, because the texts are too few to tell; --language many changes it"
    models = "en" if seen.language == "English" else "many"
    return f"language: {models}, because the texts are in {seen.language}; --language changes it"


@dataclass(frozen=True)
class More:
    """Rows without labels: how many, and which of their columns have other names."""

    num_rows: int
    columns: Mapping[str, str]


def _unlabelled(wishes: Wishes, seen: Look) -> More:
    """What `--unlabelled` names.

    Raises:
        InputError: the task has no labels, or a column is missing.
    """
    assert wishes.task is not None
    if not KINDS[wishes.task].has_labels:
        raise InputError(f"--unlabelled: {wishes.task} has no labels; give all rows in --data")
    there, wanted = [*seen.rows.column_names, *seen.pictures], wishes.read_keys()
    renamed = {}
    for key, column in wanted.items():
        if column not in there:
            if len(wanted) > 1 or len(seen.columns) != 1:
                raise InputError(f"--unlabelled: there is no column {column!r}; its columns are {', '.join(there)}")
            renamed[key] = seen.columns[0]
    return More(sum(seen.splits.values()), renamed)


def render(
    name: str, wishes: Wishes, seen: Look, choice: Choice, max_tokens: int, count: Count | None,
    more: More | None = None,
) -> str:  # fmt: skip
    """The recipe's text; `count`: of tokens, None if they are estimated; `more`: rows without labels."""
    batch = 64 if sum(seen.splits.values()) >= 4000 else 32 if sum(seen.splits.values()) >= 1000 else 16
    train = seen.splits.get("train", sum(seen.splits.values()) * 0.8)
    without = _without_label(wishes, seen) + (0 if more is None else more.num_rows)
    most = 3 if choice.kind == "decoder" else 10
    labelled = max(1, train - _without_label(wishes, seen))
    tuning, own = (_epochs(steps, batch, labelled, 30 if without else most) for steps in STEPS)
    epochs = [tuning, _epochs(STEPS[1], batch, labelled + without, most)]
    device = wishes.on
    budget = 4096 if device == "cpu" else 4096 * max(1.0, memory_gb(device) / 12)
    scales = (choice.teacher["millions"], choice.student_millions)
    micro = [min(batch, power(budget / max_tokens / max(1.0, (millions / 100) ** 0.5))) for millions in scales]
    whole = (
        KINDS[wishes.task or ""].reads_images and not choice.teacher["layers"]
    )  # convolutions: nothing for an adapter
    large = choice.teacher["millions"] >= 300 and not whole
    quantize = "nf4" if large else "none"
    why = (
        "4 bits save memory; the report shows their cost" if large else "already small; nf4 would save memory, not time"
    )
    own_rate = STATIC_RATE if choice.is_static else rate(scales[1], adapter=False)
    needs = [one["needs"] for one in (choice.teacher, choice.student or {}) if one.get("needs")]
    assert wishes.task is not None
    traits = KINDS[wishes.task]
    monitor = ", monitor: log_loss" if "log_loss" in traits.metrics else ""
    said = f"less noisy than {traits.main}" if monitor else f"{traits.main} picks the checkpoint"
    lines = [
        f"# Written by distilpeft init for {device}.",
        *(
            []
            if wishes.latency_ms is None
            else [f"# A student for {wishes.latency_ms:g} ms a row, by a rule: the report measures it."]
        ),
        f"#   distilpeft check {name}.yaml && distilpeft run {name}.yaml",
        *[f"#   {need}" for need in dict.fromkeys(needs)],
        f"name: {name}",
        "seed: 17",
        "",
        "task:",
        *task_lines(wishes, seen),
        "",
        "data:",
        *_data_lines(wishes, seen),
        *_more_lines(wishes, more),
        *([] if traits.reads_images else _length_lines(wishes, seen, max_tokens, count)),
        "",
        "teacher:",
        f"  model: {choice.teacher['name']:<24}  # {_about(choice.teacher)}",
        f"  quantize: {quantize:<21}# {why}",
        *_tuning_lines(choice, epochs[0], batch, micro[0], monitor, whole=whole, said=said),
        "",
        "student:",
        *_student_lines(choice),
        "",
        "distil:",
        *_loss_lines(traits),
        f"  optim: {{lr: {own_rate}, weight_decay: 0.01, schedule: linear, warmup_ratio: 0.06}}",
        f"  fit: {{epochs: {epochs[1]}, batch_size: {batch}, micro_batch_size: {micro[1]}{monitor}}}   # micro-batches "
        "change memory, not the result",
        *([f"  ce_only_epochs: {own:<14}# of the student on labels alone, which has fewer rows"] if without else []),
        "",
        *_written_lines(wishes, seen, count),
        "export:",
        *_export_lines(choice),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _epochs(steps: int, batch: int, rows: float, most: int) -> int:
    """Epochs that come to about this many steps."""
    return min(most, max(1, round(steps * batch / rows)))


def _without_label(wishes: Wishes, seen: Look) -> int:
    """Rows that lack a label, of tasks in which these can teach."""
    label = (wishes.columns or {}).get("label")
    return 0 if label is None or label in seen.lists else seen.missing.get(label, 0)


def _more_lines(wishes: Wishes, more: More | None) -> list[str]:
    """Rows without labels."""
    if more is None:
        return []
    columns = ", ".join(f"{key}: {plain(column)}" for key, column in more.columns.items())
    named = f", columns: {{{columns}}}" if columns else ""
    return [
        f"  unlabelled: {{source: {plain(wishes.unlabelled or '')}{named}}}   # {more.num_rows} rows; the teacher "
        "labels them, and the student learns from them as well"
    ]


def _loss_lines(traits: Kind) -> list[str]:
    """Weights of teacher and labels."""
    if not traits.has_labels:
        return ["  alpha: 1                      # the teacher is all there is", "  temperature: 1"]
    plain = traits.is_language_model or traits.is_numeric
    why = "numbers have none" if traits.is_numeric else "another needs no new teacher: distilpeft sweep"
    return [
        "  alpha: 0.9                    # loss = alpha * T^2 * KL + (1 - alpha) * CE",
        f"  temperature: {1 if plain else 2:<17}# {why}",
    ]


def _tuning_lines(
    choice: Choice, epochs: int, batch: int, micro: int, monitor: str, *, whole: bool, said: str
) -> list[str]:
    """How the teacher is tuned, or that it is not."""
    if choice.kind == "embedder":
        return ["  fit: null                     # there are no labels: its vectors are learnt unchanged"]
    millions = choice.teacher["millions"]
    return [
        "  lora: null                    # convolutions have no linear layers for an adapter: all weights are tuned"
        if whole
        else "  lora: {rank: 16, alpha: 32, target_modules: all-linear}",
        *(["  gradient_checkpointing: true  # a third slower, most activations less"] if millions >= 1000 else []),
        f"  optim: {{lr: {rate(millions, adapter=not whole)}, schedule: linear, warmup_ratio: 0.06}}"
        + ("" if whole else "   # an adapter takes about ten times a whole model's rate"),
        f"  fit: {{epochs: {epochs}, batch_size: {batch}, micro_batch_size: {micro}{monitor}}}   # {said}",
    ]


def _data_lines(wishes: Wishes, seen: Look) -> list[str]:
    lines = [f"  source: {plain(wishes.data)}", *_bad_row_lines(wishes, seen)]
    names = list(seen.splits) if any(name.lower() in SPLIT_NAMES for name in seen.splits) else []
    held = [name for name in ("validation", "dev", "valid", "test") if name in names]
    if "train" not in names or not held:
        total = sum(seen.splits.values())
        held_out = float(f"{min(0.1, HELD_OUT / total):.2g}")
        shares = f"train: {1 - 2 * held_out:g}, validation: {held_out:g}, test: {held_out:g}"
        return [*lines, f"  split: {{{shares}, seed: 7}}   # of {total} rows; once and for all by the seed"]
    if len(held) == 1:  # half of it picks the checkpoint
        (one,) = held
        return [*lines, "  train: train", f"  validation: {one}[:50%]", f"  test: {one}[50%:]"]
    return [*lines, "  train: train", f"  validation: {held[0]}", f"  test: {held[-1]}"]


def _bad_row_lines(wishes: Wishes, seen: Look) -> list[str]:
    """What to do with rows that lack something."""
    may_be_empty = ("answers", "separator", "prompt", "completion", "tools")
    columns = [name for key, name in (wishes.columns or {}).items() if key not in may_be_empty]
    lacking = {name: seen.missing.get(name, 0) for name in columns if name not in seen.lists}
    without = _without_label(wishes, seen)
    if without:
        lacking.pop((wishes.columns or {})["label"])
    named = ", ".join(f"{count} without {name!r}" for name, count in lacking.items() if count)
    return [
        *([f"  on_bad_row: skip              # rows that lack something: {named}"] if named else []),
        *([f"  on_empty_label: unlabelled    # {without} rows: the teacher labels them"] if without else []),
    ]


def _student_lines(choice: Choice) -> list[str]:
    if choice.student is not None:
        return [f"  model: {choice.student['name']:<24}  # {_about(choice.student)}"]
    if choice.is_static:
        settings = {"dim": choice.dim, "hidden": None if choice.kind == "embedder" else 128}
        given = ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
        lines = [f"  static: {{{given}}}   # a vector for each token instead of layers, and their mean"]
    else:
        kept = ", ".join(map(str, choice.layers))
        lines = [f"  from_teacher: {{layers: [{kept}]}}   # {len(choice.layers)} of {choice.teacher['layers']}, "
                 "with its embeddings"]  # fmt: skip
    if choice.tokens is not None:
        lines.append(f"  vocabulary: {{from: data, max_size: {choice.tokens}}}   # the most frequent tokens; the "
                     "report says what that changes")  # fmt: skip
    return lines


def _written_lines(wishes: Wishes, seen: Look, count: Count | None) -> list[str]:
    """How long an answer may get, of models that write one."""
    if wishes.task is None or not KINDS[wishes.task].reads_first:
        return []
    most = length(seen.rows, [(wishes.columns or {})["target"]], count or estimate)
    return ["evaluate:", f"  generate: {{max_new_tokens: {most}}}   # 98 % of the targets are at most this long", ""]


def _export_lines(choice: Choice) -> list[str]:
    wanted = ("safetensors", "gguf-q8_0") if choice.kind == "decoder" else ("safetensors", "onnx", "onnx-int8")
    able = [name for name in wanted if not FORMS[name].missing()]
    rest = [f'{name}: pip install "distilpeft[{FORMS[name].extra}]"' for name in wanted if name not in able]
    return [f"  formats: [{', '.join(able)}]", *(f"  # also {one}" for one in rest)]


def _about(model: Mapping[str, Any]) -> str:
    if not model["millions"]:
        return "not on this machine, so nothing is known of it"
    return f"{model['millions']} million weights, up to {model['tokens']} tokens, {model['licence']}"


def _length_lines(wishes: Wishes, seen: Look, max_tokens: int, count: Count | None) -> list[str]:
    why = "as given"
    if wishes.max_tokens is None:
        wanted = needed(wishes, seen, count or estimate)
        how = "counted with the teacher's tokenizer" if count else "estimated from words and characters"
        more = f"have up to {wanted} tokens" if wanted > max_tokens else "fit"
        why = f"98 % of the rows {more} ({how}); longer ones are cut, and reported"
    return [f"  max_tokens: {max_tokens:<18}# {why}"]
