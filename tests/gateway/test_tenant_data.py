"""The export of a tenant and its deletion over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.gateway.app import create_app
from deployments.gateway.routes import admin_tenant_data
from deployments.tenants import deletion, export
from deployments.tenants.directory import Directory
from deployments.tenants.identity import KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import Role, Scope
from state.database import Database
from state.errors import StateUnavailable
from state.places import sqlite_url
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.tenants.things import settle_in

ACME = "/admin/v1/tenants/acme"


class Platform:
    """With keys, and a tenant acme that has something of everything."""

    def __init__(self, world: World, directory: Directory, peppers: Peppers) -> None:
        self.world, self.directory = world, directory
        self.keys: dict[str, str] = {}
        world.directory = directory
        world.authenticator = KeyAuthenticator(directory, peppers, clock=lambda: 100.0)

    async def prepare(self) -> None:
        await settle_in(self.directory, "acme")
        await self.directory.create("staff", plan="free", by="me")
        for role in Role:
            _, minted = await self.directory.issue("staff", role=role, by="me")
            self.keys[role] = minted.text

    def client(self, contract: Contract, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(
                create_app(self.world.services()), raise_app_exceptions=False
            ),
            base_url=BASE,
            headers={"authorization": f"Bearer {key}"},
            event_hooks={"response": [contract.check]},
        )


@pytest.fixture
async def platform(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Platform]:
    monkeypatch.setattr(deletion, "SETTLE_S", 0)
    peppers = Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        made = Platform(world, Directory(database, peppers), peppers)
        await made.prepare()
        yield made


@pytest.fixture
async def admin(platform: Platform, contract: Contract) -> AsyncIterator[httpx.AsyncClient]:
    async with platform.client(contract, platform.keys[Role.ADMIN]) as client:
        yield client


async def test_an_export_is_lines(admin: httpx.AsyncClient) -> None:
    answer = await admin.get(f"{ACME}/export")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines[0]["kind"] == "tenant"
    assert lines[-1] == {"kind": "end", "data": {"lines": len(lines) - 1}}
    [entry, *_] = (await admin.get("/admin/v1/audit")).json()["data"]["entries"]
    assert (entry["what"], entry["subject"]) == ("tenant.export", "acme")
    assert entry["who"].startswith("key:")


async def test_pieces_make_the_same_export(
    admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (await admin.get(f"{ACME}/export")).text.splitlines()
    monkeypatch.setattr(admin_tenant_data, "CHUNK_BYTES", 1)
    again = (await admin.get(f"{ACME}/export")).text.splitlines()
    assert again[:-2] == whole[:-1], "but for the entry that this one has made"


async def test_an_export_that_breaks_off_says_so(
    platform: Platform, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = export._held

    async def broken(*given: Any) -> AsyncIterator[export.Line]:
        async for line in held(*given):
            yield line
            if line.kind == "key":
                raise StateUnavailable("the disk is gone")

    monkeypatch.setattr(export, "_held", broken)
    monkeypatch.setattr(admin_tenant_data, "CHUNK_BYTES", 1)
    answer = await admin.get(f"{ACME}/export")
    *_, last = (json.loads(line) for line in answer.text.splitlines())
    assert last["kind"] == "error"
    assert last["data"]["code"] == "STATE_UNAVAILABLE"
    assert "disk" not in answer.text


async def test_a_client_that_goes_away_ends_it(platform: Platform) -> None:
    call = RawCall(
        create_app(platform.world.services()),
        f"{ACME}/export",
        method="GET",
        headers={"authorization": f"Bearer {platform.keys[Role.ADMIN]}"},
    )
    call.writable.clear()  # it never reads a byte
    call.feed(b"", more=False)
    call.hang_up()
    await call.task
    assert call.sent == []
    [finished] = platform.world.recorder.finished
    assert finished.status == 499
    database = platform.directory.database
    assert isinstance(database, Database)
    assert "Checked out connections: 0" in database.engine.pool.status()


@pytest.mark.parametrize("role", list(Role))
async def test_who_may(platform: Platform, contract: Contract, role: Role) -> None:
    async with platform.client(contract, platform.keys[role]) as client:
        exported = await client.get(f"{ACME}/export")
        assert exported.status_code == (200 if role in (Role.ADMIN, Role.AUDITOR) else 403)
        deleted = await client.delete(ACME)
        assert deleted.status_code == (200 if role is Role.ADMIN else 403)


async def test_a_key_that_may_read_tenants_but_not_the_log(
    platform: Platform, contract: Contract
) -> None:
    less = frozenset({Scope.TENANTS_READ})
    _, minted = await platform.directory.issue("staff", role=Role.AUDITOR, scopes=less, by="me")
    async with platform.client(contract, minted.text) as client:
        assert (await client.get(ACME)).status_code == 200
        answer = await client.get(f"{ACME}/export")
        assert answer.status_code == 403
        assert answer.json()["error"]["details"]["scope"] == "audit:read"


async def test_a_tenant_is_deleted(admin: httpx.AsyncClient) -> None:
    answer = await admin.delete(ACME)
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert data["removed"] == {"keys": 2, "idempotency": 1, "webhook_events": 1, "alerts": 1}
    assert data["renamed"]["usage"] == 3
    for method, path in (("GET", ACME), ("GET", f"{ACME}/export"), ("DELETE", ACME)):
        assert (await admin.request(method, path)).status_code == 404
    usage = await admin.get("/admin/v1/usage", params={"by": "tenant"})
    [line] = usage.json()["data"]["lines"]
    assert (line["tenant"], line["requests"]) == (data["called"], 3)


async def test_not_with_a_key_of_its_own(
    platform: Platform, admin: httpx.AsyncClient, contract: Contract
) -> None:
    answer = await admin.delete("/admin/v1/tenants/staff")
    assert answer.status_code == 409
    assert "the tenant that you ask as" in answer.json()["error"]["message"]
    _, minted = await platform.directory.issue("acme", role=Role.ADMIN, by="me")
    async with platform.client(contract, minted.text) as other:
        assert (await other.delete("/admin/v1/tenants/staff")).status_code == 200
        last = await other.delete(ACME)
        assert last.status_code == 409


async def test_a_gateway_without_a_database_says_so(world: World, contract: Contract) -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(world.services()), client=("127.0.0.1", 1)),
        base_url="http://localhost",
        event_hooks={"response": [contract.check]},
    ) as client:
        for method, path in (
            ("GET", f"{ACME}/export"),
            ("DELETE", ACME),
            ("GET", "/admin/v1/visibility"),
        ):
            answer = await client.request(method, path)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "STATE_UNAVAILABLE"
