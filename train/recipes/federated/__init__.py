"""Federated learning: many clients train one model, and nobody sees another's data or update.

__init__.py  what a person may set, and the recipe
rounds.py    the server: who is in a round, sum, step, checkpoint
client.py    a client: an actor that keeps its images and its secrets
secure.py    secure aggregation
privacy.py   clipping, noise and what they cost
"""

from __future__ import annotations

from pydantic import Field, model_validator

from models.predictors import image
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.recipes import vision
from train.space import Choice, Float, Int


class Federated(Config):
    clients: int = Field(default=20, ge=2, le=200)
    shards: int = Field(default=2, ge=1)
    """Each client's share: so many pieces of the training images sorted by label. 2: most know
    two digits and have never seen the others (McMahan et al. 2017)."""
    rounds: int = Field(default=40, ge=1)
    rate: float = Field(default=1.0, gt=0, le=1)
    """Probability with which a client is in a round, independently of the others."""
    epochs: int = Field(default=2, ge=1)
    """Of each client over its own images in each round."""
    batch_size: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=0.05, gt=0)
    proximal: float = Field(default=0.0, ge=0)
    """FedProx's mu (Li et al. 2020): pulls a client back to the model it got. 0: FedAvg."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a client of a round is gone before it has answered."""
    secure: bool = True
    """Whether the server sees only the sum of a round. The metrics are the same either way."""
    clip: float | None = Field(default=None, gt=0)
    """Greatest length of an update; needed for ``noise``."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of the Gaussian noise in a round's sum, in units of ``clip``."""
    delta: float = Field(default=1e-3, gt=0, lt=1)
    """The metric ``epsilon`` is for this delta; well below 1 / clients."""
    noise_seed: int | None = Field(default=None, ge=0)
    """Without one, clients are drawn and noise is made from the operating system's randomness:
    private, and never the same twice. A number makes a private run repeatable, which ends its
    privacy (there is no ``epsilon`` then): for tests."""

    @model_validator(mode="after")
    def _noise_needs_clip(self) -> Federated:
        if self.noise and self.clip is None:
            raise ValueError("noise is in units of clip: set clip, too (1.0 is a good start)")
        return self


def run(config: Federated, context: RunContext) -> Metrics:
    from train.recipes.federated import rounds

    return rounds.run(config, context)


RECIPE = Recipe(
    name="federated",
    summary="FedAvg and FedProx on digits: secure sums, lost clients, differential privacy",
    kind="image-classifier",
    config=Federated,
    run=run,
    gates={
        "accuracy": Gate(
            at_least=0.88,
            baseline="a client alone knows two digits: 0.2; vision, all in one place: 0.984",
        )
    },
    smoke=Federated(clients=6, rounds=2, epochs=1),
    smoke_gates={"accuracy": Gate(at_least=0.4, baseline="a client alone knows two digits: 0.2")},
    load=image.load,
    sample=vision.RECIPE.sample,
    data=vision.RECIPE.data,
    space={
        "learning_rate": Float(low=0.01, high=0.2, log=True),
        "epochs": Int(low=1, high=5),
        "batch_size": Choice((10, 20, 50)),
        "proximal": Choice((0.0, 0.01, 0.1, 1.0)),
    },
)
