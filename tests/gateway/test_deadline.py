"""The hard limit holds for slow models, slow bodies and slow readers alike."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from deployments.config import GatewayConfig
from deployments.gateway.app import create_app
from deployments.gateway.policies import failures
from tests.gateway.asgi import RawCall
from tests.gateway.contract import chunks
from tests.gateway.fakes import FakeEmbedder, FakeGenerator, World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_embeddings import PATH as EMBED
from tests.gateway.test_embeddings import asking as embedding
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import asking


def impatient(**generator: Any) -> World:
    return World(config=GatewayConfig(request_timeout_s=0.2), generator=FakeGenerator(**generator))


async def test_an_answer_that_takes_too_long() -> None:
    world = impatient(delay_s=60)
    call = RawCall(create_app(world.services()), INFER, asking())
    await call.task
    assert call.status == 504
    error = orjson.loads(call.bodies[0])["error"]
    assert error["code"] == "TIMEOUT"
    assert error["message"].startswith("The answer was not complete after 0.2 s")
    assert len(world.generator.cancelled) == 1
    [event] = world.recorder.finished
    assert (event.status, event.code) == (504, "TIMEOUT")


async def test_a_stream_that_takes_too_long_keeps_what_has_come() -> None:
    world = impatient(pieces=["a"] * 1000, delay_s=0.01)
    call = RawCall(create_app(world.services()), CHAT, chatting(stream=True))
    await call.task
    told = chunks(b"".join(call.bodies).decode())
    assert told[0]["choices"][0]["delta"]["content"] == "a"
    assert told[-1]["error"]["type"] == "timeout_error"
    [event] = world.recorder.finished
    assert (event.status, event.code) == (200, "TIMEOUT")


async def test_embeddings_have_a_limit_of_their_own() -> None:
    world = World(embedder=FakeEmbedder(delay_s=60))
    world.config = GatewayConfig(predict_timeout_s=0.05)
    call = RawCall(create_app(world.services()), EMBED, embedding())
    await call.task
    assert call.status == 504
    assert world.embedder.cancelled == 1


async def test_a_body_that_never_ends() -> None:
    call = RawCall(create_app(impatient().services()), INFER)
    call.feed(b"{", more=True)
    await call.task
    assert call.status == 504


async def test_a_client_that_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "PATIENCE_S", 0.05)
    world = impatient(pieces=["a"] * 1000, delay_s=0.001)
    call = RawCall(create_app(world.services()), CHAT, chatting(stream=True))
    await call.until(2)
    call.writable.clear()
    with pytest.raises(TimeoutError):  # the server closes the connection of an app that raises
        await asyncio.wait_for(call.task, 30)
    assert len(world.generator.cancelled) == 1
    assert world.recorder.finished[0].code == "TIMEOUT"


async def test_a_worker_s_own_timeout_error_is_not_the_deadline() -> None:
    world = World(generator=FakeGenerator(error=TimeoutError("inside")))
    call = RawCall(create_app(world.services()), INFER, asking())
    await call.task
    assert call.status == 500
