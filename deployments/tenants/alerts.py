"""Budget alerts: each share of a tenant's monthly budget is told of once, whoever sees it first.

Gateways look for themselves (``meter.py``), so several see the same. Each writes a row; the
database takes one of a tenant, month and share, and whose row it took tells: as an
``AlertRaised`` event, which the log and the metrics subscribe to. Whatever carries alerts further
(webhooks, a pager) is one more subscriber. All alerts stay in the table, for
``GET /admin/v1/alerts``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from deployments.observability.events import AlertRaised, BudgetReached, Emit, Event
from state import tables
from state.database import Database, LazyDatabase
from state.errors import StateError
from state.pages import newest_first

logger = logging.getLogger(__name__)

_ALERTS = tables.alerts
ONE_OF_A_KIND = ("tenant", "kind", "period", "threshold")
BUDGET = "budget"
RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    id: int
    at: datetime
    tenant: str
    kind: str
    period: str
    """The month, as ``2026-11``."""
    threshold: int
    """Percent."""


@dataclass(slots=True, kw_only=True)
class Alerts:
    """A subscriber to events. Belongs to one event loop.

    Args:
        now: Unix seconds.
        emit: hears of each alert that is ours to tell.
    """

    database: Database | LazyDatabase
    now: Callable[[], float]
    emit: Emit
    _waiting: list[dict[str, Any]] = field(default_factory=list)
    _writing: asyncio.Task[None] | None = None

    def __call__(self, event: Event) -> None:
        """Note a budget that is reached; all else is none of our business."""
        if isinstance(event, BudgetReached):
            self._waiting.append(row(event, self.now()))
            if self._writing is None or self._writing.done():
                # In nobody's name: it tells of all tenants.
                self._writing = asyncio.get_running_loop().create_task(
                    self._write_all(), context=Context()
                )

    async def flush(self) -> None:
        """Write what waits, and tell of what nobody else has. Raises StateUnavailable; then it
        still waits.
        """
        while self._waiting:
            waiting = self._waiting[0]
            id_ = await self._written(waiting)
            del self._waiting[0]
            if id_ is not None:
                told = {name: waiting[name] for name in ONE_OF_A_KIND}
                self.emit(AlertRaised(id=id_, **told))

    async def _written(self, row: dict[str, Any]) -> int | None:
        """The alert's id; ``None``: another gateway's row was there first."""
        async with self.database.write() as c:
            insert = postgresql.insert if c.dialect.name == "postgresql" else sqlite.insert
            once = insert(_ALERTS).on_conflict_do_nothing(index_elements=ONE_OF_A_KIND)
            id_: int | None = await c.scalar(once.values(row).returning(_ALERTS.c.id))
            if id_ is None:  # it may be ours all the same, if the answer to the last try was lost
                id_ = await c.scalar(sa.select(_ALERTS.c.id).where(_ALERTS.c.entry == row["entry"]))
        return id_

    async def _write_all(self) -> None:
        while self._waiting:
            try:
                await self.flush()
            except StateError as error:
                logger.warning("%d alerts wait: %s", len(self._waiting), error)
                await asyncio.sleep(RETRY_S)


def row(event: BudgetReached, now: float) -> dict[str, Any]:
    """The month is the counters'. Half way to its end it is the same month by our clock, too,
    even if that is some minutes off.
    """
    within = now if event.resets_in_s is None else now + event.resets_in_s / 2
    return {
        "at": datetime.fromtimestamp(now, UTC),
        "tenant": event.tenant,
        "kind": BUDGET,
        "period": f"{datetime.fromtimestamp(within, UTC):%Y-%m}",
        "threshold": round(event.share * 100),
        "entry": token_hex(16),
    }


async def raised(
    database: Database | LazyDatabase,
    *,
    tenant: str | None = None,
    before: int | None = None,
    after: int | None = None,
    limit: int = 100,
) -> Sequence[Alert]:
    """The newest first: from the newest on, or the ones next to an alert on either side.

    Raises:
        StateUnavailable: the database is out of reach.
    """
    wanted = sa.select(*(each for each in _ALERTS.c if each.name != "entry"))
    if tenant is not None:
        wanted = wanted.where(_ALERTS.c.tenant == tenant)
    rows = await newest_first(
        database, wanted, _ALERTS.c.id, before=before, after=after, limit=limit
    )
    return [Alert(**row._mapping) for row in rows]
