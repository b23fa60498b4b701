"""What a gateway's caching generators and embedders share: the store, and what is under way.

Identical requests in flight are computed once a gateway process; between processes only what
is finished is shared, through the store.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.caching.entries import Embedded
from deployments.caching.flights import Flights
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
