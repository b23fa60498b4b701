"""One point of the search: cross-validation by hand, and nothing learned from what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC

from models.predictors import svc
from train.context import Context
from train.events import Reported
from train.recipes.hyperparameters import RECIPE, Hyperparameters, parts

DIGITS = load_digits()
FEATURES, LABELS = DIGITS.data[:400], DIGITS.target[:400]


def test_a_run_is_the_cross_validation_of_its_point_fold_by_fold(tmp_path: Path) -> None:
    config = Hyperparameters(C=2.0, gamma=5e-4, folds=4, samples=400)
    reports: list[Reported] = []
    context = Context(out=tmp_path / "a", on_report=lambda report, save: reports.append(report))
    metrics = RECIPE.run(config, context)
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    expected = cross_val_score(SVC(C=2.0, gamma=5e-4), FEATURES, LABELS, cv=folds)  # equal folds
    assert metrics["svc_accuracy"] == pytest.approx(expected.mean())
    told = [report.metrics["svc_accuracy"] for report in reports]
    assert told == pytest.approx([expected[: n + 1].mean() for n in range(4)])
    assert [(report.step, report.total) for report in reports] == [(n, 4) for n in range(1, 5)]
    assert RECIPE.run(config, Context(out=tmp_path / "b")) == metrics


def test_what_is_held_out_is_in_no_fold_and_not_in_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Hyperparameters(folds=4, samples=400, held_out=2)
    _, held_out = parts(LABELS, 4, config.seed)[2]
    before = RECIPE.run(config, Context(out=tmp_path / "a"))
    model = svc.load(tmp_path / "a" / "artifact")
    said = model.predict_batch([{"features": row} for row in FEATURES[held_out].tolist()])
    right = [
        isinstance(answer, dict) and answer["label"] == label
        for answer, label in zip(said, LABELS[held_out], strict=True)
    ]
    assert before["held_out_accuracy"] == np.mean(right) > 0.8

    spoilt = load_digits()
    spoilt.data[held_out] = 16 - spoilt.data[held_out]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: spoilt)
    after = RECIPE.run(config, Context(out=tmp_path / "b"))
    assert after.pop("held_out_accuracy") < 0.5  # type: ignore[attr-defined]
    assert after == {name: before[name] for name in after}


def test_the_artifact_of_a_whole_run_has_learned_from_all_digits(tmp_path: Path) -> None:
    metrics = RECIPE.run(Hyperparameters(folds=2, samples=400), Context(out=tmp_path))
    assert "held_out_accuracy" not in metrics
    model = svc.load(tmp_path / "artifact")
    fitted = SVC(C=10.0, gamma=1e-3).fit(FEATURES, LABELS)
    assert metrics["support_vectors"] == len(model.vectors) == len(fitted.support_vectors_)


def test_a_part_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"held_out is one of 0 … 4 \(given: 5\)"):
        Hyperparameters(held_out=5)
