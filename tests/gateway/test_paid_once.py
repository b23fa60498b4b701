"""However often and by how many the same is asked: one piece of work, one entry that is paid."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from deployments.caching.cache import ResponseCache
from deployments.config import PlanConfig, PriceConfig
from deployments.gateway.app import create_app
from deployments.observability.events import fan_out
from deployments.tenants import ledger as module
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.ledger import By, Ledger, report
from deployments.tenants.meter import Meter
from state import tables
from state.cache import Bounds, Lenient
from state.cache.memory import MemoryCache
from state.counters import Strategy
from state.counters.memory import MemoryCounters
from state.database import Database
from state.places import sqlite_url
from tests.databases import database_url, postgres, postgres_url
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.test_cache import CHAT, EMBED, HeldGenerator, chatting
from tests.gateway.test_quotas import Acme

__all__ = ["database_url", "postgres", "postgres_url"]

pytestmark = pytest.mark.integration

KEY = {"authorization": "Bearer fr_1", "content-type": "application/json"}
DAY = 1_000_000
COST = 5 * 2 + 3 * 10


@dataclass
class Platform:
    """A gateway with a cache, idempotency, quotas and a ledger over one database."""

    world: World
    app: ASGIApp
    meter: Meter
    ledger: Ledger
    idempotency: IdempotencyRecords
    database: Database

    async def close(self) -> None:
        await asyncio.gather(self.ledger.close(), self.idempotency.close())

    async def rows(self) -> list[dict[str, Any]]:
        await self.ledger.flush()
        async with self.database.read() as c:
            return [dict(row._mapping) for row in await c.execute(sa.select(tables.usage))]

    async def spent(self) -> int:
        while self.meter._tasks:
            await asyncio.wait(self.meter._tasks)
        levels = await self.meter.levels(await Acme().principal(""))
        return DAY - {each.name: each.remaining for each in levels}["tokens_per_day"]

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url=BASE, headers=KEY, timeout=30)


def platform_over(database: Database, generator: FakeGenerator) -> Platform:
    ledger = Ledger(database, now=lambda: 1_800_000_000.0, clock=lambda: 0.0)
    world = World(generator=generator, authenticator=Acme())
    world.meter = Meter(
        counters=MemoryCounters(lambda: 1_800_000_000.0),
        plans={"small": PlanConfig(tokens_per_day=DAY)},
        strategy=Strategy.FIXED_WINDOW,
        prices={"smollm2": PriceConfig(input_per_million=2, output_per_million=10)},
        emit=world.recorder,
        check=ledger.check,
    )
    bounds = Bounds(max_bytes=10**7, max_entry_bytes=10**5)
    world.cache = ResponseCache(store=Lenient(MemoryCache(bounds)), ttl_s=60, emit=world.recorder)
    idempotency = IdempotencyRecords(database, ttl_s=60)
    services = replace(
        world.services(),
        idempotency=idempotency,
        emit=fan_out(world.recorder, ledger),
    )
    return Platform(world, create_app(services), world.meter, ledger, idempotency, database)


@pytest.fixture(autouse=True)
def written_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.01)


@pytest.fixture
async def platform(database_url: str) -> AsyncIterator[Platform]:
    async with await Database.open(database_url) as database:
        made = platform_over(database, HeldGenerator())
        yield made
        await made.close()


async def test_many_at_once_and_their_retries_are_one_paid_entry(platform: Platform) -> None:
    held = platform.world.generator
    assert isinstance(held, HeldGenerator)
    async with platform.client() as client:

        def ask(key: str | None, stream: bool) -> Any:
            headers = {} if key is None else {"idempotency-key": key}
            return client.post(CHAT, json=chatting(stream=stream), headers=headers)

        calls = [
            asyncio.create_task(ask(key, stream=False))
            for key in (None, "one", None, "one", "two", "two", None, None)
        ]
        await asyncio.sleep(0.2)
        held.go.set()
        answers = await asyncio.gather(*calls)
        answers += [await ask(key, stream=False) for key in ("one", "two", None, "one")]
        answers += [await ask(None, stream=True)]
    assert {answer.status_code for answer in answers} == {200}
    assert len(held.requests) == 1
    rows = await platform.rows()
    [paid] = [row for row in rows if row["cost"]]
    assert (paid["cost"], paid["outcome"]) == (COST, "computed")
    assert (paid["prompt_tokens"], paid["completion_tokens"]) == (5, 3)
    free = [row for row in rows if not row["cost"]]
    assert {(row["prompt_tokens"], row["completion_tokens"]) for row in free} == {(0, 0)}
    assert {row["remembered_tokens"] for row in free} == {8}
    # Replays of an Idempotency-Key, and those who followed the same work, are no requests of
    # their own: four without a key, one for each key, and two after that.
    assert Counter(row["outcome"] for row in rows) == {"computed": 1, "join": 5, "hit": 2}
    assert await platform.spent() == 8
    [line] = await report(platform.database, by=[By.TENANT])
    assert dict(line) == {
        "tenant": "acme",
        "requests": 8,
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "cached_tokens": 1,
        "cost": COST,
        "remembered_requests": 7,
        "remembered_tokens": 7 * 8,
    }


async def test_inputs_that_were_there_are_not_paid_for(platform: Platform) -> None:
    async with platform.client() as client:
        for texts in (["one two", "b"], ["b", "c", "c"], ["c"]):
            answer = await client.post(EMBED, json={"model": "minilm", "input": texts})
            assert answer.status_code == 200
    rows = await platform.rows()
    told = [(row["outcome"], row["prompt_tokens"], row["remembered_tokens"]) for row in rows]
    assert sorted(told) == [("computed", 1, 2), ("computed", 3, 0), ("hit", 0, 1)]
    assert await platform.spent() == 4


async def test_a_work_that_all_have_left_is_in_the_ledger(platform: Platform) -> None:
    """Also if it was done for an ``Idempotency-Key``, whose work outlives a request."""
    platform.world.generator = generator = FakeGenerator(pieces=("a",) * 500, delay_s=0.005)
    app = platform_over(platform.database, generator)
    call = RawCall(
        app.app,
        CHAT,
        chatting(stream=True, max_tokens=600),
        headers={**KEY, "idempotency-key": "k"},
    )
    await call.until(5)
    call.hang_up()
    await call.task
    [row] = await app.rows()
    assert row["status"] == 499
    assert 0 < row["completion_tokens"] < 500
    assert await app.spent() == row["prompt_tokens"] + row["completion_tokens"]


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # which of three requests
            st.sampled_from([None, "k"]),  # with an Idempotency-Key
            st.booleans(),  # streamed
            st.integers(0, 3),  # milliseconds until the next
            st.booleans(),  # hangs up
        ),
        min_size=1,
        max_size=12,
    )
)
def test_whoever_joins_retries_or_leaves(
    tmp_path_factory: pytest.TempPathFactory,
    story: list[tuple[int, str | None, bool, int, bool]],
) -> None:
    """What the counters hold is what the ledger says, and no more than was computed."""

    async def tell() -> None:
        file = tmp_path_factory.mktemp("ledger") / "frontier.db"
        async with await Database.open(sqlite_url(file)) as database:
            generator = FakeGenerator(delay_s=0.001)
            it = platform_over(database, generator)
            calls = []
            for number, key, stream, pause_ms, leaves in story:
                headers = (
                    KEY if key is None else {**KEY, "idempotency-key": f"{key}{number}{stream}"}
                )
                body = chatting(stream=stream, seed=number, max_tokens=10)
                call = RawCall(it.app, CHAT, body, headers=headers)
                calls.append(call)
                await asyncio.sleep(pause_ms / 1000)
                if leaves:
                    call.hang_up()
            await asyncio.gather(*(call.task for call in calls))
            rows = await it.rows()
            ledger = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
            assert ledger == await it.spent()
            assert sum(1 for row in rows if row["cost"]) <= len(generator.requests)
            complete = [row for row in rows if row["cost"] and row["status"] == 200]
            ended = len(generator.requests) - len(generator.cancelled)
            assert len(complete) <= ended
            await it.close()

    asyncio.run(tell())
