"""A recipe for tests of sweeps: climbs towards a height that its configuration decides.

``python -m tests.tune.hill FOLDER '{"trials": 6}' RAY_TEMP_DIR`` sweeps it on 2 CPUs, in a
process that a test can kill.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tests.train.collecting import archive_and_collect
from train.recipe import Config, Gate, Metrics, Recipe, RunContext
from train.space import Choice, Float, Int


class Rope(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(default=4, ge=1, le=64)
    strong: bool = True


class Hill(Config):
    pace: float = Field(default=0.5, gt=0, le=1)
    """The nearer to 0.7, the higher it comes."""
    boots: str = "leather"
    rope: Rope = Rope()
    guide: Rope | None = None
    steps: int = Field(default=10, ge=1)
    seconds: float = 0.0
    """Of one step."""
    falls: bool = False
    log: str = ""
    """A file that gets a line for every step taken, by whichever process."""


def height(config: Hill, step: int) -> float:
    top = 1 - abs(config.pace - 0.7) + (0.1 if config.boots == "nailed" else 0.0)
    return top * (1 - 0.5 ** (10 * step / config.steps))


def run(config: Hill, context: RunContext) -> Metrics:
    begun = 0
    if context.checkpoint is not None:
        begun = json.loads((context.checkpoint / "state.json").read_text())["step"]
    for step in range(begun + 1, config.steps + 1):
        time.sleep(config.seconds)
        if config.falls and step > config.steps / 2:
            raise RuntimeError("fell")
        if config.log:
            with open(config.log, "a") as log:
                log.write(f"{context.out.name} {step} {os.getpid()}\n")

        def save(folder: Path, step: int = step) -> None:
            (folder / "state.json").write_text(json.dumps({"step": step}))

        context.report(
            {"height": height(config, step)}, step=step, total=config.steps, checkpoint=save
        )
    (context.artifact / "hill.json").write_text(config.model_dump_json())
    return {"height": height(config, config.steps), "steps": float(config.steps)}


RECIPE = Recipe(
    name="hill",
    summary="Climbs",
    kind="hill",
    config=Hill,
    run=run,
    gates={"height": Gate(at_least=0.9, baseline="the valley: 0")},
    smoke=Hill(steps=2),
    space={
        "pace": Float(low=0.1, high=1.0),
        "boots": Choice(("leather", "nailed")),
        "rope.length": Int(low=1, high=8, log=True),
    },
)


def climb_on(config: Hill, context: RunContext) -> Metrics:
    """From another hill's top, which somebody archives and collects meanwhile."""
    archive_and_collect("hill@1")
    top = Hill.model_validate_json((context.inputs["hill"] / "hill.json").read_text())
    return {"height": height(top, top.steps)}


def main() -> None:
    import ray

    from tune.config import resolve
    from tune.sweep import run as sweep

    folder, document = Path(sys.argv[1]), json.loads(sys.argv[2])
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[3], log_to_driver=False)
    sweep(RECIPE, resolve(RECIPE, [document]), folder)
    ray.shutdown()


if __name__ == "__main__":
    from tests.tune import hill  # so that workers find its functions under this name

    hill.main()
