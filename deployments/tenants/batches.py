"""Many rows deleted or changed a few at a time, so that nobody else waits for long."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from state.database import Database, LazyDatabase

ROWS = 500
"""In one transaction."""
PAUSE_S = 0.01
"""Between two: on SQLite one writes at a time, and others want to."""


async def in_batches(
    database: Database | LazyDatabase,
    table: sa.Table,
    due: sa.ColumnElement[bool],
    values: Mapping[str, Any] | None = None,
    *,
    rows: int = ROWS,
) -> int:
    """Delete what is due, or give it ``values``, with which it is due no more.

    Any number of processes may do so at once; a crash leaves whole batches.

    Returns:
        How many rows that were.

    Raises:
        StateUnavailable: the database is out of reach; what is done is done.
    """
    key = list(table.primary_key.columns)
    some = sa.select(*key).where(due).limit(rows).correlate(None)
    chosen = (key[0] if len(key) == 1 else sa.tuple_(*key)).in_(some)
    change: sa.Delete | sa.Update = sa.delete(table).where(chosen)
    if values is not None:
        change = sa.update(table).where(chosen).values(values)
    total = 0
    while True:
        # One at a time: two that lock the same rows in different orders would wait for each other.
        async with database.write("batches") as c:
            done: int = (await c.execute(change)).rowcount
        total += done
        if done < rows:
            return total
        await asyncio.sleep(PAUSE_S)
