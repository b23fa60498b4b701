"""``POST /v1/models/{model}/predict``: whatever a trained artifact takes and gives."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field

from deployments.gateway.schemas.base import Answer, PriorityName, Strict
from models.contracts import Json, Priority
from models.errors import InvalidInput

INT64 = range(-(2**63), 2**64)
"""Whole numbers that survive the way to a model and back."""


def _finite(value: Any) -> Any:
    """JSON as models may rely on it. Python's parser takes NaN, and integers of any length."""
    if isinstance(value, list):
        for item in value:
            _finite(item)
    elif isinstance(value, dict):
        for item in value.values():
            _finite(item)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("should hold finite numbers only")
    elif isinstance(value, int) and value not in INT64:
        raise ValueError("should hold whole numbers of 64 bits at most")
    return value


PredictInput: TypeAlias = Annotated[Any, AfterValidator(_finite)]


class PredictRequest(Strict):
    inputs: list[PredictInput] = Field(
        min_length=1,
        max_length=4096,
        description="What the model takes, each in its own form; predicted together.",
    )
    params: dict[str, PredictInput] | None = Field(
        default=None,
        description="Fields that all inputs share, where an input is an object; its own win.",
    )
    priority: PriorityName = Priority.STANDARD

    @property
    def rows(self) -> list[Json]:
        """The inputs, each with the shared fields.

        Raises:
            InvalidInput: there are shared fields, and an input that is no object.
        """
        if not self.params:
            return self.inputs
        rows: list[Json] = []
        for index, value in enumerate(self.inputs):
            if not isinstance(value, dict):
                raise InvalidInput(
                    f"params are fields that the inputs share, but input {index} is no object;"
                    " leave params out.",
                    param="params",
                    details={"index": index},
                )
            rows.append({**self.params, **value})
        return rows


class PredictData(Answer):
    predictions: list[Any] = Field(description="One for each input, in order.")
    model: str
    version: str | None = Field(
        description="NAME@VERSION in the registry; null of a model that is not from there."
    )
