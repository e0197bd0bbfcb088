"""Sections of a recipe up to the student: rows, how models are trained, the teacher, its soft targets, the student."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from distilpeft.errors import InputError
from distilpeft.section import (
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


class Split(Section):
    """A seeded random split, for data that come without one. The three parts sum to at most 1."""

    train: Positive = 0.8
    validation: Positive = 0.1
    test: Positive = 0.1
    seed: Index = 0

    @model_validator(mode="after")
    def _at_most_everything(self) -> Self:
        if self.train + self.validation + self.test > 1 + 1e-9:
            raise ValueError("train + validation + test must not be more than 1")
        return self


class Data(Section):
    """Where the rows come from and which of them train, validate and test."""

    source: str | dict[str, str] = Field(
        description="hub id, local file (csv, tsv, jsonl, parquet) or folder, package:NAME/path, or {split: file}"
    )
    config: str | None = Field(None, description="configuration name of a hub data set")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    where: dict[str, str | int | float] = Field({}, description="keep only rows whose columns equal these values")
    train: str | None = Field(None, description="slice such as train[:80%]; with validation and test")
    validation: str | None = None
    test: str | None = None
    split: Split | None = Field(None, description="seeded split, instead of train, validation and test")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="rows that the task cannot use (no text, an unknown label) end the run, or are left out "
        "and counted", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    max_tokens: Count = Field(128, description="rows are cut to this many tokens; how many were cut is reported")

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Self:
        named = [self.train, self.validation, self.test]
        if self.split is None and None in named:
            raise ValueError("give train, validation and test (slices), or split (a seeded split)")
        if self.split is not None and any(named):
            raise ValueError("give either train, validation and test (slices), or split, not both")
        return self


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
        1, description="checkpoints that stay beside the best one while training", json_schema_extra=NOT_IN_KEY
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite ends the run, or its step is left out and counted",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip


class Teacher(Section):
    """The base model, how it is quantized, and the adapter tuned on top of it."""

    model: str = Field(min_length=1, description="hub id, local folder or package:NAME/path")
    revision: str | None = None
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model; read it first", json_schema_extra=NOT_IN_KEY
    )
    quantize: Literal["nf4", "int8", "none"] = "nf4"
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of weights that are not quantized")
    lora: Lora | None = Field(Lora(), description="null = tune all weights (only with quantize: none)")
    gradient_checkpointing: bool = Field(False, json_schema_extra=NOT_IN_KEY)
    place: Literal["replicated", "sharded", "offloaded"] = Field(
        "replicated", description="where the tuned teacher is while it gives soft targets: whole in each process, its "
        "layers in shards over all processes, or its layers in main memory until each is used",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    optim: Optim | None = Field(None, description="needed unless fit is null")
    fit: Fit | None = Field(description="null = the teacher is used as it is, head and all")
    gate: Literal["stop", "warn"] = Field("stop", description="when the tuned teacher is no better than chance")

    @model_validator(mode="after")
    def _quantized_weights_need_lora(self) -> Self:
        if self.fit is None:
            for name in ("optim", "lora", "gradient_checkpointing"):
                if name in self.model_fields_set:
                    raise ValueError(f"fit: null uses the teacher as it is; {name} would do nothing")
            return self._placed()
        if self.optim is None:
            raise ValueError("give optim, or fit: null for a teacher that is used as it is")
        if self.lora is None and self.quantize != "none":
            raise ValueError("lora: null tunes all weights, which needs quantize: none")
        if self.lora is None and self.dtype == "fp16":
            raise ValueError("dtype fp16 weights cannot be tuned; use fp32 or bf16, or lora")
        return self._placed()

    def _placed(self) -> Self:
        if self.place == "sharded" and self.quantize != "none":
            raise ValueError("place: sharded needs quantize: none; a quantized teacher is replicated or offloaded")
        return self

    @property
    def adapter(self) -> Lora | None:
        """What is tuned beside the base; None of a teacher with all weights tuned, or none."""
        return None if self.fit is None else self.lora

    @property
    def precision(self) -> Precision:
        """In which its quantized weights are multiplied while it is tuned."""
        return self.fit.precision if self.fit else "auto"


class Targets(Section):
    """The teacher's soft targets: computed once and kept, or computed in every step.

    Classes are kept as all their logits. For tokens `format` says what of a position's distribution is kept.
    """

    mode: Literal["cached", "online"] = Field("cached", description="online runs the teacher in every step")
    source: str | None = Field(
        None, min_length=1, description="folder of soft targets made elsewhere (`distilpeft targets import`)"
    )
    format: Literal["auto", "full", "top_k", "sampled"] = Field(
        "auto", description="causal_lm: full = all logits; top_k = the likeliest ids, the rest as one class; "
        "sampled = random ids, unbiased; auto chooses by size, and says why"
    )  # fmt: skip
    k: Annotated[int, Number, Field(gt=0, lt=2**16)] = Field(16, description="top_k: ids kept of each position")
    draws: Annotated[int, Number, Field(gt=0, lt=2**16)] = Field(
        50, description="sampled: draws per position; several of one id are kept as one"
    )
    temperatures: tuple[Positive, ...] | None = Field(
        None, min_length=1, description="causal_lm: temperatures the targets can be used at; default: distil's"
    )
    value_bits: Literal[8, 12, 16, 32] | None = Field(
        None, description="bits of a kept log-probability, 32 = float32; default: 32 for full, else 12"
    )
    precision: Precision = "auto"
    micro_batch_size: Count = Field(64, json_schema_extra=NOT_IN_KEY)

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        given = self.model_fields_set
        formats = {"k": ("auto", "top_k"), "draws": ("auto", "sampled")}
        for name in ("source", "format", "k", "draws", "temperatures", "value_bits"):
            if name in given and self.mode == "online":
                raise ValueError(f"{name} is for targets on disk, and would do nothing with mode: online")
            if name in given and name != "source" and self.source is not None:
                raise ValueError(f"{name} is written in the store that source names, and would do nothing here")
            if name in given and self.format not in formats.get(name, (self.format,)):
                raise ValueError(f"{name} is not for format {self.format}, and would do nothing here")
        if self.temperatures is not None and len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError("the temperatures must differ from each other")
        return self


class FromTeacher(Section):
    """Take the teacher's own layers, embeddings and head, its adapter merged: exactly one of these."""

    layers: tuple[Index, ...] | None = Field(None, min_length=1, description="indices of the layers to keep, from 0")
    first: Count | None = Field(None, description="so many, from the first on", json_schema_extra=IN_KEY_IF_GIVEN)
    last: Count | None = Field(None, description="so many, up to the last", json_schema_extra=IN_KEY_IF_GIVEN)
    spread: Count | None = Field(
        None, description="so many, evenly from the first to the last", json_schema_extra=IN_KEY_IF_GIVEN
    )
    decoder: Count | None = Field(
        None, description="seq2seq: so many of the decoder's, chosen likewise; default: as many as of the encoder's",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip

    ffn: Count | None = Field(
        None, description="units kept inside each feed-forward part: those with the largest weights; default: all",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(way is not None for way in (self.layers, self.first, self.last, self.spread)) != 1:
            raise ValueError("give exactly one of layers, first, last, spread")
        if self.decoder is not None and self.layers is not None:
            raise ValueError("decoder goes with first, last or spread")
        return self

    @field_validator("layers")
    @classmethod
    def _layers_rise(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and list(layers) != sorted(set(layers)):
            raise ValueError("the layer indices must rise, each once")
        return layers

    def of(self, depth: int, side: str = "encoder") -> tuple[int, ...]:
        """The indices, of a teacher of so many layers; `side` is `decoder` for those of a decoder beside an encoder.

        Raises:
            InputError: it has not so many.
        """
        if side == "decoder" and self.decoder is not None:
            way = "first" if self.first else "last" if self.last else "spread"
            return FromTeacher.model_validate({way: self.decoder}).of(depth)
        most = self.layers[-1] + 1 if self.layers else self.first or self.last or self.spread or 0
        if most > depth:
            key = "layers" if self.layers else "first" if self.first else "last" if self.last else "spread"
            what = f"layer {most - 1} does not exist" if self.layers else f"{most} are more than there are"
            raise InputError(f"student.from_teacher.{key}: {what}; the teacher has layers 0..{depth - 1}")
        if self.layers:
            return self.layers
        if self.spread:
            return spread(depth, self.spread)
        return tuple(range(self.first) if self.first else range(depth - (self.last or 0), depth))

    def __str__(self) -> str:
        """In words."""
        if self.layers:
            found = f"layers {', '.join(map(str, self.layers))}"
        elif self.spread:
            found = f"{self.spread} layers, spread evenly,"
        else:
            found = f"the first {self.first} layers" if self.first else f"the last {self.last} layers"
        return found if self.ffn is None else f"{found} with {self.ffn} feed-forward units"


def spread(depth: int, count: int) -> tuple[int, ...]:
    """`count` of so many layers, evenly, from the first to the last; of one, the first."""
    return tuple(round(at * (depth - 1) / (count - 1)) for at in range(count)) if count > 1 else (0,)


class FromConfig(Section):
    """Build the architecture of `model` with random weights."""

    model: str = Field(min_length=1)
    revision: str | None = None
    overrides: dict[str, int | float | str | bool] = Field({}, description="configuration values to change")


class Student(Section):
    """The compact model: exactly one of `model`, `from_teacher`, `from_config`."""

    model: str | None = Field(None, description="a pretrained model: hub id, local folder or package:NAME/path")
    revision: str | None = None
    from_teacher: FromTeacher | None = None
    from_config: FromConfig | None = None
    tokenizer: Literal["own", "teacher"] = Field(
        "own", description="causal_lm: take over the teacher's, with its special tokens and chat template"
    )
    lora: Lora | None = Field(None, description="null = train all weights")
    gradient_checkpointing: bool = Field(False, json_schema_extra=NOT_IN_KEY)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.model, self.from_teacher, self.from_config)) != 1:
            raise ValueError("give exactly one of model, from_teacher, from_config")
        return self
