"""A cache that is down is a cache that has nothing: requests go on, only slower.

Quotas fail closed, since nothing may pass unmetered; nothing depends on a cache. It is left
alone for a while after a failure, or every request would wait for it to fail again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

from state.cache.contract import Cache
from state.errors import StateError

logger = logging.getLogger(__name__)

REST_S = 5.0


class Lenient:
    """See ``Cache``; ``get`` and ``put`` never raise. What somebody must know of does: ``drop``.

    Args:
        clock: seconds, for durations.
    """

    def __init__(self, cache: Cache, clock: Callable[[], float] = time.monotonic) -> None:
        self._cache = cache
        self._clock = clock
        self._rests_until = -math.inf
        self._down = False

    async def get(self, owner: str, keys: Sequence[str]) -> list[bytes | None]:
        if self._clock() < self._rests_until:
            return [None] * len(keys)
        try:
            found = await self._cache.get(owner, keys)
        except StateError as error:
            self._failed(error)
            return [None] * len(keys)
        self._answered()
        return found

    async def put(self, owner: str, entries: Mapping[str, bytes], *, ttl_s: float) -> None:
        if self._clock() < self._rests_until:
            return
        try:
            await self._cache.put(owner, entries, ttl_s=ttl_s)
        except StateError as error:
            self._failed(error)
        else:
            self._answered()

    async def drop(self, owner: str) -> int:
        return await self._cache.drop(owner)

    async def ping(self) -> None:
        await self._cache.ping()

    async def close(self) -> None:
        await self._cache.close()

    def _failed(self, error: StateError) -> None:
        self._rests_until = self._clock() + REST_S
        if not self._down:
            logger.warning("nothing is cached until it is back: %s", error)
        self._down = True

    def _answered(self) -> None:
        if self._down:
            logger.info("the cache is back")
        self._down = False
