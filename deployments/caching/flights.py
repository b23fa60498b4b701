"""One piece of work, and all who wait for it.

    async with flight.seat():                         # on board
        while (items := await flight.after(at)) is not None: ...

Who comes late gets what there is, and then whatever comes. Who leaves does not disturb the
others; the last one to leave takes the work with it. Nobody boards a flight that is over by
failure or that nobody is on.

One of them pays for the work, once: who boarded first, and of those that are left, who has been
aboard for longest, until ``Flight.settle``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from models.contracts import GenerateRequest, Priority

T = TypeVar("T")

logger = logging.getLogger(__name__)

RANKS = {priority: rank for rank, priority in enumerate(Priority)}
"""vip before standard before low."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On which somebody flies."""

    priority: Priority
    stream: bool
    """Wants to see the answer grow."""
    max_age_s: float
    """How old an answer may be that is found on the way; 0: takes no part in another's flight."""

    def suit(self, other: Terms) -> bool:
        """Whether ``other`` would wait in no better queue, see the answer grow no sooner, and find
        none that is fresher.
        """
        return (
            RANKS[self.priority] <= RANKS[other.priority]
            and (self.stream or not other.stream)
            and self.max_age_s <= other.max_age_s
        )


class Seat(Generic[T]):
    """One passenger's.

    Args:
        inherit: called when the passengers before have left, and this one pays from now on.
    """

    def __init__(self, flight: Flight[T], inherit: Callable[[], None]) -> None:
        self._flight = flight
        self.inherit = inherit
        self.paid = False
        """It was for this one to pay when it left, and still is."""
        self.handed_over = False
        """It was, and now it is for another."""

    @property
    def pays(self) -> bool:
        return self._flight.payer is self

    async def __aenter__(self) -> Flight[T]:
        self._flight.seats.append(self)
        return self._flight

    async def __aexit__(self, *_: object) -> None:
        flight, self.paid = self._flight, self.pays
        flight.seats.remove(self)
        heir = flight.payer
        if self.paid and heir is not None and heir is not self:
            self.paid, self.handed_over = False, True
            heir.inherit()
        if not flight.seats and not flight.landed:
            await flight.end()


def nothing() -> None:
    """To one that pays for nothing, or has paid."""


class Flight(Generic[T]):
    """Made by ``Flights.start``; its maker boards it before anything else is awaited."""

    def __init__(
        self,
        keys: Sequence[str],
        *,
        terms: Terms,
        work: Callable[[Flight[T]], Awaitable[None]],
        gone: Callable[[Flight[T]], None],
    ) -> None:
        self.keys = keys
        self.found: frozenset[str] | None = None
        """Of the keys, those whose answers were there; ``None``: nobody knows yet."""
        self.landed = False
        """All is there, or nothing more will come."""
        self.terms = terms
        self._items: list[T] = []
        self._error: Exception | None = None
        self.seats: list[Seat[T]] = []
        """Who is aboard, in the order in which they came."""
        self.at_work: GenerateRequest | None = None
        """What a model was asked, if it was."""
        self._settled: Seat[T] | None = None
        self._news = asyncio.Event()
        self._gone = gone
        self._task = asyncio.create_task(self._fly(work))

    def seat(self, inherit: Callable[[], None] = nothing) -> Seat[T]:
        return Seat(self, inherit)

    @property
    def payer(self) -> Seat[T] | None:
        """Whose work it is; it goes over to the next when that one leaves, until it is settled."""
        return self._settled or (self.seats[0] if self.seats else None)

    async def end(self) -> None:
        """Nobody is aboard any more."""
        self._gone(self)
        self._task.cancel()
        await asyncio.wait([self._task])

    def takes(self, passenger: Terms) -> bool:
        """Whether it is there as soon as a flight of one's own would be, and as good."""
        return passenger.max_age_s > 0 and (self.landed or self.terms.suit(passenger))

    async def decided(self) -> frozenset[str]:
        """The keys that were found; of a flight that failed before, none."""
        while self.found is None and not self.landed:
            await self._news.wait()
        return self.found or frozenset()

    async def after(self, at: int) -> Sequence[T] | None:
        """What there is from item ``at`` on, waiting for some; ``None``: nothing more.

        Raises:
            Exception: what the work raised, after what it told before.
        """
        while len(self._items) <= at and not self.landed:
            await self._news.wait()
        if len(self._items) > at:
            return self._items[at:]
        if self._error is not None:
            raise self._error
        return None

    # --- for the work

    def settle(self) -> None:
        """All is done: who pays now does, whether it stays or leaves."""
        self._settled = self.payer

    def decide(self, found: frozenset[str]) -> None:
        self.found = found
        self._tell()

    def add(self, item: T) -> None:
        self._items.append(item)
        self._tell()

    def land(self) -> None:
        """There will be no more items; what is left of the work concerns nobody aboard."""
        self.landed = True
        self._tell()

    # ---

    async def _fly(self, work: Callable[[Flight[T]], Awaitable[None]]) -> None:
        try:
            await work(self)
        except Exception as error:
            if self.landed:  # nobody's failure: whoever waited has the answer
                logger.exception("an answer could not be kept")
            else:
                self._error = error
        finally:
            self.settle()
            self._gone(self)
            self.land()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Flights(Generic[T]):
    """All that are under way, by their keys. Belongs to one event loop."""

    def __init__(self) -> None:
        self._by_key: dict[str, list[Flight[T]]] = {}

    def find(self, key: str, terms: Terms) -> Flight[T] | None:
        """The one that began last of those that suit."""
        for flight in reversed(self._by_key.get(key, ())):
            if flight.takes(terms):
                return flight
        return None

    def start(
        self,
        keys: Sequence[str],
        work: Callable[[Flight[T]], Awaitable[None]],
        terms: Terms,
    ) -> Flight[T]:
        flight = Flight(keys, terms=terms, work=work, gone=self._gone)
        for key in keys:
            self._by_key.setdefault(key, []).append(flight)
        return flight

    def check_integrity(self) -> None:
        """Nothing is remembered that is not under way."""
        for key, flights in self._by_key.items():
            assert flights, f"{key} has an empty list"
            for flight in flights:
                assert not flight._task.done(), f"{key} has a flight that is over"
                assert key in flight.keys

    def __len__(self) -> int:
        return len(self._by_key)

    def _gone(self, flight: Flight[T]) -> None:
        for key in flight.keys:
            flights = self._by_key.get(key, [])
            if flight in flights:
                flights.remove(flight)
            if not flights:
                self._by_key.pop(key, None)
