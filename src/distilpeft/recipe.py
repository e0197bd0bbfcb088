"""Recipes: the one YAML file that describes a run, and the only source of settings.

Each class is one section, in the order in which the stages read them; `distilpeft schema` prints them as
JSON schema. Every value is checked here, before any weight is read; an unknown key is an error.
Fields marked `not in the key` cannot change a result, so changing them repeats no work.
This module imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


def _refuse_bool(value: Any) -> Any:
    """Pydantic reads `true` as 1; a recipe that says `lr: true` is a mistake."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


_Number = BeforeValidator(_refuse_bool)
Fraction = Annotated[float, _Number, Field(ge=0, le=1)]
Positive = Annotated[float, _Number, Field(gt=0)]
NotNegative = Annotated[float, _Number, Field(ge=0)]
Count = Annotated[int, _Number, Field(gt=0)]
Index = Annotated[int, _Number, Field(ge=0)]
Precision = Literal["auto", "bf16", "fp32"]
NOT_IN_KEY: dict[str, Any] = {"not_in_key": True}

METRICS = ("accuracy", "macro_f1", "mcc", "ece", "log_loss")
"""Metrics that work without a hub; any other is a hub id written as `hub:NAME`."""
LOWER_IS_BETTER = frozenset({"ece", "log_loss"})


class Section(BaseModel):
    """Base of every recipe section: immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextClassification(Section):
    """Single-label text classification."""

    kind: Literal["text_classification"]
    text: str = Field(min_length=1, description="column with the text")
    label: str = Field(min_length=1, description="column with the class: its name, or its index in `labels`")
    labels: tuple[str, ...] = Field(min_length=2, description="class names; the position is the class id")

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) < len(labels):
            raise ValueError("the class names must differ from each other")
        return labels


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
    schedule: Literal["linear", "cosine", "constant", "reduce_on_plateau"] = "linear"
    warmup_ratio: Fraction = Field(0.06, description="share of all steps in which lr rises from 0")
    plateau_factor: Annotated[float, _Number, Field(gt=0, lt=1)] = 0.5
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
    precision: Precision = Field("auto", description="auto = bf16 where the device has it, else fp32")
    validate_every: Count | None = Field(None, description="optimizer steps; default: after every epoch")
    monitor: str = Field("accuracy", description="validation metric that picks the checkpoint")
    keep: Literal["best", "last"] = Field("best", description="which weights the stage returns")
    early_stopping_patience: Count | None = Field(None, description="validations without improvement")
    save_every: Count = Field(200, description="steps between checkpoints", json_schema_extra=NOT_IN_KEY)

    @field_validator("monitor")
    @classmethod
    def _known_monitor(cls, monitor: str) -> str:
        if monitor not in METRICS:
            raise ValueError(f"one of {', '.join(METRICS)}")
        return monitor


class Teacher(Section):
    """The base model, how it is quantized, and the adapter tuned on top of it."""

    model: str = Field(min_length=1, description="hub id, local folder or package:NAME/path")
    revision: str | None = None
    quantize: Literal["nf4", "int8", "none"] = "nf4"
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of weights that are not quantized")
    lora: Lora | None = Field(Lora(), description="null = tune all weights (only with quantize: none)")
    gradient_checkpointing: bool = Field(False, json_schema_extra=NOT_IN_KEY)
    optim: Optim
    fit: Fit
    gate: Literal["stop", "warn"] = Field("stop", description="when the tuned teacher is no better than chance")

    @model_validator(mode="after")
    def _quantized_weights_need_lora(self) -> Self:
        if self.lora is None and self.quantize != "none":
            raise ValueError("lora: null tunes all weights, which needs quantize: none")
        if self.lora is None and self.dtype == "fp16":
            raise ValueError("dtype fp16 weights cannot be tuned; use fp32 or bf16, or lora")
        return self


class Targets(Section):
    """The teacher's soft targets: computed once and kept, or computed in every step."""

    mode: Literal["cached", "online"] = "cached"
    precision: Precision = "auto"
    micro_batch_size: Count = Field(64, json_schema_extra=NOT_IN_KEY)


class FromTeacher(Section):
    """Take the teacher's own layers, embeddings and head, its adapter merged."""

    layers: tuple[Index, ...] = Field(min_length=1, description="indices of the layers to keep, from 0")

    @field_validator("layers")
    @classmethod
    def _layers_rise(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if list(layers) != sorted(set(layers)):
            raise ValueError("the layer indices must rise, each once")
        return layers


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
    lora: Lora | None = Field(None, description="null = train all weights")
    gradient_checkpointing: bool = Field(False, json_schema_extra=NOT_IN_KEY)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum(origin is not None for origin in (self.model, self.from_teacher, self.from_config)) != 1:
            raise ValueError("give exactly one of model, from_teacher, from_config")
        return self


class Distil(Section):
    """`alpha * T^2 * KL(teacher || student) + (1 - alpha) * CE` (Hinton et al. 2015, arXiv:1503.02531)."""

    alpha: Fraction
    temperature: Positive
    optim: Optim
    fit: Fit
    ce_only_baseline: bool = Field(True, description="also train the same student without the teacher")


class Evaluate(Section):
    """Which rows and metrics the models are judged by."""

    split: Literal["validation", "test"] = "test"
    metrics: tuple[str, ...] = Field(METRICS, min_length=1, description="accuracy is always included")
    precision: Precision = "fp32"
    micro_batch_size: Count = Field(64, json_schema_extra=NOT_IN_KEY)
    teacher_full_precision: bool = Field(True, description="measure what quantizing the teacher costs")

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for name in metrics:
            if name not in METRICS and not name.startswith("hub:"):
                raise ValueError(f"{name!r} is none of {', '.join(METRICS)}; a hub metric is written hub:NAME")
        return tuple(dict.fromkeys(("accuracy", *metrics)))


class Benchmark(Section):
    """Latency at batch 1 and throughput at `batch_size`, on rows of the evaluation split."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: Count = 32
    warmup: Count = 5
    repeats: Count = 50


class Export(Section):
    """Deployable files, and how closely each must match the student."""

    formats: tuple[Literal["safetensors"], ...] = Field(("safetensors",), min_length=1)
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_abs_diff: Positive = Field(1e-4, description="largest allowed difference of a logit")
    gate_rows: Count = Field(256, description="rows compared with the student before an export counts")


class Recipe(Section):
    """A whole run, section by section in the order in which the stages read them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="the run's folder is runs/NAME")
    seed: Index = 17
    task: TextClassification
    data: Data
    teacher: Teacher
    targets: Targets = Targets()
    student: Student
    distil: Distil
    evaluate: Evaluate = Evaluate()
    benchmark: Benchmark = Benchmark()
    export: Export = Export()


def result_settings(section: BaseModel) -> dict[str, Any]:
    """The section as plain data without the fields that cannot change a result (for artifact keys)."""
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("not_in_key"):
            continue
        value = getattr(section, name)
        kept[name] = result_settings(value) if isinstance(value, BaseModel) else value
    return kept
