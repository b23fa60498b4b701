"""What has been kept for long enough goes (spec C10): what is due is decided here, and deleted.

Every gateway does so, beside its requests; two at once do no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from deployments.config import RetentionConfig
from deployments.tenants.audit import note
from deployments.tenants.batches import in_batches
from deployments.tenants.deletion import Deletion, untraceable
from models.errors import PlatformError
from state import tables
from state.database import Database, LazyDatabase
from state.errors import StateError

logger = logging.getLogger(__name__)

FIRST_S = 60.0
"""After a start: not beside the first requests."""
DELETED = "(deleted)"
"""Whose usage came to be written after the tenant was gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """Rows whose time is over."""

    what: str
    table: sa.Table
    where: sa.ColumnElement[bool]
    values: Mapping[str, Any] | None = None
    """What they are given, with which they are due no more; ``None``: they are deleted."""


def due(config: RetentionConfig, now: datetime) -> Sequence[Due]:
    """Pure."""
    found = []
    usage, audit, keys = tables.usage, tables.audit, tables.api_keys
    alerts = tables.alerts
    if config.usage_days is not None:
        where = usage.c.day < _day(now, config.usage_days)
        found.append(Due(what="usage", table=usage, where=where))
    if config.access_days is not None:
        traceable = sa.text("subject <> ''")  # word for word as of the index
        where = sa.and_(usage.c.day < _day(now, config.access_days), traceable)
        nobody = {"subject": "", "request_id": ""}
        found.append(Due(what="who asked", table=usage, where=where, values=nobody))
    if config.audit_days is not None:
        where = audit.c.at < now - timedelta(days=config.audit_days)
        found.append(Due(what="audit", table=audit, where=where))
        where = alerts.c.at < now - timedelta(days=config.audit_days)
        found.append(Due(what="alerts", table=alerts, where=where))
    if config.dead_keys_days is not None:
        cut = now - timedelta(days=config.dead_keys_days)
        where = sa.or_(keys.c.revoked < cut, keys.c.expires < cut)
        found.append(Due(what="dead keys", table=keys, where=where))
    found.append(late(now))
    return found


def late(now: datetime) -> Due:
    """Usage of requests that were running when their tenant was deleted."""
    usage = tables.usage
    where = sa.and_(
        usage.c.day >= _day(now, 1),  # such a request ends within minutes
        usage.c.tenant.not_in(sa.select(tables.tenants.c.name)),
        usage.c.tenant.not_like("(deleted%"),
    )
    return Due(what="late usage", table=usage, where=where, values=untraceable(DELETED))


def _day(now: datetime, days: int) -> str:
    """The first day that is kept, as ``usage.day`` is written."""
    return f"{now.astimezone(UTC) - timedelta(days=days):%Y-%m-%d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Belongs to the event loop of ``database``. Methods raise ``StateUnavailable``.

    Args:
        now: the time of day.
    """

    database: Database | LazyDatabase
    config: RetentionConfig
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    async def count(self) -> Mapping[str, int]:
        """How many rows are due, by what they are."""
        found = {}
        async with self.database.read() as c:
            for each in due(self.config, self.now()):
                rows = sa.select(sa.func.count()).select_from(each.table).where(each.where)
                found[each.what] = await c.scalar(rows) or 0
        return found

    async def enforce(self, *, by: str | None = None) -> Mapping[str, int]:
        """Do away with what is due; how much that was.

        Args:
            by: who has it done now, for the audit log; ``None``: its time has come, as configured.
        """
        if by is not None:
            due_now = await self.count()
            async with self.database.write() as c:  # first: whatever becomes of it, it was begun
                await note(c, by, "retention.enforce", "everything that is due", **due_now)
        return {
            each.what: await in_batches(self.database, each.table, each.where, each.values)
            for each in due(self.config, self.now())
        }


async def keep_house(
    retention: Retention, deletion: Deletion, *, every_s: float, first_s: float = FIRST_S
) -> None:
    """Enforce the retention, and finish what deletions have begun, again and again. Never
    returns, and survives a database that is away; cancel it.
    """
    pause_s = first_s
    while True:
        await asyncio.sleep(pause_s)
        pause_s = every_s
        try:
            await deletion.resume()
            gone = await retention.enforce()
        except (StateError, PlatformError) as error:
            logger.warning("what is due stays for now: %s", error)
        else:
            if any(gone.values()):
                logger.info("retention: %s", ", ".join(f"{n} {what}" for what, n in gone.items()))
