"""Quotas that hold: what a request may need is reserved before the work, and settled after it.

    admit ── all limits of the tenant, in one step, or RateLimited ──► Admission
    extend ── what it turns out to need besides, before it begins ──► Admission
    settle ── with what was really used, however the request ended

A gateway that dies settles nothing: its leases expire, and what they held stays used, for
nobody knows how much of it the engines had done. So no ending, and no number of gateways,
lets through more than the quota.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Any

from deployments.config import PlanConfig, PriceConfig
from deployments.observability.events import BudgetReached, Emit, QuotaDenied
from deployments.tenants.plans import MICRO, REQUESTS, TOKENS, LimitName, limits
from deployments.tenants.principal import Principal
from models.errors import Forbidden, RateLimited
from models.unique import unique
from state.counters import Counters, Demand, Level, Limit, Strategy
from state.errors import StateError, StateUnavailable
from state.patience import REQUEST_S

logger = logging.getLogger(__name__)

LEASE_S = 30.0
"""How long a running request holds its place if its gateway dies."""
RENEW_AGAIN_S = 1.0
"""When, if the counters were out of reach: nobody is let in meanwhile, and places may be free."""
PATIENCE_S = REQUEST_S
"""How long the counters may take to answer."""
SETTLE_PAUSES_S = (0.2, 2.0)
"""Between attempts to settle while the counters are out of reach, at first and later."""
LOOKS_S = (2.0, 8.0)
"""When to look again for a lease whose making was never answered: what was sent to a server that
hung is carried out when it goes on, after it was settled for the first time."""
ALERTS = (0.5, 0.8, 1.0)
"""Shares of a budget that are told of when they are spent."""
WATCH_S = 1.0
"""How long after a request a tenant's budget is looked at, once for all that end within it."""


class QuotaExceeded(RateLimited):
    """Args:
    levels: where the tenant's limits stand.
    """

    def __init__(
        self,
        message: str,
        *,
        levels: tuple[Level, ...],
        details: Mapping[str, object],
        retry_after: float | None,
    ) -> None:
        super().__init__(message, details=details, retry_after=retry_after)
        self.levels = levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Tokens that a request needs: at most, before it; really, after it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def cost(price: PriceConfig | None, work: Work) -> int:
    """Millionths of the currency, rounded up. The price of a million tokens in whole units is
    that of one token in millionths.
    """
    if price is None:
        return 0
    return math.ceil(
        work.prompt_tokens * price.input_per_million
        + work.completion_tokens * price.output_per_million
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A request that was let in."""

    tenant: str
    lease: str
    reserved: Work
    price: PriceConfig | None
    counted: bool
    """False for a tenant without limits: there is nothing to settle."""
    budget: Limit | None = None
    levels: tuple[Level, ...] = ()
    parts: tuple[Admission, ...] = ()
    """What was reserved besides, for a longer prompt; ``reserved`` is all of it."""


def amounts(work: Work, price: PriceConfig | None) -> dict[LimitName, int]:
    """What ``work`` takes of each kind of limit."""
    found = dict.fromkeys(REQUESTS, 1) | dict.fromkeys(TOKENS, work.tokens)
    found[LimitName.CONCURRENT_REQUESTS] = 1
    found[LimitName.BUDGET_PER_MONTH] = cost(price, work)
    return found


@dataclass(slots=True)
class _Running:
    tenant: str
    place: Limit | None
    """What bounds how many of the tenant's may run."""
    made: bool = False
    """Its lease is known to have been made; it has not been settled, or not for sure."""


@dataclass(slots=True, kw_only=True)
class Meter:
    """Belongs to one event loop.

    Args:
        plans: by name.
        prices: by model; one that is not named costs nothing.
        lease_s: see ``LEASE_S``.
        looks_s: see ``LOOKS_S``.
        watch_s: see ``WATCH_S``.
    """

    counters: Counters
    plans: Mapping[str, PlanConfig]
    strategy: Strategy
    prices: Mapping[str, PriceConfig]
    emit: Emit
    check: Callable[[], None] = lambda: None
    """Raises StateUnavailable while what is used cannot be written down."""
    lease_s: float = LEASE_S
    looks_s: Sequence[float] = LOOKS_S
    watch_s: float = WATCH_S
    _running: dict[str, _Running] = field(default_factory=dict)
    """By lease."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _renewing: asyncio.Task[None] | None = None
    _told: dict[str, float] = field(default_factory=dict)
    """Share of its budget at which each tenant was told of last."""
    _watched: set[str] = field(default_factory=set)
    """Tenants whose budget will be looked at in a moment."""

    async def admit(self, principal: Principal, model: str | None, work: Work) -> Admission:
        """Reserve for ``work``.

        Raises:
            RateLimited: a limit is reached; the message says which, and when to try again.
            Forbidden: the tenant's plan is no longer configured.
            StateUnavailable: the counters do not answer in time; nothing is let in unmetered.
        """
        self.check()  # of everybody: who has no limits is to pay all the same
        price = self.prices.get(model) if model is not None else None
        return await self._reserve(principal, work, price, self._limits(principal))

    async def extend(
        self, principal: Principal, admission: Admission, prompt_tokens: int
    ) -> Admission:
        """Reserve so many more for the prompt of a request that was let in. It stays one request.

        Raises:
            RateLimited, Forbidden, StateUnavailable: as ``admit``; what was reserved before is
                still to be settled.
        """
        more = Work(prompt_tokens=prompt_tokens)
        limited = {
            name: limit
            for name, limit in self._limits(principal).items()
            if name in TOKENS or name is LimitName.BUDGET_PER_MONTH
        }
        part = await self._reserve(principal, more, admission.price, limited)
        now = {level.name: level for level in part.levels}
        return replace(
            admission,
            reserved=replace(
                admission.reserved, prompt_tokens=admission.reserved.prompt_tokens + prompt_tokens
            ),
            levels=tuple(now.get(level.name, level) for level in admission.levels),
            parts=(*admission.parts, part),
        )

    async def _reserve(
        self,
        principal: Principal,
        work: Work,
        price: PriceConfig | None,
        limited: Mapping[LimitName, Limit],
    ) -> Admission:
        lease = unique(24)

        def admission(levels: tuple[Level, ...] = ()) -> Admission:
            return Admission(
                tenant=principal.tenant,
                lease=lease,
                reserved=work,
                price=price,
                counted=bool(limited),
                budget=limited.get(LimitName.BUDGET_PER_MONTH),
                levels=levels,
            )

        if not limited:
            return admission()
        takes = amounts(work, price)
        demands = [Demand(limit=limit, amount=takes[name]) for name, limit in limited.items()]
        # Before the answer is there: a lease whose answer is lost may have been made.
        running = _Running(principal.tenant, limited.get(LimitName.CONCURRENT_REQUESTS))
        self._running[lease] = running
        try:
            async with asyncio.timeout(PATIENCE_S):
                told = await self.counters.reserve(
                    principal.tenant, lease, demands, ttl_s=self.lease_s
                )
        except BaseException as error:
            self._release(admission(), Work(), unsure=True)
            if isinstance(error, TimeoutError):
                raise StateUnavailable("the counters did not answer in time") from None
            raise
        if not told.allowed:
            del self._running[lease]
            if (budget := limited.get(LimitName.BUDGET_PER_MONTH)) is not None:
                self._watch(principal.tenant, budget)  # whoever used it up may be gone
            raise self._refusal(principal, demands, told.levels)
        running.made = True
        self._renew()
        return admission(told.levels)

    def settle(self, admission: Admission, used: Work) -> int:
        """End it, beside whatever else goes on. Returns what it cost, in millionths."""
        left = used.prompt_tokens
        for part in admission.parts:
            share = min(left, part.reserved.prompt_tokens)
            left -= share
            if part.counted:
                self._release(part, Work(prompt_tokens=share))
        if admission.counted:
            own = replace(used, prompt_tokens=left) if admission.parts else used
            self._release(admission, own)
        return cost(admission.price, used)

    async def levels(self, principal: Principal) -> tuple[Level, ...]:
        """Where the tenant's limits stand. Raises StateUnavailable."""
        limits = tuple(self._limits(principal).values())
        return await self.counters.levels(principal.tenant, limits) if limits else ()

    async def close(self) -> None:
        """Once all that runs is settled."""
        if self._renewing is not None:
            self._renewing.cancel()
        while self._tasks:  # settling begins a look
            await asyncio.wait(self._tasks)
        await self.counters.close()

    def _limits(self, principal: Principal) -> Mapping[LimitName, Limit]:
        if principal.plan is None:
            return {}
        plan = self.plans.get(principal.plan)
        if plan is None:
            raise Forbidden(
                f"The plan {principal.plan!r} of {principal.tenant!r} is not configured any more;"
                " ask who runs this platform."
            )
        return limits(plan.limits, tuple(principal.overrides.items()), self.strategy)

    def _refusal(
        self, principal: Principal, demands: list[Demand], levels: tuple[Level, ...]
    ) -> QuotaExceeded:
        """About the limit that takes longest to give way."""
        refused = [
            (math.inf if level.retry_ms is None else level.retry_ms, level, demand)
            for level, demand in zip(levels, demands, strict=True)
            if not level.fits
        ]
        wait_ms, level, demand = max(refused, key=lambda each: each[0])
        self.emit(QuotaDenied(tenant=principal.tenant, limit=level.name))
        scale = MICRO if level.name == LimitName.BUDGET_PER_MONTH else 1
        details = {
            "limit": level.name,
            "amount": level.amount / scale,
            "remaining": level.remaining / scale,
            "asked": demand.amount / scale,
        }
        what = level.name.replace("_", " ")
        if level.retry_ms is None:
            message = (
                f"This request may need {demand.amount / scale:g}, and {what} of"
                f" {principal.tenant!r} is {level.amount / scale:g} in all: ask for less"
                " (max_tokens), or for another plan."
            )
        else:
            message = (
                f"The limit of {level.amount / scale:g} {what} of {principal.tenant!r} is reached:"
                f" {level.remaining / scale:g} are left, {demand.amount / scale:g} are needed."
                f" Try again in {math.ceil(wait_ms / 1000)} s."
            )
        return QuotaExceeded(
            message,
            levels=levels,
            details=details,
            retry_after=None if level.retry_ms is None else wait_ms / 1000,
        )

    def _release(self, admission: Admission, used: Work, *, unsure: bool = False) -> None:
        """Settle it. ``unsure``: whether it was ever made."""
        if (running := self._running.get(admission.lease)) is not None:
            running.made = False
        self._beside(self._settle(admission, used, unsure=unsure))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, admission: Admission, used: Work, *, unsure: bool) -> None:
        takes = amounts(used, admission.price)
        named = {str(name): takes[name] for name in (*TOKENS, LimitName.BUDGET_PER_MONTH)}
        for pause_s in (0.0, *(self.looks_s if unsure else ())):
            await asyncio.sleep(pause_s)
            if await self._settled(admission, named):
                break
        # Only now: until it is settled it is held, however long that takes.
        self._running.pop(admission.lease, None)
        if admission.budget is not None and not unsure:
            self._watch(admission.tenant, admission.budget)

    async def _settled(self, admission: Admission, named: Mapping[str, int]) -> bool:
        """Whether there was such a lease; trying for as long as there may be one."""
        loop = asyncio.get_running_loop()
        give_up, pause_s = loop.time() + self.lease_s, SETTLE_PAUSES_S[0]
        while True:
            try:
                return await self.counters.settle(admission.tenant, admission.lease, named)
            except StateError as error:  # credentials, too, which somebody may put right
                if loop.time() >= give_up:
                    logger.error("lease %s stays as it was reserved: %s", admission.lease, error)
                    return True
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, SETTLE_PAUSES_S[1])

    def _renew(self) -> None:
        """See to it that what runs for long keeps its lease."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew_while_running(), context=Context())

    async def _renew_while_running(self) -> None:
        pause_s = self.lease_s / 3
        while self._running:
            await asyncio.sleep(pause_s)
            pause_s = self.lease_s / 3
            for lease, running in list(self._running.items()):
                try:
                    held = await self.counters.renew(running.tenant, lease, ttl_s=self.lease_s)
                    if not held and running.made:
                        await self._take_place_again(lease, running)
                except StateError:
                    pause_s = min(pause_s, RENEW_AGAIN_S)

    async def _take_place_again(self, lease: str, running: _Running) -> None:
        """Its lease has expired while the counters were out of reach, and it runs on. The tokens
        that it had reserved stay used; but it shall be one of those that run.

        Raises StateUnavailable.
        """
        if running.place is None:
            return
        place = Demand(limit=running.place, amount=1)
        told = await self.counters.reserve(running.tenant, lease, [place], ttl_s=self.lease_s)
        if not told.allowed:
            running.place = None  # it is taken
            logger.warning("%s has another request where %s ran", running.tenant, lease)
        elif not running.made:  # it has ended meanwhile
            await self.counters.settle(running.tenant, lease, {})

    def _watch(self, tenant: str, budget: Limit) -> None:
        """Look what of it is spent, soon."""
        if tenant not in self._watched:
            self._watched.add(tenant)
            self._beside(self._look(tenant, budget))

    async def _look(self, tenant: str, budget: Limit) -> None:
        """Tell of the share that is spent. What is only reserved may all be given back."""
        await asyncio.sleep(self.watch_s)
        self._watched.discard(tenant)  # what ends from here on may not be in the answer
        with suppress(StateError):  # the next request looks again
            level = await self.counters.spent(tenant, budget)
            share = (level.amount - level.remaining) / level.amount if level.amount else 0.0
            reached = max((alert for alert in ALERTS if share >= alert), default=0.0)
            before = self._told.get(tenant, 0.0)
            self._told[tenant] = reached
            if reached > before:
                self.emit(
                    BudgetReached(tenant=tenant, share=reached, resets_in_s=level.reset_ms / 1000)
                )
