"""Deliveries in the platform's database: each once, however often and how fast it comes.

A delivery is known by its key for ``dedupe_s``: what comes under the same key is the same
delivery again, or a mistake if its body is another one. The key is not signed, the time and
the body are: a copy of a signed delivery under another key is known by these.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import Conflict, Forbidden
from state import tables
from state.database import Database, LazyDatabase
from state.errors import StateError
from state.pages import newest_first

logger = logging.getLogger(__name__)

_EVENTS, _TENANTS = tables.webhook_events, tables.tenants
FORGET_EVERY_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What a source has sent; its signature is verified."""

    tenant: str
    source: str
    key: str
    """Of the ``Idempotency-Key``, or the event's id."""
    event_id: str
    type: str
    payload: str = field(repr=False)
    """JSON. As text: JSONB would refuse a string with U+0000, and write numbers anew."""
    body_sha256: str
    signed: datetime
    """When the sender says it signed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Delivery):
    """A delivery that is kept."""

    id: int
    received: datetime


class Inbox:
    """Belongs to the event loop of ``database``. All methods raise ``StateUnavailable`` when it
    cannot be reached.

    Args:
        dedupe_s: how long an event is kept, and its delivery known.
    """

    def __init__(self, database: Database | LazyDatabase, *, dedupe_s: float) -> None:
        self._database = database
        self._kept = timedelta(seconds=dedupe_s)

    async def accept(self, delivery: Delivery, *, at: datetime) -> tuple[Event, bool]:
        """Keep it, unless it is here already: the event, and whether it was here.

        When this returns the event is durable.

        Raises:
            Conflict: its key is that of another body.
            Forbidden: its tenant is suspended.
        """
        # One at a time: two copies never pass each other, and events become visible in the
        # order of their ids, so that whoever reads on from the last one misses none.
        async with self._database.write("webhooks") as c:
            await _refuse_suspended(c, delivery.tenant)
            known = await self._known(c, delivery, at)
            if known is not None:
                return known, True
            values = {each.name: getattr(delivery, each.name) for each in fields(Delivery)}
            made = await c.execute(
                _EVENTS.insert().values(**values, received=at).returning(_EVENTS.c.id)
            )
            return Event(**values, id=made.scalar_one(), received=at), False

    async def events(
        self, *, before: int | None = None, after: int | None = None, limit: int = 100
    ) -> Sequence[Event]:
        """The newest first: from the newest on, or the ones next to an event on either side."""
        every = sa.select(_EVENTS)
        rows = await newest_first(
            self._database, every, _EVENTS.c.id, before=before, after=after, limit=limit
        )
        return [Event(**row._mapping) for row in rows]

    async def forget_expired(self, *, at: datetime) -> int:
        """Delete what is older than it has to be kept; how many those were."""
        async with self._database.write() as c:
            gone = await c.execute(_EVENTS.delete().where(_EVENTS.c.received <= at - self._kept))
            return gone.rowcount

    async def keep_forgetting(
        self, *, every_s: float = FORGET_EVERY_S, now: Callable[[], float] = time.time
    ) -> None:
        """``forget_expired`` again and again. Never returns, and survives a database that is away;
        cancel it.
        """
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.forget_expired(at=datetime.fromtimestamp(now(), UTC))
            except StateError as error:
                logger.warning("old webhook events stay for now: %s", error)

    async def _known(self, c: AsyncConnection, delivery: Delivery, at: datetime) -> Event | None:
        """The event of an earlier copy, if that is not too long ago. Raises Conflict."""
        same_key = _EVENTS.c.key == delivery.key
        replayed = sa.and_(
            _EVENTS.c.body_sha256 == delivery.body_sha256, _EVENTS.c.signed == delivery.signed
        )
        rows = await c.execute(
            sa.select(_EVENTS).where(
                _EVENTS.c.tenant == delivery.tenant,
                _EVENTS.c.source == delivery.source,
                sa.or_(same_key, replayed),
            )
        )
        found = [Event(**row._mapping) for row in rows]
        fresh = [event for event in found if event.received > at - self._kept]
        for event in fresh:
            if event.key == delivery.key and event.body_sha256 != delivery.body_sha256:
                raise Conflict(
                    f"The key {delivery.key!r} came before with another body, on"
                    f" {event.received.isoformat(timespec='seconds')}; another event needs"
                    " another key.",
                    details={"received": event.received.isoformat()},
                )
        if fresh:
            return fresh[0]
        if found:  # their keys are free again
            await c.execute(_EVENTS.delete().where(_EVENTS.c.id.in_([each.id for each in found])))
        return None


async def _refuse_suspended(c: AsyncConnection, tenant: str) -> None:
    """Raises Forbidden. A tenant that nobody has made yet is not suspended."""
    suspended = sa.select(_TENANTS.c.suspended).where(_TENANTS.c.name == tenant)
    if await c.scalar(suspended) is not None:
        raise Forbidden(f"The tenant {tenant!r} is suspended; ask who runs this platform.")
