"""A streaming client that asks for it hears its place in the queue; all others notice nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import pytest
from openai import OpenAI

from deployments.caching.cache import ResponseCache
from deployments.gateway.app import create_app
from deployments.gateway.sse import sse_place
from models.contracts import Delta, GenerateRequest, Place
from models.errors import Timeout
from state.cache import Bounds, Lenient
from state.cache.memory import MemoryCache
from tests.gateway.asgi import HEADERS, RawCall
from tests.gateway.contract import Contract, chunks, events
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.server import LiveServer
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_infer import STREAM, asking

PLACES = (
    Place(position=7, waiting=40, wait_s=3.24),
    Place(position=2, waiting=40, wait_s=None),
)
COMMENTS = (b": queue position=7 of=40 wait=3.2s\n\n", b": queue position=2 of=40\n\n")
ASKED = {"x-queue-position": "stream"}
COMPLETIONS = "/v1/completions"


@dataclass
class Waiting(FakeGenerator):
    """Waits in a queue before it says anything; goes on when a test says so."""

    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if request.tell_place:
            for place in PLACES:
                yield Delta(place=place)
                await asyncio.sleep(0.02)
        await self.go.wait()
        async for delta in super().generate(request):
            yield delta


@pytest.fixture
def world() -> World:
    return World(generator=Waiting())


def begin(world: World, path: str, **headers: str) -> RawCall:
    bodies: dict[str, Any] = {
        STREAM: asking(),
        CHAT: chatting(stream=True),
        COMPLETIONS: {"model": "smollm2", "prompt": ["a", "b"], "stream": True},
    }
    headers = {**HEADERS, **headers}
    return RawCall(create_app(world.services()), path, bodies[path], headers=headers)


def let_go(world: World) -> None:
    assert isinstance(world.generator, Waiting)
    world.generator.go.set()


@pytest.mark.parametrize("path", [STREAM, CHAT, COMPLETIONS])
async def test_the_stream_begins_with_its_place(world: World, path: str) -> None:
    call = begin(world, path, **ASKED)
    await call.until(3)
    assert call.status == 200
    assert tuple(call.bodies) == COMMENTS
    let_go(world)
    await call.task
    output = b"".join(call.bodies[2:])
    assert b": queue" not in output
    assert b"Hel" in output
    ttft_s = world.recorder.finished[0].ttft_s
    assert ttft_s is not None
    assert ttft_s >= 0.02, "a place is no output"


@pytest.mark.parametrize("path", [STREAM, CHAT, COMPLETIONS])
async def test_who_does_not_ask_is_told_nothing(world: World, path: str) -> None:
    call = begin(world, path)
    await asyncio.sleep(0.08)
    assert call.sent == [], "the header waits for the first output"
    let_go(world)
    await call.task
    assert b": queue" not in b"".join(call.bodies)
    assert not any(request.tell_place for request in world.generator.requests)


async def test_of_several_prompts_the_last_one_s_place_is_told(world: World) -> None:
    call = begin(world, COMPLETIONS, **ASKED)
    await call.until(3)
    let_go(world)
    await call.task
    assert [request.tell_place for request in world.generator.requests] == [False, True]


async def test_lines_of_json_have_an_event_of_their_own(world: World, contract: Contract) -> None:
    let_go(world)
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://gateway", event_hooks={"response": [contract.check]}
    ) as client:
        headers = {"accept": "application/x-ndjson", **ASKED}
        answer = await client.post(STREAM, json=asking(), headers=headers)
    lines = [orjson.loads(line) for line in answer.text.splitlines()]
    assert lines[0] == {"event": "queue", "data": {"position": 7, "waiting": 40, "wait_s": 3.24}}
    assert [line["event"] for line in lines].count("queue") == 2


@pytest.mark.parametrize("path", [STREAM, CHAT])
async def test_what_fails_after_that_is_an_event(world: World, path: str) -> None:
    world.generator.error = Timeout("too late", details={"phase": "queue"})
    let_go(world)
    call = begin(world, path, **ASKED)
    await call.task
    assert call.status == 200
    body = b"".join(call.bodies).decode()
    told = events(body)[-1][1] if path == STREAM else chunks(body)[-1]
    assert told["error"]["code"] == "TIMEOUT"
    assert world.recorder.finished[0].code == "TIMEOUT"


async def test_a_wish_that_is_none(world: World) -> None:
    let_go(world)
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        headers = {"x-queue-position": "yes"}
        refused = await client.post(CHAT, json=chatting(stream=True), headers=headers)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "X-Queue-Position"
        assert "expected stream" in refused.json()["error"]["message"]
        whole = await client.post(CHAT, json=chatting(), headers=ASKED)
        assert whole.status_code == 200, "an answer that comes whole has no place for it"
    assert not world.generator.requests[-1].tell_place


async def test_who_joins_another_s_work_hears_only_what_it_asked_for(world: World) -> None:
    bounds = Bounds(max_bytes=10**6, max_entry_bytes=10**5)
    world.cache = ResponseCache(store=Lenient(MemoryCache(bounds)), ttl_s=60, emit=world.recorder)
    app = create_app(world.services())
    body = chatting(stream=True, temperature=0)
    first = RawCall(app, CHAT, body, headers={**HEADERS, **ASKED})
    await first.until(3)
    second = RawCall(app, CHAT, body)
    await asyncio.sleep(0.02)
    assert second.sent == []
    let_go(world)
    await asyncio.gather(first.task, second.task)
    assert len(world.generator.requests) == 1
    assert chunks(b"".join(first.bodies).decode()) != []
    assert b": queue" not in b"".join(second.bodies)


def test_the_official_client_does_not_notice(server: LiveServer, world: World) -> None:
    let_go(world)
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            extra_headers=ASKED,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello!"


def test_a_comment_is_one_line_of_ascii() -> None:
    for place in PLACES:
        told = sse_place(place)
        assert told.isascii()
        assert told.startswith(b": ")
        assert told.splitlines()[1:] == [b""]
