"""Explainable AI (system 8), of rows of numbers: Shapley values of an anomaly detector's scores.

The detector is the artifact of another run. Explained are malignant tumours that it has never
seen, against rows that it was fitted to; measured is whether what is said to matter does, and
how far the values are from what the library ``shap`` finds with many times the work. That they
are w (x - mean) for a linear model is a test of the method, which needs no model of ours.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.errors import ConfigError
from models.predictors import anomaly, shapley
from models.predictors.anomaly import Array
from models.predictors.shapley import Score
from train.data import anomaly as data
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.recipes import anomaly as detection
from train.space import Int


class ExplainTabular(Config):
    method: Literal["forest", "autoencoder", "zscore", "iqr", "grubbs"] | None = None
    """Of the detector; by default the one that it serves. The artifact explains all of them."""
    rows: int = Field(default=30, ge=1, le=191)
    """So many unseen malignant tumours."""
    background: int = Field(default=30, ge=1, le=378)
    """Rows of the training data that stand for what is usual."""
    pairs: int = Field(default=4, ge=1, le=shapley.MOST_PAIRS)
    """Of orders in which features come."""
    compared: int = Field(default=5, ge=1, le=191)
    """Rows that the library explains, too."""
    compared_pairs: int = Field(default=40, ge=1)
    """Of orders that it draws."""


def run(config: ExplainTabular, context: RunContext) -> Metrics:
    source = context.inputs["anomaly-detector"]
    detector = anomaly.load(source)
    score = detector.scorer(config.method or detector.default)
    known, unseen = data.tumours().values, data.unseen()[: config.rows]
    random = np.random.default_rng(config.seed)
    background = known[np.sort(random.permutation(len(known))[: config.background])]

    values = np.array(context.map(Explaining(score, background, config), list(unseen)))
    orders = {
        "shap": _descending(values),
        "random": random.permuted(np.tile(np.arange(known.shape[1]), (len(unseen), 1)), axis=1),
        "distance": _descending(np.abs(unseen - known.mean(0)) / known.std(0)),
    }
    areas = {name: deletion(score, unseen, background, order) for name, order in orders.items()}
    gained = score(unseen) - score(background).mean()
    shapley.save(context.artifact, source, background, pairs=config.pairs)
    return {
        **{f"{name}_deletion": area for name, area in areas.items()},
        **{f"shap_over_{low}": areas[low] - areas["shap"] for low in ("random", "distance")},
        "completeness_error": float(np.abs(values.sum(1) - gained).max()),
        "shap_error": shap_error(score, values, unseen, background, config),
    }


class Explaining:
    """One task of the fan-out: a row."""

    def __init__(self, score: Score, background: Array, config: ExplainTabular) -> None:
        self._score, self._background, self._config = score, background, config

    def __call__(self, row: Array) -> Array:
        return shapley.shapley_values(
            self._score, row, self._background, pairs=self._config.pairs, seed=self._config.seed
        )


def deletion(score: Score, rows: Array, background: Array, orders: NDArray[np.intp]) -> float:
    """Area under what is left of the scores while features become usual, in the order given.

    1 is the height of the rows' own mean score, 0 that of the background; small is good: what was
    said to matter did.
    """
    usual = score(background).mean()
    curves = np.array(
        [
            shapley.curve(score, row, background, order[::-1])[::-1] - usual
            for row, order in zip(rows, orders, strict=True)
        ]
    ).mean(0)
    return float(np.trapezoid(curves / curves[0]) / (len(curves) - 1))


def shap_error(
    score: Score, values: Array, rows: Array, background: Array, config: ExplainTabular
) -> float:
    """Mean distance from the library's values, in units of their mean size."""
    try:
        import shap
    except ImportError:
        raise ConfigError("comparing needs pip install 'frontier-run[explain]'") from None
    masker = shap.maskers.Independent(background, max_samples=len(background))
    explainer = shap.PermutationExplainer(score, masker, seed=config.seed)
    calls = config.compared_pairs * 2 * (rows.shape[1] + 1)
    told = explainer(rows[: config.compared], max_evals=calls, silent=True).values
    return float(np.abs(told - values[: config.compared]).mean() / np.abs(told).mean())


def _descending(importance: Array) -> NDArray[np.intp]:
    return np.argsort(-importance, axis=1, kind="stable")


RECIPE = Recipe(
    name="explain_tabular",
    summary="Shapley values: what each feature adds to an anomaly detector's score",
    kind="explained-anomaly-detector",
    config=ExplainTabular,
    run=run,
    inputs=("anomaly-detector",),
    gates={
        "shap_over_random": Gate(at_least=0.1, baseline="making features usual in random order: 0"),
        "shap_over_distance": Gate(
            at_least=0.01, baseline="the features furthest from the mean first: 0"
        ),
        "shap_error": Gate(at_most=0.2, baseline="no explanation, all values 0: 1"),
        "completeness_error": Gate(
            at_most=1e-6, baseline="what the values must add up to, by the axiom: 0"
        ),
    },
    smoke_gates={
        "shap_over_random": Gate(
            at_least=0.05, baseline="making features usual in random order: 0"
        ),
        "completeness_error": Gate(
            at_most=1e-6, baseline="what the values must add up to, by the axiom: 0"
        ),
    },
    smoke=ExplainTabular(rows=5, background=20, pairs=2, compared=2, compared_pairs=4),
    load=shapley.load,
    sample=detection.RECIPE.sample,
    space={"pairs": Int(low=1, high=16, log=True), "background": Int(low=10, high=200)},
    licence="CC-BY-4.0",
    data=f"{data.CARD} Explained are malignant rows beyond those.",
)
