"""A path says the same to everybody, or it is refused before anybody reads it."""

from __future__ import annotations

import re
import socket
from typing import Any
from urllib.parse import unquote

import httpx
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from deployments.config import GatewayConfig, PathsConfig, parse
from deployments.gateway.app import create_app, routes
from deployments.gateway.openapi import document
from deployments.gateway.policies.path_filter import (
    decoded,
    is_answered,
    may_be_answered,
    name_prefixes,
)
from deployments.tenants.principal import EVERYBODY, Principal
from models.errors import ConfigError, InvalidInput, UriTooLong
from tests.gateway.asgi import BASE
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer, wait_until

LIMITS = PathsConfig()
NAMES = (b"/v1/models/", b"/admin/v1/models/")


def get(server: LiveServer, target: bytes) -> tuple[int, Any]:
    """Status and JSON of an answer to a request line that no client library has put right."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"GET " + target + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), orjson.loads(body)


ODD = {
    b"/v1/..%2fadmin/v1/tenants": "segment . or ..",
    b"/v1/%2e%2e/admin": "segment . or ..",
    b"/v1/.%2E/admin": "segment . or ..",
    b"/v1/../healthz": "segment . or ..",
    b"/./healthz": "segment . or ..",
    b"/v1/..;x=1/admin": "segment . or ..",
    b"/admin%2fv1/tenants": "encoded slash",
    b"/%2Fadmin/v1/tenants": "encoded slash",
    b"/v1/models%2fsmollm2": "encoded slash",
    b"/v1/models/..%2f..%2fadmin": "segment . or ..",
    b"/v1/models/a%5cb": "backslash",
    b"/healthz%00": "control character",
    b"/healthz%0d%0aset-cookie:%20a": "control character",
    b"/healthz%7f": "control character",
    b"/healthz%c2%85": "control character",
    b"/healthz%ff": "not URL-encoded UTF-8",
    b"/v1/%c0%ae%c0%ae/admin": "not URL-encoded UTF-8",
    b"/healthz%ed%a0%80": "not URL-encoded UTF-8",
    b"/v1/%252e%252e/admin": "encoded twice",
    b"/v1/models/a%252fb": "encoded twice",
    b"/healthz%": "without two hexadecimal digits",
    b"/healthz%zz": "without two hexadecimal digits",
}


@pytest.mark.parametrize("target", ODD, ids=repr)
def test_an_odd_path_is_refused(server: LiveServer, world: World, target: bytes) -> None:
    status, answer = get(server, target)
    openai = unquote(target.decode()).startswith("/v1/")
    assert (status, answer["error"]["code"]) == (400, "INVALID_INPUT")
    assert ODD[target] in answer["error"]["message"]
    assert ("success" in answer) is not openai
    wait_until(lambda: bool(world.recorder.finished))
    assert world.recorder.finished[0].status == 400


def test_a_backslash_as_it_is(server: LiveServer) -> None:
    status, answer = get(server, rb"/v1\models")
    assert (status, answer["error"]["code"]) == (400, "INVALID_INPUT")


@pytest.mark.parametrize(
    "target", [b"/v1/models/" + b"a" * 2038, b"/healthz?" + b"a" * 8193], ids=["path", "query"]
)
def test_a_long_one_too(server: LiveServer, target: bytes) -> None:
    status, answer = get(server, target)
    assert status == 414
    assert answer["error"]["code"] == "INVALID_INPUT"
    assert "are allowed" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"/healthz", 200),
        (b"/%68ealthz", 200),
        (b"/v1/models/org%2Fmodel%3Av1", 200),
        (b"/v1/models/org/model:v1", 200),
        (b"/v1/models/" + b"a" * 2037, 404),
        (b"/v1/models/...", 404),
        (b"/v1/models/%E6%A8%A1%E5%9E%8B", 404),
        (b"/v1/models/100%25", 404),
        (b"/v1/models//", 404),
        (b"/v1/models/a.b/..c", 404),
    ],
)
def test_what_is_only_unusual_is_not(server: LiveServer, target: bytes, status: int) -> None:
    assert get(server, target)[0] == status


async def test_a_websocket_is_not_opened(server: LiveServer) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.url.replace("http", "ws") + "/v1/infer%2Fws")
    assert refused.value.response.status_code == 403


def test_names_with_slashes_are_where_a_route_takes_them() -> None:
    assert name_prefixes(routes(World().services())) == NAMES


PIECES = st.sampled_from(
    [
        *("/", "%2f", "%5C", "\\", ".", "%2e", "..", "%25", "%", "%00", ";", "%ff", "%c3%a9"),
        *("a", "v1", "models", "/v1/models/", "admin", "%252f"),
    ]
)
ASCII = st.text(st.characters(max_codepoint=127), max_size=3)


@given(st.lists(PIECES | ASCII, max_size=12).map("".join))
@example("/v1/models/a%2fb")
def test_who_reads_it_before_decoding_sees_the_same_segments(text: str) -> None:
    raw = ("/" + text).encode()
    try:
        path = decoded(raw, b"", LIMITS, NAMES)
    except InvalidInput:
        return
    if not raw.startswith(NAMES):
        assert path.split("/") == [unquote(part) for part in raw.decode().split("/")]
    assert unquote(path) == path  # a second decoder behind us finds nothing new
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\\]", path)
    assert not {".", ".."} & set(path.split("/"))


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_whatever_comes_is_read_or_refused(raw: bytes, query: bytes) -> None:
    limits = PathsConfig(max_bytes=64, max_query_bytes=64)
    try:
        decoded(raw, query, limits, NAMES)
    except UriTooLong:
        assert len(raw) > 64 or len(query) > 64
    except InvalidInput:
        pass
    else:
        assert max(len(raw), len(query)) <= 64


@pytest.mark.parametrize(
    ("path", "allow", "deny", "answered"),
    [
        ("/admin", (), ("/admin",), False),
        ("/admin/v1/tenants", (), ("/admin",), False),
        ("/administrator", (), ("/admin",), True),
        ("/v1/models", ("/v1",), (), True),
        ("/metrics", ("/v1",), (), False),
        ("/v1/infer", ("/v1",), ("/v1/infer",), False),
        ("/v1/inferno", ("/v1",), ("/v1/infer",), True),
    ],
)
def test_prefixes(path: str, allow: tuple[str, ...], deny: tuple[str, ...], answered: bool) -> None:
    assert is_answered(path, PathsConfig(allow=allow, deny=deny)) is answered


@pytest.mark.parametrize(
    ("allow", "deny", "answered"),
    [
        ((), (), True),
        (("/v1/models/smollm2",), (), True),
        (("/v1/models/smollm2",), ("/v1",), False),
        ((), ("/v1/models/smollm2",), True),
        ((), ("/v1/models",), False),
        (("/v1/infer",), (), False),
    ],
)
def test_a_route_with_a_name_in_its_path(
    allow: tuple[str, ...], deny: tuple[str, ...], answered: bool
) -> None:
    paths = PathsConfig(allow=allow, deny=deny)
    assert may_be_answered("/v1/models/{model}", paths) is answered


class Asked:
    """Lets everybody in, and counts."""

    def __init__(self) -> None:
        self.times = 0

    async def principal(self, credential: str) -> Principal:
        self.times += 1
        return EVERYBODY


@pytest.mark.parametrize("path", ["/admin/v1/tenants", "/%61dmin/v1/tenants", "/metrics"])
async def test_what_is_denied_is_not_there_for_anybody(path: str) -> None:
    authenticator = Asked()
    world = World(authenticator=authenticator)
    world.config = GatewayConfig(paths=PathsConfig(deny=("/admin", "/metrics")))
    transport = httpx.ASGITransport(create_app(world.services()))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        for headers in ({}, {"x-api-key": "any"}):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "NOT_FOUND"
        assert authenticator.times == 0
        models = await client.get("/v1/models", headers={"x-api-key": "any"})
        assert (models.status_code, authenticator.times) == (200, 1)


def test_what_is_denied_is_not_documented() -> None:
    world = World(config=GatewayConfig(paths=PathsConfig(deny=("/admin", "/v1/completions"))))
    described = document(routes(world.services()))["paths"]
    assert "/v1/chat/completions" in described
    assert not [path for path in described if path.startswith(("/admin", "/v1/completions"))]


async def test_a_denied_websocket() -> None:
    world = World(config=GatewayConfig(paths=PathsConfig(deny=("/v1/infer/ws",))))
    with LiveServer(create_app(world.services())) as server:
        with pytest.raises(InvalidStatus) as refused:
            await connect(server.url.replace("http", "ws") + "/v1/infer/ws")
        assert refused.value.response.status_code == 403


@pytest.mark.parametrize("prefix", ["admin", "/admin/", "/", "", "/a b", "/a/../b", "/%61dmin"])
def test_what_is_no_prefix_is_named(prefix: str) -> None:
    args = {
        "models": {"m": {"task": "generate", "source": "./m"}},
        "gateway": {"paths": {"deny": [prefix]}},
    }
    with pytest.raises(ConfigError, match=r"gateway\.paths\.deny\.0"):
        parse(args)
