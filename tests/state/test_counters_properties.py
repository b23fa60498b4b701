"""Any history of requests is the same to all three stores, decision by decision."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from state.counters import Counters, Demand, Limit, Strategy
from state.counters.memory import MemoryCounters
from state.counters.redis import RedisCounters
from state.counters.sqlite import SqliteCounters
from tests.servers import RedisServer, redis_server
from tests.state.test_counters import Clock, patience

__all__ = ["patience", "redis_server"]

MINUTE_MS, DAY_MS = 60_000, 86_400_000
OWNERS = ("acme", "globex")

limits = st.one_of(
    st.builds(
        Limit,
        name=st.sampled_from(["requests", "tokens"]),
        strategy=st.sampled_from(
            [Strategy.FIXED_WINDOW, Strategy.SLIDING_WINDOW, Strategy.TOKEN_BUCKET]
        ),
        amount=st.sampled_from([0, 1, 7, 100, 10**9]),
        window_ms=st.sampled_from([10, 1000, MINUTE_MS, DAY_MS]),
    ),
    st.builds(
        Limit,
        name=st.just("budget"),
        strategy=st.just(Strategy.FIXED_WINDOW),
        amount=st.sampled_from([0, 50, 10**12]),
    ),
    st.builds(
        Limit,
        name=st.just("running"),
        strategy=st.just(Strategy.CONCURRENT),
        amount=st.integers(0, 3),
    ),
)
demands = st.lists(
    st.builds(Demand, limits, st.sampled_from([0, 1, 3, 60, 10**8])),
    min_size=1,
    max_size=4,
    unique_by=lambda demand: demand.limit.key,
)


@dataclass(frozen=True, slots=True)
class Reserve:
    owner: str
    wanted: Sequence[Demand]
    ttl_s: float
    again: bool
    """Under the name of the lease before: its answer was lost."""


@dataclass(frozen=True, slots=True)
class Settle:
    back: int
    """The lease so many before the last."""
    used: dict[str, int]


@dataclass(frozen=True, slots=True)
class Renew:
    back: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Ask:
    owner: str
    wanted: Sequence[Demand]


@dataclass(frozen=True, slots=True)
class Drop:
    owner: str


@dataclass(frozen=True, slots=True)
class Wait:
    seconds: float


Event: TypeAlias = Reserve | Settle | Renew | Ask | Drop | Wait

owners = st.sampled_from(OWNERS)
ttls = st.sampled_from([0.05, 5.0, 100.0, 90_000.0])
used = st.dictionaries(
    st.sampled_from(["requests", "tokens", "budget"]), st.sampled_from([0, 1, 2, 60, 10**8])
)
reserves = st.builds(Reserve, owners, demands, ttls, st.booleans())
settles = st.builds(Settle, st.integers(0, 4), used)
events = st.one_of(
    reserves,
    reserves,
    settles,
    settles,
    st.builds(Renew, st.integers(0, 4), ttls),
    st.builds(Ask, owners, demands),
    st.builds(Drop, owners),
    # also back, as a clock that is set does
    st.builds(Wait, st.sampled_from([0.001, 0.5, 7.0, 61.0, 86_400.0, 2_700_000.0, -30.0])),
)


async def told(counters: Counters, history: Sequence[Event], clock: Clock) -> list[Any]:
    """All that a store answers to a history."""
    answers: list[Any] = []
    leases: list[tuple[str, str]] = []

    def lease(back: int) -> tuple[str, str]:
        return leases[-1 - back] if back < len(leases) else (OWNERS[0], "unknown")

    for event in history:
        match event:
            case Reserve(owner, wanted, ttl_s, again):
                if again and leases:
                    owner, name = leases[-1]
                else:
                    name = f"lease-{len(leases)}"
                    leases.append((owner, name))
                answers.append(await counters.reserve(owner, name, wanted, ttl_s=ttl_s))
            case Settle(back, amounts):
                answers.append(await counters.settle(*lease(back), amounts))
            case Renew(back, ttl_s):
                answers.append(await counters.renew(*lease(back), ttl_s=ttl_s))
            case Ask(owner, wanted):
                answers.append(await counters.levels(owner, [each.limit for each in wanted]))
                answers += [await counters.spent(owner, each.limit) for each in wanted]
            case Drop(owner):
                await counters.drop(
                    owner
                )  # what is expired and not yet swept may count as something
            case Wait(seconds):
                clock.now += seconds
    return answers


@settings(deadline=None)
@given(history=st.lists(events, min_size=1, max_size=25))
def test_a_history_is_the_same_to_all(redis_server: RedisServer, history: list[Event]) -> None:
    async def each() -> list[list[Any]]:
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("memory", "sqlite", "redis"):
                clock = Clock()
                counters: Counters
                match kind:
                    case "memory":
                        counters = MemoryCounters(clock)
                    case "sqlite":
                        counters = SqliteCounters(Path(folder) / "counters.db", clock)
                    case _:
                        prefix = f"test:{uuid.uuid4().hex}:"
                        counters = RedisCounters(redis_server.url, prefix=prefix, clock=clock)
                try:
                    found.append(await told(counters, history, clock))
                finally:
                    await counters.close()
        return found

    memory, *others = asyncio.run(each())
    for other in others:
        assert other == memory
