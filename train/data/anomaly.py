"""Benign tumours among which a few malignant ones hide, from scikit-learn's breast cancer data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from models.errors import ConfigError
from train.data import record

Array: TypeAlias = NDArray[np.float64]

MALIGNANT = 21

CARD = (
    "Breast Cancer Wisconsin (Diagnostic), W. Wolberg, N. Street and O. Mangasarian 1995, UCI"
    " Machine Learning Repository, CC BY 4.0, as scikit-learn carries it: 30 measurements of cell"
    " nuclei a row. All 357 benign rows and the first 21 malignant ones, in the order of the"
    " file: 378 rows with 5.6 % outliers, the proportions of the benchmark WBC of ODDS. Labels are"
    " used to measure, never to fit."
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    values: Array
    """(378, 30)"""
    malignant: NDArray[np.bool_]
    """(378,)"""
    features: tuple[str, ...]


def tumours() -> Rows:
    data = _whole()
    malignant = data.target == 0
    chosen = np.sort(
        np.concatenate([np.flatnonzero(~malignant), np.flatnonzero(malignant)[:MALIGNANT]])
    )
    return Rows(
        values=np.asarray(data.data[chosen], dtype=np.float64),
        malignant=malignant[chosen],
        features=tuple(str(name) for name in data.feature_names),
    )


def unseen() -> Array:
    """(191, 30): the malignant rows that are not among :func:`tumours`."""
    data = _whole()
    return np.asarray(data.data[data.target == 0][MALIGNANT:], dtype=np.float64)


def _whole() -> Any:
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise ConfigError(
            "The breast cancer data need pip install 'frontier-run[anomaly]'."
        ) from error
    found = load_breast_cancer()
    digest = hashlib.sha256(found.data.tobytes() + found.target.tobytes()).hexdigest()
    record("breast-cancer", sha256=digest, licence="CC-BY-4.0", rows=len(found.target))
    return found
