"""What is due, and that it goes and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.config import RetentionConfig
from deployments.observability.events import BudgetReached
from deployments.tenants import alerts, batches
from deployments.tenants.audit import note
from deployments.tenants.batches import in_batches
from deployments.tenants.deletion import Deletion
from deployments.tenants.directory import Directory
from deployments.tenants.retention import DELETED, Retention, due, keep_house
from state import tables
from state.errors import StateUnavailable
from tests.tenants.things import NOW, contents, use

DAY = timedelta(days=1)
CONFIG = RetentionConfig(access_days=30, usage_days=90, audit_days=365, dead_keys_days=60)


def of(directory: Directory, config: RetentionConfig = CONFIG) -> Retention:
    return Retention(database=directory.database, config=config, now=lambda: NOW)


@pytest.fixture(autouse=True)
async def acme(directory: Directory) -> None:
    await directory.create("acme", plan="free", by="me")


async def usage(directory: Directory) -> list[tuple[str, str, str]]:
    rows = (await contents(directory.database))["usage"]
    return sorted((row["day"], row["subject"], row["request_id"]) for row in rows)


async def test_who_asked_goes_first_and_the_rest_of_usage_later(directory: Directory) -> None:
    for days in (0, 29, 30, 31, 89, 90, 91):
        await use(directory.database, "acme", at=NOW - days * DAY)
    counted = await of(directory).count()
    gone = await of(directory).enforce()
    assert gone["usage"] == counted["usage"] == 1
    assert gone["who asked"] == 3, "those that are kept"
    named, nobody = ("key:1", "request of acme"), ("", "")
    expected = [(90, nobody), (89, nobody), (31, nobody), (30, named), (29, named), (0, named)]
    assert await usage(directory) == [
        (f"{NOW - days * DAY:%Y-%m-%d}", *told) for days, told in expected
    ]
    assert not any((await of(directory).enforce()).values()), "what was done is due no more"
    assert not any((await of(directory).count()).values())


async def test_audit_entries_and_dead_keys(directory: Directory) -> None:
    async with directory.database.write() as c:
        await c.execute(tables.audit.delete())
        for days in (364, 366):
            await note(c, "me", "test", f"{days} days ago")
            await c.execute(
                tables.audit.update()
                .where(tables.audit.c.subject == f"{days} days ago")
                .values(at=NOW - days * DAY)
            )
    ends: Mapping[str, dict[str, Any]] = {
        "living": {},
        "expiring": {"expires": NOW + DAY},
        "expired": {"expires": NOW - 59 * DAY},
        "expired long ago": {"expires": NOW - 61 * DAY},
        "revoked": {"revoked": NOW - 59 * DAY},
        "revoked long ago": {"revoked": NOW - 61 * DAY},
    }
    for label, values in ends.items():
        key, _ = await directory.issue("acme", label=label, by="me")
        async with directory.database.write() as c:
            wanted = tables.api_keys.c.id == key.id
            await c.execute(tables.api_keys.update().where(wanted).values(**values, label=label))
    reached = BudgetReached(tenant="acme", share=0.5)
    async with directory.database.write() as c:
        for days in (300, 400):
            at = (NOW - days * DAY).timestamp()
            await c.execute(tables.alerts.insert().values(alerts.row(reached, at)))
    gone = await of(directory).enforce()
    assert (gone["audit"], gone["alerts"], gone["dead keys"]) == (1, 1, 2)
    left = {key.label for key in await directory.keys("acme")}
    assert left == {label for label in ends if "long ago" not in label}
    subjects = [entry.subject for entry in await directory.audit()]
    assert "364 days ago" in subjects
    assert "366 days ago" not in subjects


async def test_null_is_for_ever(directory: Directory) -> None:
    await use(directory.database, "acme", at=NOW - 5000 * DAY)
    never = RetentionConfig(access_days=None, usage_days=None, audit_days=None, dead_keys_days=None)
    before = await contents(directory.database)
    assert not any((await of(directory, never).enforce()).values())
    assert await contents(directory.database) == before


async def test_usage_of_a_tenant_that_is_gone_is_nobodys(directory: Directory) -> None:
    await use(directory.database, "acme")
    await use(directory.database, "gone")
    await use(directory.database, "(deleted 0123456789ab)")
    assert (await of(directory).enforce())["late usage"] == 1
    rows = (await contents(directory.database))["usage"]
    assert {row["tenant"]: row["subject"] for row in rows} == {
        "acme": "key:1",
        DELETED: "",
        "(deleted 0123456789ab)": "key:1",
    }
    assert (await of(directory).enforce())["late usage"] == 0


async def test_counting_changes_nothing(directory: Directory) -> None:
    await use(directory.database, "acme", at=NOW - 100 * DAY)
    before = await contents(directory.database)
    assert (await of(directory).count())["usage"] == 1
    assert await contents(directory.database) == before


async def test_batches_are_small_and_add_up(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PAUSE_S", 0)
    for number in range(7):
        await use(directory.database, "acme", at=NOW - number * DAY)
    table, sizes = tables.usage, []
    write = directory.database.write

    def counting(alone: str | None = None) -> Any:
        sizes.append(alone)
        return write(alone)

    monkeypatch.setattr(directory.database, "write", counting)
    everything = table.c.tenant == "acme"
    kept = sa.and_(everything, table.c.subject != "")
    assert await in_batches(directory.database, table, kept, {"subject": ""}, rows=3) == 7
    assert sizes == ["batches"] * 3
    assert await in_batches(directory.database, table, everything, rows=7) == 7
    assert len(sizes) == 5, "a full batch says nothing about the next"
    assert await usage(directory) == []


async def test_a_table_of_two_keys_goes_in_batches_too(directory: Directory) -> None:
    records = tables.idempotency
    async with directory.database.write() as c:
        for tenant in ("acme", "other"):
            for number in range(5):
                await c.execute(
                    records.insert().values(
                        tenant=tenant, key=f"{number}", owner="", fingerprint="", until=NOW
                    )
                )
    due_ = records.c.tenant == "acme"
    assert await in_batches(directory.database, records, due_, rows=2) == 5
    left = (await contents(directory.database))["idempotency"]
    assert {row["tenant"] for row in left} == {"other"}
    assert len(left) == 5


async def test_several_gateways_at_once(directory: Directory) -> None:
    for number in range(40):
        await use(directory.database, "acme", at=NOW - (80 + number) * DAY)
    gone = await asyncio.gather(*(of(directory).enforce() for _ in range(4)))
    assert sum(each["usage"] for each in gone) == 29
    assert len(await usage(directory)) == 11


async def test_it_goes_on_when_the_database_was_away(
    directory: Directory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await use(directory.database, "acme", at=NOW - 100 * DAY)
    enforce, calls, done = Retention.enforce, 0, asyncio.Event()

    async def away_once(self: Retention) -> Mapping[str, int]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise StateUnavailable("away")
        gone = await enforce(self)
        done.set()
        return gone

    monkeypatch.setattr(Retention, "enforce", away_once)
    deletion = Deletion(database=directory.database, elsewhere={})
    task = asyncio.create_task(keep_house(of(directory), deletion, every_s=0, first_s=0))
    async with asyncio.timeout(10):
        await done.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await usage(directory) == []
    assert "stays for now: away" in caplog.text


@given(
    days=st.integers(1, 36_500),
    now=st.datetimes(datetime(2026, 1, 1), datetime(2126, 1, 1), timezones=st.just(UTC)),
)
def test_a_whole_number_of_days_is_kept(days: int, now: datetime) -> None:
    config = RetentionConfig(
        usage_days=days, access_days=None, audit_days=None, dead_keys_days=None
    )
    [usage_, _] = due(config, now)
    cut = str(usage_.where.compile(compile_kwargs={"literal_binds": True})).split("'")[1]
    kept = datetime.fromisoformat(cut).replace(tzinfo=UTC)
    assert timedelta(days=days) <= now - kept < timedelta(days=days + 1)


def test_days_are_whole_and_positive() -> None:
    for given_ in (0, -1, 1.5, "x", 36_501):
        with pytest.raises(ValidationError):
            RetentionConfig.model_validate({"usage_days": given_})
