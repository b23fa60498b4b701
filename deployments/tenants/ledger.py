"""The usage ledger: one row for each piece of work that was done, and what it cost.

A gateway writes rows in batches, beside its requests. Each has a name of its own, so a batch
whose answer was lost may be written again. While the database is out of reach rows wait; when
too many wait, or for too long, ``check`` raises, and nothing more is let in: work that nobody
could bill is not done. A row that the database will never take is told to the log and left
out, or it would keep all others waiting.

What came out of the cache, or was computed for another request, has a row, too: with the
tokens in a column of their own, since they are not paid for.
"""

from __future__ import annotations

import asyncio
import csv
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from deployments.caching.reuse import Outcome
from deployments.observability.events import Event, RequestFinished
from deployments.tenants.plans import MICRO
from models.contracts import NO_USAGE
from models.unique import unique
from state import tables
from state.database import Database, LazyDatabase
from state.errors import StateUnavailable
from state.patience import promptly

logger = logging.getLogger(__name__)

_USAGE = tables.usage

REMEMBERED = (Outcome.HIT, Outcome.JOIN)
COMPUTED = "computed"
"""What a row says that is neither of these."""
MOST_TEXT = 1000
"""Characters, of a column that has no limit of its own."""
_LENGTHS = {
    column.name: column.type.length or MOST_TEXT
    for column in _USAGE.columns
    if isinstance(column.type, sa.String)
}
"""Of the columns that hold text."""
FLUSH_S = 0.5
BATCH_ROWS = 500
MOST_WAITING = 50_000
"""Rows that may wait for the database."""
LONGEST_WAIT_S = 30.0
WRITE_S = 10.0
"""How long a batch may take until it is tried again, on another connection."""
CLOSE_S = 2.0
"""How long a gateway that is stopped may spend on what it has not written yet."""


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
    _flushing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __call__(self, event: Event) -> None:
        """Note finished work; all else is none of our business."""
        if isinstance(event, RequestFinished) and is_told(event):
            if self._since is None:
                self._since = self.clock()
            self._waiting.append(row(event, self.now()))
            if self._writing is None or self._writing.done():
                # In nobody's name: it writes what all have used.
                self._writing = asyncio.get_running_loop().create_task(
                    self._write_all(), context=Context()
                )

    def check(self) -> None:
        """Raises StateUnavailable: too much has been waiting for too long."""
        late = self._since is not None and self.clock() - self._since > LONGEST_WAIT_S
        if late or len(self._waiting) > MOST_WAITING:
            raise StateUnavailable(f"the usage of {len(self._waiting)} requests is not written yet")

    async def flush(self) -> None:
        """Write what waits now. Raises StateUnavailable; then it still waits."""
        async with self._flushing:
            while self._waiting:
                batch = self._waiting[:BATCH_ROWS]
                await promptly(self._insert(batch), within_s=WRITE_S, what="the database")
                del self._waiting[: len(batch)]
                self._since = self.clock() if self._waiting else None

    async def close(self) -> None:
        """Write what waits, if that can be done at once."""
        if self._writing is not None:
            self._writing.cancel()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.flush()
        except (TimeoutError, StateUnavailable) as error:
            for lost in self._waiting:
                logger.error("usage that was not written: %s", lost)
            logger.error("%d rows of usage are lost: %s", len(self._waiting), error)

    async def _write_all(self) -> None:
        """Until nothing waits."""
        complaint = ""
        while self._waiting:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except Exception as error:  # whatever it is: nobody else would ever write them
                if (said := f"{type(error).__name__}: {error}") != complaint:
                    logger.warning("%d rows of usage wait: %s", len(self._waiting), said)
                complaint = said

    async def _insert(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """Those that can be written; what never can be is told to the log."""
        try:
            async with self.database.write() as c:
                # As many executions of one statement: writing one of all their values holds up the
                # requests for tens of milliseconds, and the driver sends these together, too.
                insert = postgresql.insert if c.dialect.name == "postgresql" else sqlite.insert
                await c.execute(insert(_USAGE).on_conflict_do_nothing(), batch)
        except DBAPIError as error:
            if not _is_about_rows(error):
                raise
            if len(batch) == 1:
                logger.error("usage that cannot be written: %s: %s", error.orig, batch[0])
                return
            half = len(batch) // 2
            await self._insert(batch[:half])
            await self._insert(batch[half:])


def is_told(event: RequestFinished) -> bool:
    """Whether a model has done something for it, even if it failed afterwards; or had done so
    before, and the answer was there.
    """
    used = event.usage is not None or event.cost > 0
    return event.model is not None and used


def row(event: RequestFinished, now: float) -> dict[str, Any]:
    at = datetime.fromtimestamp(now, UTC)
    usage, timings, remembered = event.usage or NO_USAGE, event.timings, event.remembered
    told = {
        "entry": unique(),
        "at": at,
        "day": at.date().isoformat(),
        "tenant": event.tenant,
        "subject": event.subject,
        "request_id": event.request_id,
        "route": event.route,
        "model": event.model,
        "adapter": event.adapter,
        "model_version": event.versions.model,
        "adapter_version": event.versions.adapter,
        "status": event.status,
        "code": event.code,
        "outcome": event.outcome if event.outcome in REMEMBERED else COMPUTED,
        "prompt_tokens": usage.prompt_tokens - remembered.prompt_tokens,
        "completion_tokens": usage.completion_tokens - remembered.completion_tokens,
        "cached_tokens": usage.cached_tokens - remembered.cached_tokens,
        "remembered_tokens": remembered.prompt_tokens + remembered.completion_tokens,
        "queue_ms": round(timings.queue_s * 1000) if timings else 0,
        "prefill_ms": round(timings.prefill_s * 1000) if timings else 0,
        "decode_ms": round(timings.decode_s * 1000) if timings else 0,
        "cost": event.cost,
    }
    for name, length in _LENGTHS.items():
        if (value := told[name]) is not None:
            told[name] = _fitting(str(value), length)
    return told


def _fitting(value: str, length: int) -> str:
    """As the column takes it. What a client may have written must not keep a row from being."""
    if value.isascii() and len(value) <= length and "\0" not in value:  # as nearly all are
        return value
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()[:length]


def _is_about_rows(error: DBAPIError) -> bool:
    """Whether it is what was to be written that is wrong, not the database or its tables."""
    if isinstance(error, DataError | IntegrityError):
        return True
    state = getattr(error.orig, "sqlstate", None)  # classes: data exception, constraint violation
    return isinstance(state, str) and state.startswith(("22", "23"))


class By(StrEnum):
    """What a report has a line for."""

    DAY = "day"
    MODEL = "model"
    TENANT = "tenant"
    MODEL_VERSION = "model_version"
    ADAPTER_VERSION = "adapter_version"


NOTHING = ""
"""Comes first, in any database."""
SUMS = ("prompt_tokens", "completion_tokens", "cached_tokens", "cost")


def _sum(name: str) -> sa.Label[int]:
    return sa.cast(sa.func.sum(_USAGE.c[name]), sa.BigInteger).label(name)


async def report(
    database: Database | LazyDatabase,
    *,
    by: Sequence[By],
    tenant: str | None = None,
    since: str | None = None,
    until: str | None = None,
    after: Sequence[str] | None = None,
    before: Sequence[str] | None = None,
    limit: int | None = None,
) -> Sequence[Mapping[str, Any]]:
    """Requests, tokens and cost, summed, in order of ``by``: from the first line on, or the ones
    next to a line on either side.

    ``requests`` are all of them; ``remembered_requests`` those that nobody computed anything
    for, and ``remembered_tokens`` what was not paid for, in none of the other sums.

    Args:
        since, until: days, as ``2026-11-25``, both included.
        after, before: what ``place`` says of a line.
        limit: of lines; ``None``: all there are.

    Raises:
        StateUnavailable: the database is out of reach.
    """
    columns = [_USAGE.c[each] for each in by]
    wanted = sa.select(
        *columns,
        sa.func.count().label("requests"),
        *(_sum(name) for name in SUMS),
        sa.func.count()
        .filter(_USAGE.c.outcome.in_([str(each) for each in REMEMBERED]))
        .label("remembered_requests"),
        _sum("remembered_tokens"),
    )
    if tenant is not None:
        wanted = wanted.where(_USAGE.c.tenant == tenant)
    if since is not None:
        wanted = wanted.where(_USAGE.c.day >= since)
    if until is not None:
        wanted = wanted.where(_USAGE.c.day <= until)
    places = [sa.func.coalesce(column, NOTHING) for column in columns]
    if after is not None:
        wanted = wanted.where(sa.tuple_(*places) > sa.tuple_(*map(sa.literal, after)))
    if before is not None:
        wanted = wanted.where(sa.tuple_(*places) < sa.tuple_(*map(sa.literal, before)))
    order = [place.desc() for place in places] if before is not None else places
    async with database.read() as c:
        found = await c.execute(wanted.group_by(*columns).order_by(*order).limit(limit))
        # SQLAlchemy's names are a kind of text that JSON's writer does not take for text.
        lines = [{str(name): value for name, value in each._mapping.items()} for each in found]
    return lines[::-1] if before is not None else lines


def priced(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With the cost in the currency."""
    return [{**line, "cost": line["cost"] / MICRO} for line in lines]


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """With a header, if there are lines."""
    text = io.StringIO()
    if lines:
        writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()


def place(line: Mapping[str, Any], by: Sequence[By]) -> list[str]:
    """Of a line in its report."""
    return [line[each] or NOTHING for each in by]
