"""SHAP where the truth is known: of a linear model, each feature's value is w (x - mean)."""

from __future__ import annotations

import hashlib

import numpy as np

from models.errors import ConfigError
from train.data import record


def shap_errors(rows: int, seed: int) -> dict[str, float]:
    """Largest difference between SHAP values and w (x - mean).

    The model is a logistic regression on the breast-cancer data, explained in log-odds.
    ``shap_error`` is that of the permutation explainer, which asks the model for
    answers and does not know that it is linear; ``linear_shap_error`` that of the explainer
    for linear models (Lundberg, Lee 2017, corollary 1).

    Args:
        rows: so many held-out cases are explained.
    """
    try:
        import shap
    except ImportError:
        raise ConfigError("SHAP values need pip install 'frontier-run[explain]'") from None
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    features, target = load_breast_cancer(return_X_y=True)
    digest = hashlib.sha256(features.tobytes() + target.tobytes()).hexdigest()
    record("breast-cancer", sha256=digest, licence="CC-BY-4.0", rows=len(target))
    train, test, y_train, y_test = train_test_split(
        features, target, test_size=0.3, stratify=target, random_state=seed
    )
    scale = StandardScaler().fit(train)
    train, test = scale.transform(train), scale.transform(test)
    model = LogisticRegression().fit(train, y_train)
    explained = test[:rows]
    background = shap.maskers.Independent(train, max_samples=len(train))
    expected = model.coef_[0] * (explained - train.mean(0))
    asked = shap.PermutationExplainer(model.decision_function, background, seed=seed)
    told = shap.LinearExplainer(model, background)
    return {
        "shap_error": _largest(asked(explained, silent=True).values - expected),
        "linear_shap_error": _largest(told(explained).values - expected),
        "tabular_accuracy": float(model.score(test, y_test)),
    }


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max())
