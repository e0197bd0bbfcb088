"""The recipe's `distil` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, create_model, model_validator

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
    distinct,
)
from distilpeft.recipe.training import Fit, Optim

Control = Literal["ce_only_long", "hard_labels", "labelled_rows"]


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
    """What layers of the student give, compared with what layers of the teacher give, token by token."""

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
    """Terms besides the soft targets, from inside the running teacher; both models read the same tokens."""

    hidden: HiddenStates | None = None
    relations: Relations | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.hidden is None and self.relations is None:
            raise ValueError("give hidden, relations, or both")
        return self


Rounded = Literal["onnx-int8", "onnx-int4", "gguf-q8_0", "gguf-q5_1", "gguf-q5_0", "gguf-q4_1", "gguf-q4_0"]

if TYPE_CHECKING:
    _For = Section
else:  # a key of this name cannot be written in a class
    _For = create_model("_For", __base__=Section, **{"for": (Rounded, Field(description="the export"))})


class Quantization(_For):
    """Train the student with the rounding of an export in its forward pass (arXiv:1712.05877, section 3)."""

    share: Annotated[float, Number, Field(gt=0, le=1)] = Field(
        0.3, description="of the steps, the last ones: those that are trained with it. All validations have it"
    )

    @property
    def form(self) -> str:
        """The export's form."""
        return str(getattr(self, "for"))


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
    quantization: Quantization | None = Field(
        None, description="train for the rounding of an export", json_schema_extra=IN_KEY_IF_GIVEN
    )
    unlabelled_weight: NotNegative = Field(
        1.0, description="weight of the divergence on rows without a label; that on the others is 1",
        json_schema_extra=IN_KEY_IF_GIVEN,
    )  # fmt: skip
    optim: Optim
    fit: Fit
    gate: Literal["warn", "stop"] = Field(
        "warn", description="what happens before the student is trained if on validation rows the teacher is not ahead "
        "of the student that was trained on labels alone", json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    ce_only_baseline: bool = Field(
        True, description="also train the same student without the teacher", json_schema_extra=NOT_IN_KEY
    )
    ce_only_epochs: Count | None = Field(
        None, description="epochs of that student; default: those of fit. Of few labels it needs more than the student "
        "needs of all rows", json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    controls: Annotated[tuple[Control, ...], distinct("controls")] | None = Field(
        None, description="students to compare with where rows have no labels: ce_only_long (labels alone, for as many "
        "steps), hard_labels (the same rows, but of the teacher only its likeliest class), labelled_rows (the teacher, "
        "but on rows with labels only, for as many steps); default: the first two", json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip

    @property
    def ce_only_fit(self) -> Fit:
        """How the student on labels alone is trained."""
        return self.fit if self.ce_only_epochs is None else self.fit.model_copy(update={"epochs": self.ce_only_epochs})


def format_fault(form: str, distil: Distil) -> str | None:
    """Why a form of soft targets cannot serve a loss."""
    kind = distil.divergence.kind
    if form == "sampled" and kind != "forward_kl":
        return f"sampled targets estimate forward_kl and nothing else; {kind} needs top_k or full"
    if form == "top_k" and kind == "logit_mse":
        return "logit_mse compares single logits, but top_k keeps the tail as one class; take full or mode: online"
    return None
