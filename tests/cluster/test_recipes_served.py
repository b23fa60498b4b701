"""Systems that differ in kind, from one command each to ``/predict`` of one platform."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deployments.launcher.background import Served
from models import artifact
from models.sources import registry
from tests.cluster.conftest import metric, python, serving, wait_until
from tests.conformance.conftest import same
from train.discover import find

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SYSTEMS = ("anomaly", "federated", "hyperparameters", "timeseries", "vision")
ROUNDS, CLIENTS = 5, 8


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All, by an entry each; nothing in it says what they are."""
    folder = tmp_path_factory.mktemp("systems")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRONTIER_HOME", str(folder / "home"))
        for name in SYSTEMS:
            python("train", name, "--smoke", "--register")
            python("models", "promote", f"{name}@1", "--to", "candidate")
        models = {
            name: {
                "task": "predict",
                "source": f"registry:{name}@candidate",
                "replicas": {"cpus": 0, "drain_s": 1},
            }
            for name in SYSTEMS
        }
        args = {"models": models, "gateway": {"replicas": {"cpus": 0, "drain_s": 1}}}
        with serving(args, folder) as platform:
            yield platform


async def test_many_clients_are_answered_in_batches(platform: Served) -> None:
    samples = {name: list(find(name).sample) for name in SYSTEMS}
    expected = {name: predictions(name, inputs) for name, inputs in samples.items()}
    async with httpx.AsyncClient(base_url=platform.url, timeout=60) as http:

        async def client(name: str) -> list[Any]:
            """One input a request, so that only the server can put them together."""
            answers = []
            for _ in range(ROUNDS):
                for each in samples[name]:
                    body = {"inputs": [each]}
                    response = await http.post(f"/v1/models/{name}/predict", json=body)
                    assert response.status_code == 200, response.text
                    data = response.json()["data"]
                    assert data["version"] == f"{name}@1"
                    answers += data["predictions"]
            return answers

        asking = [(name, client(name)) for name in SYSTEMS for _ in range(CLIENTS)]
        answers = await asyncio.gather(*(client for _, client in asking))
    for (name, _), answered in zip(asking, answers, strict=True):
        assert same(answered, expected[name] * ROUNDS)
    for name in SYSTEMS:
        inputs = CLIENTS * ROUNDS * len(samples[name])
        told = f"the metrics of {name}"
        wait_until(lambda n=name, of=inputs: rows(platform, n) >= of, timeout_s=60, what=told)
        batches = metric(platform, "frontier_batch_size_count", model=name)
        assert batches < rows(platform, name), "clients share batches"


def rows(platform: Served, name: str) -> float:
    """Inputs computed so far."""
    return metric(platform, "frontier_batch_size_sum", model=name)


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_it_cannot_predict_for_is_named(platform: Served, name: str) -> None:
    body = {"inputs": [find(name).sample[0], {"no such field": 1}]}
    answered = httpx.post(f"{platform.url}/v1/models/{name}/predict", json=body, timeout=60)
    error = answered.json()["error"]
    assert (answered.status_code, error["details"]["param"]) == (400, "inputs[1]")


def predictions(name: str, inputs: list[Any]) -> list[Any]:
    """Of the artifact itself."""
    folder = registry.folder_of(registry.resolve(f"{name}@candidate"))
    return list(artifact.load(folder).predict_batch(inputs))
