"""The policies that hold on every route: ids, headers, origins, sizes, compression."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import AsyncIterator

import httpx
import orjson
import pytest
from starlette.types import Receive, Scope, Send

from deployments.config import Cors, GatewayConfig
from deployments.gateway.app import create_app
from deployments.gateway.exchange import Exchange, exchange_of
from deployments.gateway.policies.failures import Failures
from models.errors import InternalError
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer
from tests.gateway.test_infer import asking

INFER = "/v1/infer"


def a_client(world: World) -> httpx.AsyncClient:
    app = create_app(world.services())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE)


@pytest.mark.parametrize("given", ["abc", "a-B_c.1:2/3+4=5@6~7", "x" * 128])
async def test_a_sane_request_id_is_kept(client: httpx.AsyncClient, given: str) -> None:
    answer = await client.get("/nope", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "é", '"', "a,b"])
async def test_any_other_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    answer = await client.get("/healthz", headers={b"x-request-id": given.encode()})
    made = answer.headers["x-request-id"]
    assert made != given
    assert len(made) == 32
    assert made == answer.json()["request_id"]


async def test_of_several_ids_the_first_counts(client: httpx.AsyncClient) -> None:
    given = [("x-request-id", "a b"), ("x-request-id", "mine")]
    made = (await client.get("/healthz", headers=given)).headers["x-request-id"]
    assert made not in ("a b", "mine")


@pytest.mark.parametrize(("given", "told"), [("mine", []), ("a b", ["ours"])])
async def test_an_id_that_the_server_sends_back_by_itself_is_not_sent_twice(
    world: World, given: str, told: list[str]
) -> None:
    app = create_app(dataclasses.replace(world.services(), echoes_ids=True))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE) as client:
        answer = await client.get("/healthz", headers={"x-request-id": given})
    assert len(answer.headers.get_list("x-request-id")) == len(told)
    assert (answer.json()["request_id"] == given) == (not told)


@pytest.mark.parametrize("path", ["/healthz", "/nope", "/v1/models"])
async def test_security_headers(client: httpx.AsyncClient, path: str) -> None:
    headers = (await client.get(path)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"].startswith("default-src 'none'")


async def test_no_origin_is_allowed_by_default(client: httpx.AsyncClient) -> None:
    answer = await client.get("/healthz", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers


async def test_origins_from_the_configuration() -> None:
    world = World(config=GatewayConfig(cors=Cors(allow_origins=("https://a.example",))))
    async with a_client(world) as client:
        asked = {
            "origin": "https://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, x-request-id",
        }
        preflight = await client.options("/v1/chat/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        failed = await client.get("/nope", headers={"origin": "https://a.example"})
        assert failed.headers["access-control-allow-origin"] == "https://a.example"
        assert "Retry-After" in failed.headers["access-control-expose-headers"]
        other = await client.get("/healthz", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_a_long_answer_is_compressed_for_who_takes_it(
    client: httpx.AsyncClient, world: World
) -> None:
    world.metrics_text = b"up 1\n" * 5000
    answer = await client.get("/metrics", headers={"accept-encoding": "gzip, br"})
    assert answer.headers["content-encoding"] == "br"
    assert int(answer.headers["content-length"]) < 1000
    assert answer.headers["vary"] == "accept, accept-encoding"
    assert answer.content == world.metrics_text


async def test_a_very_long_answer_is_compressed_off_the_loop(
    client: httpx.AsyncClient, world: World
) -> None:
    world.metrics_text = b"up 1\n" * 50_000
    answer = await client.get("/metrics", headers={"accept-encoding": "gzip"})
    assert answer.content == world.metrics_text


@pytest.mark.parametrize(
    "accepted", ["identity", "zstd", "gzip;q=0", "gzip; q=0.0, br;q=0", "brr", ""]
)
async def test_nobody_is_sent_what_he_does_not_take(
    client: httpx.AsyncClient, world: World, accepted: str
) -> None:
    world.metrics_text = b"up 1\n" * 5000
    answer = await client.get("/metrics", headers={"accept-encoding": accepted})
    assert "content-encoding" not in answer.headers


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("gzip;q=0.5", "gzip"),
        ("deflate, gzip;q=0.01, br;q=0", "gzip"),
        ("br;q=0.1", "br"),
    ],
)
async def test_a_preference_is_no_refusal(
    client: httpx.AsyncClient, world: World, accepted: str, coding: str
) -> None:
    world.metrics_text = b"up 1\n" * 5000
    answer = await client.get("/metrics", headers={"accept-encoding": accepted})
    assert answer.headers["content-encoding"] == coding


@pytest.mark.parametrize(("size", "compressed"), [(100, False), (8192, False), (8193, True)])
async def test_an_answer_of_8_kb_is_not_compressed(
    client: httpx.AsyncClient, world: World, size: int, compressed: bool
) -> None:
    world.metrics_text = b"x" * size
    answer = await client.get("/metrics", headers={"accept-encoding": "gzip"})
    assert ("content-encoding" in answer.headers) == compressed
    assert answer.content == world.metrics_text


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_a_stream_is_never_compressed(world: World, accept: str) -> None:
    world.config = GatewayConfig(compress_above_bytes=0)
    async with a_client(world) as client:
        headers = {"accept": accept, "accept-encoding": "gzip"}
        answer = await client.post(INFER + "/stream", json=asking(), headers=headers)
        assert "content-encoding" not in answer.headers


async def test_a_long_body_is_refused_by_its_declared_length(world: World) -> None:
    world.config = GatewayConfig(max_body_bytes=1024)
    call = RawCall(
        create_app(world.services()),
        INFER,
        headers={"content-type": "application/json", "content-length": "1025"},
    )
    await call.task  # no byte of it was read
    assert call.status == 413


async def test_a_long_body_is_refused_as_it_comes(world: World) -> None:
    world.config = GatewayConfig(max_body_bytes=1024)
    call = RawCall(create_app(world.services()), INFER)
    for _ in range(3):
        call.feed(b" " * 512, more=True)
    await call.task
    assert call.status == 413
    error = orjson.loads(call.bodies[0])["error"]
    assert error["message"] == "The body has 1536 bytes or more; 1024 are allowed."


async def test_a_body_of_just_the_limit_in_pieces(world: World) -> None:
    body = orjson.dumps(asking()).ljust(1024)
    world.config = GatewayConfig(max_body_bytes=1024)
    call = RawCall(create_app(world.services()), INFER)
    call.feed(body[:10], more=True)
    call.feed(body[10:], more=False)
    await call.task
    assert call.status == 200


async def test_a_client_may_send_its_body_in_chunks(client: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in orjson.dumps(asking()):
            yield bytes([byte])

    answer = await client.post(
        INFER, content=pieces(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200


def test_a_client_that_is_still_sending_reads_the_refusal(server: LiveServer) -> None:
    answer = httpx.post(
        server.url + INFER,
        content=b" " * 20_000_000,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413


async def test_an_answer_that_fails_half_way_is_cut_off() -> None:
    # Without a way to tell the client, the server has to break the connection.
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        exchange_of(scope).status = 200
        raise ZeroDivisionError("of what ann has sent")

    exchange = Exchange(id="abc", method="GET", arrived=0)
    call = Failures(half, now=time.time)({"type": "http", "exchange": exchange}, None, None)  # type: ignore[arg-type]
    with pytest.raises(InternalError) as raised:
        await call
    whole = "".join(traceback.format_exception(raised.value))
    assert "ann" not in whole, "the server logs it, and our log has it already"
    assert exchange.error is not None
    assert exchange.finished(1.0).code == "INTERNAL_ERROR"
