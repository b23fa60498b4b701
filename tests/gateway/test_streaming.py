"""When the bytes of a stream go out, and how they are framed."""

from __future__ import annotations

import asyncio
import dataclasses
from itertools import pairwise

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import GatewayConfig
from deployments.gateway.app import create_app
from deployments.gateway.heartbeat import Heartbeat
from deployments.gateway.sse import one_line, sse_event
from models.errors import InvalidInput, UpstreamError
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.contract import chunks, data_lines, events
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.server import LiveServer
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_infer import STREAM, asking
from tests.virtual_time import virtually

KEEPALIVE = b": keep-alive\n\n"


def start(world: World, path: str = STREAM) -> RawCall:
    body = asking() if path == STREAM else chatting(stream=True)
    return RawCall(create_app(world.services()), path, body)


def test_each_delta_goes_out_as_it_comes() -> None:
    async def story() -> None:
        call = start(World(generator=FakeGenerator(delay_s=0.05)))
        await call.task
        tokens = call.times[1:4]
        assert [b"event: token" in body for body in call.bodies] == [True, True, True, False]
        assert all(later - sooner > 0.01 for sooner, later in pairwise(tokens))

    virtually(story)


def test_what_gathers_while_the_client_is_slow_goes_out_in_one_piece() -> None:
    async def story() -> None:
        call = start(World(generator=FakeGenerator(pieces="abcdef", delay_s=0.001)))
        await call.until(2)
        call.writable.clear()
        await asyncio.sleep(0.05)
        call.writable.set()
        await call.task
        assert len(call.bodies) < 6
        told = events(b"".join(call.bodies).decode())
        assert "".join(data["text"] for name, data in told if name == "token") == "abcdef"

    virtually(story)


def test_a_silent_stream_begins_and_is_kept_alive() -> None:
    async def story() -> None:
        world = World(generator=FakeGenerator(pieces="a", delay_s=0.35))
        world.config = GatewayConfig(sse_keepalive_s=0.1)
        clock = asyncio.get_running_loop().time
        services = dataclasses.replace(world.services(), clock=clock)
        call = RawCall(create_app(services), STREAM, asking())
        began = clock()
        await call.task
        assert call.times[0] - began < 0.3
        assert KEEPALIVE == call.bodies[0] == call.bodies[1]
        ttft_s = world.recorder.finished[0].ttft_s
        assert ttft_s is not None
        assert ttft_s >= 0.35  # a comment is no output

    virtually(story)


def test_a_refusal_after_the_header_is_an_event() -> None:
    async def story() -> None:
        world = World(generator=FakeGenerator(delay_s=0.05, error=InvalidInput("too long")))
        world.config = GatewayConfig(sse_keepalive_s=0.01)
        call = start(world)
        await call.task
        assert call.status == 200
        assert events(call.bodies[-1].decode())[0][1]["error"]["code"] == "INVALID_INPUT"

    virtually(story)


async def test_a_refusal_before_it_is_a_real_400() -> None:
    call = start(World(generator=FakeGenerator(delay_s=0.05, error=InvalidInput("too long"))))
    await call.task
    assert call.status == 400


async def test_a_delta_without_text_does_not_begin_the_answer() -> None:
    failing = FakeGenerator(pieces=("", "a"), error=UpstreamError("lost"), error_after=1)
    call = start(World(generator=failing))
    await call.task
    assert call.status == 502


async def test_a_stream_without_any_text_still_ends_well() -> None:
    call = start(World(generator=FakeGenerator(pieces=("",))))
    await call.task
    assert call.status == 200
    assert [name for name, _ in events(b"".join(call.bodies).decode())] == ["done"]


async def test_a_failure_in_mid_stream_on_openai_s_routes() -> None:
    call = start(World(generator=FakeGenerator(error=UpstreamError("lost"), error_after=1)), CHAT)
    await call.task
    *told, failure = chunks(b"".join(call.bodies).decode())
    assert told[0]["choices"][0]["delta"]["content"] == "Hel"
    assert failure["error"]["message"] == "lost"
    assert b"[DONE]" not in b"".join(call.bodies)
    assert call.sent[-1].get("more_body", False) is False


async def test_a_stream_that_nobody_foresaw_to_fail(caplog: pytest.LogCaptureFixture) -> None:
    call = start(World(generator=FakeGenerator(error=KeyError("x"), error_after=1)), CHAT)
    await call.task
    assert chunks(call.bodies[-1].decode())[0]["error"]["code"] == "INTERNAL_ERROR"
    assert len(caplog.records) == 1


async def test_a_generator_that_stops_short() -> None:
    call = start(World(generator=FakeGenerator(finish_reason=None)))
    await call.task
    assert events(call.bodies[-1].decode())[0][1]["error"]["code"] == "UPSTREAM_ERROR"


async def test_a_generator_that_is_cancelled_from_within() -> None:
    # Ray cancels the task of a generator whose replica is being stopped.
    cancelled = asyncio.CancelledError()
    call = start(World(generator=FakeGenerator(error=cancelled, error_after=1)))
    async with asyncio.timeout(30):
        await call.task
    assert events(call.bodies[-1].decode())[0][1]["error"]["code"] == "UPSTREAM_ERROR"


def test_on_a_real_socket_each_event_arrives_when_it_is_sent(
    server: LiveServer, world: World
) -> None:
    world.generator.delay_s = 0.1
    with httpx.stream("POST", server.url + STREAM, json=asking()) as answer:
        arrivals = list(answer.iter_raw())
    assert [piece.count(b"event: ") for piece in arrivals[:3]] == [1, 1, 1]


def test_the_heartbeat_is_put_off_by_every_touch() -> None:
    async def story() -> None:
        beats = 0

        def beat() -> None:
            nonlocal beats
            beats += 1

        with Heartbeat(0.2, beat) as heartbeat:
            for _ in range(6):
                await asyncio.sleep(0.05)
                heartbeat.touch()
            assert beats == 0
            await asyncio.sleep(0.5)
            assert beats == 2
        await asyncio.sleep(0.25)
        assert beats == 2

    virtually(story)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(TEXT, min_size=1, max_size=5))
@settings(max_examples=25)
async def test_any_text_survives_every_framing(pieces: list[str]) -> None:
    app = create_app(World(generator=FakeGenerator(pieces=pieces)).services())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        sse = await client.post(STREAM, json=asking())
        lines = await client.post(STREAM, json=asking(), headers={"accept": "application/x-ndjson"})
        chat = await client.post(CHAT, json=chatting(stream=True))
    text = "".join(pieces)
    told = [data for name, data in events(sse.content.decode()) if name == "token"]
    assert "".join(data["text"] for data in told) == text
    assert lines.content.count(b"\n") == len([piece for piece in pieces if piece]) + 1
    choices = [chunk["choices"][0]["delta"] for chunk in chunks(chat.content.decode())]
    assert "".join(delta.get("content", "") for delta in choices) == text
    assert data_lines(chat.content.decode())[-1] == "[DONE]"


@given(TEXT)
@settings(max_examples=50)
def test_an_event_is_two_lines_and_a_blank_one(text: str) -> None:
    frame = sse_event(orjson.dumps(text), b"token").decode()
    assert frame.splitlines()[0] == "event: token"
    assert orjson.loads(frame.splitlines()[1].removeprefix("data: ")) == text
    assert frame.splitlines()[2:] == [""]


@pytest.mark.parametrize("text", ["\x85", "\u2028", "\u2029", "\n", "\r", "\x0b", "\x1c"])
def test_nothing_that_a_client_may_take_for_a_line_break_is_left(text: str) -> None:
    for json in (orjson.dumps(text), orjson.dumps("é" + text)):
        assert len(one_line(json).decode().splitlines()) == 1
        assert orjson.loads(one_line(json)).endswith(text)
