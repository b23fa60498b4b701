"""A client that goes frees what it held (spec A13), however the server tells us."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import httpx
import pytest

from deployments.gateway.app import create_app
from tests.gateway.asgi import RawCall
from tests.gateway.fakes import FakeEmbedder, FakeGenerator, World
from tests.gateway.server import LiveServer, wait_until
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_embeddings import PATH as EMBED
from tests.gateway.test_embeddings import asking as embedding
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import STREAM, asking


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # fakes have no event to wait for
            await asyncio.sleep(0.001)


async def running(world: World) -> None:
    await until(lambda: world.generator.running > 0)


@pytest.mark.parametrize("path", [INFER, STREAM])
async def test_while_nothing_has_been_answered(path: str) -> None:
    world = World(generator=FakeGenerator(delay_s=60))
    call = RawCall(create_app(world.services()), path, asking())
    await running(world)
    call.hang_up()
    await asyncio.wait_for(call.task, 1)
    assert call.sent == []
    assert world.generator.running == 0
    assert world.generator.cancelled == [world.generator.requests[0].id]
    [event] = world.recorder.finished
    assert (event.status, event.code, event.route) == (499, None, path)


async def test_in_mid_stream() -> None:
    world = World(generator=FakeGenerator(delay_s=0.02, pieces=["a"] * 1000))
    call = RawCall(create_app(world.services()), CHAT, chatting(stream=True, n=2))
    await call.until(3)
    call.hang_up()
    await asyncio.wait_for(call.task, 1)
    assert len(world.generator.cancelled) == 1
    [event] = world.recorder.finished
    assert event.status == 499
    assert event.ttft_s is not None


async def test_every_prompt_of_a_batch_is_cancelled() -> None:
    world = World(generator=FakeGenerator(delay_s=60))
    body = {"model": "smollm2", "prompt": ["a", "b", "c"]}
    call = RawCall(create_app(world.services()), "/v1/completions", body)
    await running(world)
    call.hang_up()
    await asyncio.wait_for(call.task, 1)
    assert len(world.generator.cancelled) == 3


async def test_an_embedding_is_cancelled_too() -> None:
    world = World(embedder=FakeEmbedder(delay_s=60))
    call = RawCall(create_app(world.services()), EMBED, embedding())
    await until(lambda: bool(world.embedder.calls))
    call.hang_up()
    await asyncio.wait_for(call.task, 1)
    assert world.embedder.cancelled == 1


async def test_while_the_body_is_being_sent() -> None:
    world = World()
    call = RawCall(create_app(world.services()), INFER)
    call.feed(b'{"model":', more=True)
    call.hang_up()
    await asyncio.wait_for(call.task, 1)
    assert call.sent == []
    assert world.recorder.finished[0].status == 499


async def test_after_the_last_byte_it_is_no_loss() -> None:
    # Servers say "disconnect" to whoever still listens when the answer is complete.
    world = World()
    call = RawCall(create_app(world.services()), INFER, asking())
    await call.until(2)
    call.hang_up()
    await call.task
    assert world.recorder.finished[0].status == 200


async def test_ray_cancels_the_task() -> None:
    world = World(generator=FakeGenerator(delay_s=60))
    call = RawCall(create_app(world.services()), INFER, asking())
    await running(world)
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert world.generator.running == 0
    assert world.recorder.finished[0].status == 499


async def test_others_go_on() -> None:
    world = World(generator=FakeGenerator(delay_s=0.05))
    app = create_app(world.services())
    gone, stays = (RawCall(app, INFER, asking()) for _ in range(2))
    await running(world)
    gone.hang_up()
    await asyncio.gather(gone.task, stays.task)
    assert (gone.status, stays.status) == (None, 200)
    assert len(world.generator.cancelled) == 1


@pytest.mark.parametrize("path", [INFER, STREAM])
def test_on_a_real_socket(server: LiveServer, world: World, path: str) -> None:
    world.generator.pieces = ["a"] * 1000
    impatient = httpx.Timeout(5, read=0.5 if path == INFER else 5)
    world.generator.delay_s = 60 if path == INFER else 0.05
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.Client(timeout=impatient) as client,
        client.stream("POST", server.url + path, json=asking()) as answer,
    ):
        next(answer.iter_raw())
    wait_until(lambda: world.generator.running == 0 and bool(world.recorder.finished))
    assert len(world.generator.cancelled) == 1
    assert world.recorder.finished[0].status == 499
