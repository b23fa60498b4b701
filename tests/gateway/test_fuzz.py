"""Schemathesis over the OpenAPI document: no 5xx, nothing undocumented, whatever is sent."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import Phase, settings
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    missing_required_header,
    negative_data_rejection,
    positive_data_acceptance,
    unsupported_method,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.caching.cache import ResponseCache
from deployments.config import (
    GatewayConfig,
    GuardrailsConfig,
    PathsConfig,
    PlanConfig,
    PriceConfig,
)
from deployments.gateway.app import create_app, routes
from deployments.gateway.openapi import document
from deployments.gateway.policies.path_filter import decoded, name_prefixes
from deployments.gateway.services import Services
from deployments.guardrails.kinds import PiiKind
from deployments.tenants import idempotency
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.keys import Peppers
from deployments.tenants.meter import Meter
from deployments.tenants.principal import GRANTS, Principal, Role
from deployments.tenants.principal import Scope as Right
from deployments.webhooks.inbox import Inbox
from models.errors import PlatformError, Unauthorized
from state.cache import Bounds, Lenient
from state.cache.memory import MemoryCache
from state.counters import Strategy
from state.counters.memory import MemoryCounters
from state.database import Database
from state.places import sqlite_url
from tests.gateway.asgi import BASE
from tests.gateway.fakes import World


class AKeyForEachRole:
    """Its name."""

    async def principal(self, credential: str) -> Principal:
        if credential not in list(Role):
            raise Unauthorized("This is no key.")
        role = Role(credential)
        return Principal(
            tenant="acme", subject=f"key:{role}", role=role, scopes=GRANTS[role], plan="all"
        )


class Anew:
    """A database that is opened for each transaction: each request has a loop of its own."""

    def __init__(self, url: str) -> None:
        self._url = url

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        async with await Database.open(self._url) as database, database.read() as connection:
            yield connection

    @asynccontextmanager
    async def write(self, alone: str | None = None) -> AsyncIterator[AsyncConnection]:
        async with await Database.open(self._url) as database, database.write(alone) as connection:
            yield connection


def surroundings() -> Services:
    """With keys and a database, so that every route is served; and with all that may stand before
    a model: limits, cache, guardrails.
    """
    database: Any = Anew(sqlite_url(Path(tempfile.mkdtemp(), "frontier.db")))
    world = World()
    world.config = GatewayConfig(
        guardrails=GuardrailsConfig.model_validate(
            {
                "max_prompt_chars": 2000,
                "categories": {"plans": {"words": ["red flag"], "output": "mask"}},
                "pii": {kind: {"input": "mask", "output": "mask"} for kind in PiiKind},
            }
        ),
    )
    world.cache = ResponseCache(
        store=Lenient(MemoryCache(Bounds(max_bytes=10**6, max_entry_bytes=10**5))),
        ttl_s=60,
        emit=world.recorder,
    )
    world.meter = Meter(
        counters=MemoryCounters(),
        plans={"all": PlanConfig(tokens_per_day=10**12, concurrent_requests=10**6)},
        strategy=Strategy.SLIDING_WINDOW,
        prices={"smollm2": PriceConfig(input_per_million=1, output_per_million=1)},
        emit=world.recorder,
    )
    world.authenticator = AKeyForEachRole()
    world.directory = Directory(
        database, Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
    )
    return replace(
        world.services(),
        inbox=Inbox(database, dedupe_s=3600),
        idempotency=IdempotencyRecords(database, ttl_s=3600),
    )


def described_and_served() -> OpenApiSchema:
    services = surroundings()
    described = document(routes(services))
    # Names that exist, so that valid requests get as far as the workers.
    for name, schema in described["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema["properties"]:
            model = "minilm" if name.startswith("Embedding") else "smollm2"
            schema["properties"]["model"]["enum"] = [model]
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for parameter in operation["parameters"]:
                if parameter["name"] == "model":
                    model = "digits" if path.endswith("/predict") else "smollm2"
                    parameter["schema"]["enum"] = [model, "smollm2:poet"]
    loaded = schemathesis.openapi.from_dict(described)
    # It has never heard that a query string may be too long to be looked at.
    refusals = loaded.config.checks.negative_data_rejection
    refusals.expected_statuses = [*refusals.expected_statuses, "413", "414"]
    loaded.app = from_this_machine(create_app(services))
    return loaded


def from_this_machine(app: ASGIApp) -> ASGIApp:
    """So that admin routes answer."""

    async def local(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            others = [header for header in scope["headers"] if header[0] != b"host"]
            headers = [*others, (b"host", b"localhost")]
            scope = {**scope, "client": ("127.0.0.1", 1), "headers": headers}
        await app(scope, receive, send)

    return local


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """A machine that is busy is no database that is down."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idempotency, "PATIENCE_S", 30.0)
        yield


NOT_HERE = [
    # A schema cannot say which cursors were given out, or which fields exclude one another.
    positive_data_acceptance,
    # Who asks is decided here, also where these think that there is no key.
    ignored_auth,
    missing_required_header,
]
schema = described_and_served()
OPERATIONS = routes(World().services())
NEEDS = {(each.method, each.path_format): each.needs for each in OPERATIONS}
TOO = {("GET", "/admin/v1/tenants/{tenant}/export"): Right.AUDIT_READ}
"""A second right."""
NAMES_BELOW = name_prefixes(OPERATIONS)


def asked_by(case: Any, role: Role | None) -> Any:
    """The same request, with the key of ``role`` and no other credential."""
    given = {
        name: value for name, value in (case.headers or {}).items() if name.lower() not in KEYS
    }
    case.headers = given if role is None else {**given, "Authorization": f"Bearer {role}"}
    return case.call()


KEYS = ("authorization", "x-api-key")


def not_here(case: Any) -> list[Any]:
    """An object for a parameter of the query is written as its fields: `limit={limit: 5}` is sent
    as `limit=5`, in which nothing is wrong any more.
    """
    objects = any(isinstance(value, dict) for value in (case.query or {}).values())
    return [*NOT_HERE, negative_data_rejection] if objects else NOT_HERE


def refused_by_its_path(answer: Any) -> int | None:
    path, _, query = answer.request.path_url.partition("?")
    try:
        decoded(path.encode(), query.encode(), PathsConfig(), NAMES_BELOW)
    except PlatformError as error:
        return error.status
    return None


async def test_all_of_it_is_on() -> None:
    """Or what follows would not be about it."""
    transport = httpx.ASGITransport(schema.app)
    asked = {"model": "smollm2", "prompt": "mail a@b.example", "params": {"temperature": 0}}
    headers = {"authorization": f"Bearer {Role.ADMIN}"}
    async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=headers) as client:
        answers = [await client.post("/v1/infer", json=asked) for _ in range(2)]
        flagged = await client.post("/v1/infer", json=asked | {"prompt": "red flag"})
    assert [answer.headers.get("x-cache") for answer in answers] == ["miss", "hit"]
    assert "tokens_per_day" in answers[0].headers["ratelimit"]
    assert flagged.status_code == 400
    assert flagged.json()["error"]["details"]["guardrail"]


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=30)
def test_whatever_is_sent(case: Any) -> None:
    case.validate_response(asked_by(case, Role.ADMIN), excluded_checks=not_here(case))


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=10, phases=[Phase.generate])
def test_whatever_is_sent_by_whoever(case: Any) -> None:
    """Who has no key is told so before anything but the path is looked at; who has not the right
    gets nothing done.
    """
    public = NEEDS[case.operation.method.upper(), case.operation.path] is None
    asked = (case.method.upper(), case.operation.path)  # may be another operation's method
    needs = {NEEDS.get(asked), TOO.get(asked)} - {None}
    for role in (None, *Role):
        answer = asked_by(case, role)
        if role is None and not public:
            assert answer.status_code == (refused_by_its_path(answer) or 401)
        elif role is not None and not needs <= GRANTS[role]:
            assert answer.status_code in (403, 400, 413, 414)  # or what is wrong with the rest
        else:
            assert answer.status_code not in (401, 403) or public
        case.validate_response(answer, excluded_checks=[*not_here(case), unsupported_method])
