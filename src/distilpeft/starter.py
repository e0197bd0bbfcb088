"""`distilpeft init`: a first recipe for the data at hand, with the reason beside every choice.

Looks at the data, asks for what it cannot see, chooses teacher and student from `catalogue.json`, and settings by rules
that are written down here. The recipe is checked before it is written. Torch-free.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from distilpeft.artifact import write_text
from distilpeft.data import load_parts
from distilpeft.errors import InputError
from distilpeft.forms import FORMS
from distilpeft.recipe import Data, Split
from distilpeft.recipe_file import load_recipe

LOOKED_AT = 2000
"""Rows that text lengths are estimated from."""
MOST_CLASSES = 100
LABEL_NAMES = ("label", "labels", "class", "category", "intent", "topic", "target", "sentiment")
TOKENS_PER_WORD = 1.4
"""Of word pieces in English; other languages and code have more."""
BYTES_PER_WEIGHT = 1.06
"""Of int8 with its scales, as onnx-int8 and gguf-q8_0."""
LONGEST = {"cpu": 512, "GPU": 2048}
"""Tokens of a row that are chosen without being asked for."""
HELD_OUT = 2000
"""Rows are enough to validate, and to test."""
MOST_MILLIONS = {"encoder": 150.0, "decoder": 500.0}
"""Largest teacher on a CPU."""
MILLIONS_PER_GB = 400.0
"""Largest teacher on a GPU: nf4 weights take 0.5 GB per 1000 million, and the rest is for what it computes."""
STUDENT_MILLIONS = {"encoder": 90.0, "decoder": 500.0}
STEPS = {"encoder": (300, 600), "decoder": (300, 600)}

Ask = Callable[[str, str, Sequence[str]], str]
"""(flag, question, choices or none) → the answer."""


@dataclass(frozen=True)
class Wishes:
    """What users give on the command line; None is asked for or found out.

    Attributes:
        data: see `data.source`.
        task: `text_classification` or `causal_lm`.
        columns: recipe key of the task → column.
        device: `cpu`, or a GPU's memory in GB.
        size_mb: of the smallest export, at most.
        language: `en` or `many`.
        max_tokens: of a row.
        packages: only models that come as Python packages, for machines without a hub.
        teacher: instead of the catalogue's.
        student: likewise.
    """

    data: str
    task: str | None = None
    columns: Mapping[str, str] | None = None
    device: str = "cpu"
    size_mb: float | None = None
    language: str = "en"
    max_tokens: int | None = None
    packages: bool = False
    teacher: str | None = None
    student: str | None = None


@dataclass(frozen=True)
class Look:
    """What the data show.

    Attributes:
        splits: name → rows.
        rows: some rows of the largest split.
        columns: of text, as far as these rows show.
        classes: column → its values, of columns with few.
        lists: columns of messages.
    """

    splits: Mapping[str, int]
    rows: datasets.Dataset
    columns: Sequence[str]
    classes: Mapping[str, Sequence[str]]
    lists: Sequence[str]


def look(source: str) -> Look:
    """Read the data.

    Raises:
        InputError: they cannot be read.
    """
    parts = load_parts(Data(source=source, split=Split()))
    rows = max(parts.values(), key=len)
    some = rows.select(range(min(LOOKED_AT, len(rows))))
    texts, classes, lists = [], {}, []
    for name in rows.column_names:
        feature = rows.features[name]
        if isinstance(feature, datasets.ClassLabel):
            classes[name] = list(feature.names)
            continue
        if not isinstance(feature, datasets.Value):
            lists.append(name)
            continue
        if feature.dtype.startswith("float"):
            continue
        if feature.dtype in ("string", "large_string") and _mean_words(some, name) >= 2:
            texts.append(name)
            continue
        values = sorted(Counter(rows[name]).items(), key=lambda pair: pair[0] if pair[0] is not None else "")
        if 2 <= len(values) <= min(MOST_CLASSES, len(rows) // 2) and None not in dict(values):
            classes[name] = [str(value) for value, _ in values]
    return Look({name: len(part) for name, part in parts.items()}, some, texts, classes, lists)


def _mean_words(rows: datasets.Dataset, column: str) -> float:
    return float(np.mean([len(str(cell).split()) for cell in rows[column]])) if len(rows) else 0.0


def settled(wishes: Wishes, seen: Look, ask: Ask) -> Wishes:
    """The wishes with task and columns, found in the data or asked for.

    Raises:
        InputError: a column is not there.
    """
    given = dict(wishes.columns or {})
    everything = [*seen.columns, *seen.classes, *seen.lists]
    for key, column in given.items():
        if column not in seen.rows.column_names:
            raise InputError(f"--{key} {column}: {wishes.data} has {', '.join(seen.rows.column_names)}")
    task = wishes.task or _task(given, everything) or ask("task", "What is it?", ["text_classification", "causal_lm"])
    if task == "text_classification":
        if "label" not in given:
            named = [name for name in seen.classes if name.lower() in LABEL_NAMES]
            given["label"] = _one("label", named or list(seen.classes), "Which column holds the class?", ask)
        if "text" not in given:
            texts = [name for name in seen.columns if name not in given.values()]
            given["text"] = _one("text", texts, "Which column holds the text?", ask)
    elif not {"prompt", "messages", "text"} & set(given):
        forms = [{"messages": "messages"}, {"prompt": "prompt", "completion": "completion"}, {"text": "text"}]
        found = [form for form in forms if set(form.values()) <= set(everything)]
        given = found[0] if found else {"text": _one("text", list(seen.columns), "Which column holds the text?", ask)}
    return replace(wishes, task=task, columns=given)


def _task(given: Mapping[str, str], columns: Sequence[str]) -> str | None:
    if {"prompt", "completion", "messages"} & set(given) or "messages" in columns:
        return "causal_lm"
    if {"label", "pair"} & set(given) or {name.lower() for name in columns} & set(LABEL_NAMES):
        return "text_classification"
    return "causal_lm" if {"prompt", "completion"} <= set(columns) else None


def _one(flag: str, found: Sequence[str], question: str, ask: Ask) -> str:
    return found[0] if len(found) == 1 else ask(flag, question, found)


@dataclass(frozen=True)
class Choice:
    """Teacher and student, and why.

    Attributes:
        kind: `encoder` or `decoder`.
        teacher: of the catalogue.
        student: of the catalogue, or None: layers of the teacher.
        layers: those, if so.
    """

    kind: str
    teacher: dict[str, Any]
    student: dict[str, Any] | None
    layers: Sequence[int]

    @property
    def student_millions(self) -> float:
        """Million weights, about."""
        if self.student is not None:
            return float(self.student["millions"])
        return cut_millions(self.teacher, len(self.layers))


def choose(wishes: Wishes, max_tokens: int) -> Choice:
    """The largest teacher that the device can tune, and the largest student within the size that is of its kind.

    Raises:
        InputError: there is none.
    """
    kind = "encoder" if wishes.task == "text_classification" else "decoder"
    listed: list[dict[str, Any]] = json.loads((Path(__file__).parent / "catalogue.json").read_text("utf-8"))[kind]
    most = MOST_MILLIONS[kind] if wishes.device == "cpu" else MILLIONS_PER_GB * memory_gb(wishes.device)
    fitting = [one for one in listed if _suits(one, wishes, kind, max_tokens)]
    unlisted = {"millions": 0, "embeddings": 0, "layers": 0, "family": None, "tokens": max_tokens}
    by_name = {one["name"]: one for one in listed}
    if wishes.teacher is not None:
        teacher = by_name.get(wishes.teacher, {**unlisted, "name": wishes.teacher})
    else:
        able = [one for one in fitting if one["millions"] <= most]
        if not able:
            where = "as a package " if wishes.packages else ""
            raise InputError(
                f"init: no {kind} {where}for {max_tokens} tokens and --language {wishes.language} is known that fits "
                f"on {wishes.device}; name one with --teacher"
            )
        teacher = max(able, key=lambda one: (one["millions"], not one["name"].startswith("package:")))
    if wishes.student is not None:
        return Choice(kind, teacher, by_name.get(wishes.student, {**unlisted, "name": wishes.student}), ())
    usual = STUDENT_MILLIONS[kind] * (2 if kind == "encoder" and wishes.language == "many" else 1)  # its vocabulary
    size = usual if wishes.size_mb is None else wishes.size_mb / BYTES_PER_WEIGHT
    small = [
        one
        for one in fitting
        if one["millions"] <= min(size, 0.6 * teacher["millions"])
        and (kind == "encoder" or one["family"] == teacher["family"])
    ]
    if small:
        return Choice(kind, teacher, max(small, key=lambda one: one["millions"]), ())
    if not teacher["layers"]:
        raise InputError(f"init: {teacher['name']} is not in the catalogue; name a student with --student")
    half = max(1, teacher["layers"] // 2)
    if wishes.size_mb is None:
        return Choice(kind, teacher, None, spread(teacher["layers"], half))
    counts = [count for count in range(1, half + 1) if cut_millions(teacher, count) <= size]
    if not counts:
        least = cut_millions(teacher, 1) * BYTES_PER_WEIGHT
        raise InputError(
            f"--size-mb {wishes.size_mb:g}: no student is so small; {teacher['name']} with one layer takes "
            f"{least:.0f} MB, most of it for its vocabulary"
        )
    return Choice(kind, teacher, None, spread(teacher["layers"], counts[-1]))


def cut_millions(model: Mapping[str, Any], layers: int) -> float:
    """Million weights of a model of which so many layers are kept, with its embeddings."""
    millions, embeddings = float(model["millions"]), float(model["embeddings"])
    return embeddings + (millions - embeddings) * layers / int(model["layers"])


def _suits(one: Mapping[str, Any], wishes: Wishes, kind: str, max_tokens: int) -> bool:
    """Whether a model of the catalogue reads such rows. Of encoders, those for one language are better at it."""
    speaks = one["languages"] == wishes.language or (kind == "decoder" and wishes.language == "en")
    here = one["name"].startswith("package:") or not wishes.packages
    return bool(one["tokens"] >= max_tokens and speaks and here)


def spread(layers: int, count: int) -> list[int]:
    """`count` of so many layers, evenly, with the first."""
    return sorted({round(at) for at in np.linspace(0, layers - 1, count)}) if count > 1 else [0]


def memory_gb(device: str) -> float:
    """Of `24GB`.

    Raises:
        InputError: it is neither that nor `cpu`.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)GB", device, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise InputError(f"--device {device}: cpu, or a GPU's memory such as 24GB")
    return float(found[1])


def rate(millions: float, *, adapter: bool) -> str:
    """A learning rate to start from: adapters take about ten times that of whole models, larger models less."""
    edges = (50, 200, 1000)
    rates = ("1e-3", "5e-4", "2e-4", "1e-4") if adapter else ("2e-4", "5e-5", "2e-5", "1e-5")
    return rates[sum(millions > edge for edge in edges)]


def length(rows: datasets.Dataset, columns: Sequence[str]) -> int:
    """Tokens that 98 % of the rows have at most, about: from words, rounded up to a multiple of 16."""
    words = [sum(len(str(row[column]).split()) for column in columns) for row in rows]
    return max(16, 16 * math.ceil((TOKENS_PER_WORD * float(np.percentile(words, 98)) + 3) / 16))


def power(value: float) -> int:
    """The largest power of two up to it, at least 1."""
    return int(2 ** max(0, math.floor(math.log2(max(value, 1)))))


def write(out: Path, wishes: Wishes, ask: Ask) -> str:
    """Write a recipe that fits the wishes.

    Args:
        out: the file; it must not be there.
        wishes: what is known.
        ask: for the rest.

    Returns:
        What was chosen, in a line.

    Raises:
        InputError: the data cannot be read, nothing fits, or the file is there.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; init writes new recipes only")
    if not out.parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}")
    if wishes.device != "cpu":
        memory_gb(wishes.device)
    seen = look(wishes.data)
    wishes = settled(wishes, seen, ask)
    columns = [column for key, column in (wishes.columns or {}).items() if key != "label"]
    longest = LONGEST["cpu" if wishes.device == "cpu" or wishes.packages else "GPU"]
    max_tokens = wishes.max_tokens or min(length(seen.rows, columns), longest)
    choice = choose(wishes, max_tokens)
    text = render(out.stem, wishes, seen, choice, max_tokens)
    with tempfile.TemporaryDirectory() as folder:  # a recipe that is not good is never left behind
        (Path(folder) / out.name).write_text(text, encoding="utf-8")
        load_recipe(Path(folder) / out.name)
    write_text(out, text)
    student = choice.student["name"] if choice.student else f"{len(choice.layers)} of its layers"
    return f"{wishes.task}: {choice.teacher['name']} into {student}; rows of {max_tokens} tokens"


def render(name: str, wishes: Wishes, seen: Look, choice: Choice, max_tokens: int) -> str:
    """The recipe's text."""
    batch = 64 if sum(seen.splits.values()) >= 4000 else 32 if sum(seen.splits.values()) >= 1000 else 16
    train = seen.splits.get("train", sum(seen.splits.values()) * 0.8)
    epochs = [min(10 if choice.kind == "encoder" else 3, max(1, round(steps * batch / train)))
              for steps in STEPS[choice.kind]]  # fmt: skip
    budget = 4096 if wishes.device == "cpu" else 4096 * max(1.0, memory_gb(wishes.device) / 12)
    scales = (choice.teacher["millions"], choice.student_millions)
    micro = [min(batch, power(budget / max_tokens / max(1.0, (millions / 100) ** 0.5))) for millions in scales]
    large = choice.teacher["millions"] >= 300
    quantize = "nf4" if large else "none"
    why = (
        "4 bits save memory; the report shows their cost"
        if large
        else "small as it is; nf4 would save memory, not time"
    )
    needs = [one["needs"] for one in (choice.teacher, choice.student or {}) if one.get("needs")]
    monitor = ", monitor: log_loss" if choice.kind == "encoder" else ""
    said = "less noisy than accuracy" if choice.kind == "encoder" else "nats per token pick the checkpoint"
    lines = [
        f"# Written by distilpeft init for {wishes.device}.",
        f"#   distilpeft check {name}.yaml && distilpeft run {name}.yaml",
        *[f"#   {need}" for need in dict.fromkeys(needs)],
        f"name: {name}",
        "seed: 17",
        "",
        "task:",
        *_task_lines(wishes, seen),
        "",
        "data:",
        *_data_lines(wishes, seen),
        f"  max_tokens: {max_tokens:<18}# {_why_tokens(wishes, seen, max_tokens)}",
        "",
        "teacher:",
        f"  model: {choice.teacher['name']:<24}  # {_about(choice.teacher)}",
        f"  quantize: {quantize:<21}# {why}",
        "  lora: {rank: 16, alpha: 32, target_modules: all-linear}",
        *(["  gradient_checkpointing: true  # a third slower, most activations less"] if scales[0] >= 1000 else []),
        f"  optim: {{lr: {rate(scales[0], adapter=True)}, schedule: linear, warmup_ratio: 0.06}}   # an adapter takes "
        "about ten times a whole model's rate",
        f"  fit: {{epochs: {epochs[0]}, batch_size: {batch}, micro_batch_size: {micro[0]}{monitor}}}   # {said}",
        "",
        "student:",
        *_student_lines(choice),
        "",
        "distil:",
        "  alpha: 0.9                    # loss = alpha * T^2 * KL + (1 - alpha) * CE",
        f"  temperature: {2 if choice.kind == 'encoder' else 1:<17}# another needs no new teacher: distilpeft sweep",
        f"  optim: {{lr: {rate(scales[1], adapter=False)}, weight_decay: 0.01, schedule: linear, warmup_ratio: 0.06}}",
        f"  fit: {{epochs: {epochs[1]}, batch_size: {batch}, micro_batch_size: {micro[1]}{monitor}}}   # micro-batches "
        "change memory, not the result",
        "",
        "export:",
        *_export_lines(choice),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _task_lines(wishes: Wishes, seen: Look) -> list[str]:
    columns = dict(wishes.columns or {})
    lines = [f"  kind: {wishes.task}"]
    order = ("text", "pair", "prompt", "completion", "messages", "label")
    lines += [f"  {key}: {_plain(columns[key])}" for key in order if key in columns]
    if wishes.task == "text_classification":
        values = seen.classes.get(columns["label"])
        if values is None:
            raise InputError(
                f"--label {columns['label']}: has no 2 to {MOST_CLASSES} values that come twice; init makes recipes of "
                "classes"
            )
        lines.append(f"  labels: {json.dumps(list(values), ensure_ascii=False)}   # the position is the class id")
    elif "prompt" in columns:
        lines.append("  chat: true                    # a user's and an assistant's turn")
    return lines


def _data_lines(wishes: Wishes, seen: Look) -> list[str]:
    lines = [f"  source: {_plain(wishes.data)}"]
    names = list(seen.splits)
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


def _student_lines(choice: Choice) -> list[str]:
    if choice.student is not None:
        return [f"  model: {choice.student['name']:<24}  # {_about(choice.student)}"]
    kept = ", ".join(map(str, choice.layers))
    return [f"  from_teacher: {{layers: [{kept}]}}   # {len(choice.layers)} of {choice.teacher['layers']}, "
            "with its embeddings"]  # fmt: skip


def _export_lines(choice: Choice) -> list[str]:
    wanted = ("safetensors", "onnx", "onnx-int8") if choice.kind == "encoder" else ("safetensors", "gguf-q8_0")
    able = [name for name in wanted if not FORMS[name].missing()]
    rest = [f'{name}: pip install "distilpeft[{FORMS[name].extra}]"' for name in wanted if name not in able]
    return [f"  formats: [{', '.join(able)}]", *(f"  # also {one}" for one in rest)]


def _about(model: Mapping[str, Any]) -> str:
    if not model["millions"]:
        return "as given"
    return f"{model['millions']} million weights, up to {model['tokens']} tokens, {model['licence']}"


def _why_tokens(wishes: Wishes, seen: Look, max_tokens: int) -> str:
    if wishes.max_tokens:
        return "as given"
    columns = [column for key, column in (wishes.columns or {}).items() if key != "label"]
    wanted = length(seen.rows, columns)
    if wanted > max_tokens:
        return f"98 % of the rows have at most {wanted}, by their words: longer ones are cut, and counted"
    return "98 % of the rows have at most so many, by their words; longer ones are cut, and counted"


def _plain(text: str) -> str:
    """A YAML scalar."""
    return text if re.fullmatch(r"[A-Za-z_~/][\w./:~-]*", text) and ": " not in text else json.dumps(text)
