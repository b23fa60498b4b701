from __future__ import annotations

import httpx

from tests.gateway.fakes import World


async def test_alive(client: httpx.AsyncClient) -> None:
    answer = await client.get("/healthz")
    assert answer.json()["data"] == {"status": "alive"}


async def test_ready(client: httpx.AsyncClient) -> None:
    answer = await client.get("/readyz")
    assert answer.json()["data"] == {"components": {"smollm2": True}}


async def test_not_ready_says_why(client: httpx.AsyncClient, world: World) -> None:
    world.readiness = {"smollm2": "loading", "minilm": False, "state": True}
    answer = await client.get("/readyz")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "UNAVAILABLE")
    assert error["message"] == "Not ready. minilm: not ready; smollm2: loading."
    assert error["details"] == {
        "components": {"smollm2": "loading", "minilm": False, "state": True}
    }


async def test_metrics_are_prometheus_text(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.get("/metrics")
    assert answer.content == world.metrics_text
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_a_head_has_the_headers_alone(client: httpx.AsyncClient) -> None:
    answer = await client.head("/healthz")
    assert answer.status_code == 200
