"""What was used, written once and summed, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from deployments.observability.events import RequestFinished, RequestShed
from deployments.tenants import ledger as module
from deployments.tenants.directory import Directory
from deployments.tenants.ledger import By, Ledger, report
from models.contracts import Priority, Timings, Usage
from state import tables
from state.database import Database
from state.errors import StateUnavailable

NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()
TIMINGS = Timings(queue_s=0.01, prefill_s=0.02, ttft_s=0.03, decode_s=0.5, total_s=0.53)


def event(tenant: str = "acme", model: str | None = "m", tokens: int = 10) -> RequestFinished:
    return RequestFinished(
        request_id="r",
        route="/v1/chat/completions",
        method="POST",
        status=200,
        code=None,
        duration_s=1,
        model=model,
        tenant=tenant,
        subject="key:1",
        usage=Usage(prompt_tokens=tokens, completion_tokens=2 * tokens, cached_tokens=1),
        timings=TIMINGS,
        cost=7 * tokens,
    )


class Time:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def ledger(directory: Directory, time: Time, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    return Ledger(directory.database, now=time, clock=time)


async def written(ledger: Ledger) -> None:
    while ledger._writing is not None and not ledger._writing.done():
        await asyncio.wait([ledger._writing])


async def rows(database: Database) -> list[dict[str, object]]:
    async with database.read() as c:
        return [dict(each._mapping) for each in await c.execute(sa.select(tables.usage))]


async def test_a_request_is_one_row(ledger: Ledger) -> None:
    ledger(event())
    await written(ledger)
    [found] = await rows(ledger.database)  # type: ignore[arg-type]
    assert found["day"] == "2026-11-25"
    assert found["at"] == datetime.fromtimestamp(NOON, UTC)
    assert (found["tenant"], found["subject"], found["model"]) == ("acme", "key:1", "m")
    assert (found["prompt_tokens"], found["completion_tokens"], found["cost"]) == (10, 20, 70)
    assert (found["queue_ms"], found["prefill_ms"], found["decode_ms"]) == (10, 20, 500)


async def test_what_was_no_work_is_no_row(ledger: Ledger) -> None:
    ledger(RequestShed(model="m", priority=Priority.LOW, reason="full"))
    ledger(event(model=None))
    ledger(replace(event(), usage=None, cost=0))
    await written(ledger)
    assert await rows(ledger.database) == []  # type: ignore[arg-type]
    ledger(replace(event(), usage=None, code="TIMEOUT"))
    await written(ledger)
    assert len(await rows(ledger.database)) == 1  # type: ignore[arg-type]


async def test_a_report_sums_by_whatever_is_asked(ledger: Ledger, time: Time) -> None:
    for tenant, model, tokens in (("a", "m", 1), ("a", "n", 2), ("b", "m", 3)):
        ledger(event(tenant, model, tokens))
    time.now += 86_400
    ledger(event("a", "m", 4))
    await written(ledger)
    database = ledger.database

    async def told(*by: By, **facts: str) -> list[tuple[object, ...]]:
        lines = await report(database, by=by, **facts)  # type: ignore[arg-type]
        wanted = (*by, "requests", "prompt_tokens", "cost")
        return [tuple(line[each] for each in wanted) for line in lines]

    assert await told(By.TENANT) == [("a", 3, 7, 49), ("b", 1, 3, 21)]
    assert await told(By.DAY, By.MODEL) == [
        ("2026-11-25", "m", 2, 4, 28),
        ("2026-11-25", "n", 1, 2, 14),
        ("2026-11-26", "m", 1, 4, 28),
    ]
    assert await told(By.MODEL, tenant="a", since="2026-11-26") == [("m", 1, 4, 28)]
    assert await told(By.DAY, until="2026-11-25", tenant="b") == [("2026-11-25", 1, 3, 21)]
    assert await told(By.DAY, tenant="nobody") == []


async def test_rows_wait_for_the_database_and_are_written_once(
    ledger: Ledger, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 4)
    good = ledger.database

    class Down:
        """Gone for a while."""

        def write(self) -> object:
            raise StateUnavailable("gone")

    ledger.database = Down()  # type: ignore[assignment]
    for _ in range(10):
        ledger(event())
    batch = [dict(each) for each in ledger._waiting[:4]]
    async with good.write() as c:  # as if the answer to this had been lost
        await c.execute(tables.usage.insert(), batch)
    await asyncio.sleep(0.05)
    assert len(ledger._waiting) == 10
    ledger.check()
    time.now += module.LONGEST_WAIT_S + 1
    with pytest.raises(StateUnavailable, match="10 requests is not written"):
        ledger.check()
    ledger.database = good
    await written(ledger)
    ledger.check()
    assert len(await rows(good)) == 10  # type: ignore[arg-type]


async def test_too_many_rows_that_wait(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    for _ in range(2):
        ledger(event())
    ledger.check()
    ledger(event())
    with pytest.raises(StateUnavailable):
        ledger.check()
    await written(ledger)
