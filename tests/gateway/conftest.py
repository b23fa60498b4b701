from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from starlette.types import ASGIApp

from deployments.gateway.app import create_app, routes
from deployments.gateway.openapi import document
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def app(world: World) -> ASGIApp:
    return create_app(world.services())


@pytest.fixture(scope="session")
def contract() -> Contract:
    return Contract(document(routes(World().services())))


@pytest.fixture
async def client(app: ASGIApp, contract: Contract) -> AsyncIterator[httpx.AsyncClient]:
    """Every answer it gets is held to the OpenAPI document."""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False),
        base_url=BASE,
        event_hooks={"response": [contract.check]},
    ) as client:
        yield client


@pytest.fixture
def server(app: ASGIApp) -> Iterator[LiveServer]:
    """The same app on a real socket."""
    with LiveServer(app) as server:
        yield server
