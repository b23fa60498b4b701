"""A cache of one process; what the other stores are held against."""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from state.cache.contract import Bounds, size

SLACK = 1024
"""So many dates of entries that are gone may be remembered, beside one for each that is there."""

Place: TypeAlias = tuple[str, str]


class _Entry(NamedTuple):
    value: bytes
    expires_ms: int


class MemoryCache:
    """See ``Cache``.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.time) -> None:
        self._bounds = bounds
        self._clock = clock
        self._entries: OrderedDict[Place, _Entry] = OrderedDict()
        """The one unused for longest first."""
        self._dates: list[tuple[int, Place]] = []
        """A heap of when entries expire; may name such as are gone."""
        self._bytes = 0

    async def get(self, owner: str, keys: Sequence[str]) -> list[bytes | None]:
        now_ms = self._now_ms()
        found: list[bytes | None] = []
        for key in keys:
            entry = self._entries.get((owner, key))
            if entry is None or entry.expires_ms <= now_ms:
                found.append(None)
                continue
            self._entries.move_to_end((owner, key))
            found.append(entry.value)
        return found

    async def put(self, owner: str, entries: Mapping[str, bytes], *, ttl_s: float) -> None:
        now_ms = self._now_ms()
        expires_ms = now_ms + round(ttl_s * 1000)
        self._expire(now_ms)
        for key, value in entries.items():
            self._remove((owner, key))
            if not self._bounds.fits(value):
                continue
            self._entries[owner, key] = _Entry(value, expires_ms)
            self._bytes += size(value)
            heapq.heappush(self._dates, (expires_ms, (owner, key)))
            while self._bytes > self._bounds.max_bytes:
                self._remove(next(iter(self._entries)))
        if len(self._dates) > 2 * len(self._entries) + SLACK:
            self._dates = [(entry.expires_ms, place) for place, entry in self._entries.items()]
            heapq.heapify(self._dates)

    async def drop(self, owner: str) -> int:
        places = [place for place in self._entries if place[0] == owner]
        for place in places:
            self._remove(place)
        return len(places)

    async def ping(self) -> None:
        return

    async def close(self) -> None:
        self._entries.clear()
        self._dates.clear()
        self._bytes = 0

    def _expire(self, now_ms: int) -> None:
        while self._dates and self._dates[0][0] <= now_ms:
            _, place = heapq.heappop(self._dates)
            entry = self._entries.get(place)
            if entry is not None and entry.expires_ms <= now_ms:
                self._remove(place)

    def _remove(self, place: Place) -> None:
        entry = self._entries.pop(place, None)
        if entry is not None:
            self._bytes -= size(entry.value)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
