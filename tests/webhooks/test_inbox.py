"""Each delivery is kept once, on either database, in whatever order copies come."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from deployments.webhooks.inbox import Delivery, Inbox
from models.errors import Conflict, Forbidden
from state import tables
from state.database import Database
from state.errors import StateUnavailable
from tests.databases import database_url, postgres, postgres_url

__all__ = ["database_url", "postgres", "postgres_url"]

NOW = datetime(2026, 1, 31, 12, 0, 0, 250_000, UTC)
DAY = timedelta(days=1)


def delivery(
    key: str = "k", body: str = "{}", *, source: str = "stripe", signed: datetime = NOW
) -> Delivery:
    return Delivery(
        tenant="acme",
        source=source,
        key=key,
        event_id="evt_1",
        type="invoice.paid",
        payload=body,
        body_sha256=hashlib.sha256(body.encode()).hexdigest(),
        signed=signed,
    )


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with await Database.open(database_url) as opened:
        yield opened


@pytest.fixture
def inbox(database: Database) -> Inbox:
    return Inbox(database, dedupe_s=7 * 86_400)


async def test_what_is_accepted_is_there(inbox: Inbox, database_url: str) -> None:
    payload = '{"a":"\\u0000é","n":123456789012345678901234567890,"b":[null,1.5]}'
    given = delivery(body=payload)
    event, duplicate = await inbox.accept(given, at=NOW)
    assert not duplicate
    assert event.payload == payload
    async with await Database.open(database_url) as other:  # committed, so another sees it
        assert list(await Inbox(other, dedupe_s=1).events()) == [event]


async def test_a_copy_is_known(inbox: Inbox) -> None:
    first, _ = await inbox.accept(delivery(), at=NOW)
    later = delivery(signed=NOW + DAY)
    assert await inbox.accept(later, at=NOW + DAY) == (first, True)
    assert list(await inbox.events()) == [first]


async def test_another_body_under_the_same_key_is_a_mistake(inbox: Inbox) -> None:
    first, _ = await inbox.accept(delivery(), at=NOW)
    with pytest.raises(Conflict, match=r"'k' came before with another body.*another key"):
        await inbox.accept(delivery(body="[]"), at=NOW)
    assert list(await inbox.events()) == [first]


async def test_a_signed_copy_under_another_key_is_known(inbox: Inbox) -> None:
    """The key is not signed: who copies a delivery may write whatever there."""
    first, _ = await inbox.accept(delivery("a"), at=NOW)
    assert await inbox.accept(delivery("b"), at=NOW) == (first, True)
    _, duplicate = await inbox.accept(delivery("b", signed=NOW + DAY), at=NOW + DAY)
    assert not duplicate, "signed anew it is another delivery"


async def test_sources_and_tenants_are_apart(inbox: Inbox) -> None:
    for other in (
        delivery(),
        delivery(source="github"),
        replace(delivery(), tenant="labs"),
    ):
        assert not (await inbox.accept(other, at=NOW))[1]
    assert len(await inbox.events()) == 3


async def test_a_key_is_free_again_after_its_time(inbox: Inbox) -> None:
    first, _ = await inbox.accept(delivery(), at=NOW)
    end = NOW + 7 * DAY
    assert (await inbox.accept(delivery(), at=end - timedelta(milliseconds=1)))[1]
    again, duplicate = await inbox.accept(delivery(body="[]", signed=end), at=end)
    assert not duplicate
    assert again.id > first.id
    assert list(await inbox.events()) == [again]


async def test_what_is_old_is_forgotten_and_its_number_not_given_again(inbox: Inbox) -> None:
    old, _ = await inbox.accept(delivery("a"), at=NOW)
    young, _ = await inbox.accept(delivery("b", "[]"), at=NOW + DAY)
    assert await inbox.forget_expired(at=NOW + 7 * DAY) == 1
    assert list(await inbox.events()) == [young]
    assert await inbox.forget_expired(at=NOW + 8 * DAY) == 1
    assert await inbox.forget_expired(at=NOW + 8 * DAY) == 0
    new, duplicate = await inbox.accept(delivery("a"), at=NOW + 8 * DAY)
    assert not duplicate
    assert new.id > young.id > old.id


async def test_copies_that_come_at_once_are_kept_once(inbox: Inbox, database_url: str) -> None:
    async with await Database.open(database_url) as other:
        replicas = (inbox, Inbox(other, dedupe_s=7 * 86_400))
        outcomes = await asyncio.gather(
            *(
                each.accept(delivery(f"k{number % 3}", str(number % 3)), at=NOW)
                for number in range(12)
                for each in replicas
            )
        )
    assert [duplicate for _, duplicate in outcomes].count(False) == 3
    assert len(await inbox.events()) == len({event.id for event, _ in outcomes}) == 3


async def test_different_bodies_that_come_at_once_under_one_key(
    inbox: Inbox, database_url: str
) -> None:
    async with await Database.open(database_url) as other:
        replicas = (inbox, Inbox(other, dedupe_s=7 * 86_400))
        outcomes = await asyncio.gather(
            *(
                each.accept(delivery(body=str(number)), at=NOW)
                for number, each in enumerate(replicas * 4)
            ),
            return_exceptions=True,
        )
    kept = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(kept) == len(await inbox.events()) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 7


async def test_pages_from_either_side(inbox: Inbox) -> None:
    ids = [(await inbox.accept(delivery(k, k), at=NOW))[0].id for k in "abcde"]
    ids.reverse()

    async def page(**where: Any) -> list[int]:
        return [event.id for event in await inbox.events(limit=2, **where)]

    assert await page() == ids[:2]
    assert await page(before=ids[1]) == ids[2:4]
    assert await page(before=ids[3]) == ids[4:]
    assert await page(after=ids[3]) == ids[1:3]
    assert await page(after=ids[0]) == []


async def test_a_suspended_tenant_gets_nothing(inbox: Inbox, database: Database) -> None:
    tenant = {"name": "acme", "plan": "free", "overrides": {}, "created": NOW}
    async with database.write() as connection:
        await connection.execute(tables.tenants.insert().values(**tenant))
    await inbox.accept(delivery("before"), at=NOW)
    async with database.write() as connection:
        await connection.execute(sa.update(tables.tenants).values(suspended=NOW))
    with pytest.raises(Forbidden, match="'acme' is suspended"):
        await inbox.accept(delivery("after", "[]"), at=NOW)
    assert [event.key for event in await inbox.events()] == ["before"]


async def test_the_forgetting_goes_on_when_the_database_was_away(
    inbox: Inbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await inbox.accept(delivery(), at=NOW)
    forget, calls, forgotten = inbox.forget_expired, list[datetime](), asyncio.Event()

    async def away_once(*, at: datetime) -> int:
        calls.append(at)
        if len(calls) == 1:
            raise StateUnavailable("away")
        await forget(at=at)
        forgotten.set()
        return await asyncio.Future()

    monkeypatch.setattr(inbox, "forget_expired", away_once)
    end = NOW + 7 * DAY
    task = asyncio.create_task(inbox.keep_forgetting(every_s=0, now=end.timestamp))
    async with asyncio.timeout(30):
        await forgotten.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == [end, end]
    assert list(await inbox.events()) == []
    assert "stay for now: away" in caplog.text
