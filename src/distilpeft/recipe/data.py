"""The recipe's `data` section."""

from __future__ import annotations

import codecs
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from distilpeft.recipe.section import IN_KEY_IF_GIVEN, Count, Index, Positive, Section


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
        description="hub id, local file (csv, tsv, json, jsonl, parquet, txt; also compressed), folder or pattern such "
        "as part-*.csv, package:NAME/path, or {split: any of these}"
    )
    config: str | None = Field(None, description="configuration name of a hub data set")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    encoding: str | None = Field(
        None, description="encoding of text files, such as cp1251; default: found out (UTF-8, UTF-16, Windows-1252)",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    separator: str | None = Field(
        None, min_length=1, max_length=1, description="what separates the fields of csv files; default: found out",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    where: dict[str, bool | str | int | float] = Field(
        {}, description="keep only rows whose columns equal these values"
    )
    train: str | None = Field(None, description="slice such as train[:80%]; with validation and test")
    validation: str | None = None
    test: str | None = None
    split: Split | None = Field(None, description="seeded split, instead of train, validation and test")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="rows that cannot be used (no text, an unknown label, a token that a model has no "
        "embedding for) end the run, or are left out and counted", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    max_tokens: Count = Field(128, description="rows are cut to this many tokens; how many were cut is reported")

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str | None) -> str | None:
        try:
            return None if name is None else codecs.lookup(name).name
        except LookupError:
            raise ValueError(f"{name!r} is no encoding that Python knows") from None

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Self:
        named = [self.train, self.validation, self.test]
        if self.split is None and None in named:
            raise ValueError("give train, validation and test (slices), or split (a seeded split)")
        if self.split is not None and any(named):
            raise ValueError("give either train, validation and test (slices), or split, not both")
        return self
