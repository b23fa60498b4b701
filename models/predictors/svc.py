"""A support vector classifier with a Gaussian kernel: {label, votes}. Needs numpy only.

::

    model.json      gamma, classes, how many support vectors each class has, the input's range
    model.npz       support vectors, dual coefficients, intercepts: float64, no pickles

Classes are compared in pairs and the one with the most votes wins, the first of equals: what
libsvm does (Chang & Lin 2011), so that the label is the one scikit-learn gives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from models.contracts import Json
from models.errors import ConfigError
from models.predictors.requests import Input, Number, parse, refuse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FACTS, ARRAYS = "model.json", "model.npz"


class Features(Input):
    features: Annotated[list[Number], Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Svc:
    """s support vectors of f features, sorted by class; k classes, so k (k - 1) / 2 pairs."""

    classes: tuple[int, ...]
    gamma: float
    counts: tuple[int, ...]
    """Support vectors of each class."""
    vectors: NDArray[np.float64]
    """(s, f)"""
    coefficients: NDArray[np.float64]
    """(k - 1, s), as libsvm stores them: row j - 1 of a vector of class i < j is for the pair
    (i, j), row j of one of class i > j for the pair (j, i)."""
    intercepts: NDArray[np.float64]
    """(k (k - 1) / 2,), pairs in the order (0, 1), (0, 2), … (1, 2), …"""

    def votes(self, inputs: NDArray[np.float64]) -> NDArray[np.int64]:
        """(n, f) → (n, k)."""
        import numpy as np

        # Row by row, so that no row's rounding depends on its batch mates.
        kernel = np.stack(
            [np.exp(-self.gamma * np.square(self.vectors - row).sum(axis=1)) for row in inputs]
        )
        ends = np.cumsum([0, *self.counts])
        votes = np.zeros((len(inputs), len(self.classes)), dtype=np.int64)
        pair = 0
        for i in range(len(self.classes)):
            for j in range(i + 1, len(self.classes)):
                ours, theirs = slice(ends[i], ends[i + 1]), slice(ends[j], ends[j + 1])
                decision = (
                    (kernel[:, ours] * self.coefficients[j - 1, ours]).sum(axis=1)
                    + (kernel[:, theirs] * self.coefficients[i, theirs]).sum(axis=1)
                    + self.intercepts[pair]
                )
                votes[:, i] += decision > 0
                votes[:, j] += decision <= 0
                pair += 1
        return votes

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        """``{"features": [f numbers]}`` → ``{"label", "votes"}``.

        Raises:
            InvalidInput: naming the input at fault.
        """
        import numpy as np

        rows = [each.features for each in parse(Features, inputs)]
        width = self.vectors.shape[1]
        for index, row in enumerate(rows):
            if len(row) != width:
                problem = f"features has {len(row)} numbers, expected {width}."
                raise refuse(index, "features", problem)
        if not rows:
            return []
        votes = self.votes(np.asarray(rows, dtype=np.float64))
        return [
            {"label": self.classes[int(line.argmax())], "votes": [int(vote) for vote in line]}
            for line in votes
        ]


def save(folder: Path, fitted: Any) -> None:
    """Keep a fitted ``sklearn.svm.SVC`` with an RBF kernel and integer classes.

    Raises:
        ValueError: it has another kernel, or two classes, whose signs libsvm turns round.
    """
    import numpy as np

    classes = [int(label) for label in fitted.classes_]
    if fitted.kernel != "rbf" or len(classes) < 3:
        raise ValueError("expected a Gaussian kernel and three classes at least")
    facts = {
        "classes": classes,
        "gamma": float(fitted._gamma),  # also where gamma was "scale"
        "counts": [int(count) for count in fitted.n_support_],
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    np.savez(
        folder / ARRAYS,
        vectors=fitted.support_vectors_,
        coefficients=fitted.dual_coef_,
        intercepts=fitted.intercept_,
    )


def load(folder: Path) -> Svc:
    """The predictor of an artifact.

    Raises:
        ConfigError: the files do not fit together.
    """
    import numpy as np

    facts = json.loads((folder / FACTS).read_text())
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        model = Svc(
            classes=tuple(facts["classes"]),
            gamma=facts["gamma"],
            counts=tuple(facts["counts"]),
            vectors=arrays["vectors"],
            coefficients=arrays["coefficients"],
            intercepts=arrays["intercepts"],
        )
    k, s = len(model.classes), len(model.vectors)
    shapes = model.coefficients.shape, model.intercepts.shape
    if (
        len(model.counts) != k
        or sum(model.counts) != s
        or shapes != ((k - 1, s), (k * (k - 1) // 2,))
    ):
        raise ConfigError(f"{folder}: {FACTS} and {ARRAYS} do not fit together.")
    return model
