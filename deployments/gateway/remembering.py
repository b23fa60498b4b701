"""Models as one request asks them: through the cache, where there is one."""

from __future__ import annotations

from functools import partial

from deployments.caching.embedder import CachingEmbedder
from deployments.caching.generator import CachingGenerator
from deployments.caching.identity import with_adapter
from deployments.caching.reuse import Outcome
from deployments.gateway.exchange import Exchange
from deployments.gateway.services import (
    CHAMPION,
    Embedder,
    PublishedAdapter,
    ServedModel,
    Services,
)
from deployments.tenants.sight import Sight
from models.contracts import GenerateRequest, Generator
from models.errors import PlatformError
from state.errors import StateError

X_CACHE = {
    "X-Cache": "hit: it was there; join: it was being computed for another request; miss: it was"
    " computed. Of several inputs, what took most work. Absent where nothing may be cached."
}
"""Of a route's documentation; ``policies/cache_control.py`` writes it."""


def remembering_generator(
    services: Services, exchange: Exchange, name: str, sight: Sight
) -> Generator:
    """Raises NotFound, InvalidInput as ``Services.generator`` does."""
    generator = services.generator(name, sight)
    served, adapter = services.find(name, sight)
    if services.cache is None or served.identity is None or not exchange.wish.write:
        return generator
    if not sight.sees(served.name, adapter):
        return generator  # whatever is in the cache from before
    return CachingGenerator(
        inner=generator,
        cache=services.cache,
        wish=exchange.wish,
        version=partial(version_of, services, served),
        told=exchange.outcomes.append,
        revised=partial(_revise, exchange.outcomes),
    )


def remembering_embedder(services: Services, exchange: Exchange, name: str) -> Embedder:
    """Raises NotFound, InvalidInput as ``Services.embedder`` does."""
    embedder = services.embedder(name, exchange.sight)
    served, _ = services.find(name, exchange.sight)
    if services.cache is None or served.identity is None or not exchange.wish.write:
        return embedder
    return CachingEmbedder(
        inner=embedder,
        cache=services.cache,
        wish=exchange.wish,
        model=served.name,
        version=served.identity,
        told=exchange.outcomes.append,
    )


def _revise(outcomes: list[Outcome], was: Outcome, now: Outcome | None) -> None:
    at = outcomes.index(was)
    outcomes[at : at + 1] = [] if now is None else [now]


async def version_of(
    services: Services, served: ServedModel, request: GenerateRequest
) -> str | None:
    """Exactly what will answer; ``None`` if that cannot be told.

    An adapter's is that of the version published now: one whose alias has moved is another,
    and one that was withdrawn has none, whatever is in the cache.
    """
    if request.adapter is None or served.identity is None:
        return served.identity
    try:
        published = await services.adapters.published()
    except (PlatformError, StateError):
        return None  # whoever answers may know it all the same
    for adapter in published:
        if adapter.model == served.name and request.adapter in _names(adapter):
            return with_adapter(served.identity, adapter.content_sha256)
    return None


def _names(adapter: PublishedAdapter) -> set[str]:
    """All that a request may call it by, after the colon."""
    names = {f"{adapter.name}@{adapter.alias}", adapter.version}
    return names | {adapter.name} if adapter.alias == CHAMPION else names
