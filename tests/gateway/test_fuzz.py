"""Schemathesis over the OpenAPI document: no 5xx, nothing undocumented, whatever is sent."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import settings
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    missing_required_header,
    positive_data_acceptance,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.app import create_app, routes
from deployments.gateway.openapi import document
from deployments.gateway.services import Services
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import GRANTS, Principal, Role
from deployments.webhooks.inbox import Inbox
from models.errors import Unauthorized
from state.database import Database
from state.places import sqlite_url
from tests.gateway.fakes import World

KEY = "a key of this test"


class OneKey:
    """The only one there is."""

    async def principal(self, credential: str) -> Principal:
        if credential != KEY:
            raise Unauthorized("This is not the key.")
        grants = GRANTS[Role.ADMIN]
        return Principal(tenant="acme", subject="key:1", role=Role.ADMIN, scopes=grants)


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
    world.authenticator = OneKey()
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


NOT_HERE = [
    # A schema cannot say which cursors were given out, or which fields exclude one another.
    positive_data_acceptance,
    # Whatever is sent has the key, also where these think that it has none: without one and with
    # a wrong one every route is asked in test_authentication.py.
    ignored_auth,
    missing_required_header,
]
schema = described_and_served()


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=30, deadline=None)
def test_whatever_is_sent(case: Any) -> None:
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {KEY}"}
    case.call_and_validate(excluded_checks=NOT_HERE)
