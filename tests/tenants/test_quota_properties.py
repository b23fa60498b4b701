"""Quotas over several gateways at once: nothing is admitted beyond them, and nothing stays held.

Requests are coroutines that wait for the same counters, each way takes its time, and a gateway
may die with requests on the way. Time is virtual, so that a day of it takes no time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import PlanConfig
from deployments.tenants.meter import Admission, Meter, QuotaExceeded, Work
from deployments.tenants.plans import LimitName
from deployments.tenants.principal import GRANTS, Principal, Role
from state.counters import Counters, Demand, Reservation, Strategy
from state.counters.memory import MemoryCounters
from tests.virtual_time import virtually

WHO = Principal(
    tenant="acme", subject="key:1", role=Role.DEVELOPER, scopes=GRANTS[Role.DEVELOPER], plan="p"
)
AT_ONCE, PER_MINUTE, PER_DAY = 4, 1000, 5000
PLAN = PlanConfig(concurrent_requests=AT_ONCE, tokens_per_minute=PER_MINUTE, tokens_per_day=PER_DAY)
BEGIN = 1_800_000_000 // 86_400 * 86_400.0
LEASE_S = 30.0
GATEWAYS = 3


@dataclass(slots=True, kw_only=True)
class Ask:
    """A request, and what becomes of it."""

    at: float
    gateway: int
    reserved: int
    share: float
    """Of it that is used."""
    takes_s: float
    gives_up_s: float | None = None
    """A client that leaves, maybe before it is let in."""
    admitted: Admission | None = None
    used: int = 0
    over: bool = False
    """Settled, by its gateway's account."""


asks = st.builds(
    Ask,
    at=st.integers(0, 150).map(float),
    gateway=st.integers(0, GATEWAYS - 1),
    reserved=st.integers(1, 400),
    share=st.floats(0, 1),
    takes_s=st.sampled_from([0.0, 0.5, 5.0, 100.0]),
    gives_up_s=st.sampled_from([None, None, None, 0.1, 0.3, 3.0]),
)


@dataclass(slots=True)
class Wire:
    """Of one gateway to the counters. What was sent is carried out, whoever waits for it."""

    inner: Counters
    delay_s: Callable[[], float]
    clock: Callable[[], float]
    dead: bool = False
    made: dict[str, float] = field(default_factory=dict)
    """When each lease was."""
    settled: set[str] = field(default_factory=set)

    async def _carried(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        async def carry() -> Any:
            await asyncio.sleep(self.delay_s())
            return await call()

        if self.dead:
            await asyncio.Event().wait()
        answer = await asyncio.shield(asyncio.create_task(carry()))
        await asyncio.sleep(self.delay_s())
        if self.dead:
            await asyncio.Event().wait()
        return answer

    async def reserve(
        self, owner: str, lease: str, demands: Sequence[Demand], *, ttl_s: float
    ) -> Reservation:
        async def call() -> Reservation:
            told = await self.inner.reserve(owner, lease, demands, ttl_s=ttl_s)
            self.made[lease] = self.clock()
            return told

        told: Reservation = await self._carried(call)
        return told

    async def settle(self, owner: str, lease: str, used: Mapping[str, int]) -> bool:
        async def call() -> bool:
            self.settled.add(lease)
            return await self.inner.settle(owner, lease, used)

        found: bool = await self._carried(call)
        return found

    async def renew(self, owner: str, lease: str, *, ttl_s: float) -> bool:
        found: bool = await self._carried(lambda: self.inner.renew(owner, lease, ttl_s=ttl_s))
        return found


class Fleet:
    """Gateways over shared counters, and the requests that they are asked."""

    def __init__(
        self,
        stores: Sequence[Counters],
        strategy: Strategy,
        *,
        delay_s: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self.wires = [Wire(store, delay_s, clock) for store in stores]
        self.meters = [
            Meter(
                counters=wire,  # type: ignore[arg-type]  # all that a meter needs for requests
                plans={"p": PLAN},
                strategy=strategy,
                prices={},
                emit=lambda _: None,
                lease_s=LEASE_S,
            )
            for wire in self.wires
        ]
        self.running = [0] * len(stores)
        self.most = 0
        """That ran at one time."""

    async def serve(self, ask: Ask) -> None:
        await asyncio.sleep(ask.at)
        if self.wires[ask.gateway].dead:
            return
        try:
            async with asyncio.timeout(ask.gives_up_s):
                await self._answer(ask)
        except (TimeoutError, QuotaExceeded):
            ask.over = True

    async def _answer(self, ask: Ask) -> None:
        meter = self.meters[ask.gateway]
        work = Work(completion_tokens=ask.reserved)
        ask.admitted = await meter.admit(WHO, None, work)
        self.running[ask.gateway] += 1
        self.most = max(self.most, sum(self.running))
        ask.used = round(ask.reserved * ask.share)
        try:
            await asyncio.sleep(ask.takes_s)
        finally:
            if not self.wires[ask.gateway].dead:
                self.running[ask.gateway] -= 1
                meter.settle(ask.admitted, Work(completion_tokens=ask.used))
                ask.over = True

    async def die(self, gateway: int, at: float) -> None:
        """As by SIGKILL: nothing of it is ever done again, and its engines stop."""
        await asyncio.sleep(at)
        self.wires[gateway].dead = True
        self.running[gateway] = 0
        renewing = self.meters[gateway]._renewing
        for task in [*self.meters[gateway]._tasks, *([renewing] if renewing else [])]:
            task.cancel()

    def _lost(self, ask: Ask) -> bool:
        """Whether its gateway may have died before it could settle."""
        wire, admitted = self.wires[ask.gateway], ask.admitted
        settled = admitted is not None and admitted.lease in wire.settled
        return not ask.over or (wire.dead and not settled)

    def check(self, asked: Sequence[Ask], left: Mapping[str, int], strategy: Strategy) -> None:
        """``left``: of each limit, once all leases are over."""
        assert self.most <= AT_ONCE
        assert left[LimitName.CONCURRENT_REQUESTS] == AT_ONCE, "nothing runs for ever"
        made = [
            (self.wires[ask.gateway].made[ask.admitted.lease], ask.used)
            for ask in asked
            if ask.admitted is not None
        ]
        for begin, _ in made:
            if strategy is Strategy.SLIDING_WINDOW:
                assert sum(used for at, used in made if begin <= at < begin + 60) <= PER_MINUTE
            elif strategy is Strategy.FIXED_WINDOW:
                assert sum(used for at, used in made if at // 60 == begin // 60) <= PER_MINUTE
            else:
                for end, _ in made:
                    flowed = PER_MINUTE * max(0.0, end - begin) / 60 + 1
                    within = sum(used for at, used in made if begin <= at <= end)
                    assert within <= PER_MINUTE + flowed
        used = sum(used for _, used in made)
        assert used <= PER_DAY
        if strategy is not Strategy.TOKEN_BUCKET:  # which has flowed back
            lost = sum(ask.reserved for ask in asked if self._lost(ask))
            charged = PER_DAY - left[LimitName.TOKENS_PER_DAY]
            assert used <= charged <= used + lost, "what the dead had reserved, and no more"


async def ended(tasks: Collection[asyncio.Task[None]]) -> None:
    """Of the dead: they wait for ever."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def left_of(store: Counters, strategy: Strategy) -> dict[str, int]:
    reader = Meter(
        counters=store, plans={"p": PLAN}, strategy=strategy, prices={}, emit=lambda _: None
    )
    return {level.name: level.remaining for level in await reader.levels(WHO)}


STRATEGIES = [Strategy.FIXED_WINDOW, Strategy.SLIDING_WINDOW, Strategy.TOKEN_BUCKET]


@settings(max_examples=100)
@given(
    asked=st.lists(asks, max_size=30),
    strategy=st.sampled_from(STRATEGIES),
    deaths=st.dictionaries(st.integers(0, GATEWAYS - 1), st.floats(0, 200), max_size=2),
    seed=st.integers(0, 2**32),
)
def test_no_interleaving_admits_more_than_the_quota(
    asked: list[Ask], strategy: Strategy, deaths: dict[int, float], seed: int
) -> None:
    async def story() -> None:
        loop, random = asyncio.get_running_loop(), Random(seed)

        def clock() -> float:
            return BEGIN + loop.time()

        store = MemoryCounters(clock)
        fleet = Fleet(
            [store] * GATEWAYS, strategy, delay_s=lambda: random.random() / 4, clock=clock
        )
        for gateway, at in deaths.items():
            asyncio.create_task(fleet.die(gateway, at))  # noqa: RUF006  # the loop ends with it
        serving = [asyncio.create_task(fleet.serve(ask)) for ask in asked]
        # The longest request, the looks for what was made late, and then a lease: no more.
        await asyncio.sleep(150 + 100 + 15 + LEASE_S)
        fleet.check(asked, await left_of(store, strategy), strategy)
        await ended(serving)

    virtually(story)
