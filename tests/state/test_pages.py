"""A page is what a list of all rows, newest first, has at that place."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from state import tables
from state.database import Database
from state.pages import newest_first
from tests.state.test_migrations import MOMENT

AUDIT = tables.audit


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [5, 4, 3]),
        ({"before": 3}, [2, 1]),
        ({"before": 1}, []),
        ({"after": 1}, [4, 3, 2]),
        ({"after": 3}, [5, 4]),
        ({"after": 5}, []),
        ({"after": 2, "before": 4}, [5, 4, 3]),
    ],
)
async def test_pages(database: Database, asked: dict[str, int], expected: list[int]) -> None:
    async with database.write() as c:
        row = {"at": MOMENT, "who": "me", "what": "test", "details": {}}
        await c.execute(AUDIT.insert(), [{**row, "subject": str(n)} for n in range(1, 6)])
    rows = await newest_first(database, sa.select(AUDIT), AUDIT.c.id, limit=3, **asked)
    assert [int(row.subject) for row in rows] == expected
