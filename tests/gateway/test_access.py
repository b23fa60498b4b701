"""What the subscribers are told when a request is over."""

from __future__ import annotations

import httpx
import pytest

from models.contracts import Priority
from models.errors import Overloaded, UpstreamError
from tests.gateway.fakes import TIMINGS, World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking


async def test_a_whole_answer(client: httpx.AsyncClient, world: World) -> None:
    await client.post(CHAT, json=asking(priority="vip"), headers={"x-request-id": "abc"})
    [event] = world.recorder.finished
    assert (event.request_id, event.route, event.method) == ("abc", CHAT, "POST")
    assert (event.status, event.code) == (200, None)
    assert (event.model, event.priority, event.tenant) == ("smollm2", Priority.VIP, "public")
    assert event.usage is not None
    assert event.usage.completion_tokens == 3
    assert event.timings == TIMINGS
    assert event.ttft_s is None
    assert 0 < event.duration_s < 5


async def test_a_stream(client: httpx.AsyncClient, world: World) -> None:
    world.generator.delay_s = 0.02
    await client.post(CHAT, json=asking(stream=True))
    [event] = world.recorder.finished
    assert event.ttft_s is not None
    assert 0.02 <= event.ttft_s < event.duration_s
    assert event.timings == TIMINGS


async def test_a_refusal(client: httpx.AsyncClient, world: World) -> None:
    world.generator.error = Overloaded("full")
    await client.post(CHAT, json=asking())
    [event] = world.recorder.finished
    assert (event.status, event.code, event.model) == (429, "OVERLOADED", "smollm2")


async def test_a_stream_that_failed_is_a_failure(client: httpx.AsyncClient, world: World) -> None:
    world.generator.error = UpstreamError("lost")
    world.generator.error_after = 1
    await client.post(CHAT, json=asking(stream=True))
    [event] = world.recorder.finished
    assert (event.status, event.code) == (200, "UPSTREAM_ERROR")


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/v1/models/org/model:v1", "/v1/models/{model}", 200),
        ("GET", "/v1/models/nope", "/v1/models/{model}", 404),
        ("PUT", "/v1/infer", "/v1/infer", 405),
        ("GET", "/a/b", "(unmatched)", 404),
        ("GET", "/readyz", "/readyz", 200),
    ],
)
async def test_routes_are_templates(
    client: httpx.AsyncClient, world: World, method: str, path: str, route: str, status: int
) -> None:
    await client.request(method, path)
    [event] = world.recorder.finished
    assert (event.route, event.status) == (route, status)


@pytest.mark.parametrize(
    ("fields", "model"), [({"model": "nope"}, None), ({"top_p": 7}, None), ({}, "smollm2")]
)
async def test_only_names_that_are_served_become_labels(
    client: httpx.AsyncClient, world: World, fields: dict[str, object], model: str | None
) -> None:
    await client.post(CHAT, json=asking(**fields))
    assert world.recorder.finished[0].model == model
