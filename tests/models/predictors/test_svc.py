"""The support vector classifier says what scikit-learn's says, from files without pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from models.errors import ConfigError, InvalidInput
from models.predictors import svc

DIGITS = load_digits()


@pytest.fixture(scope="module")
def fitted() -> Any:
    """A poor one, so that pairs of classes often disagree."""
    return SVC(C=0.1, gamma=1e-3).fit(DIGITS.data[:400], DIGITS.target[:400])


def inputs(rows: Any) -> list[Any]:
    return [{"features": row} for row in np.asarray(rows).tolist()]


def test_labels_and_votes_are_those_of_scikit_learn(fitted: Any, tmp_path: Path) -> None:
    svc.save(tmp_path, fitted)
    rows = DIGITS.data[400:1000]
    said = svc.load(tmp_path).predict_batch(inputs(rows))
    labels = [answer["label"] for answer in said if isinstance(answer, dict)]
    assert labels == fitted.predict(rows).tolist()
    assert 0.5 < np.mean(np.array(labels) == DIGITS.target[400:1000]) < 0.97
    fitted.decision_function_shape = "ovo"
    pairs = fitted.decision_function(rows)
    first = [i for i in range(10) for j in range(i + 1, 10)]
    second = [j for i in range(10) for j in range(i + 1, 10)]
    for row, answer in zip(pairs, said, strict=True):
        winners = [i if d > 0 else j for d, i, j in zip(row, first, second, strict=True)]
        assert isinstance(answer, dict)
        assert answer["votes"] == np.bincount(winners, minlength=10).tolist()


def test_an_answer_does_not_depend_on_the_batch(fitted: Any, tmp_path: Path) -> None:
    svc.save(tmp_path, fitted)
    model = svc.load(tmp_path)
    batch = inputs(DIGITS.data[:40])
    assert model.predict_batch(batch) == [model.predict_batch([each])[0] for each in batch]
    assert model.predict_batch([]) == []


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"features": [1.0] * 63}, "features"),
        ({"features": ["1"] * 64}, "features.0"),
        ({"features": [float("nan")] * 64}, "features.0"),
        ({}, "features"),
        ([1.0] * 64, "input"),
    ],
)
def test_a_bad_input_is_named(fitted: Any, tmp_path: Path, bad: Any, param: str) -> None:
    svc.save(tmp_path, fitted)
    with pytest.raises(InvalidInput) as refusal:
        svc.load(tmp_path).predict_batch([*inputs(DIGITS.data[:2]), bad])
    assert refusal.value.param == param
    assert refusal.value.details["index"] == 2


def test_only_what_can_be_served_is_saved_and_only_what_fits_is_loaded(
    fitted: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="three classes"):
        svc.save(tmp_path, SVC().fit([[0.0], [1.0]], [0, 1]))
    with pytest.raises(ValueError, match="Gaussian kernel"):
        svc.save(tmp_path, SVC(kernel="linear").fit([[0.0], [1.0], [2.0]], [0, 1, 2]))
    svc.save(tmp_path, fitted)
    facts = json.loads((tmp_path / svc.FACTS).read_text())
    facts["counts"][0] += 1
    (tmp_path / svc.FACTS).write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="do not fit together"):
        svc.load(tmp_path)
