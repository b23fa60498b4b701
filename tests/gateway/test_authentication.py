"""Keys at the gateway. Who may do what, route by route, and ways around it: ``tests/attacks``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from deployments.gateway.app import create_app
from deployments.tenants.directory import Directory
from deployments.tenants.identity import FRESH_S, KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import Role
from state.database import Database
from state.errors import StateUnavailable
from state.places import sqlite_url
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Secured:
    """A gateway with keys, and one key for each role."""

    def __init__(self, world: World, directory: Directory, clock: Clock) -> None:
        self.world, self.directory, self.clock = world, directory, clock
        self.keys: dict[Role, str] = {}
        self.ids: dict[Role, str] = {}

    async def prepare(self) -> None:
        await self.directory.create("acme", plan="free", by="me")
        for role in Role:
            key, minted = await self.directory.issue("acme", role=role, by="me")
            self.keys[role], self.ids[role] = minted.text, key.id

    def client(self, contract: Contract, role: Role | None) -> httpx.AsyncClient:
        headers = {} if role is None else {"authorization": f"Bearer {self.keys[role]}"}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(
                create_app(self.world.services()), raise_app_exceptions=False
            ),
            base_url=BASE,
            headers=headers,
            event_hooks={"response": [contract.check]},
        )


@pytest.fixture
async def secured(world: World, tmp_path: Path) -> AsyncIterator[Secured]:
    peppers, clock = Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"}), Clock()
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        world.directory = Directory(database, peppers)
        world.authenticator = KeyAuthenticator(world.directory, peppers, clock=clock)
        world.bind_host = "0.0.0.0"  # with keys it does not matter
        made = Secured(world, world.directory, clock)
        await made.prepare()
        yield made


async def test_a_key_may_come_in_either_header_but_not_in_both(
    secured: Secured, contract: Contract
) -> None:
    key = secured.keys[Role.DEVELOPER]
    async with secured.client(contract, None) as client:
        for headers in ({"x-api-key": key}, {"authorization": f"bearer {key}"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        both = {"x-api-key": key, "authorization": f"Bearer {secured.keys[Role.ADMIN]}"}
        assert (await client.get("/v1/models", headers=both)).status_code == 401


async def test_a_revoked_key_is_refused_within_a_second(
    secured: Secured, contract: Contract
) -> None:
    async with (
        secured.client(contract, Role.DEVELOPER) as developer,
        secured.client(contract, Role.ADMIN) as admin,
    ):
        assert (await developer.post(CHAT, json=asking())).status_code == 200
        revoked = await admin.delete(f"/admin/v1/keys/{secured.ids[Role.DEVELOPER]}")
        assert revoked.json()["data"]["revoked"]
        secured.clock.now += FRESH_S + 0.01
        assert (await developer.post(CHAT, json=asking())).status_code == 401


async def test_state_that_is_down_is_503_and_never_401(
    secured: Secured, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with secured.client(contract, Role.DEVELOPER) as client:
        assert (await client.post(CHAT, json=asking())).status_code == 200

        async def fail(_: str) -> None:
            raise StateUnavailable("sqlite is gone")

        secured.world.authenticator._found._look_up = fail  # type: ignore[union-attr]
        secured.clock.now += FRESH_S + 0.01
        answer = await client.post(CHAT, json=asking())
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "STATE_UNAVAILABLE"
        assert answer.headers["retry-after"] == "1"
        assert "sqlite" not in answer.text


def test_a_socket_without_a_key_is_not_opened(secured: Secured) -> None:
    with TestClient(create_app(secured.world.services())) as client:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/infer/ws"):
            pass
        headers = {"authorization": f"Bearer {secured.keys[Role.AUDITOR]}"}
        with client.websocket_connect("/v1/infer/ws", headers=headers) as socket:
            socket.send_json({"type": "infer", "id": "a", "model": "smollm2", "prompt": "Hi"})
            told = socket.receive_json()
            assert told["event"] == "error"
            assert told["data"]["error"]["code"] == "FORBIDDEN"


async def test_an_open_platform_answers_this_machine_only(world: World, contract: Contract) -> None:
    for host, status in (("127.0.0.1", 200), ("0.0.0.0", 403), (None, 403)):
        world.bind_host = host
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(world.services())), base_url=BASE
        ) as client:
            assert (await client.post(CHAT, json=asking())).status_code == status
            assert (await client.get("/healthz")).status_code == 200
