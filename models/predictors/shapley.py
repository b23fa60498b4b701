"""What each feature adds to the score of an anomaly detector: its Shapley values.

``{"features": [17.99, 10.38, …]}`` becomes what the detector answers, and ``"usual": 0.42,
"contributions": {"mean radius": 0.03, …}``: the mean score of rows from the training data, and by
how much each feature moves the score away from it. They add up to ``score``.

A feature "adds" the difference that it makes when it comes to the others, with those that have not
come yet as in a row of the training data; the mean is taken over rows and orders (Lundberg, Lee
2017, A Unified Approach to Interpreting Model Predictions). Orders are drawn, each together with
its reverse (Mitchell et al. 2022, Sampling Permutations for Shapley Value Estimation). It asks the
detector for scores and for nothing else, so that it explains any of its methods.

::

    shapley.json    how many pairs of orders
    shapley.npz     rows of the training data
    anomaly.json …  the detector, as :mod:`models.predictors.anomaly` reads it
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from models.contracts import Json
from models.errors import ConfigError
from models.predictors import anomaly
from models.predictors.anomaly import Array

FACTS, ROWS = "shapley.json", "shapley.npz"
MOST_PAIRS, MOST_ROWS = 1000, 10_000

Score: TypeAlias = Callable[[Array], Array]
"""Rows (n, features) → (n,); each by itself."""


def shapley_values(score: Score, row: Array, background: Array, *, pairs: int, seed: int) -> Array:
    """By feature; they add up to ``score(row)`` less the mean score of ``background``.

    Exact where the score is a sum of functions of one or two features each.

    Args:
        background: shape (rows, features).
        pairs: of orders in which features come.
    """
    count = len(row)
    random = np.random.default_rng(seed)
    found = np.zeros(count)
    for _ in range(pairs):
        order = random.permutation(count)
        for one in (order, order[::-1]):
            found[one] += np.diff(curve(score, row, background, one))
    return found / (2 * pairs)


def curve(
    score: Score, row: Array, background: Array, order: Sequence[int] | NDArray[np.intp]
) -> Array:
    """(1 + features,): the mean score of the background while it takes over, feature by feature,
    what the row has. The last is the row's own score.
    """
    rank = np.empty(len(order), dtype=np.intp)
    rank[np.asarray(order)] = np.arange(len(order))
    came = rank < np.arange(len(order) + 1)[:, None]  # (steps, features)
    mixed = np.where(came[:, None, :], row, background)  # (steps, rows, features)
    scores = score(mixed.reshape(-1, len(row)))
    return cast(Array, scores.reshape(mixed.shape[:2]).mean(axis=1))


def save(folder: Path, detector: Path, background: Array, *, pairs: int) -> None:
    """Write what ``load`` reads, with a copy of the detector."""
    for name in (anomaly.FILE, anomaly.FOREST, anomaly.AUTOENCODER):
        if (detector / name).is_file():
            shutil.copyfile(detector / name, folder / name)
    np.savez_compressed(folder / ROWS, background=background)
    (folder / FACTS).write_text(json.dumps({"pairs": pairs}) + "\n")


def load(folder: Path) -> ExplainedDetector:
    """Raises ConfigError: the files cannot be used."""
    detector = anomaly.load(folder)
    try:
        pairs = int(json.loads((folder / FACTS).read_text())["pairs"])
        with np.load(folder / ROWS, allow_pickle=False) as arrays:
            background = np.asarray(arrays["background"], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{folder}: {FACTS} and {ROWS} cannot be used ({error})") from None
    fits = background.ndim == 2 and background.shape[1] == len(detector.features)
    if not fits or not 0 < len(background) <= MOST_ROWS or not np.isfinite(background).all():
        raise ConfigError(f"{folder}: {ROWS} has no rows of {len(detector.features)} numbers.")
    if not 0 < pairs <= MOST_PAIRS:
        raise ConfigError(f"{folder}: {FACTS} asks for {pairs} pairs, expected 1 to {MOST_PAIRS}.")
    return ExplainedDetector(detector, background, pairs=pairs)


class ExplainedDetector:
    """Inputs are those of :class:`models.predictors.anomaly.AnomalyDetector`."""

    def __init__(self, detector: anomaly.AnomalyDetector, background: Array, *, pairs: int) -> None:
        self._detector = detector
        self._background = background
        self._pairs = pairs

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        """See :class:`models.contracts.Predictor`."""
        answers = cast("list[dict[str, Any]]", self._detector.predict_batch(inputs))
        rows = [np.array(cast("dict[str, Any]", one)["features"], dtype=float) for one in inputs]
        # Each with the same orders: an explanation does not depend on its batch mates.
        return [
            {**answer, **self.explained(row, answer["method"])}
            for answer, row in zip(answers, rows, strict=True)
        ]

    def explained(self, row: Array, method: str) -> dict[str, Any]:
        score = self._detector.scorer(method)
        values = shapley_values(score, row, self._background, pairs=self._pairs, seed=0).tolist()
        return {
            "usual": math.fsum(score(self._background)) / len(self._background),
            "contributions": dict(zip(self._detector.features, values, strict=True)),
        }
