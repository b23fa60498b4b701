"""A long table a page at a time, the newest row first (spec A7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from state.database import Database, LazyDatabase


async def newest_first(
    database: Database | LazyDatabase,
    wanted: sa.Select[Any],
    by: sa.Column[int],
    *,
    before: int | None = None,
    after: int | None = None,
    limit: int = 100,
) -> Sequence[sa.Row[Any]]:
    """From the newest on, or the rows next to one on either side.

    Args:
        by: a number that grows with each row.
        before: the older neighbours of the row with this number.
        after: the newer ones; taken if both are given.

    Raises:
        StateUnavailable: the database is out of reach.
    """
    page = wanted.limit(limit)
    if after is not None:
        page = page.where(by > after).order_by(by)
    else:
        page = page.order_by(by.desc())
        if before is not None:
            page = page.where(by < before)
    async with database.read() as c:
        rows: Sequence[sa.Row[Any]] = (await c.execute(page)).all()
    return rows if after is None else rows[::-1]
