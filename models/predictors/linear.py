"""A weighted sum of named numbers: {value}. For whatever ends as one: ridge, lasso, a score.

::

    linear.json   {"intercept": 152.1, "weights": {"bmi": 24.9, …}}
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.contracts import Json
from models.errors import ConfigError
from models.predictors.requests import LARGEST, refuse

FILE = "linear.json"


def save(folder: Path, *, intercept: float, weights: Mapping[str, float]) -> None:
    """Write what ``load`` reads."""
    text = json.dumps({"intercept": intercept, "weights": dict(weights)}, allow_nan=False)
    (folder / FILE).write_text(text + "\n")


def load(folder: Path) -> LinearPredictor:
    """Raises ConfigError: the file cannot be used."""
    try:
        given: dict[str, Any] = json.loads((folder / FILE).read_text())
        weights = {str(name): float(weight) for name, weight in given["weights"].items()}
        return LinearPredictor(float(given["intercept"]), weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: {FILE} cannot be used ({error})") from None


class LinearPredictor:
    """Inputs are objects with a number for each name, and nothing else."""

    def __init__(self, intercept: float, weights: Mapping[str, float]) -> None:
        self._intercept = intercept
        self._weights = weights

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        """See :class:`models.contracts.Predictor`."""
        rows = [self._numbers(value, index) for index, value in enumerate(inputs)]
        weights = list(self._weights.values())
        return [
            {"value": self._intercept + math.fsum(map(operator.mul, weights, row))} for row in rows
        ]

    def _numbers(self, value: Json, index: int) -> list[float]:
        """In the order of the weights."""
        if not isinstance(value, dict):
            known = ", ".join(self._weights)
            got = type(value).__name__
            raise refuse(index, "input", f"The input must be an object with {known}, not {got}.")
        for name in value.keys() - self._weights.keys():
            raise refuse(index, name, f"{name}: unknown; expected {', '.join(self._weights)}.")
        numbers: list[float] = []
        for name in self._weights:
            number = value.get(name)
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not abs(number) <= LARGEST
            ):
                raise refuse(index, name, f"{name}: expected a number, not {number!r:.40}.")
            numbers.append(float(number))
        return numbers
