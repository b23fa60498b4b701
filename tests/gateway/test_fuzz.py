"""Schemathesis over the OpenAPI document: no 5xx, nothing undocumented, whatever is sent."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import Phase, settings
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    missing_required_header,
    positive_data_acceptance,
    unsupported_method,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.app import create_app, routes
from deployments.gateway.openapi import document
from deployments.gateway.services import Services
from deployments.tenants import idempotency
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import GRANTS, Principal, Role
from deployments.webhooks.inbox import Inbox
from models.errors import Unauthorized
from state.database import Database
from state.places import sqlite_url
from tests.gateway.fakes import World


class AKeyForEachRole:
    """Its name."""

    async def principal(self, credential: str) -> Principal:
        if credential not in list(Role):
            raise Unauthorized("This is no key.")
        role = Role(credential)
        return Principal(tenant="acme", subject=f"key:{role}", role=role, scopes=GRANTS[role])


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
    """With keys and a database, so that every route is served."""
    database: Any = Anew(sqlite_url(Path(tempfile.mkdtemp(), "frontier.db")))
    world = World()
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
    refusals.expected_statuses = [*refusals.expected_statuses, "414"]
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
NEEDS = {
    (operation.method, operation.path_format): operation.needs
    for operation in routes(World().services())
}


def asked_by(case: Any, role: Role | None) -> Any:
    """The same request, with the key of ``role`` and no other credential."""
    given = {
        name: value for name, value in (case.headers or {}).items() if name.lower() not in KEYS
    }
    case.headers = given if role is None else {**given, "Authorization": f"Bearer {role}"}
    return case.call()


KEYS = ("authorization", "x-api-key")


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=30)
def test_whatever_is_sent(case: Any) -> None:
    case.validate_response(asked_by(case, Role.ADMIN), excluded_checks=NOT_HERE)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=10, phases=[Phase.generate])
def test_whatever_is_sent_by_whoever(case: Any) -> None:
    """Who has no key is told so before anything else is looked at; who has not the right gets
    nothing done.
    """
    needs = NEEDS[case.operation.method.upper(), case.operation.path]
    as_described = case.method.upper() == case.operation.method.upper()
    for role in (None, *Role):
        answer = asked_by(case, role)
        if needs is not None and role is None:
            assert answer.status_code == 401
        elif needs is not None and needs not in GRANTS[Role(role)] and as_described:
            assert answer.status_code in (403, 400, 413)  # or what is wrong with its headers
        else:
            assert answer.status_code not in (401, 403) or needs is None
        case.validate_response(answer, excluded_checks=[*NOT_HERE, unsupported_method])
