"""Hyper-parameter optimisation (system 14): C and gamma of a support vector classifier.

A run is one point of the space, judged by cross-validation on scikit-learn's digits; the
search is a sweep like any other, ``python -m tune --config tune/sweeps/hyperparameters.yaml``,
and the best of it a run like any other, ``python -m train --config SWEEP_DIR/best.yaml``. The
folds are its steps, so that a scheduler need not wait for all of them.

A search is only as good as what it finds is on data that it has not seen: with ``held_out``
a fifth of the digits is kept out of everything, and only told of. Five such sweeps are a nested
cross-validation (``python -m benchmarks.tune --only searchers``). scikit-learn's default gamma
was made for such data, so that there is next to nothing to gain; what this shows is that a
search does not overfit what it sees. ``branin`` is the other half of the system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from models.errors import ConfigError
from models.predictors import svc
from train import data
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.space import Float

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Hyperparameters(Config):
    C: float = Field(default=10.0, gt=0)
    gamma: float = Field(default=1e-3, gt=0)
    """Of the Gaussian kernel."""
    folds: int = Field(default=5, ge=2)
    """Of the cross-validation."""
    held_out: int | None = Field(default=None, ge=0)
    """One of ``folds`` parts that neither a fold nor the artifact learns from; the metric
    ``held_out_accuracy`` is of it. A sweep must not look at that."""
    samples: int = Field(default=1797, ge=100, le=1797)
    """Digits used; fewer for a quick look."""

    @model_validator(mode="after")
    def _there_is_such_a_part(self) -> Hyperparameters:
        if self.held_out is not None and self.held_out >= self.folds:
            raise ValueError(f"held_out is one of 0 … {self.folds - 1} (given: {self.held_out})")
        return self


def run(config: Hyperparameters, context: RunContext) -> Metrics:
    features, labels = _digits(config.samples)
    rows: list[int] = list(range(len(labels)))
    held_out: list[int] = []
    if config.held_out is not None:
        rows, held_out = parts(labels, config.folds, config.seed)[config.held_out]

    hits = tried = 0
    for step, (train, test) in enumerate(parts(labels[rows], config.folds, config.seed), 1):
        fitted = _fit(config, features, labels, [rows[i] for i in train])
        hits += _hits(fitted, features, labels, [rows[i] for i in test])
        tried += len(test)
        context.report({"svc_accuracy": hits / tried}, step=step, total=config.folds)

    fitted = _fit(config, features, labels, rows)
    svc.save(context.artifact, fitted)
    metrics = {"svc_accuracy": hits / tried, "support_vectors": float(fitted.n_support_.sum())}
    if held_out:
        right = _hits(fitted, features, labels, held_out)
        metrics["held_out_accuracy"] = right / len(held_out)
    return metrics


def parts(labels: NDArray[np.int64], folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(All other rows, a fold's own) of each fold; every digit is equally often in all."""
    from sklearn.model_selection import StratifiedKFold

    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [(train.tolist(), test.tolist()) for train, test in split.split(labels, labels)]


def _fit(
    config: Hyperparameters,
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    rows: Sequence[int],
) -> Any:
    from sklearn.svm import SVC

    return SVC(C=config.C, gamma=config.gamma).fit(features[rows], labels[rows])


def _hits(
    fitted: Any, features: NDArray[np.float64], labels: NDArray[np.int64], rows: Sequence[int]
) -> int:
    return int((fitted.predict(features[rows]) == labels[rows]).sum())


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
    summary="A support vector classifier of digits, whose C and gamma a sweep has found",
    kind="svc",
    config=Hyperparameters,
    run=run,
    gates={
        "svc_accuracy": Gate(
            at_least=0.985,
            baseline="logistic regression 0.969; scikit-learn's default C and gamma 0.987",
        ),
    },
    smoke=Hyperparameters(folds=2, samples=600),
    smoke_gates={"svc_accuracy": Gate(at_least=0.9, baseline="chance: 0.1")},
    load=svc.load,
    sample=[{"features": _ONE}],
    space={
        "C": Float(low=1e-2, high=1e3, log=True),
        "gamma": Float(low=1e-5, high=1e-1, log=True),
    },
    licence="Apache-2.0",
    data=(
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak 1998, UCI Machine"
        " Learning Repository, CC BY 4.0, test part, as scikit-learn carries it: 1 797 images of"
        " 8 x 8 grey values"
    ),
)
