"""One suite over all counters: memory, SQLite, a real Redis."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from state.counters import Counters, Demand, Limit, Strategy, open_counters, redis, sqlite
from state.counters.memory import MemoryCounters
from state.counters.redis import RedisCounters
from state.counters.sqlite import SqliteCounters
from state.errors import StateMisconfigured, StateUnavailable
from tests.servers import RedisServer, redis_server

__all__ = ["redis_server"]

MINUTE = 60_000
START = datetime(2026, 11, 24, 23, 59, tzinfo=UTC).timestamp()

per_minute = Limit(name="requests", strategy=Strategy.FIXED_WINDOW, amount=10, window_ms=MINUTE)
sliding = Limit(name="tokens", strategy=Strategy.SLIDING_WINDOW, amount=100, window_ms=MINUTE)
bucket = Limit(name="bucket", strategy=Strategy.TOKEN_BUCKET, amount=60, window_ms=MINUTE)
small = Limit(name="small", strategy=Strategy.FIXED_WINDOW, amount=100, window_ms=MINUTE)
at_once = Limit(name="running", strategy=Strategy.CONCURRENT, amount=2)
monthly = Limit(name="budget", strategy=Strategy.FIXED_WINDOW, amount=1_000_000)


class Clock:
    """Unix seconds that stand still until somebody moves them."""

    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


Make = Callable[[Clock], Counters]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is not a server that is down."""
    monkeypatch.setattr(redis, "TIMEOUT_S", 20)
    monkeypatch.setattr(sqlite, "PATIENCE_S", 20)


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """Opens counters over the same store, as many as are asked for."""
    opened: list[Counters] = []
    shared: dict[str, Counters] = {}
    prefix = f"test:{uuid.uuid4().hex}:"

    def opener(clock: Clock) -> Counters:
        made: Counters
        match request.param:
            case "memory":
                made = shared.setdefault("memory", MemoryCounters(clock))
            case "sqlite":
                made = SqliteCounters(tmp_path / "counters.db", clock)
            case _:
                server: RedisServer = request.getfixturevalue("redis_server")
                made = RedisCounters(server.url, prefix=prefix, clock=clock)
        opened.append(made)
        return made

    yield opener
    for each in opened:
        await each.close()


async def take(
    counters: Counters, lease: str, *demands: tuple[Limit, int], ttl_s: float = 60
) -> bool:
    wanted = [Demand(limit=limit, amount=amount) for limit, amount in demands]
    return (await counters.reserve("acme", lease, wanted, ttl_s=ttl_s)).allowed


async def left(counters: Counters, limit: Limit) -> int:
    [level] = await counters.levels("acme", [limit])
    return level.remaining


async def test_what_is_reserved_counts_until_it_is_settled(make: Make) -> None:
    counters = make(Clock())
    assert await take(counters, "a", (sliding, 80))
    assert not await take(counters, "b", (sliding, 30))
    assert await counters.settle("acme", "a", {"tokens": 50})
    assert await left(counters, sliding) == 50
    assert await take(counters, "b", (sliding, 50))
    assert await left(counters, sliding) == 0


async def test_all_demands_or_none(make: Make) -> None:
    counters = make(Clock())
    assert not await take(counters, "a", (per_minute, 1), (sliding, 101))
    assert await left(counters, per_minute) == 10
    told = await counters.reserve(
        "acme",
        "b",
        [Demand(limit=per_minute, amount=1), Demand(limit=sliding, amount=40)],
        ttl_s=60,
    )
    assert [(level.name, level.remaining) for level in told.levels] == [
        ("requests", 9),
        ("tokens", 60),
    ]


async def test_owners_share_nothing(make: Make) -> None:
    counters = make(Clock())
    wanted = [Demand(limit=per_minute, amount=10)]
    assert (await counters.reserve("acme", "a", wanted, ttl_s=60)).allowed
    assert (await counters.reserve("other", "a", wanted, ttl_s=60)).allowed
    assert not (await counters.reserve("acme", "b", wanted, ttl_s=60)).allowed


async def test_stores_opened_twice_are_one(make: Make) -> None:
    clock = Clock()
    one, other = make(clock), make(clock)
    assert await take(one, "a", (sliding, 100))
    assert not await take(other, "b", (sliding, 1))
    assert await other.settle("acme", "a", {"tokens": 0})
    assert await take(one, "b", (sliding, 100))


async def test_a_lease_is_charged_and_settled_once(make: Make) -> None:
    counters = make(Clock())
    assert await take(counters, "a", (sliding, 60))
    assert await take(counters, "a", (sliding, 60)), "a retry of a call whose answer was lost"
    assert await left(counters, sliding) == 40
    assert await counters.settle("acme", "a", {"tokens": 10})
    assert not await counters.settle("acme", "a", {"tokens": 0})
    assert await left(counters, sliding) == 90


async def test_what_is_not_named_was_used_as_reserved(make: Make) -> None:
    counters = make(Clock())
    assert await take(counters, "a", (per_minute, 1), (sliding, 60))
    assert await counters.settle("acme", "a", {"tokens": 5})
    assert await left(counters, per_minute) == 9


async def test_a_lease_that_expires_stays_used_and_no_longer_runs(make: Make) -> None:
    clock = Clock()
    counters = make(clock)
    assert await take(counters, "a", (at_once, 1), (monthly, 400), ttl_s=5)
    assert await take(counters, "b", (at_once, 1), ttl_s=30)
    assert not await take(counters, "c", (at_once, 1))
    clock.now += 4
    assert await counters.renew("acme", "a", ttl_s=5)
    clock.now += 4
    assert not await take(counters, "c", (at_once, 1))
    clock.now += 1
    assert await take(counters, "c", (at_once, 1))
    assert not await counters.renew("acme", "a", ttl_s=5)
    assert not await counters.settle("acme", "a", {"budget": 0})
    assert await left(counters, monthly) == 999_600


async def test_a_fixed_window_begins_anew(make: Make) -> None:
    clock = Clock()
    counters = make(clock)
    assert await take(counters, "a", (per_minute, 10), ttl_s=120)
    wanted = [Demand(limit=per_minute, amount=1)]
    refused = await counters.reserve("acme", "b", wanted, ttl_s=60)
    assert not refused.allowed
    assert refused.levels[0].retry_ms == MINUTE
    clock.now += 59.999
    assert not await take(counters, "b", (per_minute, 1))
    clock.now += 0.001
    assert await take(counters, "b", (per_minute, 10))
    assert await counters.settle("acme", "a", {"requests": 0}), "of the window before: no refund"
    assert await left(counters, per_minute) == 0


async def test_a_sliding_window_slides(make: Make) -> None:
    clock = Clock()
    counters = make(clock)
    assert await take(counters, "a", (sliding, 60))
    clock.now += 30
    assert await take(counters, "b", (sliding, 40))
    refused = await counters.reserve("acme", "c", [Demand(limit=sliding, amount=50)], ttl_s=60)
    assert refused.levels[0].retry_ms == 36_000, "the first slice leaves after eleven"
    clock.now += 35.999
    assert not await take(counters, "c", (sliding, 1))
    clock.now += 0.001
    assert await take(counters, "c", (sliding, 60))


async def test_a_bucket_flows_back_evenly(make: Make) -> None:
    clock = Clock()
    counters = make(clock)
    assert await take(counters, "a", (bucket, 60))
    refused = await counters.reserve("acme", "b", [Demand(limit=bucket, amount=3)], ttl_s=60)
    assert refused.levels[0].retry_ms == 3000
    clock.now += 2.999
    assert not await take(counters, "b", (bucket, 3))
    clock.now += 0.001
    assert await take(counters, "b", (bucket, 3))
    assert await counters.settle("acme", "a", {"bucket": 20})
    assert await left(counters, bucket) == 40


async def test_a_month_is_a_calendar_month(make: Make) -> None:
    clock = Clock(datetime(2028, 2, 29, 23, 59, 59, tzinfo=UTC).timestamp())
    counters = make(clock)
    assert await take(counters, "a", (monthly, 1_000_000))
    [level] = await counters.levels("acme", [monthly])
    assert level.reset_ms == 1000
    clock.now += 1
    assert await left(counters, monthly) == 1_000_000


async def test_more_than_there_ever_is_has_no_time_to_try_again(make: Make) -> None:
    counters = make(Clock())
    for limit in (per_minute, sliding, bucket, at_once, monthly):
        wanted = [Demand(limit=limit, amount=limit.amount + 1)]
        refused = await counters.reserve("acme", "a", wanted, ttl_s=60)
        assert not refused.allowed
        assert refused.levels[0].retry_ms is None


async def test_a_limit_of_nothing_admits_nothing(make: Make) -> None:
    counters = make(Clock())
    for strategy in Strategy:
        limit = Limit(name="none", strategy=strategy, amount=0, window_ms=MINUTE)
        assert not await take(counters, "a", (limit, 1))


async def test_another_amount_keeps_what_was_used(make: Make) -> None:
    counters = make(Clock())
    assert await take(counters, "a", (per_minute, 8))
    more = Limit(name="requests", strategy=Strategy.FIXED_WINDOW, amount=20, window_ms=MINUTE)
    assert await left(counters, more) == 12


async def test_a_clock_that_goes_back_gives_nothing_back(make: Make) -> None:
    clock = Clock()
    counters = make(clock)
    for limit in (per_minute, sliding, bucket):
        assert await take(counters, limit.name, (limit, limit.amount))
    clock.now -= 120
    for limit in (per_minute, sliding, bucket):
        assert not await take(counters, f"{limit.name} again", (limit, 1))
    clock.now += 120
    assert await left(counters, bucket) == 0


async def test_a_crowd_gets_no_more_than_there_is(make: Make) -> None:
    clock = Clock()
    stores = [make(clock) for _ in range(4)]
    won = await asyncio.gather(
        *(take(stores[n % 4], f"lease-{n}", (sliding, 7)) for n in range(60))
    )
    assert sum(won) == 100 // 7


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mysql://x:secret@host/1", "mysql:.*not supported"),
        ("sqlite://relative.db", "no absolute file"),
        ("redis://host:notaport/0", "URL of the counters"),
    ],
)
def test_what_cannot_be_opened_says_why(url: str, why: str) -> None:
    with pytest.raises(StateMisconfigured, match=why) as told:
        open_counters(url)
    assert "secret" not in str(told.value)


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database, but long enough to look like one" * 40)
    with pytest.raises(StateMisconfigured, match="not a database"):
        open_counters(f"sqlite:///{tmp_path}/file")


async def test_a_redis_that_is_down_is_unavailable() -> None:
    counters = RedisCounters("redis://127.0.0.1:1/0")
    with pytest.raises(StateUnavailable, match=r"redis://127\.0\.0\.1:1/0"):
        await counters.ping()
    await counters.close()


def test_who_opens_a_file_that_another_is_making_waits(tmp_path: Path) -> None:
    """As gateways that start at once do: switching to a shared file does not wait by itself."""
    file = tmp_path / "counters.db"
    maker = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    maker.execute("CREATE TABLE made (x)")
    maker.execute("BEGIN IMMEDIATE")
    maker.execute("INSERT INTO made VALUES (1)")
    timer = threading.Timer(0.3, maker.execute, ["COMMIT"])
    timer.start()
    counters = SqliteCounters(file)
    assert asyncio.run(take(counters, "a", (per_minute, 1)))
    timer.join()
    maker.close()


@pytest.mark.parametrize("limit", [per_minute, sliding, bucket, monthly, at_once])
async def test_what_is_spent_is_not_what_is_held(make: Make, limit: Limit) -> None:
    clock = Clock()
    one, other = make(clock), make(clock)
    unit = 1 if limit is at_once else limit.amount // 10
    for name in "ab":
        assert await take(one, name, (limit, unit), (small, 1))
    assert (await other.spent("acme", limit)).remaining == limit.amount
    assert await one.settle("acme", "a", {limit.name: unit // 2})
    used = 0 if limit is at_once else unit // 2
    assert (await other.spent("acme", limit)).remaining == limit.amount - used
    level = await other.spent("acme", limit)
    [held] = await other.levels("acme", [limit])
    assert held.remaining == level.remaining - unit
    assert (level.name, level.amount) == (held.name, held.amount)
    assert await one.settle("acme", "b", {})
    expired = 0 if limit is at_once else used + unit
    assert (await other.spent("acme", limit)).remaining == limit.amount - expired
    assert await take(one, "c", (limit, unit), ttl_s=1)
    assert (await other.spent("acme", limit)).remaining == limit.amount - expired
    clock.now += 1
    back = 1 if limit is bucket else 0  # it has flowed
    lost = 0 if limit is at_once else unit
    assert (await other.spent("acme", limit)).remaining == limit.amount - expired - lost + back


async def test_a_decision_is_one_round_trip_to_redis(redis_server: RedisServer) -> None:
    sent: list[bytes] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", redis_server.port)

        async def back() -> None:
            while piece := await to_reader.read(65_536):
                writer.write(piece)

        backward = asyncio.create_task(back())
        while piece := await reader.read(65_536):
            sent.append(piece)
            to_writer.write(piece)
        backward.cancel()
        to_writer.close()
        writer.close()

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as between:
        port = between.sockets[0].getsockname()[1]
        counters = RedisCounters(f"redis://127.0.0.1:{port}/0", prefix=f"test:{uuid.uuid4().hex}:")
        await counters.ping()
        assert await take(counters, "first", (sliding, 1))  # from here on Redis has the script
        wanted = [(per_minute, 1), (sliding, 1), (bucket, 1), (monthly, 1), (at_once, 1)]
        limits = [limit for limit, _ in wanted]
        for call in (
            lambda: take(counters, "a", *wanted),
            lambda: take(counters, "b", (sliding, 1000)),
            lambda: counters.renew("acme", "a", ttl_s=60),
            lambda: counters.levels("acme", limits),
            lambda: counters.spent("acme", sliding),
            lambda: counters.settle("acme", "a", {"tokens": 0}),
        ):
            sent.clear()
            await call()
            assert len(sent) == 1, sent
        await counters.close()


async def test_an_owner_is_forgotten_whole(make: Make) -> None:
    counters = make(Clock())
    assert await take(counters, "running", (sliding, 80), (at_once, 1))
    other = [Demand(limit=sliding, amount=30)]
    await counters.reserve("acme2", "other", other, ttl_s=60)
    assert await counters.drop("acme")
    assert await left(counters, sliding) == 100
    assert await left(counters, at_once) == 2
    assert not await counters.settle("acme", "running", {"tokens": 5}), "it has no lease any more"
    assert not await counters.renew("acme", "running", ttl_s=60)
    assert await left(counters, sliding) == 100
    [level] = await counters.levels("acme2", [sliding])
    assert level.remaining == 70
    assert not await counters.drop("nobody")
