"""From every release's tables to this one's, with rows in them, on both databases."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection

from state import migrations, tables
from state.database import Database

pytestmark = pytest.mark.integration

MOMENT = datetime(2026, 1, 31, 12, 0, 0, 123456, UTC)
ROWS = 3
"""In each table; one of them has nothing where nothing may be."""

Rows = Mapping[str, list[dict[str, Any]]]


def value(column: sa.Column[Any], number: int) -> Any:
    """Something that fits, a different one for each row."""
    if number == 0 and column.nullable:
        return None
    kind = column.type
    if isinstance(kind, sa.DateTime):
        moment = MOMENT + timedelta(days=number)
        return moment if kind.timezone else moment.replace(tzinfo=None)
    if isinstance(kind, sa.JSON):
        return {"number": number, "list": [None, 1.5, "é"], "inner": {"a": True}}
    if isinstance(kind, sa.LargeBinary):
        return bytes([0, 255, number])
    if isinstance(kind, sa.Integer):
        return 2**31 - 1 - number
    assert isinstance(kind, sa.String), f"{column} is a {kind!r}: teach this test what fits"
    return f"{number} {column.name} 'é\n"[: kind.length]


def fill(connection: Connection) -> Rows:
    """Rows in all tables that there are."""
    found = reflected(connection)
    for table in found.sorted_tables:  # what is referred to comes first
        parents = {
            own.name: (foreign.table, foreign.name)
            for constraint in table.foreign_key_constraints
            for own, foreign in zip(
                constraint.columns, [each.column for each in constraint.elements], strict=True
            )
        }
        rows = [
            {column.name: value(column, number) for column in table.columns}
            for number in range(ROWS)
        ]
        for name, (parent, key) in parents.items():
            keys = connection.scalars(sa.select(parent.c[key]).order_by(*parent.primary_key)).all()
            for row, key_ in zip(rows, keys, strict=True):
                row[name] = key_
        connection.execute(table.insert(), rows)
    return read(connection, found)


def read(connection: Connection, wanted: sa.MetaData) -> Rows:
    """All rows, in the columns and the order of ``wanted``."""
    return {
        table.name: [
            dict(row)
            for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()
        ]
        for table in wanted.sorted_tables
    }


def reflected(connection: Connection) -> sa.MetaData:
    """The tables as the database has them, whatever this release says."""
    found = sa.MetaData()
    found.reflect(connection)
    found.remove(found.tables["alembic_version"])
    return found


def differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), tables.metadata))


@pytest.mark.parametrize("revision", migrations.revisions())
async def test_rows_of_every_revision_are_there_in_this_one(
    database_url: str, revision: str
) -> None:
    def begin(connection: Connection) -> tuple[sa.MetaData, Rows]:
        migrations.upgrade(connection, revision)
        assert migrations.revision_of(connection) == revision
        return reflected(connection), fill(connection)

    async with (
        await Database.open(database_url, migrate=False) as database,
        database.write() as c,
    ):
        then, rows = await c.run_sync(begin)
    assert all(len(each) == ROWS for each in rows.values())
    async with await Database.open(database_url) as database, database.read() as c:
        assert await c.run_sync(migrations.revision_of) == migrations.head()
        assert await c.run_sync(differences) == []
        assert await c.run_sync(read, then) == rows


@pytest.mark.parametrize("revision", migrations.revisions())
async def test_this_release_reads_and_writes_what_it_finds(
    database_url: str, revision: str
) -> None:
    """What reflection calls a column's type is not what ``state/tables.py`` calls it."""

    def begin(connection: Connection) -> Rows:
        migrations.upgrade(connection, revision)
        return fill(connection)

    async with (
        await Database.open(database_url, migrate=False) as database,
        database.write() as c,
    ):
        rows = await c.run_sync(begin)

    def again(connection: Connection) -> None:
        for table in reversed(tables.metadata.sorted_tables):
            found = [dict(row) for row in connection.execute(sa.select(table)).mappings()]
            assert len(found) == len(rows.get(table.name, ()))
            connection.execute(table.delete())
            if found:
                connection.execute(table.insert(), found)
            connection.execute(table.delete())

    async with await Database.open(database_url) as database, database.write() as c:
        await c.run_sync(again)


def test_the_chain_has_no_fork() -> None:
    """Two releases that both added a migration: one must be put behind the other."""
    assert migrations.revisions()[-1] == migrations.head()
    assert list(migrations.revisions()) == sorted(migrations.revisions())
