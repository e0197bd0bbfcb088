"""The two models of a recipe: load the tuned teacher in each of its forms, build, save and reload the student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distilpeft import features, formats, models
from distilpeft.data.pictures import Reader
from distilpeft.data.sources import Source, resolve
from distilpeft.data.vocabulary import Vocabulary, check_same
from distilpeft.distillation.store import SoftTargets, row_hashes
from distilpeft.errors import InputError
from distilpeft.exported import Graph, open_exported
from distilpeft.machine.artifact import Artifact
from distilpeft.machine.files import digest_file, digest_json, read_json, write_json
from distilpeft.machine.runtime import Runtime
from distilpeft.models import Architecture
from distilpeft.parallel import offload_layers, shard_layers
from distilpeft.recipe import Recipe
from distilpeft.recipe.recipe import result_settings
from distilpeft.recipe.training import Precision
from distilpeft.tasks.rows import TaskData, task_module

MODEL, ADAPTER, HEADS = "model", "adapter", "heads.json"
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


@dataclass(frozen=True)
class Loaded:
    """A frozen model ready to predict, with the tokenizer that its rows need and the digest that names it."""

    model: Any
    tokenizer: Any
    tokenizer_digest: str


def architecture(recipe: Recipe) -> Architecture:
    """What the recipe's task asks of a model."""
    task = task_module(recipe)
    return Architecture(task.AUTO_CLASS, task.PEFT_TASK, task.model_options(recipe.task), train_heads=task.TRAIN_HEADS)


def teacher_source(recipe: Recipe) -> Source:
    """Where the teacher's base comes from."""
    found = resolve(recipe.teacher.model, "teacher.model", recipe.teacher.revision)
    return replace(found, trusted=recipe.teacher.trust_remote_code)


def student_source(recipe: Recipe) -> Source:
    """Where the student's weights (or configuration) and its tokenizer come from."""
    student = recipe.student
    if student.model is not None:
        return resolve(student.model, "student.model", student.revision)
    if student.from_config is not None:
        return resolve(student.from_config.model, "student.from_config.model", student.from_config.revision)
    return teacher_source(recipe)


def tokenizer_source(recipe: Recipe) -> Source:
    """Where the student's tokenizer comes from."""
    return teacher_source(recipe) if recipe.student.tokenizer == "teacher" else student_source(recipe)


def load_reader(recipe: Recipe, source: Source) -> Any:
    """What makes inputs out of rows: the model's tokenizer, or how it reads pictures."""
    return models.load_picture_reader(source) if recipe.kind.images else models.load_tokenizer(source)


def check_tokenizers(recipe: Recipe) -> None:
    """Refuse a pair that reads token ids differently where it is taught or judged token by token; loads no weights.

    Raises:
        InputError: the first token, special token or place of the chat template that differs.
    """
    taken = recipe.student.tokenizer == "teacher"
    if not recipe.kind.same_tokens or (taken and recipe.student.from_config):
        return  # to random weights every id is as good as any other
    sources = (teacher_source(recipe), student_source(recipe))
    if sources[0] == sources[1]:
        return
    teacher, student = (Vocabulary.of_tokenizer(source.name, models.load_tokenizer(source)) for source in sources)
    check_same(teacher, student, chat=recipe.needs_template, tokens_only=taken)


def check_words(recipe: Recipe, data: TaskData) -> None:
    """Refuse a pair that does not read the same words of every row, where words are taught; loads no weights.

    Raises:
        InputError: names the first row of which their tokenizers have room for different words.
    """
    sources = (teacher_source(recipe), tokenizer_source(recipe))
    if recipe.kind.unit != "words" or sources[0] == sources[1]:
        return
    for split in ("train", "validation", "test"):
        theirs_N, ours_N = (
            data.tokens(split, load_reader(recipe, one), tokenizer_digest(one)).column("num_words") for one in sources
        )
        apart = np.flatnonzero(theirs_N != ours_N)
        if len(apart):
            row = int(apart[0])
            raise InputError(
                f"data.max_tokens: of row {row} of {split} the teacher reads {theirs_N[row]} words, the student "
                f"{ours_N[row]} ({len(apart)} such rows): their tokenizers need different numbers of tokens; raise "
                "max_tokens, or cut long rows"
            )


def check_features(recipe: Recipe) -> None:
    """Refuse a pair whose insides cannot be held against each other; loads no weights.

    Raises:
        InputError: they read other tokens, or have no such layers.
    """
    settings = recipe.distil.features
    if settings is None:
        return
    sources = (tokenizer_source(recipe), teacher_source(recipe))
    if sources[0] != sources[1]:
        ours, theirs = (Vocabulary.of_tokenizer(one.name, models.load_tokenizer(one)) for one in sources)
        check_same(theirs, ours, chat=recipe.needs_template)
    overrides = recipe.student.from_config.overrides if recipe.student.from_config else {}
    teacher = models.configuration(teacher_source(recipe), architecture(recipe), {})
    student = models.configuration(student_source(recipe), architecture(recipe), overrides)
    configs = [one.get_text_config() for one in (student, teacher)]
    depths = [one.num_hidden_layers for one in configs]
    if recipe.student.from_teacher is not None:
        depths[0] = len(recipe.student.from_teacher.of(depths[1]))
    features.check(settings, depths, configs)


def check_exports(recipe: Recipe) -> None:
    """Refuse forms that the student's architecture or tokenizer does not have, before it is trained; loads no weights.

    Raises:
        InputError: names the form and why.
    """
    overrides = recipe.student.from_config.overrides if recipe.student.from_config else {}
    config = models.configuration(student_source(recipe), architecture(recipe), overrides)
    tokenizer = load_reader(recipe, tokenizer_source(recipe))
    for form in recipe.export.formats:
        wrong = formats.fault(form, config, tokenizer, caches=recipe.kind.caches)
        if wrong is not None:
            raise InputError(f"export.formats: {form}: {wrong}")


def check_lengths(recipe: Recipe) -> None:
    """Refuse benchmark lengths beyond what a model can read, before it is trained; loads no weights.

    Raises:
        InputError: names the length and the model.
    """
    asked = [length for length in recipe.benchmark.lengths if length != "data"]
    if not asked:
        return
    longest = max(asked) + (recipe.benchmark.new_tokens if recipe.kind.caches else 0)
    overrides = recipe.student.from_config.overrides if recipe.student.from_config else {}
    for source, changes in ((teacher_source(recipe), {}), (student_source(recipe), overrides)):
        config = models.configuration(source, architecture(recipe), changes)
        most = getattr(config, "max_position_embeddings", None)
        # RoBERTa and its kin keep the positions up to the padding id for themselves
        reserved = config.pad_token_id + 1 if config.model_type in OFFSET_POSITIONS else 0
        if most is not None and longest > most - reserved:
            raise InputError(
                f"benchmark.lengths: {longest} tokens (with new_tokens) are more than {source.name} reads, "
                f"{most - reserved}"
            )


def binding(recipe: Recipe, teacher: Artifact, tokenizer: Any) -> dict[str, str]:
    """Everything that soft targets depend on besides the rows: the teacher's own files, and how it reads text."""
    files = teacher.manifest()["files"]
    weights = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return {
        "teacher": teacher.key,
        "base": f"{recipe.teacher.model} ({str(teacher.inputs.get('base'))[:12]})",
        "adapter": digest_json(weights)[:12],
        "quantize": recipe.teacher.quantize,
        "task": digest_json([result_settings(recipe.task), recipe.data.max_tokens])[:12],
        **text_binding(tokenizer),
    }


def open_targets(recipe: Recipe, data: TaskData, folder: Path, teacher: Artifact | None) -> SoftTargets:
    """A store of soft targets for the recipe's training rows.

    Args:
        recipe: names the models.
        data: the rows.
        folder: the store.
        teacher: whose targets they must be; None for a store that was made elsewhere (`targets.source`).

    Raises:
        InputError: they belong to another teacher, or to other tokens; both sides are named.
    """
    store = SoftTargets(folder)
    source = teacher_source(recipe)
    tokenizer = load_reader(recipe, source)
    if teacher is not None:
        expected = binding(recipe, teacher, tokenizer)
    else:
        bound = store.store["bound"]
        expected = {name: value for name, value in text_binding(tokenizer).items() if name in bound}
        if not recipe.needs_template:
            expected.pop("chat_template", None)
    # Tokens are looked up for the student's own reading of the rows, classes for the teacher's.
    read_by = tokenizer_source(recipe) if recipe.kind.same_tokens else source
    rows = data.tokens("train", load_reader(recipe, read_by), tokenizer_digest(read_by))
    store.check(expected, row_hashes(rows.dataset))
    return store


def text_binding(tokenizer: Any) -> dict[str, str]:
    """How text becomes ids: the token → id map and the chat template; or how pictures are read."""
    if isinstance(tokenizer, Reader):
        return {"pictures": digest_json(dict(tokenizer.settings))[:12]}
    tokens = digest_json(tokenizer.get_vocab())
    template = tokenizer.chat_template
    return {"vocabulary": tokens[:12], "chat_template": digest_json(template)[:12] if template else "none"}


def new_teacher(runtime: Runtime, recipe: Recipe, data: TaskData, tokenizer: Any) -> tuple[Any, list[str]]:
    """The untuned teacher, ready to be trained or used as it is, and the names of its heads.

    Raises:
        InputError: it is to be used as it is, but came without some of its weights.
    """
    model, heads = _base(runtime, recipe, recipe.teacher.quantize, tokenizer, recipe.teacher.precision)
    if recipe.teacher.fit is None:
        task_module(recipe).prepare(recipe.task, model)
        used = set(dict(model.named_parameters()))
        fresh = [name for name in model.fresh if name in used]
        if fresh:
            raise InputError(
                f"teacher.fit: null uses {recipe.teacher.model} as it is, but it came without {fresh[0]}"
                f"{f' and {len(fresh) - 1} more' if len(fresh) > 1 else ''}; tune it, or take a model for this task"
            )
        return model.requires_grad_(False).eval(), heads
    _start_head(recipe, data, model, teacher_source(recipe))
    if recipe.teacher.lora is None:
        models.unfreeze(model, architecture(recipe))
    if recipe.teacher.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.teacher.lora is not None:
        model = models.add_lora(model, recipe.teacher.lora, architecture(recipe), heads, "teacher.lora")
    task_module(recipe).prepare(recipe.task, model)
    return model, heads


def save_teacher(model: Any, folder: Path, heads: list[str], *, tuned: bool = True) -> None:
    """Save what was tuned: the adapter with its heads, the whole model, or nothing."""
    if hasattr(model, "peft_config"):
        # Nothing of ours resizes embeddings; to find out, PEFT would look for the base's configuration on the hub.
        model.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # an empty form, its tags in another order every time
    elif tuned:
        model.save_pretrained(str(folder / MODEL))
    write_json(folder / HEADS, {"modules": heads})


def load_teacher(
    runtime: Runtime,
    recipe: Recipe,
    folder: Path,
    precision: Precision,
    *,
    full_precision: bool = False,
    merged: bool = False,
    placed: bool = False,
) -> Loaded:
    """The tuned teacher, frozen.

    Args:
        runtime: the device.
        recipe: names its base.
        folder: its artifact.
        precision: in which 4-bit weights are multiplied; that of the stage, so that its figures are of one kind.
        full_precision: put the adapter on the unquantized base instead.
        merged: merge the adapter into the (dequantized) base, as an ordinary model.
        placed: put it where `teacher.place` says, instead of whole on the device.
    """
    place = recipe.teacher.place if placed else "replicated"
    whole = recipe.teacher.fit is not None and recipe.teacher.lora is None  # all weights tuned, which are not quantized
    quantize = "none" if full_precision or whole else recipe.teacher.quantize
    # quantized weights are made on the device; others come to it layer by layer
    device = runtime.device if place == "replicated" or quantize != "none" else torch.device("cpu")
    source = teacher_source(recipe)
    tokenizer = load_reader(recipe, source)
    if whole:
        tuned = Source(str(folder / MODEL), folder / MODEL)
        model, _ = models.load_base(
            tuned, architecture(recipe), quantize="none", dtype=recipe.teacher.dtype,
            device=device, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    else:
        heads = read_json(folder / HEADS, f"delete {folder} to make it again")["modules"]
        model, _ = _base(runtime, recipe, quantize, tokenizer, precision, heads, device)
        if recipe.teacher.fit is None:
            model = models.dequantize(model) if merged else model
        else:
            model = models.merge(model, folder / ADAPTER) if merged else models.load_adapter(model, folder / ADAPTER)
    task_module(recipe).prepare(recipe.task, model)
    model.requires_grad_(False).eval()
    if place == "offloaded":
        offload_layers(runtime, model)
    elif place == "sharded":
        shard_layers(runtime, model)
    return Loaded(model, tokenizer, tokenizer_digest(source))


def _start_head(recipe: Recipe, data: TaskData, model: Any, tokens: Source) -> None:
    """Let a new head begin at what is usual in training, where the task says what that is."""
    usual = getattr(data.task, "usual", None)
    if usual is not None:
        rows = data.tokens("train", load_reader(recipe, tokens), tokenizer_digest(tokens))
        models.start_head(model, usual(recipe.task, rows))


def new_student(runtime: Runtime, recipe: Recipe, data: TaskData, teacher: Path | None) -> Loaded:
    """The untrained student with all its weights trainable, or its LoRA adapter.

    Args:
        runtime: the device.
        recipe: its `student` section.
        data: the rows.
        teacher: the teacher's artifact; needed by `from_teacher`.
    """
    student, source = recipe.student, student_source(recipe)
    tokens = tokenizer_source(recipe)
    tokenizer = load_reader(recipe, tokens)
    runtime.seed(recipe.seed)  # the head, or everything, may be random: the same for every run of this recipe
    if student.from_teacher is not None:
        assert teacher is not None
        model = load_teacher(runtime, recipe, teacher, "fp32", merged=True).model.float()
        models.keep_layers(model, student.from_teacher)
    elif student.from_config is not None:
        overrides = student.from_config.overrides
        model = models.from_config(source, architecture(recipe), overrides, tokenizer.pad_token_id)
    else:
        model, _ = models.load_base(
            source, architecture(recipe), quantize="none", dtype="fp32",
            device=runtime.device, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    if student.from_teacher is None:
        _start_head(recipe, data, model, tokens)
    model = model.to(runtime.device)
    models.unfreeze(model, architecture(recipe))
    if student.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if student.lora is not None:
        heads = models.head_modules(architecture(recipe), model.config)
        model = models.add_lora(model, student.lora, architecture(recipe), heads, "student.lora")
    task_module(recipe).prepare(recipe.task, model)
    return Loaded(model, tokenizer, tokenizer_digest(tokens))


def save_student(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save an ordinary transformers model (an adapter is merged) with its tokenizer."""
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    model.to(dtype).save_pretrained(str(folder))
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer, or what reads pictures, without the length that rows were last cut to.

    Its files would otherwise tell of what this process has done before.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        core.no_truncation()
        core.no_padding()
    tokenizer.save_pretrained(str(folder))


def load_student(runtime: Runtime, recipe: Recipe, folder: Path) -> Loaded:
    """A saved student or export, frozen, loaded as any user of transformers would."""
    model = architecture(recipe).auto_class.from_pretrained(str(folder), dtype="auto")
    tokenizer = load_reader(recipe, Source(str(folder), folder))
    digest = tokenizer_digest(tokenizer_source(recipe))
    task_module(recipe).prepare(recipe.task, model)
    return Loaded(model.to(runtime.device).requires_grad_(False).eval(), tokenizer, digest)


def load_export(runtime: Runtime, recipe: Recipe, folder: Path) -> Loaded:
    """An exported folder in its own runtime, as a frozen module."""
    tokenizer = load_reader(recipe, Source(str(folder), folder))
    model = open_exported(folder, runtime.device)
    if not isinstance(model, Graph):
        task_module(recipe).prepare(recipe.task, model)
    return Loaded(model, tokenizer, tokenizer_digest(tokenizer_source(recipe)))


def tokenizer_digest(source: Source) -> str:
    """Names a tokenizer: by the content of its files, or by hub id and revision."""
    if source.path is None:
        return digest_json([source.name, source.revision])
    if source.path.is_file():
        return digest_file(source.path)
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "preprocessor_config.json",
    )
    files = [source.path / name for name in names]
    return digest_json({file.name: digest_file(file) for file in files if file.is_file()})


def _base(
    runtime: Runtime,
    recipe: Recipe,
    quantize: models.Quantize,
    tokenizer: Any,
    precision: Precision,
    heads: list[str] | None = None,
    device: torch.device | None = None,
) -> tuple[Any, list[str]]:
    teacher = recipe.teacher
    runtime.seed(recipe.seed)
    return models.load_base(
        teacher_source(recipe), architecture(recipe), quantize=quantize, dtype=teacher.dtype,
        compute_dtype=runtime.compute_dtype(precision),
        device=device or runtime.device, pad_token_id=tokenizer.pad_token_id, heads=heads,
    )  # fmt: skip
