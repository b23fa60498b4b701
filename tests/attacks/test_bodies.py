"""Bodies that are made to hurt: too deep, too large, too many mistakes, numbers that are none.

Each goes to every route that takes a body; a new route without an example of a good one fails.
"""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from starlette.types import ASGIApp

from deployments.config import GatewayConfig, GuardrailsConfig
from deployments.gateway.app import create_app, routes
from deployments.gateway.operation import Operation
from deployments.tenants.directory import Directory
from deployments.tenants.keys import Peppers
from deployments.webhooks.inbox import Inbox
from deployments.webhooks.signature import signed
from deployments.webhooks.sources import Source, Sources
from state.database import LazyDatabase
from state.places import sqlite_url
from tests.attacks.dial import Dial
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import NOW, World

SECRET = b"a secret of these tests"
LOCAL = {"host": "localhost", "content-type": "application/json"}

GOOD: Mapping[str, tuple[str, dict[str, Any]]] = {
    "POST /v1/chat/completions": (
        "/v1/chat/completions",
        {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]},
    ),
    "POST /v1/completions": ("/v1/completions", {"model": "smollm2", "prompt": "hi"}),
    "POST /v1/embeddings": ("/v1/embeddings", {"model": "minilm", "input": "hi"}),
    "POST /v1/infer": ("/v1/infer", {"model": "smollm2", "prompt": "hi"}),
    "POST /v1/infer/stream": ("/v1/infer/stream", {"model": "smollm2", "prompt": "hi"}),
    "POST /v1/models/{model}/predict": ("/v1/models/digits/predict", {"inputs": [1]}),
    "POST /tokenize": ("/tokenize", {"model": "smollm2", "prompt": "hi"}),
    "POST /detokenize": ("/detokenize", {"model": "smollm2", "tokens": [104, 105]}),
    "POST /admin/v1/models/{model}/adapters": (
        "/admin/v1/models/smollm2/adapters",
        {"name": "poet"},
    ),
    "PUT /admin/v1/models/{model}/visibility": (
        "/admin/v1/models/smollm2/visibility",
        {"tenants": "all"},
    ),
    "POST /admin/v1/tenants": ("/admin/v1/tenants", {"name": "new"}),
    "PATCH /admin/v1/tenants/{tenant}": ("/admin/v1/tenants/acme", {"plan": "pro"}),
    "POST /admin/v1/tenants/{tenant}/keys": ("/admin/v1/tenants/acme/keys", {"label": "x"}),
    "POST /admin/v1/keys/{key}/rotate": ("/admin/v1/keys/000000000000/rotate", {"overlap_s": 1}),
    "POST /webhooks/ingest": ("/webhooks/ingest", {"id": "a", "type": "b", "payload": 1}),
}
"""A path that exists and a body that is taken, for each route that takes one."""


@pytest.fixture
async def app(world: World, tmp_path: Path) -> Any:
    database = LazyDatabase(sqlite_url(tmp_path / "frontier.db"))
    directory = Directory(database, Peppers((b"0" * 16,)))
    await directory.create("acme", plan="free", by="me")
    source = Source(name="default", tenant="acme", secrets=lambda: (SECRET,))
    world.directory = directory
    services = replace(
        world.services(),
        inbox=Inbox(database, dedupe_s=3600),
        webhook_sources=Sources({"default": source}),
    )
    yield create_app(services)
    await database.close()


class Sender:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def __call__(self, name: str, body: bytes) -> httpx.Response:
        path, _ = GOOD[name]
        signature = {"x-webhook-signature": signed(body, (SECRET,), at=int(NOW))}
        method = name.partition(" ")[0]
        return await self.client.request(method, path, content=body, headers={**LOCAL, **signature})


@pytest.fixture
async def send(client: httpx.AsyncClient) -> Sender:
    return Sender(client)


def operations() -> dict[str, Operation]:
    return {
        f"{one.method} {one.path_format}": one for one in routes(World().services()) if one.has_body
    }


def test_there_is_a_good_body_of_every_kind() -> None:
    assert GOOD.keys() == operations().keys()


async def test_a_good_body_is_taken(send: Sender) -> None:
    """Or all that follows would prove nothing."""
    for name, (_, good) in GOOD.items():
        answer = await send(name, json.dumps(good).encode())
        assert answer.status_code == (404 if "rotate" in name else 200), answer.text


DEEP = 100_000
NO_JSON: Mapping[str, bytes] = {
    "nothing": b"",
    "blanks": b" \n" * 1000,
    "lists without end": b"[" * DEEP,
    "lists in lists": b"[" * DEEP + b"]" * DEEP,
    "objects in objects": b'{"model":' * DEEP + b"1" + b"}" * DEEP,
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "two": b"{}{}",
    "a comma too many": b'{"model":"smollm2",}',
    "a comment": b'{"model":"smollm2"} // yes',
    "single quotes": b"{'model':'smollm2'}",
    "no UTF-8": b'{"model":"\xff\xfe"}',
    "more bytes than a character needs": b'{"model":"\xc0\xaf"}',
    "half a pair, in UTF-8": b'{"model":"\xed\xa0\x80"}',
    "half a pair, escaped": b'{"model":"\\ud800"}',
    "half a name": b'{"mod\\udfffel":"smollm2"}',
    "UTF-16": '{"model":"smollm2"}'.encode("utf-16"),
    "a mark of byte order": b"\xef\xbb\xbf{}",
    "a control character": b'{"model":"a\x01b"}',
    "a number without an end": b'{"model":' + b"1" * 500_000 + b"}",
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
async def test_what_is_no_body_is_told_so(send: Sender, world: World, body: bytes) -> None:
    for name in GOOD:
        answer = await send(name, body)
        assert answer.status_code == 400, name
        assert len(answer.content) < 2000, "what is sent does not come back"
    assert nobody_was_asked(world)


def nobody_was_asked(world: World) -> bool:
    asked = world.generator.requests, world.embedder.calls, world.predictor.calls
    return not any(asked)


HOSTILE: Mapping[str, bytes] = {
    "infinite": b"1e400",
    "minus infinite": b"-1e400",
    "Infinity": b"Infinity",
    "NaN": b"NaN",
    "of 4000 digits": b"9" * 4000,
    "of 5000 digits": b"9" * 5000,
    "beyond 64 bits": b"18446744073709551616",
    "minus nothing": b"-0.0",
    "next to nothing": b"1e-400",
    "a flag": b"true",
    "an object": b'{"__class__":"os","$where":"1"}',
    "deep": b"[" * 150 + b"]" * 150,
    "very deep": b"[" * 5000 + b"]" * 5000,
    "a long text": b'"' + b"A" * 200_000 + b'"',
    "U+0000": b'"\\u0000"',
    "half a pair": b'"\\udc00"',
    "a path": b'"../../../../etc/passwd"',
    "a template": b'"{{7*7}}${7*7}%s%n"',
    "a header": b'"a\\r\\nX-Injected: 1"',
    "a list of many": b"[" + b",".join([b"0"] * 50_000) + b"]",
}


def variants(name: str, value: bytes) -> Iterator[bytes]:
    """The good body with ``value`` in the place of each of its fields, given or not."""
    _, good = GOOD[name]
    for field in operations()[name].takes.model_fields:
        kept = {key: each for key, each in good.items() if key != field}
        rest = orjson.dumps(kept)[1:]
        yield b"{" + json.dumps(field).encode() + b":" + value + (b"," if kept else b"") + rest


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
async def test_a_value_that_is_made_to_hurt(send: Sender, value: bytes) -> None:
    """The answers are held to the OpenAPI document, too."""
    for name in GOOD:
        for body in variants(name, value):
            answer = await send(name, body)
            assert answer.status_code < 500, (name, body[:80], answer.text[:300])
            assert "x-injected" not in answer.headers


# What is said twice


async def test_of_a_field_that_is_given_twice_all_see_the_same(
    world: World, contract: Contract
) -> None:
    """The guardrails look at the very value that the model gets, and that is the last one."""
    guardrails = {"pii": {"email": {"input": "mask"}}}
    world.config = GatewayConfig(guardrails=GuardrailsConfig.model_validate(guardrails))
    harmless, secret = b'"prompt":"hi"', b'"prompt":"ask ann@example.org"'
    app = create_app(world.services())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        for first, second in ((harmless, secret), (secret, harmless)):
            pair = first + b"," + second
            await client.post("/v1/infer", content=b'{"model":"smollm2",%s}' % pair, headers=LOCAL)
            async with Dial(app, "/v1/infer/ws") as socket:
                asked = b'{"type":"infer","id":"a","model":"smollm2",%s}' % pair
                await socket.say(asked.decode())
                while (await socket.hear())["event"] == "token":
                    pass
    prompts = [request.prompt.messages[0].content for request in world.generator.requests]  # type: ignore[union-attr]
    assert prompts == ["ask [EMAIL]", "ask [EMAIL]", "hi", "hi"]


# What a refusal costs


def floods(name: str) -> Iterator[tuple[str, bytes]]:
    """Long bodies in which everything is wrong."""
    size = 300_000
    _, good = GOOD[name]
    head = orjson.dumps(good)[:-1]
    unknown = b",".join(b'"%x":1' % number for number in range(size // 9))[:size].rpartition(b",")[
        0
    ]
    yield "unknown fields", head + b"," + unknown + b"}"
    yield "one unknown field", head + b',"' + b"ab" * (size // 2 - 100) + b'":1}'
    for field, described in operations()[name].takes.model_fields.items():
        if re.search(r"list|dict|Any", str(described)):  # all else is one mistake
            wrong = b"[" + b",".join([b'[""]'] * (size // 5)) + b"]"
            yield field, b'{"%s":%s}' % (field.encode(), wrong)


@pytest.mark.parametrize("name", GOOD)
async def test_a_refusal_is_cheap(send: Sender, app: ASGIApp, name: str) -> None:
    """However many mistakes there are, they are not all described: memory, which can be measured
    exactly, stands for time here, which is what others would lose.
    """
    await send(name, b"{}")  # what is made at the first call of all is not counted
    for what, body in floods(name):
        tracemalloc.start()
        try:
            answer = await send(name, body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer.status_code == 400, what
        assert peak < 60 * len(body), f"{what}: {peak / 1e6:.0f} MB"  # its own objects are 48
        assert len(answer.content) < 10_000


# Sockets


@pytest.mark.parametrize(
    "message",
    [
        "[" * 5000,
        "1e400",
        '{"type":"infer","id":"a","model":"smollm2","prompt":"\\ud800"}',
        '{"type":"infer","id":"a","model":"smollm2","prompt":"x","params":{"seed":1e400}}',
        '{"type":"infer","id":"a","model":"smollm2","prompt":"x","params":{"temperature":NaN}}',
        '{"type":["infer"],"id":{"a":1}}',
        '{"type":"infer","id":"' + "a" * 100_000 + '"}',
        '{"type":"cancel","id":"\\u0000"}',
        '{"type":"infer","type":"cancel","id":"a","model":"smollm2","prompt":"x"}',
        "{" + ",".join(f'"{number}":1' for number in range(50_000)) + "}",
    ],
)
async def test_a_message_that_is_made_to_hurt_ends_nothing_but_itself(
    world: World, message: str
) -> None:
    async with Dial(create_app(world.services()), "/v1/infer/ws") as socket:
        await socket.say(message)
        told = await socket.hear()
        assert told["event"] == "error"
        assert told["data"]["error"]["code"] == "INVALID_INPUT"
        assert len(orjson.dumps(told)) < 10_000
        await socket.say({"type": "infer", "id": "b", "model": "smollm2", "prompt": "hi"})
        assert (await socket.hear())["id"] == "b"
    assert len(world.generator.requests) == 1
