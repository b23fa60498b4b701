"""Every request's end says which version did the work, for the ledger."""

from __future__ import annotations

import httpx
import pytest

from deployments.gateway.app import create_app
from models.contracts import Versions
from models.errors import UpstreamError
from tests.gateway.asgi import RawCall
from tests.gateway.fakes import World
from tests.gateway.test_cache import CHAT, EMBED, chatting, outcome
from tests.gateway.test_cache import world as caching_world

__all__ = ["caching_world"]

TOLD = Versions(model="chat@7", adapter="poet@2")
CONFIGURED = Versions(model="wheel:smollm2==1")


@pytest.fixture
def world(caching_world: World) -> World:
    caching_world.adapters.add("smollm2", "poet")  # type: ignore[attr-defined]
    caching_world.generator.versions = TOLD
    return caching_world


def told(world: World) -> list[Versions]:
    return [event.versions for event in world.recorder.finished]


async def test_who_answered_says_so_and_the_cache_remembers(
    client: httpx.AsyncClient, world: World
) -> None:
    asking = chatting(model="smollm2:poet")
    answers = [await client.post(CHAT, json=asking) for _ in range(2)]
    assert [outcome(answer) for answer in answers] == ["miss", "hit"]
    assert told(world) == [TOLD, TOLD]


async def test_before_anything_was_said_it_is_what_is_configured(
    client: httpx.AsyncClient, world: World
) -> None:
    world.generator.error = UpstreamError("lost")
    await client.post(CHAT, json=chatting(temperature=1))
    assert told(world) == [CONFIGURED]


async def test_a_stream_that_is_left_early_has_said_it(world: World) -> None:
    world.generator.pieces, world.generator.delay_s = ("a",) * 1000, 0.01
    call = RawCall(create_app(world.services()), CHAT, chatting(temperature=1, stream=True))
    await call.until(messages=4)
    call.hang_up()
    await call.task
    assert told(world) == [TOLD]


async def test_models_that_embed_and_predict(client: httpx.AsyncClient, world: World) -> None:
    for _ in range(2):  # the second from the cache
        await client.post(EMBED, json={"model": "minilm", "input": "a"})
    await client.post("/v1/models/digits/predict", json={"inputs": [1]})
    minilm = Versions(model="wheel:minilm==1")
    assert told(world) == [minilm, minilm, Versions(model="digits@3")]
