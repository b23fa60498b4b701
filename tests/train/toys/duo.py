"""A walk that a data-parallel group takes together, in step."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path

from pydantic import Field

from models.errors import ConfigError
from tests.train.toys.walk import full_once
from train.recipe import Config, Gate, Metrics, Recipe, RunContext

SHARDS = 12


class Duo(Config):
    steps: int = Field(default=20, ge=1)
    every: int = Field(default=5, ge=1)
    pause_s: float = 0.0
    full_at: int = 0
    """The disk is full while the checkpoint of this step is written, for the first time."""
    wrong_at: int = 0
    """A ConfigError at this step."""


def run(config: Duo, context: RunContext) -> Metrics:
    rank, size = context.workers.rank, context.workers.size
    place, done = 0.0, 0
    if context.checkpoint is not None:
        place, done = json.loads((context.checkpoint / "duo.json").read_text())
    for step in range(done + 1, config.steps + 1):
        if step == config.wrong_at:
            raise ConfigError(f"step {step} is wrong")
        mine = [_push(config.seed, step, shard) for shard in range(rank, SHARDS, size)]
        place = 0.9 * place + _together(sum(mine), size)
        full = step == config.full_at and rank == 0 and full_once(context.out)
        save = partial(_save, place=place, step=step, full=full)
        due = step % config.every == 0
        context.report(
            {"place": place}, step=step, total=config.steps, checkpoint=save if due else None
        )
        time.sleep(config.pause_s)
    if rank == 0:
        (context.artifact / "duo.json").write_text(json.dumps(place))
    return {"place": place, "workers": float(size)}


def _push(seed: int, step: int, shard: int) -> float:
    return random.Random(f"{seed} {step} {shard}").gauss(0, 1)


def _together(value: float, size: int) -> float:
    if size == 1:
        return value
    import torch
    import torch.distributed as dist

    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared)
    return float(shared.item())


def _save(folder: Path, place: float, step: int, full: bool) -> None:
    if full:
        (folder / "duo.json").symlink_to("/dev/full")
    (folder / "duo.json").write_text(json.dumps([place, step]))


RECIPE = Recipe(
    name="duo",
    summary="A walk that a group takes together",
    kind="duo",
    config=Duo,
    run=run,
    gates={"workers": Gate(at_least=1, baseline="nobody")},
    smoke=Duo(steps=5),
    smoke_gates={"workers": Gate(at_least=1, baseline="nobody")},
    parallel=True,
)
