"""Clients that send or read too slowly are cut off, and hold nothing meanwhile for long.

Limits are short where a client does nothing at all, so that waiting longer changes nothing, and
an hour where it must not be cut off.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from deployments.config import GatewayConfig
from deployments.gateway.app import create_app
from deployments.gateway.policies.slow_body import SlowBody
from deployments.tenants.idempotency import IdempotencyRecords
from state.database import Database
from state.places import sqlite_url
from tests.gateway.asgi import HEADERS, RawCall
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.server import LiveServer, wait_until
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_idempotency import SteppedGenerator
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import asking

HOUR = 3600.0
NEVER_ENDING = ["word " * 10_000] * 100_000
"""5 GB: more than the buffers on the way take."""


def impatient(**config: Any) -> World:
    return World(config=GatewayConfig(**{"request_timeout_s": HOUR, **config}))


async def ended(task: asyncio.Future[None]) -> None:
    """By itself: ``wait_for`` would end it."""
    await asyncio.wait([task], timeout=5)
    assert task.done()
    await task


async def test_a_body_that_does_not_end() -> None:
    world = impatient(body_timeout_s=0.05)
    call = RawCall(create_app(world.services()), CHAT)
    call.feed(b'{"model": ', more=True)
    await ended(call.task)
    assert call.status == 408
    assert (b"connection", b"close") in call.sent[0]["headers"]
    error = orjson.loads(call.bodies[0])["error"]
    assert (error["code"], error["type"]) == ("TIMEOUT", "timeout_error")
    assert error["message"].startswith("After 0.05 s the body was not complete; 10 bytes had come")
    assert world.generator.requests == []
    [event] = world.recorder.finished
    assert (event.status, event.code) == (408, "TIMEOUT")


async def test_a_byte_now_and_then_is_not_enough() -> None:
    call = RawCall(create_app(impatient(body_timeout_s=0.2).services()), INFER)

    async def trickle() -> None:
        while True:
            call.feed(b" ", more=True)
            await asyncio.sleep(0.01)

    trickling = asyncio.create_task(trickle())
    await ended(call.task)
    trickling.cancel()
    assert call.status == 408


async def test_who_has_sent_the_body_may_wait_for_the_answer() -> None:
    world = impatient(body_timeout_s=0.05)
    world.generator.delay_s = 0.2
    call = RawCall(create_app(world.services()), INFER, asking())
    await ended(call.task)
    assert call.status == 200


async def test_who_has_sent_the_body_may_be_listened_to() -> None:
    heard = []

    async def listen(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([await receive(), await receive()])

    incoming: asyncio.Queue[Message] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": b"{}", "more_body": False})
    listening = asyncio.ensure_future(
        SlowBody(listen, limit_s=0.01)({"type": "http"}, incoming.get, incoming.put)
    )
    await asyncio.sleep(0.05)
    incoming.put_nowait({"type": "http.disconnect"})
    await ended(listening)
    assert heard[1] == {"type": "http.disconnect"}


async def test_a_body_in_pieces_within_the_limit() -> None:
    body = orjson.dumps(asking())
    call = RawCall(create_app(impatient(body_timeout_s=HOUR).services()), INFER)
    for at in range(len(body)):
        await asyncio.sleep(0)
        call.feed(body[at : at + 1], more=at < len(body) - 1)
    await ended(call.task)
    assert call.status == 200


async def test_a_request_that_may_come_again_is_not_begun(tmp_path: Path) -> None:
    world = impatient(body_timeout_s=0.05)
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        records = IdempotencyRecords(database, ttl_s=60)
        call = RawCall(
            create_app(replace(world.services(), idempotency=records)),
            INFER,
            headers={**HEADERS, "idempotency-key": "k"},
        )
        call.feed(b"{", more=True)
        await ended(call.task)
    assert call.status == 408


async def test_a_reader_that_stops() -> None:
    world = impatient(send_timeout_s=0.05)
    world.generator = FakeGenerator(pieces=["a"] * 100_000, delay_s=0.001)
    call = RawCall(create_app(world.services()), CHAT, chatting(stream=True))
    await call.until(2)
    call.writable.clear()
    await ended(call.task)  # returns: the server closes an answer that is not whole
    assert len(world.generator.cancelled) == 1
    assert world.generator.running == 0
    [event] = world.recorder.finished
    assert (event.status, event.code) == (499, None)
    assert event.usage is None or event.usage.completion_tokens < 100_000


async def test_a_reader_that_takes_its_time_is_not_cut_off() -> None:
    world = impatient(send_timeout_s=HOUR)
    call = RawCall(create_app(world.services()), CHAT, chatting(stream=True))
    await call.until(2)
    call.writable.clear()
    await asyncio.sleep(0.05)
    call.writable.set()
    await ended(call.task)
    assert b"".join(call.bodies).endswith(b"data: [DONE]\n\n")


async def test_of_two_who_wait_for_one_work_the_other_gets_its_answer(tmp_path: Path) -> None:
    world = impatient(send_timeout_s=0.2)
    world.generator = generator = SteppedGenerator()
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        records = IdempotencyRecords(database, ttl_s=60)
        app = create_app(replace(world.services(), idempotency=records))
        headers = {**HEADERS, "idempotency-key": "k"}
        slow, other = (RawCall(app, CHAT, chatting(stream=True), headers=headers) for _ in range(2))
        generator.let(1)
        await slow.until(2)
        slow.writable.clear()
        generator.let(1)
        await ended(slow.task)
        generator.let(100)
        await ended(other.task)
    assert b"".join(other.bodies).endswith(b"data: [DONE]\n\n")
    assert not b"".join(slow.bodies).endswith(b"data: [DONE]\n\n")
    assert len(world.generator.requests) == 1
    assert world.generator.cancelled == []


@pytest.fixture
def hurried() -> World:
    world = impatient(body_timeout_s=0.2, send_timeout_s=0.2)
    world.generator.pieces, world.generator.delay_s = NEVER_ENDING, 0.001
    return world


@pytest.fixture
def hurried_server(hurried: World) -> Iterator[LiveServer]:
    with LiveServer(create_app(hurried.services())) as server:
        yield server


def test_a_slow_body_on_a_real_socket(hurried_server: LiveServer) -> None:
    with socket.create_connection(("127.0.0.1", hurried_server.port), timeout=5) as client:
        head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.sendall(head.encode() + b"content-length: 1000\r\n\r\n{")
        answer = b""
        while piece := client.recv(65536):  # until the server closes the connection
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in answer


def test_a_slow_reader_on_a_real_socket(hurried_server: LiveServer, hurried: World) -> None:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(5)
    with client:
        client.connect(("127.0.0.1", hurried_server.port))
        body = orjson.dumps(chatting(stream=True))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        # ... and no more. The generator would go on for ever.
        wait_until(lambda: bool(hurried.recorder.finished), 20)
        assert hurried.generator.running == 0
        assert hurried.recorder.finished[0].status == 499
        hurried.generator.pieces = ("fine",)
        answer = httpx.post(hurried_server.url + INFER, json=asking())
        assert answer.json()["data"]["output"] == "fine"
