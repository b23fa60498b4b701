"""Models that come from the registry: two versions of each, and how requests ask for them.

``poet`` is an adapter of ``tiny``, ``eye`` the artifact behind ``eyes``; the first version of
each is the champion.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from deployments.launcher.background import Served
from models import artifact
from models.artifact import Facts
from models.predictors import image
from models.registry import open_registry
from models.store import Store
from tests import tiny_models
from tests.cluster.conftest import tiny_args
from tests.engines import adapters

ADAPTERS = "/admin/v1/models/tiny/adapters"
PREDICT = "/v1/models/eyes/predict"
BLANK = [[0, 0, 0, 0]] * 4
"""An image that ``eyes`` takes."""


def poet_and_eye(folder: Path, *, replicas: int) -> dict[str, Any]:
    """Register them, and return application args that serve them."""
    base = tiny_models.make("llama", folder / "base", context=512)
    for seed in (1, 2):
        layers = adapters.LAYERS["llama"]
        poet = adapters.make(
            base, folder / f"poet{seed}", seed=seed, target_modules=layers, r=4, lora_alpha=32
        )
        register(poet, Facts(name="poet", kind="causal-lm"))
        eye = folder / f"eye{seed}"
        eye.mkdir()
        small = image.Architecture(channels=(2,), hidden=4, classes=3, height=4, width=4)
        image.save(eye, image.build(small, seed=seed), small)
        register(eye, Facts(name="eye", kind="classifier", loader="models.predictors.image:load"))
    asyncio.run(point("poet", 1))
    asyncio.run(point("eye", 1))
    args = tiny_args(base, replicas=replicas, slots=8)
    args["models"]["eyes"] = {
        "task": "predict",
        "source": "registry:eye@champion",
        "replicas": {"min": replicas, "max": replicas, "cpus": 0, "drain_s": 1},
    }
    args["registry"] = {"heartbeat_s": 5}
    return args


def register(folder: Path, facts: Facts) -> None:
    manifest = artifact.seal(folder, facts)

    async def add() -> None:
        async with open_registry() as registry:
            await registry.register(manifest, Store().publish(folder), by="test")

    asyncio.run(add())


async def point(name: str, number: int) -> None:
    """Make a version the champion."""
    async with open_registry() as registry:
        await registry.promote(
            f"{name}@{number}", "champion", expected=None, by="test", approve=True
        )


def chat(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}


def ask(platform: Served, model: str, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    url = f"{platform.url}/v1/completions"
    return httpx.post(url, json=chat(model), headers=headers, timeout=60)


def answer(platform: Served, model: str) -> str:
    response = ask(platform, model)
    assert response.status_code == 200, response.text
    said: str = response.json()["choices"][0]["text"]
    return said


def predicted(platform: Served) -> tuple[str, Any]:
    """The version behind ``eyes``, and what it sees in a blank image."""
    response = httpx.post(platform.url + PREDICT, json={"inputs": [BLANK]}, timeout=60)
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    return data["version"], data["predictions"]
