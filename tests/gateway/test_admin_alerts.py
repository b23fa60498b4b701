"""``GET /admin/v1/alerts``, and the way there: a meter that sees a budget run out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from deployments.config import PlanConfig, PriceConfig
from deployments.gateway.app import create_app
from deployments.observability.events import AlertRaised, fan_out
from deployments.tenants.alerts import Alerts
from deployments.tenants.directory import Directory
from deployments.tenants.keys import Peppers
from deployments.tenants.meter import Meter, Work
from deployments.tenants.principal import GRANTS, Principal, Role
from state.counters import Strategy
from state.counters.memory import MemoryCounters
from state.database import Database
from state.places import sqlite_url
from tests.gateway.contract import Contract
from tests.gateway.fakes import NOW, World

ROUTE = "/admin/v1/alerts"


def tenant(name: str) -> Principal:
    role = Role.DEVELOPER
    return Principal(tenant=name, subject="key:1", role=role, scopes=GRANTS[role], plan="small")


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        yield database


@pytest.fixture
def alerts(world: World, database: Database) -> Alerts:
    world.directory = Directory(
        database, Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
    )
    return Alerts(database=database, now=lambda: NOW, emit=world.recorder)


@pytest.fixture
async def client(
    world: World, alerts: Alerts, contract: Contract
) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(world.services()), client=("127.0.0.1", 1)),
        base_url="http://localhost",
        event_hooks={"response": [contract.check]},
    ) as client:
        yield client


async def spend(world: World, alerts: Alerts, name: str) -> None:
    """A month's budget, in ten requests."""
    meter = Meter(
        counters=MemoryCounters(lambda: NOW),
        plans={"small": PlanConfig(budget_per_month=0.001)},
        strategy=Strategy.FIXED_WINDOW,
        prices={"m": PriceConfig(input_per_million=1)},
        emit=fan_out(world.recorder, alerts),
        watch_s=0,
    )
    for _ in range(10):
        work = Work(prompt_tokens=100)
        meter.settle(await meter.admit(tenant(name), "m", work), work)
        while meter._tasks:
            await asyncio.wait(meter._tasks)
    await meter.close()
    assert alerts._writing is not None
    await alerts._writing


async def test_a_budget_that_runs_out(
    client: httpx.AsyncClient, world: World, alerts: Alerts
) -> None:
    await spend(world, alerts, "acme")
    await spend(world, alerts, "acme")  # another gateway, or the same one after a restart
    answer = await client.get(ROUTE)
    assert [
        (alert["tenant"], alert["kind"], alert["period"], alert["threshold"])
        for alert in answer.json()["data"]["alerts"]
    ] == [("acme", "budget", "2023-11", percent) for percent in (100, 80, 50)]
    told = [event for event in world.recorder.events if isinstance(event, AlertRaised)]
    assert [event.threshold for event in told] == [50, 80, 100]


async def test_pages_of_one_tenant(client: httpx.AsyncClient, world: World, alerts: Alerts) -> None:
    for name in ("acme", "other"):
        await spend(world, alerts, name)
    query: dict[str, str | int] = {"limit": 2, "tenant": "acme"}
    first = await client.get(ROUTE, params=query)
    second = await client.get(ROUTE, params={**query, "cursor": first.headers["x-next-cursor"]})
    back = await client.get(ROUTE, params={**query, "cursor": second.headers["x-prev-cursor"]})
    shares = [
        [alert["threshold"] for alert in answer.json()["data"]["alerts"]]
        for answer in (first, second, back)
    ]
    assert shares == [[100, 80], [50], [100, 80]]
    assert "x-next-cursor" not in second.headers
    assert "x-prev-cursor" not in first.headers


async def test_without_a_database(world: World) -> None:
    transport = httpx.ASGITransport(create_app(world.services()), client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.get(ROUTE)).status_code == 503
