"""The anomaly predictor: forests that are checked before they are followed, answers, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import ConfigError, InvalidInput
from models.predictors.anomaly import (
    AUTOENCODER,
    FILE,
    FOREST,
    Distance,
    Fence,
    Forest,
    MethodSettings,
    Settings,
    autoencoder_network,
    load,
)

STUMP = Forest(
    left=np.array([[1, 1, 2]], dtype=np.int32),
    right=np.array([[2, 1, 2]], dtype=np.int32),
    feature=np.array([[1, 0, 0]], dtype=np.int32),
    threshold=np.array([[0.5, 0.0, 0.0]]),
    length=np.array([[0.0, 1.0, 3.0]]),
    depth=1,
    typical=2.0,
)
"""Two features, one split: at most 0.5 in the second one is unusual."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    arrays = {"center": (1.0, 2.0), "spread": (1.0, 0.5)}
    settings = Settings(
        features=("width", "height"),
        default="forest",
        methods={
            "forest": MethodSettings(threshold=0.6),
            "zscore": MethodSettings(threshold=3.0, arrays=arrays),
            "grubbs": MethodSettings(threshold=4.0, arrays=arrays),
            "iqr": MethodSettings(threshold=1.5, arrays={"low": (0, 0), "high": (1, 2)}),
            "autoencoder": MethodSettings(threshold=1.0, arrays=arrays),
        },
        autoencoder=(2, 3, 1, 3, 2),
    )
    (tmp_path / FILE).write_text(settings.model_dump_json())
    STUMP.write(tmp_path / FOREST)
    save_file(autoencoder_network(settings.autoencoder).state_dict(), tmp_path / AUTOENCODER)
    return tmp_path


def test_answers(folder: Path) -> None:
    detector = load(folder)
    answers = detector.predict_batch(
        [
            {"features": [9, 0.5]},
            {"features": [9, 0.6]},
            {"features": [5.0, 2.0], "method": "zscore"},
            {"features": [5.0, 2.0], "method": "grubbs"},
            {"features": [3, -4], "method": "iqr"},
        ]
    )
    assert answers == [
        {"score": 2**-0.5, "anomaly": True, "threshold": 0.6, "method": "forest"},
        {"score": 2**-1.5, "anomaly": False, "threshold": 0.6, "method": "forest"},
        {"score": 4.0, "anomaly": True, "threshold": 3.0, "method": "zscore"},
        {"score": 4.0, "anomaly": False, "threshold": 4.0, "method": "grubbs"},
        {"score": 2.0, "anomaly": True, "threshold": 1.5, "method": "iqr"},
    ]


def test_an_answer_does_not_depend_on_the_batch(folder: Path) -> None:
    detector = load(folder)
    random = np.random.default_rng(0)
    methods = ("forest", "autoencoder", "zscore", "grubbs", "iqr")
    requests: list[Any] = [
        {"features": random.normal(size=2).tolist(), "method": methods[number % 5]}
        for number in range(40)
    ]
    together: list[Any] = list(detector.predict_batch(requests))
    for request, answer in zip(requests, together, strict=True):
        (alone,) = detector.predict_batch([request])
        found: Any = alone
        assert found["method"] == answer["method"] == request["method"]
        assert found["score"] == pytest.approx(answer["score"], rel=1e-12)
    assert detector.predict_batch([]) == []


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (7, "input", "must be an object"),
        ({}, "features", "required"),
        ({"features": [1]}, "features", "takes 2: width, height"),
        ({"features": [1, 2, 3]}, "features", "has 3 numbers"),
        ({"features": [1, "2"]}, "features.1", "valid number"),
        ({"features": [1, False]}, "features.1", "valid number"),
        ({"features": [1, float("nan")]}, "features.1", "finite"),
        ({"features": [1, 1e31]}, "features.1", "less than"),
        ({"features": [1, 2], "method": "svm"}, "method", "knows forest, zscore"),
        ({"features": [1, 2], "threshold": 1}, "threshold", "Extra"),
    ],
)
def test_a_bad_input_is_refused_by_name(
    folder: Path, request_: Any, param: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        load(folder).predict_batch([{"features": [1, 2]}, request_])
    assert caught.value.param == param
    assert caught.value.details["index"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"left": np.array([[1, 1, 3]], dtype=np.int32)},
        {"left": np.array([[-1, 1, 2]], dtype=np.int32)},
        {"right": np.array([[2, 0, 2]], dtype=np.int32)},
        {"feature": np.array([[2, 0, 0]], dtype=np.int32)},
        {"feature": np.array([[-1, 0, 0]], dtype=np.int32)},
        {"threshold": np.array([[np.nan, 0, 0]])},
        {"length": np.array([[np.inf, 0, 0]])},
        {"length": np.array([[1.0]])},
        {"depth": 10**9},
        {"depth": 0},
        {"typical": 0.0},
    ],
)
def test_a_damaged_forest_is_not_followed(folder: Path, damage: dict[str, Any]) -> None:
    replace(STUMP, **damage).write(folder / FOREST)
    with pytest.raises(ConfigError, match="damaged"):
        load(folder)


def test_no_pickle_is_read(folder: Path) -> None:
    np.savez(folder / FOREST, left=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ConfigError, match=r"damaged.*pickle"):
        load(folder)
    (folder / FOREST).write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("default",), "svm", "svm"),
        (("methods", "svm"), {"threshold": 1}, "svm"),
        (("methods", "zscore", "arrays", "center"), [1], "2 numbers"),
        (("methods", "zscore", "arrays"), {"center": [1, 2]}, "lacks 'spread'"),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, path: tuple[str, ...], value: Any, message: str
) -> None:
    settings = json.loads((folder / FILE).read_text())
    inner = settings
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / FILE).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_the_furthest_feature_counts() -> None:
    rows = np.array([[0.0, 0.0], [1.0, 4.0], [-6.0, 1.0]])
    distance = Distance(center=np.zeros(2), spread=np.array([2.0, 1.0]))
    assert distance.scores(rows).tolist() == [0.0, 4.0, 3.0]
    fence = Fence(low=np.array([-1.0, 0.0]), high=np.array([1.0, 2.0]))
    assert fence.scores(rows).tolist() == [0.0, 1.0, 2.5]
