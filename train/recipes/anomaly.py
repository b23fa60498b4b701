"""System 22, anomaly detection: five detectors fitted without labels.

An isolation forest, an autoencoder, the z-score, Tukey's fences and Grubbs' test look for 21
malignant tumours among 357 benign ones. The malignant rows stay where the detectors learn:
that is the task. What is measured are scores out of fold: each row is judged by a detector
that has not seen it. The artifact's detectors are then fitted to all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.predictors import anomaly
from models.predictors.anomaly import Array, Autoencoder, Detector, Distance, Fence, Forest
from train.data import anomaly as data
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.space import Float, Int

Name = Literal["forest", "autoencoder", "zscore", "iqr", "grubbs"]


class Anomaly(Config):
    methods: tuple[Name, ...] = ("forest", "autoencoder", "zscore", "iqr", "grubbs")
    serve: Name = "forest"
    """The method of a request that names none."""
    contamination: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the training rows above the threshold."""
    folds: int = Field(default=5, ge=2, le=50)

    trees: int = Field(default=200, ge=1, le=10_000)
    sample: int = Field(default=256, ge=2)
    """Rows that one tree sees."""

    hidden: int = Field(default=16, ge=1)
    code: int = Field(default=4, ge=1)
    """Width of the autoencoder where it is narrowest."""
    steps: int = Field(default=400, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)

    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Level of Grubbs' test."""

    @model_validator(mode="after")
    def _serves_what_it_has(self) -> Anomaly:
        if self.serve not in self.methods:
            raise ValueError(f"serve is {self.serve!r}, which is not among methods")
        return self


def run(config: Anomaly, context: RunContext) -> Metrics:
    rows = data.tumours()
    found = _baselines(config, rows)
    methods: dict[str, anomaly.MethodSettings] = {}
    context.artifact.mkdir(parents=True, exist_ok=True)
    for step, name in enumerate(config.methods, start=1):
        folds = _folds(config, name, rows.values)
        judged = context.map(judge_fold, folds)
        scores, flagged = np.empty(len(rows.values)), np.empty(len(rows.values), dtype=bool)
        for fold, (fold_scores, threshold) in zip(folds, judged, strict=True):
            scores[fold.held_out] = fold_scores
            flagged[fold.held_out] = fold_scores > threshold
        measured = {
            f"auc_{name}": _auc(scores, rows.malignant),
            f"recall_{name}": float(flagged[rows.malignant].mean()),
            f"false_alarms_{name}": float(flagged[~rows.malignant].mean()),
        }
        detector = fit(name, rows.values, config)
        seen = detector.scores(rows.values)
        measured[f"auc_in_sample_{name}"] = _auc(seen, rows.malignant)
        methods[name] = _write(detector, _threshold(seen, config), context)
        found |= measured
        context.report(measured, step=step, total=len(config.methods))
    settings = anomaly.Settings(
        features=rows.features,
        default=config.serve,
        methods=methods,
        autoencoder=_widths(config, rows.values),
    )
    (context.artifact / anomaly.FILE).write_text(settings.model_dump_json(indent=2) + "\n")
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fold:
    """One task of the fan-out."""

    config: Anomaly
    name: Name
    rows: Array
    held_out: NDArray[np.intp]


def judge_fold(fold: Fold) -> tuple[Array, float]:
    """Scores of the rows held out, and the threshold from the others."""
    others = np.delete(fold.rows, fold.held_out, axis=0)
    detector = fit(fold.name, others, fold.config)
    return detector.scores(fold.rows[fold.held_out]), _threshold(
        detector.scores(others), fold.config
    )


def fit(name: Name, rows: Array, config: Anomaly) -> Detector:
    fits: Mapping[Name, Callable[[Array, Anomaly], Detector]] = {
        "forest": _forest,
        "autoencoder": _autoencoder,
        "zscore": _zscore,
        "iqr": _iqr,
        "grubbs": _grubbs,
    }
    return fits[name](rows, config)


def _zscore(rows: Array, config: Anomaly) -> Distance:
    return Distance(center=rows.mean(0), spread=_positive(rows.std(0, ddof=1)))


def _iqr(rows: Array, config: Anomaly) -> Fence:
    low, high = np.quantile(rows, [0.25, 0.75], axis=0)
    return Fence(low=low, high=low + _positive(high - low))


def _grubbs(rows: Array, config: Anomaly) -> Distance:
    """Mean and deviation of each feature once Grubbs' test finds no more outliers in it.

    The plain z-score measures outliers with a deviation that they have widened themselves.
    """
    kept = [without_outliers(column, config.alpha) for column in rows.T]
    return Distance(
        center=np.array([column.mean() for column in kept]),
        spread=_positive(np.array([column.std(ddof=1) for column in kept])),
    )


def grubbs_statistic(values: Array) -> float:
    """Largest distance from the mean, in standard deviations."""
    return float(np.abs(values - values.mean()).max() / values.std(ddof=1))


def grubbs_critical(count: int, alpha: float, sides: Literal[1, 2] = 2) -> float:
    """What the statistic of ``count`` normal values exceeds with probability ``alpha`` at most.

    Grubbs (1950), as in section 1.3.5.17.1 of the NIST/SEMATECH e-Handbook of Statistical
    Methods, whose example is one-sided.

    Args:
        sides: 1 where only the largest value, or only the smallest, is suspected.
    """
    from scipy.stats import t

    quantile = float(t.ppf(1 - alpha / (sides * count), count - 2))
    return float((count - 1) / np.sqrt(count) * np.sqrt(quantile**2 / (count - 2 + quantile**2)))


def without_outliers(values: Array, alpha: float) -> Array:
    """Drop the furthest value while Grubbs' test finds it to be an outlier."""
    while len(values) > 3 and values.std() > 0:
        if grubbs_statistic(values) <= grubbs_critical(len(values), alpha):
            break
        values = np.delete(values, np.abs(values - values.mean()).argmax())
    return values


def _forest(rows: Array, config: Anomaly) -> Forest:
    from sklearn.ensemble import IsolationForest

    sample = min(config.sample, len(rows))
    grown = IsolationForest(
        n_estimators=config.trees, max_samples=sample, random_state=config.seed
    ).fit(rows)
    trees = [estimator.tree_ for estimator in grown.estimators_]
    nodes = max(tree.node_count for tree in trees)
    own = np.arange(nodes, dtype=np.int32)
    left, right = np.tile(own, (2, len(trees), 1))
    feature = np.zeros_like(left)
    threshold, length = np.zeros((2, len(trees), nodes))
    deepest = 0
    for row, tree in enumerate(trees):
        depth = np.zeros(tree.node_count, dtype=np.int64)
        for node in np.flatnonzero(tree.children_left >= 0):  # parents come before children
            for child in (tree.children_left[node], tree.children_right[node]):
                depth[child] = depth[node] + 1
        inner = np.flatnonzero(tree.children_left >= 0)
        left[row, inner] = tree.children_left[inner]
        right[row, inner] = tree.children_right[inner]
        feature[row, inner] = tree.feature[inner]
        threshold[row, inner] = tree.threshold[inner]
        length[row, : tree.node_count] = depth + average_path(tree.n_node_samples)
        deepest = max(deepest, int(depth.max()))
    return Forest(
        left=left,
        right=right,
        feature=feature,
        threshold=threshold,
        length=length,
        depth=max(deepest, 1),
        typical=float(average_path(np.array([sample]))[0]),
    )


def average_path(counts: NDArray[np.integer]) -> Array:
    """Mean depth of a random binary search tree over so many points (Liu et al. 2008, eq. 1)."""
    many = np.maximum(counts, 3).astype(np.float64)
    mean = 2 * (np.log(many - 1) + np.euler_gamma) - 2 * (many - 1) / many
    return np.where(counts <= 1, 0.0, np.where(counts == 2, 1.0, mean))


def _autoencoder(rows: Array, config: Anomaly) -> Autoencoder:
    """Each step leaves out the rows that fit worst, as many as may be anomalies: squared errors
    would otherwise teach the network the anomalies first.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = anomaly.autoencoder_network(_widths(config, rows))
    detector = Autoencoder(network, rows.mean(0), _positive(rows.std(0, ddof=1)))
    inputs_nf = torch.from_numpy(detector.standardised(rows))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    kept = math.ceil(len(rows) * (1 - config.contamination))
    for _ in range(config.steps):
        errors_n = ((network(inputs_nf) - inputs_nf) ** 2).mean(1)
        loss = errors_n.topk(kept, largest=False).values.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return detector


def _widths(config: Anomaly, rows: Array) -> tuple[int, ...]:
    features = rows.shape[1]
    return (features, config.hidden, config.code, config.hidden, features)


def _write(detector: Detector, threshold: float, context: RunContext) -> anomaly.MethodSettings:
    arrays: dict[str, Sequence[float]] = {}
    match detector:
        case Forest():
            detector.write(context.artifact / anomaly.FOREST)
        case Autoencoder():
            detector.write(context.artifact / anomaly.AUTOENCODER)
            arrays = {"center": detector.center.tolist(), "spread": detector.spread.tolist()}
        case Distance(center=center, spread=spread):
            arrays = {"center": center.tolist(), "spread": spread.tolist()}
        case Fence(low=low, high=high):
            arrays = {"low": low.tolist(), "high": high.tolist()}
        case _:
            raise TypeError(f"{type(detector).__name__} has no place in an artifact")
    return anomaly.MethodSettings(
        threshold=threshold, arrays={name: tuple(row) for name, row in arrays.items()}
    )


def _threshold(scores: Array, config: Anomaly) -> float:
    return float(np.quantile(scores, 1 - config.contamination))


def _folds(config: Anomaly, name: Name, rows: Array) -> list[Fold]:
    order = np.random.default_rng(config.seed).permutation(len(rows))
    return [
        Fold(config=config, name=name, rows=rows, held_out=np.sort(order[first :: config.folds]))
        for first in range(config.folds)
    ]


def _baselines(config: Anomaly, rows: data.Rows) -> dict[str, float]:
    """Out of fold, too: the length of the standardised row, its distance from as many principal
    components as the autoencoder's code is wide, and the size of the tumour alone.
    """
    norm, pca, radius = np.empty((3, len(rows.values)))
    for fold in _folds(config, "zscore", rows.values):
        others = np.delete(rows.values, fold.held_out, axis=0)
        center, spread = others.mean(0), _positive(others.std(0, ddof=1))
        known = (others - center) / spread
        asked = (rows.values[fold.held_out] - center) / spread
        axes = np.linalg.svd(known, full_matrices=False)[2][: config.code]
        norm[fold.held_out] = np.linalg.norm(asked, axis=1)
        pca[fold.held_out] = ((asked - asked @ axes.T @ axes) ** 2).mean(1)
        radius[fold.held_out] = np.abs(asked[:, 0])
    return {
        "auc_norm": _auc(norm, rows.malignant),
        "auc_pca": _auc(pca, rows.malignant),
        "auc_radius": _auc(radius, rows.malignant),
    }


def _auc(scores: Array, malignant: NDArray[np.bool_]) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(malignant, scores))


def _positive(spread: Array) -> Array:
    """A feature that never varies has any spread but zero."""
    return np.where(spread > 0, spread, 1.0)


SAMPLE_ROW = [
    *(17.99, 10.38, 122.8, 1001.0, 0.1184, 0.2776, 0.3001, 0.1471, 0.2419, 0.07871),
    *(1.095, 0.9053, 8.589, 153.4, 0.006399, 0.04904, 0.05373, 0.01587, 0.03003, 0.006193),
    *(25.38, 17.33, 184.6, 2019.0, 0.1622, 0.6656, 0.7119, 0.2654, 0.4601, 0.1189),
]
"""The first malignant row."""

RECIPE = Recipe(
    name="anomaly",
    summary="Outliers among tumours: isolation forest, autoencoder, z-score, fences, Grubbs",
    kind="anomaly-detector",
    config=Anomaly,
    run=run,
    gates={
        "auc_forest": Gate(
            at_least=0.92,
            baseline="the reference for these 378 rows is .939; length of the row alone .959",
        ),
        "auc_autoencoder": Gate(
            at_least=0.847, baseline="as many principal components: auc_pca .847"
        ),
        "auc_zscore": Gate(at_least=0.847, baseline="four principal components: auc_pca .847"),
        "auc_iqr": Gate(at_least=0.847, baseline="four principal components: auc_pca .847"),
        "auc_grubbs": Gate(
            at_least=0.9152, baseline="the plain z-score, which outliers widen: auc_zscore .9152"
        ),
    },
    smoke_gates={
        "auc_forest": Gate(at_least=0.92, baseline="as in a whole run"),
        "auc_grubbs": Gate(at_least=0.847, baseline="four principal components"),
    },
    smoke=Anomaly(trees=50, folds=2, steps=50),
    load=anomaly.load,
    sample=(
        {"features": SAMPLE_ROW},
        {"features": SAMPLE_ROW, "method": "autoencoder"},
        {"features": [number / 2 for number in SAMPLE_ROW], "method": "grubbs"},
    ),
    space={
        "trees": Int(low=50, high=400, log=True),
        "sample": Int(low=32, high=256, log=True),
        "code": Int(low=1, high=8),
        "learning_rate": Float(low=1e-3, high=3e-2, log=True),
    },
    licence="CC-BY-4.0",
    data=data.CARD,
)
