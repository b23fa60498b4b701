"""Each budget alert is told of once, by whichever gateway is first, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from deployments.observability.events import AlertRaised, BudgetReached, Event, RequestShed
from deployments.tenants import alerts as module
from deployments.tenants.alerts import Alerts, raised, row
from models.contracts import Priority
from state.database import Database
from state.errors import StateUnavailable

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
REST_OF_NOVEMBER_S = 5.5 * 86_400


def reached(
    share: float, tenant: str = "acme", resets_in_s: float | None = REST_OF_NOVEMBER_S
) -> BudgetReached:
    return BudgetReached(tenant=tenant, share=share, resets_in_s=resets_in_s)


class Gateway:
    """One of several, with a connection of its own."""

    def __init__(self, database: Database, now: float = NOON) -> None:
        self.told: list[Event] = []
        self.alerts = Alerts(database=database, now=lambda: now, emit=self.told.append)

    async def done(self) -> None:
        if self.alerts._writing is not None:
            await self.alerts._writing


@pytest.fixture
async def databases(database_url: str) -> AsyncIterator[list[Database]]:
    opened = [await Database.open(database_url) for _ in range(3)]
    yield opened
    for database in opened:
        await database.close()


async def test_of_several_gateways_one_tells(databases: list[Database]) -> None:
    gateways = [Gateway(database) for database in databases]
    for share in (0.5, 0.8, 1.0):
        for gateway in gateways:
            gateway.alerts(reached(share))
    await asyncio.gather(*(gateway.done() for gateway in gateways))
    told = [event for gateway in gateways for event in gateway.told]
    assert all(isinstance(event, AlertRaised) for event in told)
    assert sorted(event.threshold for event in told if isinstance(event, AlertRaised)) == [
        50,
        80,
        100,
    ]
    kept = await raised(databases[0])
    assert {(a.tenant, a.kind, a.period, a.threshold) for a in kept} == {
        ("acme", "budget", "2026-11", share) for share in (50, 80, 100)
    }
    assert {alert.id for alert in kept} == {
        event.id for event in told if isinstance(event, AlertRaised)
    }


async def test_a_gateway_that_starts_again_says_nothing_twice(databases: list[Database]) -> None:
    for expected in (1, 0):
        gateway = Gateway(databases[0])
        gateway.alerts(reached(0.8))
        await gateway.done()
        assert len(gateway.told) == expected


async def test_every_tenant_and_month_has_its_own(databases: list[Database]) -> None:
    gateway = Gateway(databases[0])
    gateway.alerts(reached(0.5))
    gateway.alerts(reached(0.5, tenant="other"))
    await gateway.done()
    december = Gateway(databases[0], now=NOON + 10 * 86_400)
    december.alerts(reached(0.5, resets_in_s=20 * 86_400))
    await december.done()
    assert [(a.tenant, a.period) for a in await raised(databases[0])] == [
        ("acme", "2026-12"),
        ("other", "2026-11"),
        ("acme", "2026-11"),
    ]


async def test_other_events_are_none_of_its_business(databases: list[Database]) -> None:
    gateway = Gateway(databases[0])
    gateway.alerts(RequestShed(model="m", priority=Priority.LOW, reason="full"))
    assert gateway.alerts._writing is None


def test_the_month_is_that_of_the_counters() -> None:
    """Our clock may be past midnight already, or not yet."""
    midnight = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
    december_s = 31 * 86_400
    assert row(reached(0.5, resets_in_s=december_s), midnight - 60)["period"] == "2026-12"
    assert row(reached(0.5, resets_in_s=december_s), midnight + 60)["period"] == "2026-12"
    assert row(reached(0.5, resets_in_s=None), midnight + 60)["period"] == "2026-12"


class Fragile(Database):
    """Loses its connection when it is told to: before the commit, or just after it."""

    before = after = False

    @asynccontextmanager
    async def write(self, alone: str | None = None) -> AsyncIterator[AsyncConnection]:
        if self.before:
            raise StateUnavailable("gone")
        async with super().write(alone) as connection:
            yield connection
        if self.after:
            self.after = False
            raise StateUnavailable("the answer to the commit was lost")


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_database_that_comes_back_hears_of_it(
    database_url: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    async with await Fragile.open(database_url) as database:
        gateway = Gateway(database)
        setattr(database, moment, True)
        gateway.alerts(reached(0.5))
        gateway.alerts(reached(0.8))
        await asyncio.sleep(0.05)
        database.before = False
        await gateway.done()
        assert [e.threshold for e in gateway.told if isinstance(e, AlertRaised)] == [50, 80]
        assert len(await raised(database)) == 2


async def test_the_newest_first_and_from_either_side(databases: list[Database]) -> None:
    gateway = Gateway(databases[0])
    for number in range(5):
        gateway.alerts(reached(0.5, tenant=f"t{number}"))
    await gateway.done()

    async def tenants(**where: int) -> list[str]:
        return [alert.tenant for alert in await raised(databases[0], limit=2, **where)]

    newest = (await raised(databases[0]))[0].id
    assert await tenants() == ["t4", "t3"]
    assert await tenants(before=newest - 1) == ["t2", "t1"]
    assert await tenants(after=newest - 3) == ["t3", "t2"]
    assert [a.tenant for a in await raised(databases[0], tenant="t1")] == ["t1"]
