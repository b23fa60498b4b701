"""Inputs of a predictor: validated all at once, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.contracts import Json
from models.errors import InvalidInput

M = TypeVar("M", bound="Input")

LARGEST = 1e100
"""Squares and sums of numbers up to this stay finite."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
"""A finite JSON number; never a boolean or a string."""


class Input(BaseModel):
    """One input of a predictor. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parse(model: type[M], inputs: Sequence[Json]) -> list[M]:
    """Validate a batch.

    Raises:
        InvalidInput: naming the first input at fault (``details["index"]``) and its field.
    """
    return [_parse_one(model, value, index) for index, value in enumerate(inputs)]


def refuse(index: int, param: str, problem: str) -> InvalidInput:
    """The error for the input at ``index``; ``problem`` is a sentence for the client."""
    return InvalidInput(problem, param=param, details={"index": index})


def _parse_one(model: type[M], value: Json, index: int) -> M:
    if not isinstance(value, dict):
        known = ", ".join(model.model_fields)
        got = type(value).__name__
        raise refuse(index, "input", f"The input must be an object with {known}, not {got}.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"])) or "input"
    raise refuse(index, field, f"{field}: {first['msg']}.")
