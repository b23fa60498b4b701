"""Branin's function, whose minimum is known: what a search is worth (system 14, with
``hyperparameters``).

A run is one point, a sweep has forty of them to come down to 0.397887:
``python -m tune --config tune/sweeps/branin.yaml``.
"""

from __future__ import annotations

import math

from pydantic import Field

from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.space import Float


class Branin(Config):
    x: float = Field(default=math.pi, ge=-5, le=10)
    """With the default of ``y``, one of the three minima."""
    y: float = Field(default=2.275, ge=0, le=15)


def run(config: Branin, context: RunContext) -> Metrics:
    found = {"branin": branin(config.x, config.y)}
    context.report(found, step=1, total=1)
    return found


def branin(x: float, y: float) -> float:
    """Branin (1972); three minima of 0.397887."""
    valley = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return valley**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


AT_THE_BOTTOM = {
    "branin": Gate(at_most=0.41, baseline="minimum 0.3979; 40 random points come to 0.999")
}

RECIPE = Recipe(
    name="branin",
    summary="A function with a known minimum: how near does a search come?",
    kind="point",
    config=Branin,
    run=run,
    gates=AT_THE_BOTTOM,
    smoke=Branin(x=-math.pi, y=12.275),
    smoke_gates=AT_THE_BOTTOM,
    space={"x": Float(low=-5, high=10), "y": Float(low=0, high=15)},
)
