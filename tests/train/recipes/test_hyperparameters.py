"""The quality of the tuner: Branin's function, nested cross-validation, the smoke run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from models.predictors import svc
from train.context import Context
from train.recipes.hyperparameters import RECIPE, Hyperparameters, branin
from train.search import searcher
from train.space import Float


def test_branin_has_its_three_published_minima() -> None:
    for x, y in ((-math.pi, 12.275), (math.pi, 2.275), (9.42478, 2.475)):
        assert branin({"x": x, "y": y}) == pytest.approx(0.397887, abs=1e-5)
        for dx, dy in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
            assert branin({"x": x + dx, "y": y + dy}) > 0.397887


def test_a_run_gives_what_it_measured_and_the_classifier_it_searched(tmp_path: Path) -> None:
    config = Hyperparameters(
        search="tpe", branin_trials=25, svc_trials=4, folds=2, inner_folds=2, samples=400
    )
    metrics = RECIPE.run(config, Context(out=tmp_path / "a"))
    assert metrics["branin"] < 10
    # Half of the digits are little to learn from, but every one is predicted by the other half.
    assert 0.7 < metrics["svc_accuracy"] < 1
    assert metrics["svc_accuracy"] * 400 == pytest.approx(round(metrics["svc_accuracy"] * 400))
    model = svc.load(tmp_path / "a" / "artifact")
    assert model.gamma == metrics["svc_gamma"]
    digits = load_digits()
    said = model.predict_batch([{"features": row} for row in digits.data[400:600].tolist()])
    right = [
        isinstance(answer, dict) and answer["label"] == label
        for answer, label in zip(said, digits.target[400:600], strict=True)
    ]
    assert np.mean(right) > 0.8
    assert model.predict_batch(RECIPE.sample)[0] == {"label": 1, "votes": [*_votes(model)]}
    assert RECIPE.run(config, Context(out=tmp_path / "b")) == metrics


def _votes(model: svc.Svc) -> list[int]:
    return model.votes(np.asarray([RECIPE.sample[0]["features"]], dtype=np.float64))[0].tolist()


def test_random_search_is_measured_by_the_same_rules(tmp_path: Path) -> None:
    config = Hyperparameters(
        search="random", branin_trials=5, svc_trials=2, folds=2, inner_folds=2, samples=200
    )
    metrics = RECIPE.run(config, Context(out=tmp_path))
    assert metrics["branin"] == metrics["branin_random"]
    assert metrics["svc_accuracy"] == metrics["svc_accuracy_random"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_gaussian_process_comes_to_the_bottom_of_branin(seed: int) -> None:
    from train.search import search

    space = {"x": Float(low=-5, high=10), "y": Float(low=0, high=15)}
    best = search(searcher("gp", space, mode="min", seed=seed), branin, 40)[1]
    assert best <= 0.41
