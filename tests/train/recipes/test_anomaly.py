"""Anomaly detection: Grubbs against NIST, the forest against scikit-learn, the smoke run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.context import Context
from train.data.anomaly import tumours
from train.recipes.anomaly import (
    RECIPE,
    Anomaly,
    fit,
    grubbs_critical,
    grubbs_statistic,
    without_outliers,
)

URANIUM = np.array([199.31, 199.53, 200.19, 200.82, 201.92, 201.95, 202.18, 245.57])
"""Tietjen & Moore's mass spectrometer data, the example of NIST's section 1.3.5.17.1."""


def test_grubbs_agrees_with_nist() -> None:
    assert grubbs_statistic(URANIUM) == pytest.approx(2.4688, abs=1e-4)
    assert grubbs_critical(8, 0.05, sides=1) == pytest.approx(2.0317, abs=1e-4)
    assert grubbs_critical(8, 0.05) == pytest.approx(2.1266, abs=1e-4)  # tables: 2.126 or 2.127
    assert without_outliers(URANIUM, 0.05).tolist() == URANIUM[:-1].tolist()


def test_grubbs_rarely_drops_what_is_normal() -> None:
    random = np.random.default_rng(0)
    dropped = sum(len(without_outliers(random.normal(size=30), 0.05)) < 30 for _ in range(400))
    assert 0.02 < dropped / 400 < 0.09


def test_the_forest_is_scikit_learns() -> None:
    from sklearn.ensemble import IsolationForest

    rows = tumours().values
    config = Anomaly(seed=3, trees=20, sample=64)
    theirs = IsolationForest(n_estimators=20, max_samples=64, random_state=3).fit(rows)
    probe = np.concatenate([rows, rows * 3, -rows])
    ours = fit("forest", rows, config).scores(probe)
    assert ours == pytest.approx(-theirs.score_samples(probe), rel=1e-12)


def test_the_selection_is_the_documented_one() -> None:
    from sklearn.datasets import load_breast_cancer

    rows = tumours()
    assert rows.values.shape == (378, 30)
    assert len(rows.features) == 30
    assert rows.malignant.sum() == 21
    whole = load_breast_cancer()
    first = whole.data[np.flatnonzero(whole.target == 0)[:21]]
    assert rows.values[rows.malignant].tolist() == first.tolist()
    assert rows.values[rows.malignant][0].tolist() == RECIPE.sample[0]["features"]


def test_a_constant_feature_does_no_harm() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 3))
    rows[:, 1] = 5.0
    for name in ("forest", "autoencoder", "zscore", "iqr", "grubbs"):
        found = fit(name, rows, Anomaly(trees=5, steps=5)).scores(rows)
        assert np.isfinite(found).all()


def test_the_smoke_run(tmp_path: Path) -> None:
    metrics = RECIPE.run(RECIPE.smoke, Context(out=tmp_path / "one"))
    again = RECIPE.run(RECIPE.smoke, Context(out=tmp_path / "two"))
    assert metrics == again
    for name, gate in RECIPE.smoke_gates.items():
        assert gate.holds(metrics[name]), name
    assert RECIPE.gates.keys() <= metrics.keys()
    assert RECIPE.load is not None
    answers: Any = RECIPE.load(tmp_path / "one" / "artifact").predict_batch(RECIPE.sample)
    assert [answer["method"] for answer in answers] == ["forest", "autoencoder", "grubbs"]
    assert answers[0]["anomaly"]


def test_the_served_method_is_among_the_fitted() -> None:
    with pytest.raises(ValueError, match="serve is 'forest'"):
        Anomaly(methods=("iqr",))
