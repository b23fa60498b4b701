"""Bytes on a real socket that two parsers could read differently: request smuggling.

Whatever a proxy in front makes of them, a request that hides in the body of another is never
carried out here. (uvicorn's other parser, h11, reads a length beside chunks as RFC 9112 lets it,
by the chunks. Ray Serve runs the one in C, which refuses both; so do we want it.)
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deployments.gateway.app import create_app
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer

HIDDEN = b"GET /v1/models/hidden HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = b'{"model":"smollm2","prompt":"hi"}'
JSON = b"Content-Type: application/json\r\n"
POST = b"POST /v1/infer HTTP/1.1\r\nHost: x\r\n" + JSON


class Witness:
    """Notes which requests reach the app."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.seen: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.seen.append(f"{scope['method']} {scope['path']}")
        await self.app(scope, receive, send)


class Wire:
    def __init__(self, server: LiveServer, witness: Witness) -> None:
        self._port = server.port
        self.witness = witness

    def say(self, *pieces: bytes) -> list[int]:
        """The statuses of all answers, until the server hangs up or has nothing more to say."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=5) as connection:
            connection.settimeout(1.5)  # a server that waits for more of a body says nothing
            told = b""
            try:
                for piece in pieces:
                    connection.sendall(piece)
                while data := connection.recv(65_536):
                    told += data
            except (TimeoutError, ConnectionError):
                pass
        return [int(part[:3]) for part in told.split(b"HTTP/1.1 ")[1:]]


@pytest.fixture
def wire(world: World) -> Iterator[Wire]:
    witness = Witness(create_app(world.services()))
    with LiveServer(witness, timeout_keep_alive=1) as server:
        yield Wire(server, witness)


def test_the_parser_is_the_strict_one(world: World) -> None:
    """uvicorn takes it where it is installed, and says nothing if it is not."""
    config = uvicorn.Config(create_app(world.services()))
    config.load()
    assert config.http_protocol_class is HttpToolsProtocol


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST = b"0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
AMBIGUOUS: Mapping[str, bytes] = {
    "a length, and chunks": POST
    + b"Content-Length: %d\r\n" % (len(LAST + HIDDEN))
    + CHUNKED
    + b"\r\n"
    + LAST
    + HIDDEN,
    "chunks, and a length": POST
    + CHUNKED
    + b"Content-Length: 4\r\n\r\n"
    + chunk(BODY)
    + LAST
    + HIDDEN,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n" + HIDDEN,
    "two lengths in one line": POST + b"Content-Length: 0, 44\r\n\r\n" + HIDDEN,
    "a length below zero": POST + b"Content-Length: -1\r\n\r\n" + HIDDEN,
    "a length with a sign": POST + b"Content-Length: +0\r\n\r\n" + HIDDEN,
    "a length in hexadecimal": POST + b"Content-Length: 0x0\r\n\r\n" + HIDDEN,
    "a length that overflows": POST + b"Content-Length: 18446744073709551616\r\n\r\n" + HIDDEN,
    "a blank before the colon": POST + b"Content-Length : 44\r\n\r\n" + HIDDEN,
    "a folded header": POST + b"X-A: b\r\n Content-Length: 44\r\n\r\n" + HIDDEN,
    "another coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + LAST + HIDDEN,
    "a coding behind chunked": POST
    + b"Transfer-Encoding: chunked, identity\r\n\r\n"
    + LAST
    + HIDDEN,
    "chunked twice": POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + LAST + HIDDEN,
    "a chunk's size that is none": POST + CHUNKED + b"\r\nzz\r\n" + HIDDEN,
    "a chunk's size with a sign": POST + CHUNKED + b"\r\n+0\r\n\r\n" + HIDDEN,
    "a chunk's size in 0x": POST + CHUNKED + b"\r\n0x0\r\n\r\n" + HIDDEN,
    "a chunk's size that overflows": POST + CHUNKED + b"\r\n10000000000000000\r\n" + HIDDEN,
    "a chunk that is longer than it says": POST + CHUNKED + b"\r\n1\r\n" + BODY + HIDDEN,
    "a bare CR behind a header": POST + b"X-A: b\rContent-Length: 44\r\n\r\n" + HIDDEN,
    "a NUL in a header": POST + b"X-A: b\0c\r\n\r\n" + HIDDEN,
    "no name of a header": POST + b": b\r\n\r\n" + HIDDEN,
    "a header with a line feed in its name": POST + b"X\nA: b\r\n\r\n" + HIDDEN,
}


@pytest.mark.parametrize("raw", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_hides_in_a_body_is_not_carried_out(wire: Wire, raw: bytes) -> None:
    statuses = wire.say(raw)
    assert wire.witness.seen in ([], ["POST /v1/infer"]), statuses
    assert not any(status >= 500 for status in statuses)


def test_a_pipeline_is_as_many_requests_as_it_says(wire: Wire) -> None:
    """The control: what follows a whole request is another one."""
    length = b"Content-Length: %d\r\n\r\n" % len(BODY)
    assert wire.say(POST + length + BODY + HIDDEN) == [200, 404]
    assert wire.witness.seen == ["POST /v1/infer", "GET /v1/models/hidden"]


def test_chunks_are_one_body(wire: Wire, world: World) -> None:
    pieces = chunk(BODY[:5]) + chunk(BODY[5:]) + LAST
    assert wire.say(POST + CHUNKED + b"\r\n" + pieces) == [200]
    assert len(world.generator.requests) == 1


def test_a_body_that_is_cut_off_is_nothing(wire: Wire, world: World) -> None:
    assert wire.say(POST + b"Content-Length: 100\r\n\r\n" + BODY) == []
    assert world.generator.requests == []


ODD: Mapping[str, bytes] = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "CONNECT": b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a whole address": b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\n"
    b"Connection: close\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "%00 in the path": b"GET /v1/models/a%00b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "half a sequence": b"GET /v1/models/%ff%c0%af HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "half an escape": b"GET /v1/models/%2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "an upgrade to h2c": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\n"
    b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
    "a method that is made up": b"BREW /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "many headers": b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    + b"".join(b"X-%d: y\r\n" % number for number in range(5000))
    + b"\r\n",
}


@pytest.mark.parametrize("raw", ODD.values(), ids=ODD)
def test_an_odd_request_fails_nothing(wire: Wire, raw: bytes, world: World) -> None:
    """And what it says as its method is no label of a metric."""
    statuses = wire.say(raw)
    assert not any(status >= 500 for status in statuses), statuses
    assert {event.method for event in world.recorder.finished} <= {
        *("GET", "POST", "OPTIONS", "CONNECT", "OTHER")
    }


@pytest.mark.parametrize(
    "value",
    [
        b"abc\r\nX-Injected: 1",
        b"abc\rX-Injected: 1",
        b"abc\nX-Injected: 1",
        b"abc%0d%0aX-Injected: 1",
    ],
)
def test_a_header_that_comes_back_brings_no_other(wire: Wire, value: bytes) -> None:
    """The request's id is the one thing of a client that is in the head of an answer."""
    with socket.create_connection(("127.0.0.1", wire._port), timeout=5) as connection:
        connection.settimeout(1.5)
        request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-ID: "
        connection.sendall(request + value + b"\r\n\r\n")
        told = b""
        while data := connection.recv(65_536):
            told += data
    head, _, _ = told.partition(b"\r\n\r\n")
    assert b"x-injected" not in head.lower()
