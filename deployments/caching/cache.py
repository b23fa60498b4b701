"""What a gateway's caching generators and embedders share: the store, and what is under way.

Identical requests in flight are computed once a gateway process; between processes only what
is finished is shared, through the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deployments.caching.entries import Embedded, stamped, unstamped
from deployments.caching.flights import Flights
from deployments.caching.reuse import Wish
from deployments.config import CacheConfig
from deployments.observability.events import Emit
from models.contracts import Delta
from state.cache import Bounds, Cache, Lenient, open_cache
from state.places import Places


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseCache:
    store: Cache
    """One that never raises from ``get`` and ``put``."""
    ttl_s: float
    emit: Emit
    answers: Flights[Delta] = field(default_factory=Flights)
    embeddings: Flights[dict[str, Embedded]] = field(default_factory=Flights)
    now: Callable[[], float] = time.time
    """Unix seconds: gateways of several machines read each other's entries."""

    async def get(self, owner: str, keys: Sequence[str], wish: Wish) -> list[bytes | None]:
        """Of each key what was put; ``None``: nothing, or nothing that ``wish`` allows."""
        if not wish.read:
            return [None] * len(keys)
        now = self.now()
        return [
            None if entry is None else unstamped(entry, now, wish.max_age_s)
            for entry in await self.store.get(owner, keys)
        ]

    async def put(self, owner: str, values: Mapping[str, bytes]) -> None:
        now = self.now()
        entries = {key: stamped(value, now) for key, value in values.items()}
        await self.store.put(owner, entries, ttl_s=self.ttl_s)


def opened(config: CacheConfig, emit: Emit, url: str | None = None) -> ResponseCache | None:
    """The cache that the configuration wants; ``None``: none.

    Args:
        url: default: that of ``state.places``.

    Raises:
        StateMisconfigured: the URL is wrong, or the file cannot be made.
    """
    if not config.enabled:
        return None
    bounds = Bounds(max_bytes=config.max_bytes, max_entry_bytes=config.max_entry_bytes)
    store = open_cache(Places.of().cache if url is None else url, bounds)
    return ResponseCache(store=Lenient(store), ttl_s=config.ttl_s, emit=emit)
