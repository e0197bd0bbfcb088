"""Recipes: the one YAML file that describes a run, and the only source of settings.

Each class is one section, in the order in which the stages read them; `distilpeft schema` prints them as
JSON schema. Every value is checked here, before any weight is read; an unknown key is an error.
Fields marked `not in the key` cannot change a result, so changing them repeats no work.
This module imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from distilpeft.forms import FORMS, LIMITS, Exactness, FormName, Limits, form_name
from distilpeft.kinds import KINDS, Kind
from distilpeft.section import IN_KEY_IF_GIVEN, NOT_IN_KEY, Count, Fraction, Index, Number, Positive, Section
from distilpeft.task_sections import (
    CausalLM,
    Embedding,
    ImageClassification,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    Seq2Seq,
    TextClassification,
    TokenClassification,
)
from distilpeft.training_sections import Data, Fit, Optim, Precision, Student, Targets, Teacher

Parallel = Literal["ddp", "fsdp2"]
_Form = Annotated[FormName, BeforeValidator(form_name)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Divergence(Section):
    """What the student minimises against the teacher, at the temperature; sources in the docstrings of losses.py."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "logit_mse"] = (
        "forward_kl"
    )
    beta: Annotated[float, Number, Field(gt=0, lt=1)] = Field(
        0.5, description="only jsd: weight of the teacher in the mixture; for 0 or 1 use forward_kl or reverse_kl"
    )
    skew: Annotated[float, Number, Field(gt=0, lt=1)] = Field(
        0.1, description="only skew_kl and skew_reverse_kl: share of a side that is mixed into the other"
    )

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        for name, kinds in (("beta", ("jsd",)), ("skew", ("skew_kl", "skew_reverse_kl"))):
            if name in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"{name} is only for kind {' and '.join(kinds)}, and would do nothing here")
        return self


Layers = dict[Index, Index]


class HiddenStates(Section):
    """What layers of the student give, held against what layers of the teacher give, token by token."""

    weight: Positive = Field(1.0, description="of the mean over layers")
    loss: Literal["mse", "cosine"] = "mse"
    layers: Layers | None = Field(
        None, min_length=1, description="student's layer → teacher's, from 0; default: all, spread over the teacher's"
    )
    project: bool = Field(False, description="through a learned matrix even where both are as wide")


class Relations(Section):
    """How the tokens of a row are related in attention (MiniLMv2, arXiv:2012.15828)."""

    weight: Positive = Field(1.0, description="of the sum over `of`")
    of: tuple[Literal["query", "key", "value"], ...] = Field(("query", "key", "value"), min_length=1)
    heads: Count | None = Field(None, description="relation heads; default: the teacher's attention heads")
    layers: Layers | None = Field(
        None, min_length=1, description="student's layer → teacher's, from 0; default: the last of both"
    )


class Features(Section):
    """Terms beside the soft targets, from inside the running teacher; both models read the same tokens."""

    hidden: HiddenStates | None = None
    relations: Relations | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.hidden is None and self.relations is None:
            raise ValueError("give hidden, relations, or both")
        return self


class Distil(Section):
    """`alpha * T^2 * D(teacher, student) + (1 - alpha) * CE` (Hinton et al. 2015, arXiv:1503.02531)."""

    alpha: Fraction
    temperature: Positive
    divergence: Divergence = Divergence()
    label_smoothing: Annotated[float, Number, Field(ge=0, lt=1)] = Field(
        0.0, description="share of a label's weight that is spread evenly over all classes or tokens"
    )
    features: Features | None = Field(
        None, description="also learn hidden states or relations; needs targets.mode: online",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    optim: Optim
    fit: Fit
    ce_only_baseline: bool = Field(True, description="also train the same student without the teacher")


class Generate(Section):
    """How models write by themselves: the likeliest token each time, or the likeliest of several beams."""

    max_new_tokens: Count = Field(64, description="of a text at most")
    num_beams: Count = Field(1, description="1 = the likeliest token each time; graphs (ONNX) always write so")
    length_penalty: Annotated[float, Number] = Field(1.0, description="of beams; above 0 favours longer texts")
    no_repeat_ngram_size: Index = Field(0, description="runs of so many tokens are written once; 0 = no such rule")
    rows: Count = Field(500, description="so many, the first of the evaluated split, are written and scored")


class Evaluate(Section):
    """Which rows and metrics the models are judged by."""

    split: Literal["validation", "test"] = "test"
    metrics: tuple[str, ...] | None = Field(None, min_length=1, description="default: all; accuracy is always there")
    precision: Precision = "fp32"
    micro_batch_size: Count = Field(64, json_schema_extra=NOT_IN_KEY)
    teacher_full_precision: bool = Field(True, description="measure what quantizing the teacher costs")
    seeds: tuple[Index, ...] = Field(
        (), description="also train and judge everything with these seeds, to tell gain from luck",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    groups: str | None = Field(
        None, min_length=1, description="column of the data: every score also for each of its values, and what "
        "distilling adds to the gaps between them", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    group_margin: Fraction = Field(
        0.02, description="warn of a group that loses more to the teacher than all rows do, by more than this",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    samples: Index = Field(2, description="language models: rows that teacher and student complete in the report")
    sample_tokens: Count = Field(32, description="language models: longest such completion")
    generate: Generate = Field(
        Generate(), description="seq2seq: how models write what they are scored on, and exports are set to write",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("the seeds must differ from each other")
        return seeds


class Benchmark(Section):
    """Latency, throughput and memory of every model, in turns, for all combinations of what is listed here."""

    devices: tuple[Literal["auto", "cpu", "cuda"], ...] = Field(
        ("auto",), min_length=1, description="auto = as in training"
    )
    threads: tuple[Count, ...] | None = Field(None, min_length=1, description="default: one per processor")
    batch_sizes: tuple[Count, ...] = Field(
        (1, 32), min_length=1, description="latency is told of the smallest, throughput of the largest"
    )
    lengths: tuple[Literal["data"] | Count, ...] = Field(
        ("data",), min_length=1, description="data = rows as long as they are; a number = real tokens, cut to it"
    )
    rounds: Annotated[int, Number, Field(ge=3)] = Field(
        20, description="turns of every model at least; up to four times as many for the precision"
    )
    precision: Fraction | None = Field(
        0.1, description="more rounds while a ratio's 95 % interval is wider than this share of it; null = none"
    )
    new_tokens: Count = Field(16, description="causal_lm: tokens generated after each prompt, timed apart")
    compile: bool = Field(False, description="text_classification: also time the student under torch.compile")

    @field_validator("devices", "threads", "batch_sizes", "lengths")
    @classmethod
    def _differ(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError("the values must differ from each other")
        return values


class Tolerance(Section):
    """How far an export may be from the student on the gate's rows. What is not given has the form's own default."""

    max_abs_diff: Positive | None = Field(None, description="largest difference of a logit")
    kl: Positive | None = Field(None, description="mean KL(student ‖ export), nats per row or token")
    top1_agreement: Fraction | None = Field(None, description="least share of rows or tokens with the same top answer")
    metric_kept: Fraction | None = Field(
        None, description="least share of the student's accuracy; causal_lm: exp(− more nats per token)"
    )


class Export(Section):
    """Deployable files, and how closely each must match the student before it counts."""

    formats: tuple[_Form, ...] = Field(("safetensors",), min_length=1, description="the first is the run's `student`")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of safetensors")
    int8: Literal["auto", "dynamic", "per_channel", "mixed", "static"] = Field(
        "auto", description="how onnx-int8 is made; auto tries these in turn until one is within the tolerance"
    )
    calibration_rows: Count = Field(128, description="training rows that static int8 takes its ranges from")
    tolerance: dict[_Form, Tolerance] = Field({}, description="format → what it must hold, instead of its defaults")
    gate_rows: Count = Field(1024, description="validation rows compared with the student")
    license: str | None = Field(None, min_length=1, description="of the student, for its card; a hub id such as mit")

    @field_validator("formats")
    @classmethod
    def _formats_differ(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(formats)) < len(formats):
            raise ValueError("the formats must differ from each other")
        return formats


class Recipe(Section):
    """A whole run, section by section in the order in which the stages read them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="the run's folder is runs/NAME")
    seed: Index = 17
    deterministic: bool = Field(
        False, description="only operations that give the same bits each time on the same hardware and versions; "
        "slower on GPUs", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    devices: Literal["auto", "cpu"] | Count = Field(
        "auto", description="auto = all GPUs, a process each, or one process without any; cpu = one process without "
        "GPUs; a number = so many GPUs, or processes where there are none", json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    parallel: Parallel = Field(
        "ddp", description="weights in training: whole in each process, or in shards over all",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    task: (
        TextClassification
        | MultiLabelClassification
        | Regression
        | TokenClassification
        | QuestionAnswering
        | CausalLM
        | Seq2Seq
        | ImageClassification
        | Embedding
    ) = Field(discriminator="kind")
    data: Data
    teacher: Teacher
    targets: Targets = Targets()
    student: Student
    distil: Distil
    evaluate: Evaluate = Evaluate()
    benchmark: Benchmark = Benchmark()
    export: Export = Export()
    tracking: tuple[Tracker, ...] = Field(
        (), description="experiment trackers that see every training; each needs the extra of its name"
    )

    @field_validator("tracking")
    @classmethod
    def _trackers_differ(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("the trackers must differ from each other")
        return trackers

    @property
    def kind(self) -> Kind:
        """What is known of the task's kind."""
        return KINDS[self.task.kind]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What models are scored by."""
        own = self.kind.metrics
        always = (own[0], *(name for name in own if name == "accuracy"))
        return tuple(dict.fromkeys((*always, *(self.evaluate.metrics or self.kind.scored))))

    @property
    def reads_pairs(self) -> bool:
        """Whether a second text is read behind the first."""
        return isinstance(self.task, QuestionAnswering) or getattr(self.task, "pair", None) is not None

    @property
    def needs_template(self) -> bool:
        """Whether rows are rendered by the tokenizer's chat template."""
        return isinstance(self.task, CausalLM) and (self.task.chat or self.task.messages is not None)

    def exactness(self, form: str) -> Exactness:
        """How near an export stays to the student by nature; of safetensors, `export.dtype` decides."""
        rounded = form == "safetensors" and self.export.dtype != "fp32"
        return "half" if rounded else FORMS[form].exactness

    def limits(self, form: str) -> Limits:
        """What an export must hold: the recipe's own limits over the form's."""
        own = self.export.tolerance.get(form)  # type: ignore[call-overload]
        asked = {name: value for name, value in own if value is not None} if own else {}
        return replace(LIMITS[self.kind.family, self.exactness(form)], **asked)

    def monitor(self, fit: Fit) -> str:
        """The validation metric that picks the checkpoint."""
        return fit.monitor or self.kind.main


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold."""
    found = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type)]
    return [part for part in found if issubclass(part, BaseModel)]


def result_settings(section: BaseModel) -> dict[str, Any]:
    """The section as plain data without the fields that cannot change a result (for artifact keys)."""
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value = getattr(section, name)
        if extra.get("not_in_key") or (extra.get("in_key_if_given") and value == field.default):
            continue
        kept[name] = result_settings(value) if isinstance(value, BaseModel) else value
    return kept
