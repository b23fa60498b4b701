from __future__ import annotations

import pytest

from train.recipes.explain.tabular import shap_errors


@pytest.mark.slow  # importing shap takes seconds
@pytest.mark.filterwarnings(
    "ignore:The set_.* function will be deprecated:PendingDeprecationWarning"  # shap's colours
)
def test_shap_values_of_a_linear_model_are_weight_times_distance_from_the_mean() -> None:
    found = shap_errors(rows=3, seed=1)
    assert found["shap_error"] < 1e-6
    assert found["linear_shap_error"] < 1e-6
    assert found["tabular_accuracy"] > 0.95
