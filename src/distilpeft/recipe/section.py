"""What every section of a recipe is made of; see `recipe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def refuse_bool(value: Any) -> Any:
    """Pydantic reads `true` as 1; a recipe that says `lr: true` is a mistake."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def refuse_repeats(what: str, values: Sequence[Any] | None) -> None:
    """Refuse a list that holds a value twice; `what` names the values in the message."""
    if values is not None and len(set(values)) < len(values):
        raise ValueError(f"the {what} must differ from each other")


def distinct(what: str) -> AfterValidator:
    """Annotates a list whose values must differ from each other."""

    def check(values: Any) -> Any:
        refuse_repeats(what, values)
        return values

    return AfterValidator(check)


Number = BeforeValidator(refuse_bool)
Fraction = Annotated[float, Number, Field(ge=0, le=1)]
Positive = Annotated[float, Number, Field(gt=0)]
NotNegative = Annotated[float, Number, Field(ge=0)]
Count = Annotated[int, Number, Field(gt=0)]
Index = Annotated[int, Number, Field(ge=0)]
NOT_IN_KEY: dict[str, Any] = {"not_in_key": True}
IN_KEY_IF_GIVEN: dict[str, Any] = {"in_key_if_given": True}
"""Of keys that came later: what was made before them stays what it is."""


class Section(BaseModel):
    """Base of every recipe section: immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
