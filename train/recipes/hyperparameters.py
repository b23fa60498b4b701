"""Hyper-parameter optimisation (system 14): does the search find what there is to find?

Two problems with a known answer, through the searchers that ``python -m tune`` uses, each
beside random search with as many trials:

- Branin's function, whose minimum is 0.397887: how near the search comes.
- C and gamma of a support vector classifier on scikit-learn's digits. Accuracy is of nested
  cross-validation: each fifth of the digits is predicted by a classifier whose parameters
  were searched without it. The artifact is a classifier searched and fitted on all digits.
  scikit-learn's default gamma was made for such data, so that there is next to nothing to
  gain: this part shows that a search does not overfit what it sees.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from models.errors import ConfigError
from models.predictors import svc
from train import data
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.search import Point, search, searcher
from train.space import Float, Int

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BRANIN = {"x": Float(low=-5, high=10), "y": Float(low=0, high=15)}
SVC = {
    "C": Float(low=1e-2, high=1e3, log=True),
    "gamma": Float(low=1e-5, high=1e-1, log=True),
}


class Hyperparameters(Config):
    search: Literal["random", "tpe", "gp"] = "gp"
    branin_trials: int = Field(default=40, ge=1)
    svc_trials: int = Field(default=15, ge=1)
    """Of each search; there is one a fold, and one for the artifact."""
    folds: int = Field(default=5, ge=2)
    """Of the outer cross-validation, which measures."""
    inner_folds: int = Field(default=3, ge=2)
    """Of the inner one, which the search sees."""
    samples: int = Field(default=1797, ge=100, le=1797)
    """Digits used; fewer for a quick look."""


def branin(point: Point) -> float:
    """Branin (1972); three minima of 0.397887."""
    x, y = float(point["x"]), float(point["y"])
    valley = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return valley**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def run(config: Hyperparameters, context: RunContext) -> Metrics:
    features, labels = _digits(config.samples)
    best = _best_of_branin(config.search, config)
    by_chance = _best_of_branin("random", config)
    context.report({"branin": best, "branin_random": by_chance}, step=1, total=3)

    folds = [
        _Fold(kind=kind, config=config, train=train, test=test, seed=config.seed + 1 + number)
        for number, (train, test) in enumerate(_parts(labels, config.folds, config.seed))
        for kind in (config.search, "random", None)
    ]
    hits = context.map(partial(_hits, features, labels), folds)
    names = ("svc_accuracy", "svc_accuracy_random", "svc_accuracy_default")
    told = {name: sum(hits[which::3]) / len(labels) for which, name in enumerate(names)}
    context.report(told, step=2, total=3)

    everything = range(len(labels))
    point, inner = _tuned(features, labels, everything, config.search, config, config.seed)
    svc.save(context.artifact, _fit(features, labels, everything, point))
    context.report({"svc_inner_accuracy": inner}, step=3, total=3)
    return {
        "branin": best,
        "branin_random": by_chance,
        **told,
        "svc_inner_accuracy": inner,
        "svc_C": float(point["C"]),
        "svc_gamma": float(point["gamma"]),
    }


def _best_of_branin(kind: Any, config: Hyperparameters) -> float:
    found = searcher(kind, BRANIN, mode="min", seed=config.seed)
    return search(found, branin, config.branin_trials)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fold:
    """One search without ``test``, judged on it."""

    kind: Any
    """Of the search; ``None``: scikit-learn's default parameters."""
    config: Hyperparameters
    train: Sequence[int]
    test: Sequence[int]
    seed: int


def _hits(features: NDArray[np.float64], labels: NDArray[np.int64], fold: _Fold) -> int:
    """How many of the fold's test digits are recognised."""
    point: Point = {}
    if fold.kind is not None:
        point, _ = _tuned(features, labels, fold.train, fold.kind, fold.config, fold.seed)
    fitted = _fit(features, labels, fold.train, point)
    predicted = fitted.predict(features[list(fold.test)])
    return int((predicted == labels[list(fold.test)]).sum())


def _tuned(
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    rows: Sequence[int],
    kind: Any,
    config: Hyperparameters,
    seed: int,
) -> tuple[Point, float]:
    """The best point on ``rows``, and its cross-validated accuracy there."""
    chosen = list(rows)
    parts = _parts(labels[chosen], config.inner_folds, config.seed)

    def accuracy(point: Point) -> float:
        hits = 0
        for train, test in parts:
            fitted = _fit(features, labels, [chosen[i] for i in train], point)
            held_out = [chosen[i] for i in test]
            hits += int((fitted.predict(features[held_out]) == labels[held_out]).sum())
        return hits / len(chosen)

    return search(searcher(kind, SVC, mode="max", seed=seed), accuracy, config.svc_trials)


def _fit(
    features: NDArray[np.float64], labels: NDArray[np.int64], rows: Sequence[int], point: Point
) -> Any:
    from sklearn.svm import SVC as Classifier

    chosen = list(rows)
    return Classifier(**point).fit(features[chosen], labels[chosen])


def _parts(
    labels: NDArray[np.int64], folds: int, seed: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    from sklearn.model_selection import StratifiedKFold

    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [(train.tolist(), test.tolist()) for train, test in split.split(labels, labels)]


def _digits(samples: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(samples, 64) grey values from 0 to 16, and (samples,) labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("This recipe needs pip install 'frontier-run[tune]'.") from None
    digits = load_digits()
    features, labels = digits.data[:samples], digits.target[:samples]
    data.record(
        "optical-digits",
        sha256=hashlib.sha256(features.tobytes() + labels.tobytes()).hexdigest(),
        licence="CC-BY-4.0",
        rows=len(labels),
    )
    return features, labels


_ONE = [0, 0, 0, 12, 13, 5, 0, 0, 0, 0, 0, 11, 16, 9, 0, 0, 0, 0, 3, 15, 16, 6, 0, 0, 0, 7, 15, 16,
        16, 2, 0, 0, 0, 0, 1, 16, 16, 3, 0, 0, 0, 0, 1, 16, 16, 6, 0, 0, 0, 0, 1, 16, 16, 6, 0, 0,
        0, 0, 0, 11, 16, 10, 0, 0]  # fmt: skip

RECIPE = Recipe(
    name="hyperparameters",
    summary="Bayesian search against random search: Branin's minimum, and an SVC on digits",
    kind="svc",
    config=Hyperparameters,
    run=run,
    gates={
        "branin": Gate(
            at_most=0.41, baseline="minimum 0.3979; random search 0.999 (branin_random)"
        ),
        "svc_accuracy": Gate(
            at_least=0.985,
            baseline="logistic regression 0.969; the default C and gamma reach 0.987"
            " (svc_accuracy_default), random search 0.989 (svc_accuracy_random)",
        ),
    },
    smoke=Hyperparameters(
        search="tpe", branin_trials=30, svc_trials=8, folds=2, inner_folds=2, samples=600
    ),
    smoke_gates={
        "branin": Gate(at_most=2.0, baseline="mean of the function: 54"),
        "svc_accuracy": Gate(at_least=0.9, baseline="chance: 0.1"),
    },
    load=svc.load,
    sample=[{"features": _ONE}],
    space={"svc_trials": Int(low=5, high=40), "inner_folds": Int(low=2, high=5)},
    licence="Apache-2.0",
    data=(
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak 1998, UCI Machine"
        " Learning Repository, CC BY 4.0, test part, as scikit-learn carries it: 1 797 images of"
        " 8 x 8 grey values"
    ),
)
