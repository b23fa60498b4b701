"""Shapley values where they are known, and the predictor around them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import ConfigError, InvalidInput
from models.predictors import anomaly, linear, shapley
from models.predictors.anomaly import Array
from models.predictors.shapley import Score, curve, shapley_values

RANDOM = np.random.default_rng(0)
BACKGROUND, ROW = RANDOM.normal(size=(7, 4)), RANDOM.normal(size=4)


def exact(score: Score, row: Array, background: Array) -> Array:
    """By definition: the mean over all orders of what each feature adds when it comes."""
    found = np.zeros(len(row))
    orders = list(itertools.permutations(range(len(row))))
    for order in orders:
        mixed = background.copy()
        before = score(mixed).mean()
        for feature in order:
            mixed[:, feature] = row[feature]
            after = score(mixed).mean()
            found[feature] += after - before
            before = after
    return found / len(orders)


def test_of_a_linear_artifact_they_are_weight_times_distance_from_the_mean(tmp_path: Path) -> None:
    """The closed form (Lundberg, Lee 2017, corollary 1), of a model behind its predictor."""
    weights = dict(zip("abcd", (2.0, -3.0, 0.0, 0.5), strict=True))
    linear.save(tmp_path, intercept=1.0, weights=weights)
    predictor = linear.load(tmp_path)

    def score(rows: Array) -> Array:
        asked: Any = [dict(zip(weights, row, strict=True)) for row in rows.tolist()]
        answers: Any = predictor.predict_batch(asked)
        return np.array([answer["value"] for answer in answers])

    found = shapley_values(score, ROW, BACKGROUND, pairs=1, seed=3)
    expected = np.array(list(weights.values())) * (ROW - BACKGROUND.mean(0))
    assert found == pytest.approx(expected, abs=1e-6)


def test_pairs_of_features_are_shared_exactly() -> None:
    def score(rows: Array) -> Array:
        return np.asarray(rows[:, 0] * rows[:, 1] + np.abs(rows[:, 2] - rows[:, 3]))

    found = shapley_values(score, ROW, BACKGROUND, pairs=1, seed=0)
    assert found == pytest.approx(exact(score, ROW, BACKGROUND), abs=1e-12)


def test_more_orders_come_nearer() -> None:
    def score(rows: Array) -> Array:
        return np.asarray(np.abs(rows).max(axis=1) + rows.prod(axis=1))

    truth = exact(score, ROW, BACKGROUND)

    def error(pairs: int) -> float:
        found = [shapley_values(score, ROW, BACKGROUND, pairs=pairs, seed=s) for s in range(10)]
        assert [one.sum() for one in found] == pytest.approx([truth.sum()] * 10, abs=1e-12)
        return float(np.abs(np.array(found) - truth).mean())

    assert error(64) < error(2) / 2
    assert error(64) < 0.1 * np.abs(truth).mean()


def test_the_curve_goes_from_the_background_to_the_row() -> None:
    def score(rows: Array) -> Array:
        return np.asarray(rows @ np.array([1.0, 10.0, 100.0, 1000.0]))

    found = curve(score, np.ones(4), np.zeros((2, 4)), [2, 0, 3, 1])
    assert found.tolist() == [0, 100, 101, 1101, 1111]


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """Distances in four features, of which the first three have a spread that is never left."""
    folder = tmp_path / "detector"
    folder.mkdir()
    arrays = {"center": (0.0,) * 4, "spread": (1e6, 1e6, 1e6, 1.0)}
    settings = anomaly.Settings(
        features=tuple("abcd"),
        default="zscore",
        methods={
            "zscore": anomaly.MethodSettings(threshold=1.5, arrays=arrays),
            "iqr": anomaly.MethodSettings(
                threshold=1.0, arrays={"low": (-1,) * 4, "high": (1,) * 4}
            ),
        },
    )
    (folder / anomaly.FILE).write_text(settings.model_dump_json())
    return folder


@pytest.fixture
def explained(detector: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "explained"
    folder.mkdir()
    shapley.save(folder, detector, BACKGROUND, pairs=2)
    return folder


def test_an_answer_is_the_detectors_and_its_parts_add_up(explained: Path, detector: Path) -> None:
    inputs: Any = [{"features": [9, 9, 9, -4]}, {"features": [3, 2, 0, 0.5], "method": "iqr"}]
    answers: Any = shapley.load(explained).predict_batch(inputs)
    for answer, plain in zip(answers, anomaly.load(detector).predict_batch(inputs), strict=True):
        parts = answer.pop("contributions")
        assert list(parts) == list("abcd")
        assert answer.pop("usual") + math.fsum(parts.values()) == pytest.approx(answer["score"])
        assert answer == plain
        answer["contributions"] = parts
    assert answers[0]["contributions"]["d"] == pytest.approx(4 - np.abs(BACKGROUND[:, 3]).mean())
    assert max(abs(answers[0]["contributions"][name]) for name in "abc") < 1e-3
    assert answers[1]["contributions"]["a"] > answers[1]["contributions"]["d"]


def test_what_else_is_in_the_batch_does_not_matter(explained: Path) -> None:
    predictor = shapley.load(explained)
    inputs: Any = [{"features": row} for row in RANDOM.normal(size=(3, 4)).tolist()]
    alone = [predictor.predict_batch([one])[0] for one in inputs]
    assert predictor.predict_batch(inputs[::-1])[::-1] == alone
    assert predictor.predict_batch([]) == []


def test_a_bad_row_is_named(explained: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        shapley.load(explained).predict_batch([{"features": [1, 2, 3, 4]}, {"features": [1]}])
    assert caught.value.details["index"] == 1


def test_files_that_do_not_fit_are_refused(explained: Path) -> None:
    np.savez(explained / shapley.ROWS, background=np.zeros((3, 5)))
    with pytest.raises(ConfigError, match="no rows of 4 numbers"):
        shapley.load(explained)
    (explained / shapley.FACTS).write_text('{"pairs": 0}')
    np.savez(explained / shapley.ROWS, background=BACKGROUND)
    with pytest.raises(ConfigError, match="asks for 0 pairs"):
        shapley.load(explained)
    (explained / shapley.ROWS).write_text("none")
    with pytest.raises(ConfigError, match="cannot be used"):
        shapley.load(explained)
