"""A ``Generator`` that remembers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from deployments.caching.cache import ResponseCache
from deployments.caching.entries import pack_answer, unpack_answer, whole
from deployments.caching.flights import Flight, Terms
from deployments.caching.keys import deterministic, generation_key
from deployments.caching.reuse import Outcome, Told, Wish
from deployments.observability.events import CacheAsked
from models.contracts import NO_USAGE, Accountable, Delta, GenerateRequest, Generator, Usage
from models.errors import Underestimated


@dataclass(frozen=True, slots=True, kw_only=True)
class CachingGenerator:
    """One caller's view of ``inner``.

    An answer is kept if it is complete and says (``Delta.answered_by``) that it comes from
    the very version it was looked up for. A failure never is.

    Args:
        version: exactly what will answer a request; ``None`` if that cannot be told.
        told: hears once, before the first delta, how the answer was come by; nothing of a
            request that cannot be cached.
        revised: hears of a caller that pays in place of one that has left, or is paid for by
            one that stays, or has to ask again: what it was told, and what holds now, if anything.
    """

    inner: Generator
    cache: ResponseCache
    wish: Wish
    version: Callable[[GenerateRequest], Awaitable[str | None]]
    told: Told
    revised: Callable[[Outcome, Outcome | None], None] = lambda was, now: None
    _left: dict[str, GenerateRequest | None] = field(default_factory=dict)
    """Of requests that were closed early, by receipt: the one that was at work for them;
    ``None``: others pay for it."""

    async def spent(self, request: GenerateRequest) -> Usage | None:
        """See ``models.contracts.Accountable``."""
        asked: GenerateRequest | None = request
        if request.receipt is not None:
            asked = self._left.pop(request.receipt, request)
        if asked is None:
            return NO_USAGE
        return await self.inner.spent(asked) if isinstance(self.inner, Accountable) else None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See ``models.contracts.Generator``."""
        receipt = request.receipt
        if receipt is not None:
            self._left[receipt] = None
        version = await self.version(request) if deterministic(request) else None
        if version is None or not self.wish.write:
            if receipt is not None:
                del self._left[receipt]
            async with aclosing(_closable(self.inner, request)) as source:
                async for delta in source:
                    yield delta
            return
        key = generation_key(request, version)
        flights = self.cache.answers
        terms = Terms(
            priority=request.priority, stream=request.stream, max_age_s=self.wish.max_age_s
        )
        joined = flights.find(key, terms)
        kept = joined is not None and joined.landed
        work = partial(self._answer, request, key, version)
        flying = joined or flights.start([key], work, terms)
        outcome: Outcome | None = None

        def inherit() -> None:
            nonlocal outcome
            if outcome is Outcome.JOIN:
                self.revised(Outcome.JOIN, Outcome.MISS)
                outcome = Outcome.MISS

        seat = flying.seat(inherit)
        at, complete = 0, False
        try:
            async with seat as flight:
                found = await flight.decided()
                outcome = Outcome.MISS if joined is None else Outcome.JOIN
                if kept or key in found:
                    outcome = Outcome.HIT
                self._tell(request, outcome)
                if seat.pays:  # who began it has left before anybody knew
                    inherit()
                while (deltas := await flight.after(at)) is not None:
                    at += len(deltas)
                    for delta in deltas:
                        complete = complete or delta.usage is not None
                        # Where the time went is true for the one whose time it was.
                        yield delta if seat.pays else replace(delta, timings=None)
        except Underestimated:
            if outcome is not None:
                self.revised(outcome, None)
            raise
        finally:
            if seat.handed_over and outcome is Outcome.MISS:
                self.revised(Outcome.MISS, Outcome.JOIN)
            if receipt is not None and complete:
                del self._left[receipt]
            elif receipt is not None:
                self._left[receipt] = flying.at_work if seat.paid else None

    async def _answer(
        self, request: GenerateRequest, key: str, version: str, flight: Flight[Delta]
    ) -> None:
        """Find the answer or compute it, for all who are aboard."""
        owner = request.tenant
        [value] = await self.cache.get(owner, [key], self.wish)
        found = None if value is None else unpack_answer(value, request.n)
        if found is not None:
            flight.decide(frozenset([key]))
            for delta in found:
                flight.add(delta)
            return
        flight.decide(frozenset())
        deltas = []
        flight.at_work = request
        # Each caller has a deadline and leaves when it has passed; the others go on.
        async with aclosing(_closable(self.inner, replace(request, timeout_s=None))) as source:
            async for delta in source:
                deltas.append(delta)
                if delta.usage is not None:
                    flight.settle()
                flight.add(delta)
        answer = whole(deltas, request.n)
        if answer is not None and deltas[-1].answered_by == version:
            flight.land()
            await self.cache.put(owner, {key: pack_answer(answer)})

    def _tell(self, request: GenerateRequest, outcome: Outcome) -> None:
        self.cache.emit(CacheAsked(model=request.model, outcome=outcome))
        self.told(outcome)


def _closable(inner: Generator, request: GenerateRequest) -> AsyncGenerator[Delta]:
    """The contract cancels by closing, so what generates can be closed."""
    return cast("AsyncGenerator[Delta]", inner.generate(request))
