"""Counters of one process; what the other stores are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from state.counters.contract import Reservation
from state.counters.limits import Cell, Demand, Hold, Level, Limit, asked, decide, settle, spent


@dataclass(slots=True)
class _Lease:
    expires_ms: int
    holds: tuple[Hold, ...]


@dataclass(slots=True)
class _Owner:
    cells: dict[str, Cell] = field(default_factory=dict)
    leases: dict[str, _Lease] = field(default_factory=dict)

    def expire(self, now_ms: int) -> None:
        for name in [n for n, lease in self.leases.items() if lease.expires_ms <= now_ms]:
            del self.leases[name]


class MemoryCounters:
    """See ``Counters``.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._owners: dict[str, _Owner] = {}

    async def reserve(
        self, owner: str, lease: str, demands: Sequence[Demand], *, ttl_s: float
    ) -> Reservation:
        now_ms, book = self._now(owner)
        if lease in book.leases:
            limits = [each.limit for each in demands]
            told = decide(book.cells, len(book.leases), asked(limits), now_ms)
            return Reservation(allowed=True, levels=told.levels)
        decision = decide(book.cells, len(book.leases), demands, now_ms)
        if decision.allowed and decision.holds:
            book.cells.update(decision.cells)
            book.leases[lease] = _Lease(now_ms + round(ttl_s * 1000), decision.holds)
        return Reservation(allowed=decision.allowed, levels=decision.levels)

    async def settle(self, owner: str, lease: str, used: Mapping[str, int]) -> bool:
        now_ms, book = self._now(owner)
        found = book.leases.pop(lease, None)
        if found is None:
            return False
        book.cells.update(settle(book.cells, found.holds, used, now_ms))
        return True

    async def renew(self, owner: str, lease: str, *, ttl_s: float) -> bool:
        now_ms, book = self._now(owner)
        found = book.leases.get(lease)
        if found is None:
            return False
        found.expires_ms = now_ms + round(ttl_s * 1000)
        return True

    async def levels(self, owner: str, limits: Sequence[Limit]) -> tuple[Level, ...]:
        now_ms, book = self._now(owner)
        return decide(book.cells, len(book.leases), asked(limits), now_ms).levels

    async def spent(self, owner: str, limit: Limit) -> Level:
        now_ms, book = self._now(owner)
        held = chain.from_iterable(lease.holds for lease in book.leases.values())
        return spent(book.cells, held, limit, now_ms)

    async def drop(self, owner: str) -> bool:
        _, book = self._now(owner)
        del self._owners[owner]
        return bool(book.cells or book.leases)

    async def ping(self) -> None:
        return

    async def close(self) -> None:
        self._owners.clear()

    def _now(self, owner: str) -> tuple[int, _Owner]:
        now_ms = round(self._clock() * 1000)
        book = self._owners.setdefault(owner, _Owner())
        book.expire(now_ms)
        return now_ms, book
