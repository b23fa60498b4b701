"""Who works on the answer to an ``Idempotency-Key``, and what was answered (spec C5).

    begin ──> Lease ── renew … ──> finish: the answer is kept until its time is over
          │                   └──> release: as if nobody had asked
          ├─> Busy: somebody else works on it
          └─> Answer: it was done before

The record is durable before the work begins. Whoever works holds a lease and renews it; of
one that crashed, nothing is left when its lease has run out. A lease that was lost changes
nothing any more: each write asks for the owner that the record has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from models.errors import Conflict
from state import tables
from state.database import Database, LazyDatabase
from state.errors import StateError, StateUnavailable
from state.patience import REQUEST_S

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RECORDS = tables.idempotency
HEADER = "Idempotency-Key"
LEASE_S = 30.0
"""What a crashed gateway leaves behind is locked for this long at most. The clocks of all
gateways must agree far better than that."""
PATIENCE_S = REQUEST_S
"""How long the database may take to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client was told."""

    status: int
    headers: Sequence[tuple[str, str]]
    """In latin-1, as HTTP has them."""
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to work on the answer for a key."""

    tenant: str
    key: str
    owner: str


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody has the lease."""

    until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    fingerprint: str
    """Of the request that the key came with first."""
    until: datetime
    """The end of the lease; once it is finished, of the answer."""
    finished: datetime | None = None
    answer: Answer | None = None
    """``None`` of a finished one: it is nothing that is written down."""


def judge(record: Record | None, key: str, fingerprint: str, now: datetime) -> Busy | Answer | None:
    """What a request with ``key`` gets. ``None``: nobody has it, so it may begin.

    Raises:
        Conflict: the key belongs to another request, or its answer cannot be had again.
    """
    if record is None or record.until <= now:
        return None
    if record.fingerprint != fingerprint:
        raise another_request(key)
    if record.finished is None:
        return Busy(record.until)
    if record.answer is None:
        raise Conflict(
            f"What {key!r:.80} asked for was done at {record.finished:%Y-%m-%d %H:%M:%S} UTC. Its"
            " answer has a secret in it, which is told once; look at what is there, and use a"
            " new key to ask for another.",
            param=HEADER,
        )
    return record.answer


def another_request(key: str) -> Conflict:
    return Conflict(
        f"The {HEADER} {key!r:.80} came with another request before: method, path, query and body"
        " must be the same. Use a new key for a new request.",
        param=HEADER,
    )


class IdempotencyRecords:
    """Belongs to the event loop of ``database``. Tenants share nothing.

    All methods raise ``StateUnavailable`` when the database has not answered within
    ``PATIENCE_S``.

    Args:
        ttl_s: how long answers are kept.
        now: Unix seconds.
    """

    def __init__(
        self,
        database: Database | LazyDatabase,
        *,
        ttl_s: float,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._ttl = timedelta(seconds=ttl_s)
        self._lease = timedelta(seconds=LEASE_S)
        self._unix = now
        self._tasks: set[asyncio.Task[Any]] = set()

    async def begin(self, tenant: str, key: str, fingerprint: str) -> Lease | Busy | Answer:
        """Raises Conflict as ``judge`` does."""
        return await self._promptly(self._begin(tenant, key, fingerprint))

    async def look(self, tenant: str, key: str, fingerprint: str) -> Busy | Answer | None:
        """What ``begin`` would find, without beginning. Raises Conflict as ``judge`` does."""
        return await self._promptly(self._look(tenant, key, fingerprint))

    async def renew(self, lease: Lease) -> bool:
        """Hold it for ``LEASE_S`` from now. False: it is another's, or over."""
        return await self._promptly(self._renew(lease))

    async def finish(self, lease: Lease, answer: Answer | None) -> bool:
        """Keep the answer; ``None``: that there was one. False: it is another's now.

        Doing so twice does no harm.
        """
        return await self._promptly(self._finish(lease, answer))

    async def release(self, lease: Lease) -> bool:
        """Let the next one begin anew. False: it is another's now, or over."""
        return await self._promptly(self._release(lease))

    async def forget_expired(self) -> int:
        """Delete what has no meaning any more; how many records that were."""
        async with self._database.write() as c:
            gone = await c.execute(_RECORDS.delete().where(_RECORDS.c.until <= self._now()))
            return gone.rowcount

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._unix(), UTC)

    async def _begin(self, tenant: str, key: str, fingerprint: str) -> Lease | Busy | Answer:
        # Alone for this very key: two that find nothing must not both begin.
        async with self._database.write(f"idempotency {tenant} {key}") as c:
            now = self._now()
            found = judge(await _record(c, tenant, key), key, fingerprint, now)
            if found is not None:
                return found
            lease = Lease(tenant=tenant, key=key, owner=token_hex(16))
            await c.execute(_RECORDS.delete().where(_named(tenant, key)))
            await c.execute(
                _RECORDS.insert().values(
                    tenant=tenant,
                    key=key,
                    owner=lease.owner,
                    fingerprint=fingerprint,
                    until=now + self._lease,
                )
            )
        return lease

    async def _look(self, tenant: str, key: str, fingerprint: str) -> Busy | Answer | None:
        async with self._database.read() as c:
            record = await _record(c, tenant, key)
        return judge(record, key, fingerprint, self._now())

    async def _renew(self, lease: Lease) -> bool:
        running = _RECORDS.update().where(_held(lease), _RECORDS.c.finished.is_(None))
        async with self._database.write() as c:
            done = await c.execute(running.values(until=self._now() + self._lease))
            return done.rowcount > 0

    async def close(self) -> None:
        """Wait for what is being written; the database ends that in its own time."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _finish(self, lease: Lease, answer: Answer | None) -> bool:
        now = self._now()
        values: dict[str, Any] = {"finished": now, "until": now + self._ttl}
        if answer is not None:
            headers = [list(header) for header in answer.headers]
            values |= {"status": answer.status, "headers": headers, "body": answer.body}
        async with self._database.write() as c:
            done = await c.execute(_RECORDS.update().where(_held(lease)).values(values))
            return done.rowcount > 0

    async def _release(self, lease: Lease) -> bool:
        running = _RECORDS.delete().where(_held(lease), _RECORDS.c.finished.is_(None))
        async with self._database.write() as c:
            return (await c.execute(running)).rowcount > 0

    async def _promptly(self, work: Coroutine[Any, Any, T]) -> T:
        """What is late, or no longer waited for, goes on: stopping a database may take longer."""
        task = self._spawn(work)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await asyncio.shield(task)
        except (TimeoutError, asyncio.CancelledError) as gone:
            task.add_done_callback(self._unwanted)
            if isinstance(gone, asyncio.CancelledError):
                raise
            raise StateUnavailable(f"the database did not answer within {PATIENCE_S} s") from None

    def _unwanted(self, task: asyncio.Task[Any]) -> None:
        """Nobody is there to work under a lease that came too late."""
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            logger.debug("nobody waited for this: %s", error)
        elif isinstance(lease := task.result(), Lease):
            self._spawn(self._give_back(lease))

    async def _give_back(self, lease: Lease) -> None:
        try:
            await self._release(lease)
        except StateError as error:
            logger.warning("a key of %s stays locked for %s s: %s", lease.tenant, LEASE_S, error)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _record(c: AsyncConnection, tenant: str, key: str) -> Record | None:
    row = (await c.execute(sa.select(_RECORDS).where(_named(tenant, key)))).one_or_none()
    if row is None:
        return None
    answer = None
    if row.status is not None:
        headers = [(name, value) for name, value in row.headers]
        answer = Answer(status=row.status, headers=headers, body=row.body)
    return Record(
        fingerprint=row.fingerprint, until=row.until, finished=row.finished, answer=answer
    )


def _named(tenant: str, key: str) -> sa.ColumnElement[bool]:
    return sa.and_(_RECORDS.c.tenant == tenant, _RECORDS.c.key == key)


def _held(lease: Lease) -> sa.ColumnElement[bool]:
    return sa.and_(_named(lease.tenant, lease.key), _RECORDS.c.owner == lease.owner)
