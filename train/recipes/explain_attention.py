"""Explainable AI (system 8), of attention: which months a forecasting Transformer looked at.

The Transformer is the artifact of another run. Attention is only an explanation if what it points
to matters: so months are taken away from the network, in the order of their attention, and the
sooner its forecast moves, the better. The last season stays, since the network's forecast starts
from it whatever it looks at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from models.errors import ConfigError
from models.predictors import forecast_attention
from train.data import Part, m3
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.recipes import timeseries

if TYPE_CHECKING:
    from torch import Tensor

    from models.predictors.forecast.networks import Ensemble


class ExplainAttention(Config):
    series: int = Field(default=300, ge=1, le=1428)
    """So many of M3's monthly ones."""
    part: Part = "test"
    """Of each series: explained is the forecast of its last 18 months, or of those before."""


def run(config: ExplainAttention, context: RunContext) -> Metrics:
    import torch

    source = context.inputs["forecaster"]
    _, network = forecast_attention.transformer_of(source)
    ensemble = network.ensemble
    logs_bc, known_bc = network.seen(_monthly(config, network.settings.shortest))
    shares_bc = forecast_attention.attention(ensemble, logs_bc, known_bc).mean(1)

    generator = torch.Generator().manual_seed(config.seed)
    months = logs_bc.shape[1]
    ways = {
        "attention": shares_bc,
        "random": torch.rand(shares_bc.shape, generator=generator),
        "recent": torch.arange(months).expand_as(shares_bc),
    }
    areas = {name: deletion(ensemble, logs_bc, known_bc, way) for name, way in ways.items()}
    forecast_attention.save(context.artifact, source)
    _, copy = forecast_attention.transformer_of(context.artifact)
    return {
        **{f"{name}_deletion": area for name, area in areas.items()},
        **{
            f"attention_over_{low}": areas["attention"] - areas[low] for low in ("random", "recent")
        },
        "copy_error": _difference(ensemble, copy.ensemble, logs_bc, known_bc),
    }


def deletion(ensemble: Ensemble, logs_bc: Tensor, known_bc: Tensor, importance_bc: Tensor) -> float:
    """Area under the distance that a forecast has moved while months become unknown.

    The most important go first. 1 is the distance when all but the last season are unknown; large
    is good: what was said to matter did.
    """
    import torch

    removable = logs_bc.shape[1] - ensemble.settings.period
    with torch.inference_mode():
        first_bh = ensemble(logs_bc, known_bc)[..., 1]
        left_bc = known_bc.clone()
        order = importance_bc[:, :removable].argsort(dim=1, descending=True, stable=True)
        moved = [0.0]
        for column in order.T:
            left_bc.scatter_(1, column[:, None], 0.0)
            now_bh = ensemble(logs_bc, left_bc)[..., 1]
            moved.append(float((now_bh - first_bh).abs().mean()))
    curve = torch.tensor(moved, dtype=torch.float64)
    if not curve[-1] > 0:
        return 0.0  # it looks at the last season alone
    return float(torch.trapezoid(curve / curve[-1]) / removable)


def _difference(one: Ensemble, other: Ensemble, logs_bc: Tensor, known_bc: Tensor) -> float:
    import torch

    with torch.inference_mode():
        return float((one(logs_bc, known_bc) - other(logs_bc, known_bc)).abs().max())


def _monthly(config: ExplainAttention, shortest: int) -> list[list[float]]:
    """Raises ConfigError: there are none."""
    found = [
        one.known.tolist()
        for one in m3.m3(config.part)
        if one.group == "monthly" and len(one.known) >= shortest and one.known.min() > 0
    ]
    if not found:
        raise ConfigError(f"no monthly series of M3 has {shortest} values for this network")
    return found[:: max(1, len(found) // config.series)][: config.series]


SAME = Gate(at_most=1e-9, baseline="forecasts of its input, logarithms: 0")

RECIPE = Recipe(
    name="explain_attention",
    summary="Attention rollout: which months a forecasting Transformer looked at",
    kind="explained-forecaster",
    config=ExplainAttention,
    run=run,
    inputs=("forecaster",),
    gates={
        "attention_over_random": Gate(
            at_least=0.1, baseline="taking months away in random order: 0"
        ),
        "copy_error": SAME,
    },
    smoke_gates={"copy_error": SAME},
    smoke=ExplainAttention(series=20),
    load=forecast_attention.load,
    sample=[
        {key: value for key, value in timeseries.RECIPE.sample[0].items() if key != "method"},
        {"series": timeseries.SAMPLE_SERIES[:30], "period": 12, "horizon": 18},
    ],
    licence="Apache-2.0",
    data=m3.CARD,
)
