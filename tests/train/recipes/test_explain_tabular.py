"""Shapley values of somebody else's detector, and what they are measured by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import ConfigError
from models.predictors import anomaly
from models.predictors.anomaly import Array
from train.context import Context
from train.data.anomaly import MALIGNANT, tumours, unseen
from train.recipes.explain_tabular import RECIPE, ExplainTabular, deletion

SMALL = ExplainTabular(rows=4, background=10, pairs=1, compared=2, compared_pairs=1)

# shap's colours
pytestmark = pytest.mark.filterwarnings(
    "ignore:The set_.* function will be deprecated:PendingDeprecationWarning"
)


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """Of somebody who finds unusual what has a large worst area, and nothing else."""
    rows = tumours()
    spread = np.full(30, 1e12)
    spread[23] = rows.values[:, 23].std()
    settings = anomaly.Settings(
        features=rows.features,
        default="zscore",
        methods={
            "zscore": anomaly.MethodSettings(
                threshold=2.0,
                arrays={"center": tuple(rows.values.mean(0)), "spread": tuple(spread)},
            )
        },
    )
    folder = tmp_path / "detector"
    folder.mkdir()
    (folder / anomaly.FILE).write_text(settings.model_dump_json())
    return folder


@pytest.mark.slow  # importing shap takes seconds
def test_what_is_explained_is_the_artifact_that_was_given(detector: Path, tmp_path: Path) -> None:
    context = Context(out=tmp_path / "out", inputs={"anomaly-detector": detector})
    metrics = RECIPE.run(SMALL, context)
    assert (context.artifact / anomaly.FILE).read_bytes() == (detector / anomaly.FILE).read_bytes()
    # One feature matters: with it gone first, nothing is left at once.
    assert metrics["shap_deletion"] == pytest.approx(0.5 / 30, abs=1e-6)
    assert metrics["shap_error"] < 1e-6
    assert metrics["completeness_error"] < 1e-9
    assert RECIPE.load is not None
    (answer,) = RECIPE.load(context.artifact).predict_batch([{"features": unseen()[0].tolist()}])
    parts: dict[str, float] = answer["contributions"]  # type: ignore[call-overload,index,assignment]
    assert max(parts, key=lambda name: abs(parts[name])) == "worst area"
    assert sum(abs(parts[name]) for name in parts if name != "worst area") < 1e-6


def test_a_method_that_the_artifact_lacks_is_refused(detector: Path, tmp_path: Path) -> None:
    context = Context(out=tmp_path / "out", inputs={"anomaly-detector": detector})
    with pytest.raises(ConfigError, match=r"'forest'.*zscore"):
        RECIPE.run(SMALL.model_copy(update={"method": "forest"}), context)


def test_deletion_is_small_when_the_reason_goes_first() -> None:
    def score(rows: Array) -> Array:
        return rows[:, 1]

    rows, background = np.ones((2, 4)), np.zeros((3, 4))
    first = deletion(score, rows, background, np.array([[1, 0, 2, 3]] * 2))
    last = deletion(score, rows, background, np.array([[0, 2, 3, 1]] * 2))
    assert (first, last) == (0.5 / 4, 3.5 / 4)


def test_explained_rows_are_malignant_and_new_to_the_detector() -> None:
    from sklearn.datasets import load_breast_cancer

    whole = load_breast_cancer()
    malignant = whole.data[whole.target == 0]
    found = unseen()
    assert found.tolist() == malignant[MALIGNANT:].tolist()
    known = {tuple(row) for row in tumours().values.tolist()}
    assert not known & {tuple(row) for row in found.tolist()}
    field: Any = ExplainTabular.model_fields["rows"]
    assert len(found) == next(each.le for each in field.metadata if hasattr(each, "le"))
