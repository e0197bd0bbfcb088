"""The recipe's `student` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, create_model, field_validator, model_validator

from distilpeft.errors import InputError
from distilpeft.recipe.section import IN_KEY_IF_GIVEN, NOT_IN_KEY, Count, Index, Section
from distilpeft.recipe.training import Lora


def spread(depth: int, count: int) -> tuple[int, ...]:
    """`count` of `depth` layers, evenly spaced from the first to the last; of one, the first."""
    return tuple(round(at * (depth - 1) / (count - 1)) for at in range(count)) if count > 1 else (0,)


class FromTeacher(Section):
    """Take the teacher's own layers, embeddings and head, its adapter merged: exactly one of these."""

    layers: tuple[Index, ...] | None = Field(None, min_length=1, description="indices of the layers to keep, from 0")
    first: Count | None = Field(None, description="keep the first N layers", json_schema_extra=IN_KEY_IF_GIVEN)
    last: Count | None = Field(None, description="keep the last N layers", json_schema_extra=IN_KEY_IF_GIVEN)
    spread: Count | None = Field(
        None, description="keep N layers, evenly spaced from the first to the last", json_schema_extra=IN_KEY_IF_GIVEN
    )
    decoder: Count | None = Field(
        None, description="seq2seq: number of decoder layers, chosen the same way; default: as many as encoder layers",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    hidden: Count | None = Field(
        None, description="hidden units kept: those with the largest activations on training rows; default: all",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    heads: Count | None = Field(
        None, description="attention heads kept in each layer: those that add most to the hidden state on training "
        "rows; default: all, or as many as fit `hidden`",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    ffn: Count | None = Field(
        None, description="units kept inside each feed-forward part: those that add most to the hidden state on "
        "training rows; default: all",
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
            raise ValueError("layer indices must be strictly increasing")
        return layers

    def of(self, depth: int, side: str = "encoder") -> tuple[int, ...]:
        """The indices, for a teacher of `depth` layers; `side` is `decoder` for those of a decoder next to an encoder.

        Raises:
            InputError: it has fewer.
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
            words = f"layers {', '.join(map(str, self.layers))}"
        elif self.spread:
            words = f"{self.spread} layers, spread evenly,"
        else:
            words = f"the first {self.first} layers" if self.first else f"the last {self.last} layers"
        widths = {"hidden units": self.hidden, "heads": self.heads, "feed-forward units": self.ffn}
        given = [f"{width} {units}" for units, width in widths.items() if width is not None]
        return f"{words} with {', '.join(given)}" if given else words

    @property
    def is_narrower(self) -> bool:
        """Whether it keeps some units only."""
        return any(width is not None for width in (self.hidden, self.heads, self.ffn))


class FromConfig(Section):
    """Build the architecture of `model` with random weights."""

    model: str = Field(min_length=1)
    revision: str | None = None
    overrides: dict[str, int | float | str | bool] = Field({}, description="configuration values to change")


if TYPE_CHECKING:
    _From = Section
else:  # a key of this name cannot be written in a class
    _From = create_model(
        "_From",
        __base__=Section,
        **{"from": (Literal["data"], Field(description="data = the tokens of the rows that the student learns from"))},
    )


class Vocabulary(_From):
    """Cut tokenizer, embeddings and tied head to the tokens that the task needs."""

    min_count: Count = Field(
        1, description="drop tokens that occur less often; their text is read as smaller tokens. 1 = every text that "
        "was counted is encoded as before",
    )  # fmt: skip
    max_size: Count | None = Field(
        None, description="keep at most this many tokens: the least frequent are dropped first; default: no limit"
    )

    @property
    def is_exact(self) -> bool:
        """Whether every text that was counted is encoded as before."""
        return self.min_count == 1 and self.max_size is None


STATIC_TYPE = "distilpeft_static"
"""What configurations call the architecture of static students."""


class Static(Section):
    """A vector for each token, their weighted mean and a head: the teacher's word embeddings without its layers."""

    dim: Count | None = Field(
        None, description="units of a token's vector, to which PCA reduces the teacher's embeddings; default: all"
    )
    hidden: Count | None = Field(
        None, description="units of the head's hidden layer (ReLU); default: a linear head; embedding: no head"
    )
    weighting: Literal["learned", "sif"] = Field(
        "learned", description="each token has a learned weight, which begins at 1 (learned) or at a / (a + p) by its "
        "frequency p in the training rows (sif, smooth inverse frequency, a = 0.001)",
    )  # fmt: skip

    def __str__(self) -> str:
        """In words."""
        width = "" if self.dim is None else f", reduced to {self.dim} units"
        return f"a static model of the teacher's word embeddings{width}"


class Student(Section):
    """The compact model: exactly one of `model`, `from_teacher`, `from_config`, `static`."""

    model: str | None = Field(
        None, description="a pretrained model: hub id, local folder (also of a PEFT adapter) or package:NAME/path"
    )
    revision: str | None = None
    from_teacher: FromTeacher | None = None
    from_config: FromConfig | None = None
    static: Static | None = Field(
        None, description="a vector for each token instead of layers",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    tokenizer: Literal["own", "teacher"] = Field(
        "own", description="causal_lm: take over the teacher's, with its special tokens and chat template"
    )
    vocabulary: Vocabulary | None = Field(
        None, description="default: all of its tokenizer's", json_schema_extra=IN_KEY_IF_GIVEN
    )
    lora: Lora | None = Field(None, description="null = train all weights")
    gradient_checkpointing: bool = Field(False, json_schema_extra=NOT_IN_KEY)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = (self.model, self.from_teacher, self.from_config, self.static)
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give exactly one of model, from_teacher, from_config, static")
        if self.static is not None and self.lora is not None:
            raise ValueError("static students have no layers for an adapter: leave lora out")
        if self.static is not None and self.gradient_checkpointing:
            raise ValueError("static students have no layers: leave gradient_checkpointing out")
        return self

    @property
    def words(self) -> str:
        """How it begins, in words."""
        if self.from_config is not None:
            return f"configuration of {self.from_config.model}"
        return str(self.from_teacher or self.static or self.model)

    @property
    def is_of_teacher(self) -> bool:
        """Whether it is made of the tuned teacher's weights, and so reads as the teacher does."""
        return self.from_teacher is not None or self.static is not None
