"""From one command to traffic: every recipe that predicts registers as a person does it, and a
replica serves what its alias names, by configuration alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from filelock import FileLock

from deployments import replicas
from deployments.config import PredictModel, parse
from deployments.observability.events import BatchRan, Event
from deployments.replicas import PredictorReplica
from models import artifact
from models.contracts import Standing
from models.errors import InvalidInput
from models.sources import registry as source
from models.versions import Version
from tests.conformance.conftest import ROOT, maker, same, several
from train.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ALIAS = "candidate"
"""An alias without gates: a smoke run is to be no champion."""
STANDING = Standing(timeout_s=120.0)


@dataclass(frozen=True, slots=True)
class Registry:
    """Of all test processes: smoke runs that were registered, each with an alias."""

    home: Path

    def add(self, recipe: Recipe[Any]) -> Version:
        """Train and register, once; what it starts from comes from the registry, too."""
        inputs = [f"{kind}={self.add(maker(kind)).name}@{ALIAS}" for kind in recipe.inputs]
        words = [word for each in inputs for word in ("--input", each)]
        done = self.home / f"{recipe.name}.done"
        with FileLock(f"{done}.lock"):
            if not done.exists():
                run("train", recipe.name, "--smoke", "--register", *words)
                run("models", "promote", f"{recipe.name}@1", "--to", ALIAS)
                done.touch()
        return source.resolve(f"{recipe.name}@{ALIAS}")


def run(module: str, *words: str) -> None:
    """``python -m module words…``. A recipe that lacks a library is skipped."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode == 2 and "needs pip install" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "registry"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("FRONTIER_HOME", str(home))
    return Registry(home)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A replica as ``serve_config.yaml`` makes it, and what it does."""

    version: Version
    shell: PredictorReplica
    max_input_bytes: int
    batches: list[int] = field(default_factory=list)
    """Their sizes."""


@pytest_asyncio.fixture
async def served(
    recipe: Recipe[Any], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    if recipe.load is None:
        pytest.skip("predicts nothing")
    version = await asyncio.to_thread(registry.add, recipe)
    batches: list[int] = []

    def notice(event: Event) -> None:
        if isinstance(event, BatchRan):
            batches.append(event.rows)

    monkeypatch.setattr(replicas, "_observers", lambda: notice)
    monkeypatch.setattr(replicas, "_replica", lambda: "r1")
    entry = {"task": "predict", "source": f"registry:{recipe.name}@{ALIAS}"}
    config = parse({"models": {recipe.name: entry}})
    model = config.models[recipe.name]
    assert isinstance(model, PredictModel)
    shell = PredictorReplica(
        recipe.name, model.model_dump(mode="json"), config.registry.model_dump(mode="json")
    )
    shell.reconfigure(model.batcher.limits())
    yield Served(
        version=version, shell=shell, max_input_bytes=model.max_input_bytes, batches=batches
    )
    for task in shell._tasks:
        task.cancel()
    await asyncio.gather(*shell._tasks, return_exceptions=True)
    await shell._catalogue.close()


async def test_it_answers_many_at_a_time_from_its_alias(
    recipe: Recipe[Any], served: Served
) -> None:
    inputs = several(recipe.sample)
    predictor = await asyncio.to_thread(artifact.load, source.folder_of(served.version))
    expected = list(await asyncio.to_thread(predictor.predict_batch, inputs))

    answers = await asyncio.gather(
        *(served.shell.predict([each], STANDING) for each in inputs * 4),
        served.shell.predict(inputs, STANDING),
    )
    outputs = [answer for answer in answers if isinstance(answer, tuple)]
    assert outputs == answers, "no request failed"
    assert {version for _, version in outputs} == {f"{recipe.name}@1"}
    assert same([output for [output], _ in outputs[:-1]], expected * 4)
    assert same(outputs[-1][0], expected)
    assert sum(served.batches) == 5 * len(inputs)
    assert len(served.batches) < len(answers), "clients share batches"


async def test_its_sample_and_its_answer_pass_the_wire(recipe: Recipe[Any], served: Served) -> None:
    for each in recipe.sample:
        assert len(json.dumps(each).encode()) <= served.max_input_bytes
    answer = await served.shell.predict(list(recipe.sample), STANDING)
    assert isinstance(answer, tuple), answer
    outputs, _ = answer
    assert len(outputs) == len(recipe.sample)
    assert json.loads(json.dumps(outputs, allow_nan=False)) == outputs


async def test_what_it_cannot_predict_for_is_refused_by_its_place(
    recipe: Recipe[Any], served: Served
) -> None:
    refusal = await served.shell.predict([recipe.sample[0], None], STANDING)
    assert isinstance(refusal, InvalidInput)
    assert refusal.param == "inputs[1]"


def test_its_lineage_is_known(recipe: Recipe[Any], registry: Registry) -> None:
    if recipe.load is None:
        pytest.skip("predicts nothing")
    version = registry.add(recipe)
    manifest = artifact.read(source.folder_of(version))
    assert (version.kind, manifest.name) == (recipe.kind, recipe.name)
    assert manifest.run is not None
    assert (manifest.run.recipe, manifest.passed) == (recipe.name, True)
    assert set(manifest.parents) == {registry.add(maker(kind)).artifact for kind in recipe.inputs}
