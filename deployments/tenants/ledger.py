"""The usage ledger: one row for each piece of work that was done, and what it cost.

A gateway writes rows in batches, beside its requests. Each has a name of its own, so a batch
whose answer was lost may be written again. While the database is out of reach rows wait; when
too many wait, or for too long, ``check`` raises, and nothing more is let in: work that nobody
could bill is not done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from secrets import token_hex
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from deployments.observability.events import Event, RequestFinished
from state import tables
from state.database import Database, LazyDatabase
from state.errors import StateUnavailable

logger = logging.getLogger(__name__)

_USAGE = tables.usage

FLUSH_S = 0.5
BATCH_ROWS = 500
MOST_WAITING = 50_000
"""Rows that may wait for the database."""
LONGEST_WAIT_S = 30.0


@dataclass(slots=True)
class Ledger:
    """A subscriber to events. Belongs to one event loop.

    Args:
        now: Unix seconds.
        clock: seconds, never running backwards.
    """

    database: Database | LazyDatabase
    now: Callable[[], float]
    clock: Callable[[], float]
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _since: float | None = None
    """When the oldest row that waits began to."""
    _writing: asyncio.Task[None] | None = None

    def __call__(self, event: Event) -> None:
        """Note finished work; all else is none of our business."""
        if isinstance(event, RequestFinished) and is_work(event):
            if self._since is None:
                self._since = self.clock()
            self._waiting.append(row(event, self.now()))
            if self._writing is None or self._writing.done():
                self._writing = asyncio.get_running_loop().create_task(self._write_all())

    def check(self) -> None:
        """Raises StateUnavailable: too much has been waiting for too long."""
        late = self._since is not None and self.clock() - self._since > LONGEST_WAIT_S
        if late or len(self._waiting) > MOST_WAITING:
            raise StateUnavailable(f"the usage of {len(self._waiting)} requests is not written yet")

    async def flush(self) -> None:
        """Write what waits now. Raises StateUnavailable; then it still waits."""
        while self._waiting:
            batch = self._waiting[:BATCH_ROWS]
            async with self.database.write() as c:
                # As many executions of one statement: writing one of all their values holds up the
                # requests for tens of milliseconds, and the driver sends these together, too.
                insert = postgresql.insert if c.dialect.name == "postgresql" else sqlite.insert
                await c.execute(insert(_USAGE).on_conflict_do_nothing(), batch)
            del self._waiting[: len(batch)]
            self._since = self.clock() if self._waiting else None

    async def _write_all(self) -> None:
        """Until nothing waits."""
        while self._waiting:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except StateUnavailable as error:
                logger.warning("%d rows of usage wait: %s", len(self._waiting), error)


def is_work(event: RequestFinished) -> bool:
    """Whether a model has done something for it, even if it failed afterwards."""
    used = event.usage is not None or event.cost > 0
    return event.model is not None and event.worked and used


def row(event: RequestFinished, now: float) -> dict[str, Any]:
    at = datetime.fromtimestamp(now, UTC)
    usage, timings = event.usage, event.timings
    return {
        "entry": token_hex(16),
        "at": at,
        "day": f"{at:%Y-%m-%d}",
        "tenant": event.tenant,
        "subject": event.subject,
        "request_id": event.request_id,
        "route": event.route,
        "model": event.model,
        "adapter": event.adapter,
        "status": event.status,
        "code": event.code,
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "completion_tokens": usage.completion_tokens if usage else 0,
        "cached_tokens": usage.cached_tokens if usage else 0,
        "queue_ms": round(timings.queue_s * 1000) if timings else 0,
        "prefill_ms": round(timings.prefill_s * 1000) if timings else 0,
        "decode_ms": round(timings.decode_s * 1000) if timings else 0,
        "cost": event.cost,
    }


class By(StrEnum):
    """What a report has a line for."""

    DAY = "day"
    MODEL = "model"
    TENANT = "tenant"


SUMS = ("prompt_tokens", "completion_tokens", "cached_tokens", "cost")


async def report(
    database: Database | LazyDatabase,
    *,
    by: Sequence[By],
    tenant: str | None = None,
    since: str | None = None,
    until: str | None = None,
) -> Sequence[Mapping[str, Any]]:
    """Requests, tokens and cost, summed, in order of ``by``.

    Args:
        since, until: days, as ``2026-11-25``, both included.

    Raises:
        StateUnavailable: the database is out of reach.
    """
    columns = [_USAGE.c[each] for each in by]
    wanted = sa.select(
        *columns,
        sa.func.count().label("requests"),
        *(sa.cast(sa.func.sum(_USAGE.c[name]), sa.BigInteger).label(name) for name in SUMS),
    )
    if tenant is not None:
        wanted = wanted.where(_USAGE.c.tenant == tenant)
    if since is not None:
        wanted = wanted.where(_USAGE.c.day >= since)
    if until is not None:
        wanted = wanted.where(_USAGE.c.day <= until)
    async with database.read() as c:
        found = await c.execute(wanted.group_by(*columns).order_by(*columns))
        # SQLAlchemy's names are a kind of text that JSON's writer does not take for text.
        return [{str(name): value for name, value in each._mapping.items()} for each in found]
