"""Sections of a recipe up to the student: rows, how models are trained, the teacher, its soft targets, the student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distilpeft.recipe.section import (
    IN_KEY_IF_GIVEN,
    NOT_IN_KEY,
    Count,
    Fraction,
    Index,
    NotNegative,
    Number,
    Positive,
    Section,
)

Precision = Literal["auto", "bf16", "fp16", "tf32", "fp32"]


class Lora(Section):
    """LoRA adapter (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Count = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: Positive
    weight_decay: NotNegative = Field(0.0, description="not applied to biases and norms")
    schedule: Literal["linear", "cosine", "constant", "exponential", "reduce_on_plateau"] = "linear"
    warmup_ratio: Fraction = Field(0.06, description="share of all steps in which lr rises from 0")
    final_ratio: Positive = Field(
        0.01, description="exponential: the last step's lr over the first's", json_schema_extra=IN_KEY_IF_GIVEN
    )
    plateau_factor: Annotated[float, Number, Field(gt=0, lt=1)] = 0.5
    plateau_patience: Index = Field(1, description="validations without improvement before lr is cut")
    max_grad_norm: Positive | None = 1.0


class Fit(Section):
    """How long and how wide to train.

    `batch_size` is rows per optimizer step over all processes; accumulation is derived from it, so one
    recipe means one trajectory on any number of devices.
    """

    epochs: Count
    max_steps: Count | None = Field(None, description="stop after this many optimizer steps")
    batch_size: Count
    micro_batch_size: Count = Field(32, description="rows per forward pass", json_schema_extra=NOT_IN_KEY)
    precision: Precision = Field(
        "auto", description="auto = bf16 where the device has it, else fp32; weights stay fp32; tf32 is for NVIDIA GPUs"
    )
    compile: bool = Field(
        False, description="torch.compile the layers; pays off after minutes", json_schema_extra=NOT_IN_KEY
    )
    batch_norm: Literal["sync", "frozen", "local"] = Field(
        "sync", description="BatchNorms that are trained: statistics over all processes, the pretrained ones, or each "
        "process's own", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    validate_every: Count | None = Field(None, description="optimizer steps; default: after every epoch")
    monitor: str | None = Field(
        None, description="validation metric that picks the checkpoint; default: accuracy, or nats_per_token"
    )
    keep: Literal["best", "last"] = Field("best", description="which weights the stage returns")
    early_stopping_patience: Count | None = Field(None, description="validations without improvement")
    save_every: Count = Field(200, description="steps between checkpoints", json_schema_extra=NOT_IN_KEY)
    keep_last: Count = Field(
        1, description="checkpoints that are kept besides the best one while training", json_schema_extra=NOT_IN_KEY
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite ends the run, or its step is left out and counted",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
