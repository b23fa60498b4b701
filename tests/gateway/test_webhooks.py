"""Signed deliveries: who may deliver, when, and that each is kept once."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from deployments.config import GatewayConfig, WebhooksConfig, WebhookSource
from deployments.gateway.app import create_app, routes
from deployments.gateway.policies.authentication import PUBLIC
from deployments.gateway.services import Services
from deployments.tenants.directory import Directory
from deployments.tenants.identity import KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import Role
from deployments.webhooks.inbox import Inbox
from deployments.webhooks.signature import signed
from deployments.webhooks.sources import Sources
from state.database import LazyDatabase
from state.places import sqlite_url
from tests import documents
from tests.databases import postgres, postgres_url
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import NOW, World

__all__ = ["postgres", "postgres_url"]

PATH, EVENTS = "/webhooks/ingest", "/admin/v1/webhooks/events"
LOCAL = {"host": "localhost:8000"}
OLD, NEW, STRIPE = (
    b"old-secret-of-16-or-more",
    b"new-secret-of-16-or-more",
    b"whsec_of-somebody-else",
)
ENVIRON = {"FRONTIER_WEBHOOK_SECRETS": f"{NEW.decode()},{OLD.decode()}", "STRIPE": STRIPE.decode()}
CONFIG = GatewayConfig(
    webhooks=WebhooksConfig(sources={"stripe": WebhookSource(secrets="${STRIPE}", tenant="acme")})
)
DAY = 86_400
both = pytest.mark.parametrize("url", ["sqlite", "postgres"], indirect=True)


@dataclass
class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a new database: SQLite, unless the test is for ``both``."""
    if getattr(request, "param", "sqlite") == "postgres":
        found: str = request.getfixturevalue("postgres_url")
        return found
    return sqlite_url(tmp_path / "frontier.db")


@pytest.fixture
async def database(url: str) -> AsyncIterator[LazyDatabase]:
    database = LazyDatabase(url)
    yield database
    await database.close()


@pytest.fixture
def services(world: World, database: LazyDatabase, clock: Clock) -> Services:
    return serving(world, database, clock)


@pytest.fixture
def app(services: Services) -> ASGIApp:
    return create_app(services)


def serving(world: World, database: LazyDatabase, now: Callable[[], float]) -> Services:
    world.config = CONFIG
    return replace(
        world.services(),
        inbox=Inbox(database, dedupe_s=CONFIG.webhooks.dedupe_s),
        webhook_sources=Sources.of(CONFIG.webhooks, ENVIRON),
        now=now,
    )


def a_client(services: Services, contract: Contract) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(services)),
        base_url=BASE,
        event_hooks={"response": [contract.check]},
    )


def event(id_: str = "evt_1", **fields: Any) -> bytes:
    return json.dumps({"id": id_, "type": "invoice.paid", "payload": {"n": 1}, **fields}).encode()


async def deliver(
    client: httpx.AsyncClient,
    body: bytes | None = None,
    *,
    secrets: Sequence[bytes] = (NEW,),
    at: float = NOW,
    signature: str | None = None,
    **headers: str,
) -> httpx.Response:
    """``headers``: with underscores for dashes."""
    body = event() if body is None else body
    signature = signed(body, secrets, at=int(at)) if signature is None else signature
    return await client.post(
        PATH,
        content=body,
        headers={
            "content-type": "application/json",
            "x-webhook-signature": signature,
            **{name.replace("_", "-"): value for name, value in headers.items()},
        },
    )


async def kept(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    answer = await client.get(EVENTS, headers=LOCAL)
    assert answer.status_code == 200
    events: list[dict[str, Any]] = answer.json()["data"]["events"]
    return events


def refused(answer: httpx.Response, status: int, code: str, words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert answer.json()["success"] is False
    assert error["code"] == code
    assert words in error["message"]


# Kept once


@both
async def test_a_delivery_is_kept(client: httpx.AsyncClient, world: World) -> None:
    payload = {"text": "\x00é", "n": 12345678901234567890123, "deep": [{"a": None}], "x": 1.5}
    answer = await deliver(client, event(payload=payload))
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert data == {
        "id": "evt_1",
        "duplicate": False,
        "received": "2023-11-14T22:13:20.250000+00:00",
    }
    [found] = await kept(client)
    assert found["payload"] == payload
    assert (found["tenant"], found["source"]) == ("public", "default")
    assert (found["key"], found["event_id"], found["type"]) == ("evt_1", "evt_1", "invoice.paid")
    assert (found["received"], found["signed"][:19]) == (data["received"], "2023-11-14T22:13:20")
    assert [one.status for one in world.recorder.finished] == [200, 200]


@both
async def test_the_same_twice_is_kept_once(client: httpx.AsyncClient, clock: Clock) -> None:
    first = await deliver(client)
    clock.now += 60
    second = await deliver(client, at=clock.now)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.json()["data"] == {**second.json()["data"], "duplicate": False}
    assert second.json()["data"]["duplicate"] is True
    assert len(await kept(client)) == 1


@both
async def test_the_same_at_the_same_time_is_kept_once(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(
        *(deliver(client, at=NOW - number, idempotency_key="d-1") for number in range(10))
    )
    assert [answer.status_code for answer in answers] == [200] * 10
    assert [answer.json()["data"]["duplicate"] for answer in answers].count(False) == 1
    assert len({answer.json()["data"]["received"] for answer in answers}) == 1
    assert len(await kept(client)) == 1


@both
async def test_a_key_with_another_body_is_a_conflict(client: httpx.AsyncClient) -> None:
    assert (await deliver(client, idempotency_key="d-1")).status_code == 200
    other = event(payload={"n": 2})
    refused(await deliver(client, other, idempotency_key="d-1"), 409, "CONFLICT", "'d-1' came")
    assert (await deliver(client, other, idempotency_key="d-2")).status_code == 200
    assert [found["key"] for found in await kept(client)] == ["d-2", "d-1"]


async def test_without_a_key_the_id_is_one(client: httpx.AsyncClient) -> None:
    await deliver(client)
    refused(await deliver(client, event(payload=2)), 409, "CONFLICT", "'evt_1' came")


async def test_a_key_is_free_again_after_its_time(client: httpx.AsyncClient, clock: Clock) -> None:
    await deliver(client)
    clock.now += 7 * DAY - 1
    assert (await deliver(client, at=clock.now)).json()["data"]["duplicate"] is True
    clock.now += 1
    answer = await deliver(client, event(payload=2), at=clock.now)
    assert answer.json()["data"]["duplicate"] is False
    assert [found["payload"] for found in await kept(client)] == [2]


@pytest.mark.parametrize("key", ["", " ", "a b", "é", "x" * 256, "a\x00"])
async def test_a_key_that_is_none(client: httpx.AsyncClient, key: str) -> None:
    body = event()
    headers = {
        b"content-type": b"application/json",
        b"x-webhook-signature": signed(body, (NEW,), at=int(NOW)).encode(),
        b"idempotency-key": key.encode(),
    }
    answer = await client.post(PATH, content=body, headers=headers)
    refused(answer, 400, "INVALID_INPUT", "Idempotency-Key is")
    assert await kept(client) == []


# Genuine


async def test_replayed_as_it_was(client: httpx.AsyncClient, clock: Clock) -> None:
    body = event()
    signature = signed(body, (NEW,), at=int(NOW))
    assert (await deliver(client, body, signature=signature)).json()["data"]["duplicate"] is False
    clock.now += 200
    for key in ("another", "and-another"):  # it is not signed
        again = await deliver(client, body, signature=signature, idempotency_key=key)
        assert again.json()["data"]["duplicate"] is True
    clock.now += 200
    refused(await deliver(client, body, signature=signature), 401, "UNAUTHORIZED", "in the past")
    assert len(await kept(client)) == 1


@pytest.mark.parametrize(
    ("skew", "words"), [(-301, "302 s in the past; at most 300 s"), (301, "301 s in the future")]
)
async def test_late_and_early(client: httpx.AsyncClient, skew: int, words: str) -> None:
    answer = await deliver(client, at=NOW + skew)
    refused(answer, 401, "UNAUTHORIZED", words)
    assert answer.json()["error"]["details"] == {"skew_s": skew - 0.25, "window_s": 300}


@pytest.mark.parametrize("skew", [-299, 300])
async def test_just_in_time(client: httpx.AsyncClient, skew: int) -> None:
    assert (await deliver(client, at=NOW + skew)).status_code == 200


async def test_altered(client: httpx.AsyncClient) -> None:
    signature = signed(event(), (NEW,), at=int(NOW))
    answer = await deliver(client, event(payload={"n": 2}), signature=signature)
    refused(answer, 401, "UNAUTHORIZED", "No signature fits")
    assert signed(event(payload={"n": 2}), (NEW,), at=int(NOW))[-64:] not in answer.text
    assert await kept(client) == []


@pytest.mark.parametrize("signature", ["", "nonsense", f"t={int(NOW)}", "v1=" + "a" * 64])
async def test_not_signed(client: httpx.AsyncClient, signature: str) -> None:
    answer = await deliver(client, signature=signature)
    refused(answer, 401, "UNAUTHORIZED", "t=<unix seconds>,v1=<64 hexadecimal digits>")


@pytest.mark.parametrize("secrets", [(NEW,), (OLD,), (OLD, b"not-known-here-yet")])
async def test_while_secrets_rotate(client: httpx.AsyncClient, secrets: Sequence[bytes]) -> None:
    assert (await deliver(client, secrets=secrets)).status_code == 200


async def test_rotated_in_a_file_without_a_restart(
    services: Services, contract: Contract, tmp_path: Path
) -> None:
    path = tmp_path / "secrets"
    path.write_bytes(OLD)
    source = WebhookSource(secrets=f"file:{path}", tenant="acme")
    sources = Sources.of(WebhooksConfig(sources={"default": source}), {})
    async with a_client(replace(services, webhook_sources=sources), contract) as client:
        assert (await deliver(client, secrets=(OLD,))).status_code == 200
        assert (await deliver(client, secrets=(NEW,))).status_code == 401
        path.write_bytes(NEW + b"\n" + OLD)
        assert (await deliver(client, secrets=(NEW,))).status_code == 200
        assert (await deliver(client, secrets=(OLD,))).status_code == 200
        path.write_bytes(NEW)
        assert (await deliver(client, secrets=(OLD,))).status_code == 401


async def test_nothing_is_parsed_before_it_is_verified(client: httpx.AsyncClient) -> None:
    refused(await deliver(client, b"{", secrets=(STRIPE,)), 401, "UNAUTHORIZED", "No signature")
    refused(await deliver(client, b"{"), 400, "INVALID_INPUT", "not valid JSON")


# Sources


async def test_a_source_of_its_own(client: httpx.AsyncClient, world: World) -> None:
    answer = await deliver(client, secrets=(STRIPE,), x_webhook_source="stripe")
    assert answer.status_code == 200
    assert world.recorder.finished[0].tenant == "acme"
    [found] = await kept(client)
    assert (found["tenant"], found["source"]) == ("acme", "stripe")
    again = await deliver(client)  # the same event of another source
    assert again.json()["data"]["duplicate"] is False


@pytest.mark.parametrize(("source", "secret"), [("stripe", NEW), ("default", STRIPE)])
async def test_the_secret_of_another_source(
    client: httpx.AsyncClient, source: str, secret: bytes
) -> None:
    answer = await deliver(client, secrets=(secret,), x_webhook_source=source)
    refused(answer, 401, "UNAUTHORIZED", "No signature fits")


@pytest.mark.parametrize("source", ["github", "", "stripe,default"])
async def test_no_such_source(client: httpx.AsyncClient, source: str) -> None:
    refused(await deliver(client, x_webhook_source=source), 404, "NOT_FOUND", "no source")
    unsigned = await deliver(client, signature="", x_webhook_source=source)
    refused(unsigned, 401, "UNAUTHORIZED", "not signed")


async def test_nothing_is_set_up(services: Services, contract: Contract) -> None:
    async with a_client(replace(services, webhook_sources=Sources()), contract) as client:
        refused(await deliver(client), 404, "NOT_FOUND", "FRONTIER_WEBHOOK_SECRETS")


# What else may be wrong


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"zzz": 1}, "Unknown field 'zzz'"),
        ({"id": ""}, "id should"),
        ({"id": "a b"}, "id should"),
        ({"id": "x" * 129}, "id should"),
        ({"type": 7}, "type should"),
        ({"payload": float("nan")}, "payload should hold finite numbers"),
    ],
)
async def test_a_signed_body_that_is_no_event(
    client: httpx.AsyncClient, fields: dict[str, Any], words: str
) -> None:
    refused(await deliver(client, event(**fields)), 400, "INVALID_INPUT", words)


async def test_a_number_that_python_would_make_infinite(client: httpx.AsyncClient) -> None:
    body = event().replace(b'{"n": 1}', b"1e400")
    refused(await deliver(client, body), 400, "INVALID_INPUT", "finite")


async def test_a_body_without_a_payload(client: httpx.AsyncClient) -> None:
    body = b'{"id":"a","type":"b"}'
    refused(await deliver(client, body), 400, "INVALID_INPUT", "payload is required")
    body = b'{"id":"a","type":"b","payload":null}'
    assert (await deliver(client, body)).status_code == 200


async def test_too_large_a_body_is_not_even_verified(client: httpx.AsyncClient) -> None:
    body = event(payload="x" * CONFIG.max_body_bytes)
    refused(await deliver(client, body), 413, "INVALID_INPUT", "are allowed")


async def test_another_type_of_body(client: httpx.AsyncClient) -> None:
    answer = await deliver(client, content_type="text/plain")
    refused(answer, 415, "INVALID_INPUT", "application/json")


async def test_a_database_out_of_reach(services: Services, contract: Contract) -> None:
    away = Inbox(LazyDatabase("postgresql://127.0.0.1:1/nowhere"), dedupe_s=DAY)
    async with a_client(replace(services, inbox=away), contract) as client:
        answer = await deliver(client)
        refused(answer, 503, "STATE_UNAVAILABLE", "nothing was done")
        assert answer.headers["retry-after"] == "1"
        assert (await client.get(EVENTS, headers=LOCAL)).status_code == 503


async def test_a_gateway_without_a_database(services: Services, contract: Contract) -> None:
    async with a_client(replace(services, inbox=None), contract) as client:
        refused(await deliver(client), 503, "STATE_UNAVAILABLE", "no database")


# Who is asked for a key


def test_public_routes_are_those_that_need_nothing() -> None:
    free = {one.path for one in routes(World().services()) if one.needs is None}
    assert free | {"/openapi.json"} == PUBLIC


async def test_a_signature_in_place_of_a_key(
    services: Services, contract: Contract, database: LazyDatabase
) -> None:
    peppers = Peppers((b"0" * 16,))
    directory = Directory(database, peppers)
    await directory.create("acme", plan="free", by="test")
    keys = {
        role: (await directory.issue("acme", role=role, by="test"))[1].text
        for role in (Role.DEVELOPER, Role.AUDITOR)
    }
    guarded = replace(
        services,
        directory=directory,
        authenticator=KeyAuthenticator(directory, peppers, clock=time.monotonic),
    )
    async with a_client(guarded, contract) as client:
        assert (await deliver(client)).status_code == 200
        assert (await deliver(client, authorization="Bearer nonsense")).status_code == 200
        assert (await client.post(PATH, json={})).status_code == 401
        assert (await client.get(EVENTS)).status_code == 401
        for role, status in ((Role.DEVELOPER, 403), (Role.AUDITOR, 200)):
            answer = await client.get(EVENTS, headers={"authorization": f"Bearer {keys[role]}"})
            assert answer.status_code == status
        await directory.change("acme", suspended=True, by="test")
        answer = await deliver(client, secrets=(STRIPE,), x_webhook_source="stripe")
        refused(answer, 403, "FORBIDDEN", "'acme' is suspended")


async def test_an_open_platform_takes_deliveries_from_elsewhere(
    services: Services, contract: Contract
) -> None:
    async with a_client(replace(services, bind_host="0.0.0.0"), contract) as client:
        assert (await deliver(client, x_forwarded_for="203.0.113.7")).status_code == 200
        assert (await client.get(EVENTS)).status_code == 403


# The list


@both
async def test_pages_of_events(client: httpx.AsyncClient) -> None:
    for name in "abcde":
        assert (await deliver(client, event(name))).status_code == 200
    pages, cursor = [], {}
    while True:
        answer = await client.get(EVENTS, params={"limit": "2", **cursor}, headers=LOCAL)
        pages.append([found["event_id"] for found in answer.json()["data"]["events"]])
        if "x-next-cursor" not in answer.headers:
            break
        cursor = {"cursor": answer.headers["x-next-cursor"]}
    assert pages == [["e", "d"], ["c", "b"], ["a"]]
    back = {"cursor": answer.headers["x-prev-cursor"]}
    answer = await client.get(EVENTS, params={"limit": "2", **back}, headers=LOCAL)
    assert [found["event_id"] for found in answer.json()["data"]["events"]] == ["c", "b"]
    foreign = await client.get(EVENTS, params={"cursor": "PmFiYw"}, headers=LOCAL)
    refused(foreign, 400, "INVALID_INPUT", "not of this list")


async def test_the_newest_page_leads_to_what_comes_later(client: httpx.AsyncClient) -> None:
    await deliver(client, event("a"))
    await deliver(client, event("b"))
    answer = await client.get(EVENTS, params={"limit": "1"}, headers=LOCAL)
    older = await client.get(
        EVENTS, params={"cursor": answer.headers["x-next-cursor"]}, headers=LOCAL
    )
    await deliver(client, event("c"))
    newer = await client.get(
        EVENTS, params={"cursor": older.headers["x-prev-cursor"]}, headers=LOCAL
    )
    assert [found["event_id"] for found in newer.json()["data"]["events"]] == ["c", "b"]


# The documents


def test_the_openapi_document_says_how_it_is_signed(contract: Contract) -> None:
    ingest = contract.document["paths"][PATH]["post"]
    [security] = ingest["security"]
    [scheme] = security
    described = contract.document["components"]["securitySchemes"][scheme]
    assert (described["in"], described["name"]) == ("header", "X-Webhook-Signature")
    assert {parameter["name"] for parameter in ingest["parameters"]} == {
        *("X-Request-ID", "X-Webhook-Source", "Idempotency-Key")
    }
    assert {"200", "400", "401", "403", "404", "409", "413", "415", "503"} <= set(
        ingest["responses"]
    )


def block(language: str) -> documents.Block:
    """The last one, which delivers."""
    found = documents.blocks(documents.ROOT / "docs" / "webhooks.md")
    return [one for one in found if one.language == language][-1]


async def test_the_documented_python_signs(client: httpx.AsyncClient) -> None:
    names: dict[str, Any] = {}
    exec(block("python").code, names)
    body = event()
    headers = names["signed"](NEW.decode(), body, at=int(NOW))
    answer = await client.post(PATH, content=body, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("curl")), reason="needs openssl and curl"
)
async def test_the_documented_shell_commands_deliver(
    world: World, database: LazyDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBHOOK_SECRET", NEW.decode())
    services = serving(world, database, time.time)
    async with on_a_socket(create_app(services)) as address:
        await asyncio.to_thread(documents.run, block("bash"), address=address)
    assert services.inbox is not None
    [found] = await services.inbox.events()
    assert (found.event_id, json.loads(found.payload)) == ("evt_1", {"amount": 4200})


@asynccontextmanager
async def on_a_socket(app: ASGIApp) -> AsyncIterator[str]:
    """In this event loop, which the database belongs to."""
    config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(server.serve([listening]))
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


# Whatever is sent


Send = Callable[[bytes, dict[bytes, bytes]], httpx.Response]


@pytest.fixture(scope="module")
def send(tmp_path_factory: pytest.TempPathFactory, contract: Contract) -> Iterator[Send]:
    """To one gateway with a real database, which many examples share."""
    database = LazyDatabase(sqlite_url(tmp_path_factory.mktemp("fuzz") / "frontier.db"))
    services = serving(World(), database, lambda: NOW)
    with asyncio.Runner() as runner:

        def post(body: bytes, headers: dict[bytes, bytes]) -> httpx.Response:
            async def posting() -> httpx.Response:
                async with a_client(services, contract) as client:
                    return await client.post(PATH, content=body, headers=headers)

            return runner.run(posting())

        yield post
        runner.run(database.close())


LATIN = st.text(st.characters(max_codepoint=255), max_size=30).map(
    lambda text: text.encode("latin-1")
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
BODIES = st.builds(
    lambda id_, payload: event(id_, payload=payload), st.text(max_size=4), JSON
) | st.binary(max_size=40)
SIGNATURES = st.lists(
    st.sampled_from([b"t=", b"v1=", b",", str(int(NOW)).encode(), b"a" * 64, b" ", b"=", b"v2=x"])
    | LATIN,
    max_size=6,
).map(b"".join)


@given(
    body=BODIES,
    genuine=st.booleans(),
    signature=SIGNATURES,
    source=st.none() | st.sampled_from([b"default", b"stripe"]) | LATIN,
    key=st.none() | st.sampled_from([b"a", b"b"]) | LATIN,
)
@settings(max_examples=150)
def test_never_a_5xx(
    send: Send,
    body: bytes,
    genuine: bool,
    signature: bytes,
    source: bytes | None,
    key: bytes | None,
) -> None:
    if genuine:
        secret = STRIPE if source == b"stripe" else NEW
        signature = signed(body, (secret,), at=int(NOW)).encode()
    headers = {b"content-type": b"application/json", b"x-webhook-signature": signature}
    if source is not None:
        headers[b"x-webhook-source"] = source
    if key is not None:
        headers[b"idempotency-key"] = key
    answer = send(body, headers)
    assert answer.status_code < 500, answer.text
    if not genuine:
        assert answer.status_code in (401, 404)
    elif source in (None, b"default", b"stripe"):
        assert answer.status_code in (200, 400, 409)
    assert not any(secret in answer.content for secret in (NEW, OLD, STRIPE))
