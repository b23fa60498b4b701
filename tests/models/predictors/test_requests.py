"""Validation that every predictor shares."""

from __future__ import annotations

from typing import Any

import pytest

from models.errors import InvalidInput
from models.predictors.requests import LARGEST, Input, Number, parse


class Point(Input):
    x: Number
    tags: list[Number] = []


def test_valid_inputs_come_back_in_order() -> None:
    points = parse(Point, [{"x": 1}, {"x": -2.5, "tags": [0.0, LARGEST]}])
    assert points == [Point(x=1.0), Point(x=-2.5, tags=[0.0, LARGEST])]


@pytest.mark.parametrize(
    ("value", "param", "message"),
    [
        (None, "input", "must be an object with x, tags, not NoneType"),
        ([1.0], "input", "not list"),
        ({}, "x", "x: Field required"),
        ({"x": "1"}, "x", "valid number"),
        ({"x": True}, "x", "valid number"),
        ({"x": float("nan")}, "x", "finite number"),
        ({"x": float("-inf")}, "x", "finite number"),
        ({"x": 1e101}, "x", "less than or equal to"),
        ({"x": 10**400}, "x", "x: "),
        ({"x": 0, "tags": [1, None]}, "tags.1", "valid number"),
        ({"x": 0, "y": 1}, "y", "Extra inputs"),
    ],
)
def test_a_bad_input_is_named(value: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        parse(Point, [{"x": 1}, value, {}])
    assert caught.value.param == param
    assert caught.value.details == {"index": 1}
