"""An ``Embedder`` that remembers, input by input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

from deployments.caching.cache import ResponseCache
from deployments.caching.entries import Embedded, pack_embedding, unpack_embedding
from deployments.caching.flights import Flight, Terms
from deployments.caching.keys import embedding_key
from deployments.caching.reuse import BY_WORK, Outcome, Told, Wish
from deployments.gateway.services import Embedder, EmbedResult
from deployments.observability.events import CacheAsked
from models.contracts import Standing
from models.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class CachingEmbedder:
    """One caller's view of ``inner``, which is asked for what nobody has asked for yet.

    Args:
        version: exactly what embeds.
        told: hears how the vectors were come by: the most work that any of them took; and again,
            if they have to be computed after all.
    """

    inner: Embedder
    cache: ResponseCache
    wish: Wish
    model: str
    version: str
    told: Told

    async def embed(self, inputs: Sequence[str], standing: Standing) -> EmbedResult:
        """See ``deployments.gateway.services.Embedder``."""
        if not self.wish.write:
            return await self.inner.embed(inputs, standing)

        async def alone() -> EmbedResult:
            self.told(Outcome.MISS)  # whatever was told before: it is computed, and paid for
            return await self.inner.embed(inputs, standing)

        keys = [
            embedding_key(text, tenant=standing.tenant, model=self.model, version=self.version)
            for text in inputs
        ]
        texts = dict(zip(keys, inputs, strict=True))
        flights = self.cache.embeddings
        terms = Terms(priority=standing.priority, stream=False, max_age_s=self.wish.max_age_s)
        joined = {key: flight for key in texts if (flight := flights.find(key, terms))}
        kept = {key for key, flight in joined.items() if flight.landed}
        own = {key: text for key, text in texts.items() if key not in joined}
        aboard = list(dict.fromkeys(joined.values()))
        if own:
            work = partial(self._answer, own, standing)
            aboard.append(flights.start(list(own), work, terms))
        async with AsyncExitStack() as stack:
            for flight in aboard:
                await stack.enter_async_context(flight.seat())
            found = kept.union(*[await flight.decided() for flight in aboard])
            self._tell(
                Counter(
                    Outcome.HIT if key in found else Outcome.JOIN if key in joined else Outcome.MISS
                    for key in texts
                )
            )
            answers: dict[str, Embedded] = {}
            try:
                for flight in aboard:
                    for answer in await flight.after(0) or ():
                        answers |= answer
            except InvalidInput:
                # It names an input by its place in that call, or is about another caller's.
                if [text for key, text in own.items() if key not in found] == list(inputs):
                    raise
                return await alone()
        if not answers.keys() >= texts.keys():
            return await alone()  # a call that we joined ended without a word
        tokens = [answers[key].tokens for key in keys]
        computed = sum(answers[key].tokens for key in own if key not in found)
        return EmbedResult(
            vectors=[answers[key].vector for key in keys],
            tokens=tokens,
            answered_by=self.version,
            remembered_tokens=sum(tokens) - computed,
        )

    async def _answer(
        self, texts: Mapping[str, str], standing: Standing, flight: Flight[dict[str, Embedded]]
    ) -> None:
        """Find vectors or have them computed, for all who are aboard. One item tells all."""
        answers: dict[str, Embedded] = {}
        tenant = standing.tenant
        values = await self.cache.get(tenant, list(texts), self.wish)
        for key, value in zip(texts, values, strict=True):
            if value is not None and (embedded := unpack_embedding(value)) is not None:
                answers[key] = embedded
        flight.decide(frozenset(answers))
        missing = [key for key in texts if key not in answers]
        if not missing:
            flight.add(answers)
            return
        # Each caller has a deadline and leaves when it has passed; the others go on.
        result = await self.inner.embed(
            [texts[key] for key in missing], replace(standing, timeout_s=None)
        )
        computed = {
            key: Embedded(vector=vector, tokens=tokens)
            for key, vector, tokens in zip(missing, result.vectors, result.tokens, strict=True)
        }
        flight.add(answers | computed)
        if result.answered_by == self.version:
            flight.land()
            entries = {key: pack_embedding(embedded) for key, embedded in computed.items()}
            await self.cache.put(tenant, entries)

    def _tell(self, outcomes: Counter[Outcome]) -> None:
        for outcome, inputs in outcomes.items():
            self.cache.emit(CacheAsked(model=self.model, outcome=outcome, times=inputs))
        self.told(max(outcomes, key=BY_WORK.index))
