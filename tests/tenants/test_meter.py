"""Quotas over real counters: what is let in, what is paid for, and what a crash leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import PLANS, PlanConfig, PriceConfig
from deployments.observability.events import BudgetReached, Event, QuotaDenied
from deployments.tenants import meter as module
from deployments.tenants.meter import Admission, Meter, QuotaExceeded, Work, cost
from deployments.tenants.plans import LimitName
from deployments.tenants.principal import EVERYBODY, GRANTS, Principal, Role
from models.errors import Forbidden
from state.counters import Counters, Strategy
from state.counters.memory import MemoryCounters
from state.counters.sqlite import SqliteCounters
from state.errors import StateMisconfigured, StateUnavailable
from tests.virtual_time import virtually

DEVELOPER = Principal(
    tenant="acme", subject="key:1", role=Role.DEVELOPER, scopes=GRANTS[Role.DEVELOPER], plan="small"
)
SMALL = PlanConfig(
    requests_per_minute=5, tokens_per_minute=1000, concurrent_requests=3, budget_per_month=0.01
)
PRICES = {"m": PriceConfig(input_per_million=1, output_per_million=3)}


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def metering(counters: Counters, events: list[Event] | None = None, **facts: object) -> Meter:
    told: dict[str, object] = {
        "plans": {"small": SMALL, **PLANS},
        "strategy": Strategy.SLIDING_WINDOW,
        "prices": PRICES,
        "looks_s": (),
        "watch_s": 0,
        "emit": [].append if events is None else events.append,
    }
    return Meter(counters=counters, **(told | facts))  # type: ignore[arg-type]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def meter(clock: Clock) -> AsyncIterator[Meter]:
    made = metering(MemoryCounters(clock))
    yield made
    await made.close()


async def left(meter: Meter, name: LimitName) -> int:
    return {level.name: level.remaining for level in await meter.levels(DEVELOPER)}[name]


async def settle(meter: Meter, admission: Admission, used: Work) -> int:
    paid = meter.settle(admission, used)
    while meter._tasks:
        await asyncio.wait(meter._tasks)
    return paid


async def test_what_was_reserved_is_settled_to_what_was_used(meter: Meter) -> None:
    admission = await meter.admit(DEVELOPER, "m", Work(prompt_tokens=100, completion_tokens=500))
    assert {level.name: level.remaining for level in admission.levels} == {
        "requests_per_minute": 4,
        "tokens_per_minute": 400,
        "concurrent_requests": 2,
        "budget_per_month": 10_000 - 1600,
    }
    paid = await settle(meter, admission, Work(prompt_tokens=10, completion_tokens=30))
    assert paid == 100
    assert await left(meter, LimitName.TOKENS_PER_MINUTE) == 960
    assert await left(meter, LimitName.REQUESTS_PER_MINUTE) == 4
    assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 3
    assert await left(meter, LimitName.BUDGET_PER_MONTH) == 9900


async def test_a_longer_prompt_is_reserved_besides(meter: Meter) -> None:
    admission = await meter.admit(DEVELOPER, "m", Work(prompt_tokens=100, completion_tokens=500))
    extended = await meter.extend(DEVELOPER, admission, 50)
    assert extended.reserved == Work(prompt_tokens=150, completion_tokens=500)
    assert {level.name: level.remaining for level in extended.levels} == {
        "requests_per_minute": 4,
        "tokens_per_minute": 350,
        "concurrent_requests": 2,
        "budget_per_month": 10_000 - 1650,
    }
    assert await settle(meter, extended, Work(prompt_tokens=140, completion_tokens=30)) == 230
    assert await left(meter, LimitName.TOKENS_PER_MINUTE) == 830
    assert await left(meter, LimitName.REQUESTS_PER_MINUTE) == 4, "it is one request"
    assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 3
    assert await left(meter, LimitName.BUDGET_PER_MONTH) == 9770


async def test_what_cannot_be_reserved_besides(meter: Meter) -> None:
    admission = await meter.admit(DEVELOPER, "m", Work(prompt_tokens=100, completion_tokens=500))
    with pytest.raises(QuotaExceeded, match="tokens per minute"):
        await meter.extend(DEVELOPER, admission, 401)
    await settle(meter, admission, Work())
    assert await left(meter, LimitName.TOKENS_PER_MINUTE) == 1000
    unlimited = await meter.extend(EVERYBODY, await meter.admit(EVERYBODY, "m", Work()), 10**9)
    assert await settle(meter, unlimited, Work(prompt_tokens=10**9)) == 10**9


@given(
    bounds=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    completion=st.integers(0, 100),
    share=st.floats(0, 1),
)
@settings(max_examples=100)
def test_however_often_it_is_extended_it_is_settled_to_what_was_used(
    bounds: list[int], completion: int, share: float
) -> None:
    async def tell() -> None:
        meter = metering(MemoryCounters(Clock()), plans={"small": PlanConfig(tokens_per_day=2000)})
        first, *more = bounds
        work = Work(prompt_tokens=first, completion_tokens=completion)
        admission = await meter.admit(DEVELOPER, None, work)
        for tokens in more:
            admission = await meter.extend(DEVELOPER, admission, tokens)
        assert admission.reserved.prompt_tokens == sum(bounds)
        assert await left(meter, LimitName.TOKENS_PER_DAY) == 2000 - sum(bounds) - completion
        used = Work(prompt_tokens=round(sum(bounds) * share), completion_tokens=completion)
        await settle(meter, admission, used)
        assert await left(meter, LimitName.TOKENS_PER_DAY) == 2000 - used.tokens
        await meter.close()

    asyncio.run(tell())


async def test_a_tenant_s_own_limits_hold_in_place_of_its_plan_s(meter: Meter) -> None:
    own = {"requests_per_minute": 1, "tokens_per_minute": None, "requests_per_hour": 2}
    special = replace(DEVELOPER, overrides=own)
    admission = await meter.admit(special, "m", Work(completion_tokens=3000))
    assert {level.name: (level.amount, level.remaining) for level in admission.levels} == {
        "requests_per_minute": (1, 0),
        "requests_per_hour": (2, 1),
        "concurrent_requests": (3, 2),
        "budget_per_month": (10_000, 1000),
    }, "more tokens than the plan has in a minute; the others are the plan's"
    with pytest.raises(QuotaExceeded, match="limit of 1 requests per minute"):
        await meter.admit(special, None, Work())
    await meter.admit(DEVELOPER, None, Work(completion_tokens=1000))
    assert {level.name for level in await meter.levels(special)} == {
        *("requests_per_minute", "requests_per_hour", "concurrent_requests", "budget_per_month")
    }


@pytest.mark.parametrize(
    ("name", "window_s"),
    [
        ("requests_per_minute", 60),
        ("requests_per_hour", 3600),
        ("requests_per_day", 86_400),
        ("tokens_per_minute", 60),
        ("tokens_per_day", 86_400),
    ],
)
async def test_each_limit_has_the_window_it_is_named_after(
    clock: Clock, name: str, window_s: int
) -> None:
    clock.now = 1_800_000_000 // 86_400 * 86_400.0  # where all of them begin
    plan = PlanConfig.model_validate({name: 2})
    meter = metering(MemoryCounters(clock), plans={"small": plan}, strategy=Strategy.FIXED_WINDOW)
    work = Work(completion_tokens=1)
    for _ in range(2):
        await settle(meter, await meter.admit(DEVELOPER, None, work), work)
    clock.now += window_s - 1
    with pytest.raises(QuotaExceeded, match=name.replace("_", " ")) as told:
        await meter.admit(DEVELOPER, None, work)
    assert told.value.retry_after == 1
    clock.now += 1
    await settle(meter, await meter.admit(DEVELOPER, None, work), work)
    await meter.close()


async def test_a_refusal_says_which_limit_and_when(meter: Meter, clock: Clock) -> None:
    await meter.admit(DEVELOPER, "m", Work(completion_tokens=900))
    clock.now += 6
    with pytest.raises(QuotaExceeded, match="1000 tokens per minute") as told:
        await meter.admit(DEVELOPER, "m", Work(prompt_tokens=101))
    assert told.value.retry_after == pytest.approx(60, abs=6)
    assert told.value.details == {
        "limit": "tokens_per_minute",
        "amount": 1000,
        "remaining": 100,
        "asked": 101,
    }
    assert [level.remaining for level in told.value.levels][:2] == [4, 100]
    with pytest.raises(QuotaExceeded, match="in all: ask for less") as never:
        await meter.admit(DEVELOPER, None, Work(prompt_tokens=1001))
    assert never.value.retry_after is None


async def test_the_budget_is_money(clock: Clock) -> None:
    plan = PlanConfig(budget_per_month=0.01)
    meter = metering(MemoryCounters(clock), plans={"small": plan})
    with pytest.raises(QuotaExceeded, match="budget per month") as told:
        await meter.admit(DEVELOPER, "m", Work(prompt_tokens=1, completion_tokens=10_000))
    assert told.value.details["amount"] == 0.01
    assert told.value.details["asked"] == pytest.approx(0.030001)
    await meter.close()


async def test_budgets_are_told_of_once_a_share(clock: Clock) -> None:
    events: list[Event] = []
    plan = PlanConfig(budget_per_month=0.001)
    meter = metering(MemoryCounters(clock), events, plans={"small": plan})
    for _ in range(10):
        await settle(
            meter,
            await meter.admit(DEVELOPER, "m", Work(prompt_tokens=100)),
            Work(prompt_tokens=100),
        )
    assert [e.share for e in events if isinstance(e, BudgetReached)] == [0.5, 0.8, 1.0]
    with pytest.raises(QuotaExceeded):
        await meter.admit(DEVELOPER, "m", Work(prompt_tokens=1))
    assert events[-1] == QuotaDenied(tenant="acme", limit="budget_per_month")
    await meter.close()


async def test_a_budget_that_is_only_reserved_is_not_told_of(clock: Clock) -> None:
    """One request that may need all of it would else tell, once and for all, of 100 percent."""
    events: list[Event] = []
    plan = PlanConfig(budget_per_month=0.001)
    meter, other = (
        metering(counters, events, plans={"small": plan})
        for counters in [MemoryCounters(clock)] * 2
    )

    def shares() -> list[float]:
        return [event.share for event in events if isinstance(event, BudgetReached)]

    large = await meter.admit(DEVELOPER, "m", Work(prompt_tokens=100, completion_tokens=300))
    await settle(meter, large, Work(prompt_tokens=100))
    assert shares() == [], "a tenth was used of what was reserved"
    running = await other.admit(DEVELOPER, "m", Work(completion_tokens=100))
    small = Work(prompt_tokens=100)
    await settle(meter, await meter.admit(DEVELOPER, "m", small), small)
    assert shares() == [], "a fifth, while another gateway's request holds three tenths"
    await settle(other, running, Work(completion_tokens=100))
    assert shares() == [0.5], "by the one that held it, though nobody reserves any more"
    await settle(
        meter, await meter.admit(DEVELOPER, "m", Work(prompt_tokens=500)), Work(prompt_tokens=500)
    )
    assert shares() == [0.5, 1.0]
    await meter.close()


async def test_what_a_gateway_that_died_had_reserved_is_spent_when_its_lease_is_over(
    clock: Clock,
) -> None:
    events: list[Event] = []
    plan = PlanConfig(budget_per_month=0.001)
    counters = MemoryCounters(clock)
    dying, other = (metering(counters, events, plans={"small": plan}) for _ in range(2))
    await dying.admit(DEVELOPER, "m", Work(prompt_tokens=1000))
    for alerted in ([], [1.0]):
        with pytest.raises(QuotaExceeded):
            await other.admit(DEVELOPER, "m", Work(prompt_tokens=1))
        while other._tasks:
            await asyncio.wait(other._tasks)
        assert [event.share for event in events if isinstance(event, BudgetReached)] == alerted
        clock.now += module.LEASE_S
    assert dying._renewing is not None
    dying._renewing.cancel()
    await other.close()


async def test_without_a_plan_nothing_is_counted(meter: Meter) -> None:
    admission = await meter.admit(EVERYBODY, "m", Work(completion_tokens=10**9))
    assert admission.levels == ()
    assert meter.settle(admission, Work(completion_tokens=2)) == 6


async def test_a_plan_that_is_gone(meter: Meter) -> None:
    orphan = Principal(
        tenant="a", subject="s", role=Role.DEVELOPER, scopes=frozenset(), plan="gone"
    )
    with pytest.raises(Forbidden, match="'gone' of 'a' is not configured"):
        await meter.admit(orphan, "m", Work())


async def test_a_gateway_that_dies_leaves_nothing_running_and_everything_paid(
    tmp_path: Path, clock: Clock
) -> None:
    dying = metering(SqliteCounters(tmp_path / "c.db", clock))
    for _ in range(3):
        await dying.admit(DEVELOPER, "m", Work(completion_tokens=100))
    # Nothing of `dying` is ever run again.
    assert dying._renewing is not None
    dying._renewing.cancel()
    other = metering(SqliteCounters(tmp_path / "c.db", clock))
    with pytest.raises(QuotaExceeded, match="concurrent requests"):
        await other.admit(DEVELOPER, "m", Work(completion_tokens=1))
    clock.now += module.LEASE_S
    assert await left(other, LimitName.CONCURRENT_REQUESTS) == 3
    assert await left(other, LimitName.TOKENS_PER_MINUTE) == 700
    await other.close()


def test_a_long_request_keeps_its_place() -> None:
    async def story() -> None:
        clock = asyncio.get_running_loop().time
        meter = metering(MemoryCounters(clock), lease_s=60)
        admission = await meter.admit(DEVELOPER, "m", Work(completion_tokens=10))
        await asyncio.sleep(600)
        assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 2
        await settle(meter, admission, Work())
        assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 3
        await meter.close()

    virtually(story)


class Flaky(MemoryCounters):
    """Out of reach while ``down``."""

    down = False
    hang = False

    async def reserve(self, *args: object, **facts: object) -> object:  # type: ignore[override]
        if self.hang:
            told = await super().reserve(*args, **facts)  # type: ignore[arg-type]
            await asyncio.sleep(60)
            return told
        if self.down:
            raise StateUnavailable("down")
        return await super().reserve(*args, **facts)  # type: ignore[arg-type]

    async def settle(self, *args: object, **facts: object) -> bool:  # type: ignore[override]
        if self.down:
            raise StateUnavailable("down")
        return await super().settle(*args, **facts)  # type: ignore[arg-type]

    async def renew(self, *args: object, **facts: object) -> bool:  # type: ignore[override]
        if self.down:
            raise StateUnavailable("down")
        return await super().renew(*args, **facts)  # type: ignore[arg-type]


def test_a_request_that_outlives_an_outage_has_its_place_again() -> None:
    """Its lease expires meanwhile, and those who come next must not find its place free."""

    async def story() -> None:
        clock = asyncio.get_running_loop().time
        counters = Flaky(clock)
        meter = metering(counters, lease_s=30)
        admission = await meter.admit(DEVELOPER, "m", Work(completion_tokens=100))
        counters.down = True
        await asyncio.sleep(60)
        counters.down = False
        await asyncio.sleep(module.RENEW_AGAIN_S + 0.1)
        assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 2
        await asyncio.sleep(100)
        assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 2
        assert await left(meter, LimitName.BUDGET_PER_MONTH) == 10_000 - 300
        await settle(meter, admission, Work(completion_tokens=1))
        assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 3
        assert await left(meter, LimitName.BUDGET_PER_MONTH) == 9_700, "what expired stays used"
        await asyncio.sleep(100)
        assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 3
        await meter.close()

    virtually(story)


async def test_counters_that_are_out_of_reach_let_nobody_in(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Flaky(clock)
    meter = metering(counters)
    admission = await meter.admit(DEVELOPER, "m", Work(completion_tokens=100))
    counters.down = True
    with pytest.raises(StateUnavailable):
        await meter.admit(DEVELOPER, "m", Work())
    meter.settle(admission, Work(completion_tokens=1))
    await asyncio.sleep(0.05)
    counters.down = False
    while meter._tasks:
        await asyncio.wait(meter._tasks)
    assert await left(meter, LimitName.TOKENS_PER_MINUTE) == 999, "settled once it came back"
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    counters.hang = True
    with pytest.raises(StateUnavailable, match="in time"):
        await meter.admit(DEVELOPER, "m", Work(completion_tokens=100))
    while meter._tasks:
        await asyncio.wait(meter._tasks)
    assert await left(meter, LimitName.TOKENS_PER_MINUTE) == 999, "an answer that came too late"
    await meter.close()


async def test_counters_that_refuse_our_password_for_a_while(clock: Clock) -> None:
    """An operator's mistake, which may be put right while requests run."""

    class Locked(MemoryCounters):
        locked = False

        async def settle(self, *args: Any, **facts: Any) -> bool:
            if self.locked:
                raise StateMisconfigured("wrong password")
            return await super().settle(*args, **facts)

    counters = Locked(clock)
    meter = metering(counters)
    admission = await meter.admit(DEVELOPER, "m", Work(completion_tokens=100))
    counters.locked = True
    meter.settle(admission, Work(completion_tokens=1))
    await asyncio.sleep(0.05)
    counters.locked = False
    while meter._tasks:
        await asyncio.wait(meter._tasks)
    assert await left(meter, LimitName.TOKENS_PER_MINUTE) == 999
    assert not meter._running
    await meter.close()


async def test_a_lease_that_is_made_after_it_was_given_up(clock: Clock) -> None:
    """What was sent to counters that hung is carried out when they go on."""

    class Late(MemoryCounters):
        sent: tuple[Any, dict[str, Any]] | None = None

        async def reserve(self, *args: Any, **facts: Any) -> Any:
            self.sent = (args, facts)
            raise StateUnavailable("no answer")

    counters = Late(clock)
    meter = metering(counters, looks_s=(0.05, 0.05))
    with pytest.raises(StateUnavailable):
        await meter.admit(DEVELOPER, "m", Work(completion_tokens=100))
    await asyncio.sleep(0.01)
    assert counters.sent is not None
    args, facts = counters.sent
    await MemoryCounters.reserve(counters, *args, **facts)
    assert await left(meter, LimitName.TOKENS_PER_MINUTE) == 900
    while meter._tasks:
        await asyncio.wait(meter._tasks)
    assert await left(meter, LimitName.TOKENS_PER_MINUTE) == 1000
    assert await left(meter, LimitName.CONCURRENT_REQUESTS) == 3
    await meter.close()


def test_costs_are_rounded_up() -> None:
    assert cost(None, Work(prompt_tokens=10)) == 0
    cheap = PriceConfig(input_per_million=0.1, output_per_million=0.4)
    assert cost(cheap, Work(prompt_tokens=1)) == 1
    assert cost(cheap, Work(prompt_tokens=100, completion_tokens=10)) == 14
