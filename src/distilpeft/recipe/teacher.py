"""The recipe's `teacher` and `targets` sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from distilpeft.recipe.section import (
    IN_KEY_IF_GIVEN,
    NOT_IN_KEY,
    Count,
    Index,
    Number,
    Positive,
    Section,
    refuse_repeats,
)
from distilpeft.recipe.training import Fit, Lora, Optim, Precision

YES_NO = ("yes", "no")
"""The answers to each of several classes."""


class Teacher(Section):
    """The base model, how it is quantized, and the adapter tuned on top of it."""

    model: str = Field(min_length=1, description="hub id, local folder (also of a PEFT adapter) or package:NAME/path")
    revision: str | None = None
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model; read it first", json_schema_extra=NOT_IN_KEY
    )
    quantize: Literal["nf4", "int8", "none"] = Field(
        "nf4", description="left out, weights that were saved quantized are used unchanged"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of weights that are not quantized")
    lora: Lora | None = Field(
        Lora(), description="null = tune all weights (only with quantize: none); left out, an adapter keeps its own"
    )
    gradient_checkpointing: bool = Field(False, json_schema_extra=NOT_IN_KEY)
    place: Literal["replicated", "sharded", "offloaded"] = Field(
        "replicated", description="where the tuned teacher is while it gives soft targets: replicated in each process, "
        "its layers sharded over all processes, or its layers offloaded to main memory until each is used",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    optim: Optim | None = Field(None, description="needed unless fit is null")
    fit: Fit | None = Field(
        description="null = the teacher is used unchanged, head and all; its classes are matched to task.labels by name"
    )
    gate: Literal["stop", "warn"] = Field("stop", description="when the tuned teacher is no better than chance")
    prompt: str | None = Field(
        None, min_length=1, description="ask a language model: a text with the places {text} and, of pairs, {pair}; of "
        "several classes also {label}; the answer comes behind it", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    answers: dict[str, str] | None = Field(
        None, description="class → what the model writes for it; default: a space and the class's name. Of several "
        "classes `yes` and `no`; of numbers each that it may answer",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    shots: Index = Field(
        0, description="training rows with their answers before every prompt: drawn by the seed, of each class in turn",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    calibrate: bool = Field(
        False, description="divide each answer's probability by the one that it has where the text says nothing",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    per_token: bool = Field(
        False, description="score an answer by the mean over its tokens instead of their sum",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    chat: bool = Field(
        False, description="put the prompt into the model's chat template, as what a user says",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip

    @model_validator(mode="after")
    def _quantized_weights_need_lora(self) -> Self:
        if self.fit is None:
            for name in ("optim", "lora", "gradient_checkpointing"):
                if name in self.model_fields_set and getattr(self, name):
                    raise ValueError(f"fit: null uses the teacher without tuning; {name} would do nothing")
            return self._placed()
        if self.optim is None:
            raise ValueError("give optim, or fit: null for a teacher that is used without tuning")
        if self.lora is None and self.quantize != "none":
            raise ValueError("lora: null tunes all weights, which needs quantize: none")
        if self.lora is None and self.dtype == "fp16":
            raise ValueError("dtype fp16 weights cannot be tuned; use fp32 or bf16, or lora")
        return self._placed()

    @model_validator(mode="after")
    def _prompts_are_whole(self) -> Self:
        if self.prompt is None:
            for name in ("answers", "shots", "calibrate", "per_token", "chat"):
                if name in self.model_fields_set:
                    raise ValueError(f"{name} is for a language model that is asked by teacher.prompt")
            return self
        if "{text}" not in self.prompt:
            raise ValueError("prompt needs the place {text}, where a row's text goes")
        if self.prompt != self.prompt.rstrip() and not self.chat:
            raise ValueError("prompt ends with a space or a line break; let the answers begin with it")
        if self.calibrate and self.fit is not None:
            raise ValueError("calibrate is for a teacher that is used without tuning (fit: null); tuning learns it")
        return self

    @field_validator("answers", mode="before")
    @classmethod
    def _names_may_be_numbers(cls, answers: Any) -> Any:
        """Names as text: YAML takes numbers, and yes and no, for what they are."""
        if not isinstance(answers, dict):
            return answers
        spelled = dict(zip((True, False), YES_NO, strict=True))
        return {
            spelled[name] if isinstance(name, bool) else str(name) if isinstance(name, int | float) else name: answer
            for name, answer in answers.items()
        }

    @field_validator("answers")
    @classmethod
    def _can_be_told_apart(cls, answers: dict[str, str] | None) -> dict[str, str] | None:
        if answers is not None:
            if any(not answer.strip() for answer in answers.values()):
                raise ValueError("an answer is empty")
            refuse_repeats("answers", tuple(answers.values()))
        return answers

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
        refuse_repeats("temperatures", self.temperatures)
        return self
