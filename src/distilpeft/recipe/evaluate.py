"""The recipe's `evaluate` and `benchmark` sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distilpeft.recipe.section import IN_KEY_IF_GIVEN, NOT_IN_KEY, Count, Fraction, Index, Number, Section, distinct
from distilpeft.recipe.training import Precision


class Generate(Section):
    """How models write by themselves: the likeliest token each time, or the likeliest of several beams."""

    max_new_tokens: Count = Field(64, description="of a text at most")
    num_beams: Count = Field(1, description="1 = the likeliest token each time; graphs (ONNX) always write so")
    length_penalty: Annotated[float, Number] = Field(1.0, description="of beams; above 0 favours longer texts")
    no_repeat_ngram_size: Index = Field(0, description="n-grams of this length are not repeated; 0 = off")
    rows: Count = Field(500, description="the first rows of the evaluated split, this many, are written and scored")


class Evaluate(Section):
    """Which rows and metrics the models are judged by."""

    split: Literal["validation", "test"] = "test"
    metrics: tuple[str, ...] | None = Field(None, min_length=1, description="default: all; accuracy is always there")
    precision: Precision = "fp32"
    micro_batch_size: Count = Field(64, json_schema_extra=NOT_IN_KEY)
    teacher_full_precision: bool = Field(True, description="measure what quantizing the teacher costs")
    seeds: Annotated[tuple[Index, ...], distinct("seeds")] = Field(
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


_DISTINCT = distinct("values")


class Benchmark(Section):
    """Latency, throughput and memory of every model, in turns, for all combinations of what is listed here."""

    devices: Annotated[tuple[Literal["auto", "cpu", "cuda"], ...], _DISTINCT] = Field(
        ("auto",), min_length=1, description="auto = as in training"
    )
    threads: Annotated[tuple[Count, ...] | None, _DISTINCT] = Field(
        None, min_length=1, description="default: one per processor"
    )
    batch_sizes: Annotated[tuple[Count, ...], _DISTINCT] = Field(
        (1, 32), min_length=1, description="latency is reported for the smallest, throughput for the largest"
    )
    lengths: Annotated[tuple[Literal["data"] | Count, ...], _DISTINCT] = Field(
        ("data",),
        min_length=1,
        description="data = rows of their own length; a number = real text, cut to this many tokens",
    )
    rounds: Annotated[int, Number, Field(ge=3)] = Field(
        20, description="turns of every model at least; up to four times as many for the precision"
    )
    precision: Fraction | None = Field(
        0.1, description="more rounds while a ratio's 95 % interval is wider than this share of it; null = none"
    )
    new_tokens: Count = Field(16, description="causal_lm: tokens generated after each prompt, timed apart")
    compile: bool = Field(False, description="text_classification: also time the student under torch.compile")
