"""PEFT adapters as models: what they were tuned with, and whether the recipe's own LoRA continues them. Torch-free."""

from __future__ import annotations

from pathlib import Path

from distilpeft.data.sources import Source, adapter_settings, adapter_shapes, saved_modules
from distilpeft.recipe.teacher import Teacher
from distilpeft.recipe.training import Lora

OTHER_LORAS = (
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication",
    "trainable_token_indices", "target_parameters", "lora_bias", "use_qalora",
)  # fmt: skip
"""Settings of PEFT's LoRA that a recipe does not have."""


def own_lora(folder: Path) -> Lora | None:
    """The settings that an adapter was tuned with, if a recipe can say them; None for other kinds of adapters."""
    settings = adapter_settings(folder)
    if settings.get("peft_type") != "LORA" or any(settings.get(name) for name in OTHER_LORAS):
        return None
    if settings.get("bias", "none") != "none" or any("embed" in name for name in saved_modules(folder)):
        return None
    targets = settings.get("target_modules")
    if not isinstance(targets, list):  # a pattern
        targets = [name.partition(".lora_A")[0] for name in adapter_shapes(folder) if ".lora_A" in name]
        targets = [name.removeprefix("base_model.model.") for name in targets]
    try:
        return Lora(
            rank=settings["r"], alpha=settings["lora_alpha"], dropout=settings.get("lora_dropout", 0.0),
            target_modules=tuple(sorted(targets)),
        )  # fmt: skip
    except (KeyError, ValueError):
        return None


def continued_lora(teacher: Teacher, folder: Path) -> Lora | None:
    """The recipe's LoRA, with the adapter's own settings where the recipe is silent; None if it cannot be continued."""
    own = own_lora(folder)
    if own is None or teacher.adapter is None:
        return None
    given = teacher.adapter if "lora" in teacher.model_fields_set else Lora()
    return own.model_copy(update={name: getattr(given, name) for name in given.model_fields_set})


def is_continued(teacher: Teacher, source: Source) -> bool:
    """Whether the teacher's adapter is tuned further, instead of being merged into its base first."""
    own = own_lora(source.adapter) if source.adapter is not None else None
    if own is None or teacher.adapter is None:
        return False
    ours, theirs = (
        (lora.rank, lora.alpha, set(lora.target_modules) if isinstance(lora.target_modules, tuple) else None)
        for lora in (teacher.adapter, own)
    )
    return ours == theirs
