"""Nobody changes the control plane unseen: every route that does leaves who it was in the log.

Over a real registry and a real database, as gateways have them.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.catalogue import Catalogue
from deployments.gateway.app import create_app
from deployments.gateway.operation import Operation
from deployments.publishing import RegistryAdapters
from deployments.tenants import deletion
from deployments.tenants.principal import Role
from models import artifact
from models.registry import open_registry
from models.store import Store
from tests.attacks.test_rights import name_of, ways_in
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.gateway.test_authentication import Secured, secured
from tests.test_publishing import BASE as TRAINED_ON
from tests.test_publishing import sealed

__all__ = ["secured"]

READING = frozenset({"GET", "HEAD"})
CHANGES: Mapping[str, tuple[dict[str, Any] | None, str]] = {
    "POST /admin/v1/models/{model}/adapters": ({"name": "poet"}, "promote"),
    "DELETE /admin/v1/models/{model}/adapters/{name}": (None, "remove"),
    "PUT /admin/v1/models/{model}/visibility": ({"tenants": ["victim"]}, "model.visibility"),
    "POST /admin/v1/tenants": ({"name": "newcomer"}, "tenant.create"),
    "PATCH /admin/v1/tenants/{tenant}": ({"plan": "pro"}, "tenant.change"),
    "POST /admin/v1/tenants/{tenant}/keys": ({}, "key.issue"),
    "POST /admin/v1/keys/{key}/rotate": ({}, "key.rotate"),
    "DELETE /admin/v1/keys/{key}": (None, "key.revoke"),
    "DELETE /admin/v1/tenants/{tenant}": (None, "tenant.delete"),
}
"""What each is sent, and what it is called in the log; in an order in which all of them work."""


@pytest.fixture
async def admin(
    secured: Secured, contract: Contract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    """With an administrator's key, and an adapter to publish in the registry."""
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path))  # whose database is that of `secured`
    monkeypatch.setattr(deletion, "SETTLE_S", 0)
    folder = sealed(tmp_path / "adapter", "poet")
    async with open_registry() as registry:
        await registry.register(artifact.read(folder), Store().publish(folder), by="somebody else")
    catalogue = Catalogue()

    async def fits(model: str, reference: str) -> None:
        return

    adapters = RegistryAdapters(catalogue, {"smollm2": TRAINED_ON}, fits, refresh_s=0)
    app = create_app(replace(secured.world.services(), adapters=adapters))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False),
        base_url=BASE,
        headers={"authorization": f"Bearer {secured.keys[Role.ADMIN]}"},
        event_hooks={"response": [contract.check]},
    ) as client:
        yield client
    await catalogue.close()


def test_every_route_that_writes_is_here(world: World) -> None:
    writing = {
        name_of(route)
        for route in ways_in(world)
        if isinstance(route, Operation)
        and route.path_format.startswith("/admin/")
        and route.method not in READING
    }
    assert writing == CHANGES.keys()


async def test_who_changed_what(secured: Secured, admin: httpx.AsyncClient) -> None:
    await secured.directory.create("victim", plan="free", by="somebody else")
    key, _ = await secured.directory.issue("victim", by="somebody else")
    parts = {"model": "smollm2", "name": "poet", "tenant": "victim", "key": key.id}
    who = f"key:{secured.ids[Role.ADMIN]}"
    for name, (body, what) in CHANGES.items():
        method, path = name.split(" ")
        path = re.sub(r"{(\w+)}", lambda found: parts[found[1]], path)
        [newest] = await secured.directory.audit(limit=1)
        answer = await admin.request(method, path, json=body)
        assert answer.status_code == 200, f"{name}: {answer.text}"
        told = await secured.directory.audit(after=newest.id)
        assert what in {entry.what for entry in told}, name
        assert {entry.who for entry in told} == {who}, name
