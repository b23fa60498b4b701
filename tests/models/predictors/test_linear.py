"""The linear model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError, InvalidInput
from models.predictors import linear


@pytest.fixture
def predictor(tmp_path: Path) -> linear.LinearPredictor:
    linear.save(tmp_path, intercept=1.0, weights={"a": 2.0, "b": -3.0})
    return linear.load(tmp_path)


def test_a_weighted_sum(predictor: linear.LinearPredictor) -> None:
    assert predictor.predict_batch([{"a": 1, "b": 0}, {"b": 1.5, "a": 2}]) == [
        {"value": 3.0},
        {"value": 0.5},
    ]


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (None, "input"),
        ([1, 2], "input"),
        ({"a": 1}, "b"),
        ({"a": 1, "b": 2, "c": 3}, "c"),
        ({"a": "1", "b": 2}, "a"),
        ({"a": True, "b": 2}, "a"),
        ({"a": float("nan"), "b": 2}, "a"),
        ({"a": 1e300, "b": 2}, "a"),
    ],
)
def test_what_is_refused(bad: Any, param: str, predictor: linear.LinearPredictor) -> None:
    with pytest.raises(InvalidInput) as told:
        predictor.predict_batch([{"a": 1, "b": 0}, bad])
    assert (told.value.details, told.value.param) == ({"index": 1}, param)


@pytest.mark.parametrize("text", ["", "[]", '{"intercept": 1}', '{"intercept": 1, "weights": 2}'])
def test_a_file_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / linear.FILE).write_text(text)
    with pytest.raises(ConfigError, match="cannot be used"):
        linear.load(tmp_path)
