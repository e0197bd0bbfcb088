"""The recipe's `data` section."""

from __future__ import annotations

import codecs
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from distilpeft.recipe.section import IN_KEY_IF_GIVEN, NOT_IN_KEY, Count, Fraction, Index, Positive, Section


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


class RowSource(Section):
    """Where rows come from, and how their files are read."""

    at: ClassVar[str]
    source: str | dict[str, str]
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

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str | None) -> str | None:
        try:
            return None if name is None else codecs.lookup(name).name
        except LookupError:
            raise ValueError(f"{name!r} is not an encoding that Python knows") from None


UNLABELLED_KEYS = ("labelled", "unlabelled", "on_empty_label", "views")
"""Keys of `data` that may give rows without labels."""
SOURCE = (
    "hub id, local file (csv, tsv, json, jsonl, parquet, txt; also compressed), folder or pattern such as part-*.csv, "
    "package:NAME/path"
)


class Unlabelled(RowSource):
    """Rows without labels, which the teacher labels for the student; no score and no label ever counts them."""

    at: ClassVar[str] = "data.unlabelled"
    source: str = Field(description=SOURCE)
    rows: str | None = Field(None, description="slice such as unsupervised[:5000]; default: all rows of the source")
    columns: dict[str, str] = Field(
        {}, description="column of each key of `task` that says what is read, such as {text: body}; default: as in "
        "data.source"
    )  # fmt: skip
    max_rows: Count | None = Field(
        None, description="use a random sample of at most this many rows; the same in every run"
    )


class Views(Section):
    """Changed copies of the rows that the student learns from, for the teacher to label (arXiv:1903.12136).

    For pictures give `copies` alone; `task.augment` says how they vary.
    """

    copies: Count = Field(4, description="views of each row")
    mask: Fraction = Field(0.1, description="share of words replaced by the model's mask token, or its unknown token")
    replace: Fraction = Field(0.1, description="share of words replaced by random words of other rows")
    crop: Fraction = Field(0.25, description="share of views that keep only a part of the text, at least half of it")
    splice: Fraction = Field(0.25, description="share of views that end like another row")

    @model_validator(mode="after")
    def _changes(self) -> Self:
        if self.mask + self.replace > 1:
            raise ValueError("mask + replace must not be more than 1")
        if not (self.mask or self.replace or self.crop or self.splice):
            raise ValueError("these views would all equal their rows: mask, replace, crop and splice are 0")
        return self


class Data(RowSource):
    """Where the rows come from and which of them train, validate and test."""

    at: ClassVar[str] = "data"
    source: str | dict[str, str] = Field(description=f"{SOURCE}, or {{split: any of these}}")
    train: str | None = Field(None, description="slice such as train[:80%]; with validation and test")
    validation: str | None = None
    test: str | None = None
    split: Split | None = Field(None, description="seeded split, instead of train, validation and test")
    labelled: Count | None = Field(
        None, description="keep the labels of this many training rows, stratified by class, and use the others as rows "
        "without labels; for label-budget studies", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    unlabelled: Unlabelled | None = Field(
        None, description="more rows for the student, without labels", json_schema_extra=NOT_IN_KEY
    )
    views: Views | None = Field(
        None, description="changed copies of all rows that the student learns from, as rows without labels; for where "
        "there is no other text", json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    on_empty_label: Literal["error", "unlabelled"] = Field(
        "error", description="training rows whose label is empty are bad rows, or rows without labels",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="rows that cannot be used (no text, an unknown label, a token that a model has no "
        "embedding for) end the run, or are left out and counted", json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    max_tokens: Count = Field(128, description="rows are cut to this many tokens; how many were cut is reported")

    def gives_unlabelled(self, key: str) -> bool:
        """Whether this key, as it is set, makes rows without labels."""
        return getattr(self, key) not in (None, "error")

    @property
    def may_have_unlabelled(self) -> bool:
        """Whether some rows that the student learns from may have no label."""
        return any(map(self.gives_unlabelled, UNLABELLED_KEYS))

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Self:
        named = [self.train, self.validation, self.test]
        if self.split is None and None in named:
            raise ValueError("give train, validation and test (slices), or split (a seeded split)")
        if self.split is not None and any(named):
            raise ValueError("give either train, validation and test (slices), or split, not both")
        return self
