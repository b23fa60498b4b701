"""A run that starts from the artifact of another one."""

from __future__ import annotations

import shutil

from train.recipe import Config, Metrics, Recipe, RunContext


def run(config: Config, context: RunContext) -> Metrics:
    shutil.copy(context.inputs["walk"] / "walk.json", context.artifact / "walk.json")
    return {}


RECIPE = Recipe(
    name="copy",
    summary="Another artifact, copied",
    kind="copy",
    config=Config,
    run=run,
    gates={},
    smoke=Config(),
    inputs=("walk",),
)
