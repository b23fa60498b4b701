"""A run without heavy libraries whose every step depends on all earlier ones."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from models.errors import ConfigError
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.space import Float


class Noise(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(default=1.0, gt=0)


class Walk(Config):
    steps: int = Field(default=20, ge=1)
    """How far."""
    every: int = Field(default=5, ge=1)
    """Steps from checkpoint to checkpoint."""
    pause_s: float = 0.0
    full_at: int = 0
    """The disk is full while the checkpoint of this step is written, for the first time."""
    wrong_at: int = 0
    """A ConfigError at this step."""
    noise: Noise = Noise()


def run(config: Walk, context: RunContext) -> Metrics:
    place, done = 0.0, 0
    if context.checkpoint is not None:
        place, done = json.loads((context.checkpoint / "walk.json").read_text())
    for step in range(done + 1, config.steps + 1):
        place = 0.9 * place + config.noise.scale * random.Random(f"{config.seed} {step}").gauss()
        if step == config.wrong_at:
            raise ConfigError(f"step {step} is wrong")
        full = step == config.full_at and full_once(context.out)
        save = partial(_save, place=place, step=step, full=full)
        due = step % config.every == 0
        context.report(
            {"place": place}, step=step, total=config.steps, checkpoint=save if due else None
        )
        time.sleep(config.pause_s)
    (context.artifact / "walk.json").write_text(json.dumps(place))
    return {"place": place, "steps": float(config.steps)}


def full_once(out: Path) -> bool:
    """True the first time. Somebody frees some space before the run goes on."""
    mark = out / ".was-full"
    first = not mark.exists()
    mark.touch()
    return first


def _save(folder: Path, place: float, step: int, full: bool) -> None:
    if full:
        (folder / "part").write_text("x")
        (folder / "walk.json").symlink_to("/dev/full")
    (folder / "walk.json").write_text(json.dumps([place, step]))


RECIPE = Recipe(
    name="walk",
    summary="A walk of known steps",
    kind="walk",
    config=Walk,
    run=run,
    gates={"steps": Gate(at_least=10, baseline="one step")},
    smoke=Walk(steps=5, noise=Noise(scale=2)),
    smoke_gates={"steps": Gate(at_least=5, baseline="one step")},
    space={"noise.scale": Float(low=0.1, high=10, log=True)},
)
