"""One suite for both databases: made once, committed whole, one writer at a time."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import exc
from sqlalchemy.engine import Connection

from state import database as module
from state import migrations, tables
from state.database import Database
from state.errors import StateMisconfigured, StateUnavailable
from state.places import sqlite_url

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 1, 31, 12, 0, 0, 123456, UTC)


def entry(who: str = "me", at: datetime = NOW) -> sa.Insert:
    return tables.audit.insert().values(at=at, who=who, what="test", subject="it", details={})


async def writers(database: Database) -> list[str]:
    async with database.read() as connection:
        query = sa.select(tables.audit.c.who).order_by(tables.audit.c.id)
        return list((await connection.scalars(query)).all())


async def test_migrations_lead_to_the_tables_of_this_release(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), tables.metadata))

    async with database.read() as connection:
        assert await connection.run_sync(differences) == []
        assert await connection.run_sync(migrations.revision_of) == migrations.head()


async def test_opening_again_changes_nothing(database: Database, database_url: str) -> None:
    async with database.write() as connection:
        await connection.execute(entry())
    async with await Database.open(database_url) as again:
        assert await writers(again) == ["me"]


@pytest.mark.slow
def test_processes_that_open_a_new_database_at_once(database_url: str) -> None:
    words = [sys.executable, "-m", "state", "upgrade", "--database", database_url]
    opening = [
        subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=100) for process in opening]
    assert [process.returncode for process in opening] == [0] * 3, said


async def test_a_migration_that_fails_leaves_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(connection: Connection) -> None:
        connection.execute(sa.text("CREATE TABLE half (x INTEGER)"))
        raise RuntimeError("the power failed")

    with monkeypatch.context() as patched:
        patched.setattr(migrations, "upgrade", half)
        with pytest.raises(RuntimeError):
            await Database.open(database_url)

    def names(connection: Connection) -> list[str]:
        return sa.inspect(connection).get_table_names()

    async with await Database.open(database_url) as database, database.read() as connection:
        found = await connection.run_sync(names)
    assert set(found) == {"alembic_version", *tables.metadata.tables}


async def test_a_database_of_a_newer_release_is_left_alone(
    database: Database, database_url: str
) -> None:
    async with database.write() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = 'r9999'"))
    with pytest.raises(StateMisconfigured, match=r"newer release \(revision r9999\)"):
        await Database.open(database_url)


async def test_an_exception_undoes_everything(database: Database) -> None:
    async def give_up() -> None:
        async with database.write() as connection:
            await connection.execute(entry())
            raise KeyError

    with pytest.raises(KeyError):
        await give_up()
    assert await writers(database) == []


async def test_faults_of_our_own_statements_stay_what_they_are(database: Database) -> None:
    for statement in ("INSERT INTO nowhere VALUES (1)", "SELEKT 1"):
        with pytest.raises(exc.DBAPIError):
            async with database.write() as connection:
                await connection.execute(sa.text(statement))
    with pytest.raises(exc.IntegrityError):
        async with database.write() as connection:
            await connection.execute(
                tables.parents.insert().values(artifact="a" * 64, parent="b" * 64)
            )
    with pytest.raises(FileNotFoundError):
        async with database.write():
            open("/nowhere/at/all")  # noqa: ASYNC230, SIM115
    await database.ping()


async def test_a_reader_sees_one_moment(database: Database) -> None:
    async with database.read() as connection:
        count = sa.select(sa.func.count()).select_from(tables.audit)
        assert await connection.scalar(count) == 0
        async with database.write() as other:
            await other.execute(entry())
        assert await connection.scalar(count) == 0
    assert await writers(database) == ["me"]


async def test_writers_of_one_name_take_turns(database: Database, database_url: str) -> None:
    """Read, think, write: without turns two would read the same number."""

    async def count_up(through: Database) -> None:
        async with through.write("turns") as connection:
            count = sa.select(sa.func.count()).select_from(tables.audit)
            seen = await connection.scalar(count)
            await asyncio.sleep(0.01)
            await connection.execute(entry(str(seen)))

    async with await Database.open(database_url) as other:
        await asyncio.gather(*(count_up(one) for one in (database, other) * 5))
    assert await writers(database) == [str(number) for number in range(10)]


async def test_moments_keep_their_zone(database: Database) -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))
    async with database.write() as connection:
        await connection.execute(entry(at=elsewhere))
        found = await connection.scalar(sa.select(tables.audit.c.at))
    assert found == NOW
    assert found.tzinfo is UTC
    with pytest.raises(exc.StatementError, match="no time zone"):
        async with database.write() as connection:
            await connection.execute(entry(at=NOW.replace(tzinfo=None)))


async def test_who_waits_too_long_is_told(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUSY_S", 1.0)
    async with await Database.open(database_url) as impatient, database.write("x") as connection:
        await connection.execute(entry())
        with pytest.raises(StateUnavailable, match="lock"):
            async with impatient.write("x"):
                pass
    assert await writers(database) == ["me"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "is not one"),
        ("hidden", "is not one"),
        ("postgresql://user:hidden@host:port/x", "is not one"),
        ("mysql://user:hidden@host/x?password=hidden", "mysql://host/x is not supported"),
        ("sqlite://", "names no absolute file"),
        ("sqlite:///relative.db", "names no absolute file"),
    ],
)
async def test_a_wrong_url(url: str, says: str) -> None:
    with pytest.raises(StateMisconfigured, match=says) as raised:
        await Database.open(url)
    assert "hidden" not in str(raised.value)
    assert "expected sqlite:////" in str(raised.value)


async def test_an_unreachable_server() -> None:
    url = "postgres://user:hidden@127.0.0.1:1/name?sslmode=disable"
    with pytest.raises(StateUnavailable, match=r"^postgres\w*://127.0.0.1:1/name") as raised:
        await Database.open(url)
    assert "hidden" not in str(raised.value)


async def test_a_database_that_is_not_there(postgres_url: str) -> None:
    with pytest.raises(StateMisconfigured, match="does not exist"):
        await Database.open(postgres_url.replace("/test_", "/nowhere_"))


async def test_a_server_that_goes_away(postgres_url: str) -> None:
    async with (
        await Database.open(postgres_url) as database,
        await Database.open(postgres_url) as other,
    ):

        async def interrupted() -> None:
            async with database.write() as connection:
                await connection.execute(entry())
                pid = await connection.scalar(sa.text("SELECT pg_backend_pid()"))
                async with other.write() as killer:
                    await killer.execute(sa.text(f"SELECT pg_terminate_backend({pid})"))
                await asyncio.sleep(0.1)
                await connection.execute(entry())

        with pytest.raises(StateUnavailable):
            await interrupted()
        assert await writers(database) == []


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(StateMisconfigured, match=r"text\.db: file is not a database"):
        await Database.open(sqlite_url(tmp_path / "text.db"))


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateUnavailable, match="cannot be reached"):
        await Database.open(sqlite_url(tmp_path / "file" / "frontier.db"))


async def test_sqlite_readers_go_on_while_one_writes(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "frontier.db")
    async with await Database.open(url) as database, database.write() as connection:
        await connection.execute(entry())
        with sqlite3.connect(tmp_path / "frontier.db", timeout=0) as other:
            assert other.execute("SELECT count(*) FROM audit").fetchone() == (0,)
            assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        other.close()


def test_the_command_line(tmp_path: Path) -> None:
    environment = os.environ | {"FRONTIER_HOME": str(tmp_path), "FRONTIER_DATABASE": ""}

    def say(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "state", *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "revision None, this release has" in say("current")
    assert f"frontier.db: revision {migrations.head()}\n" in say("upgrade")
    assert f"revision {migrations.head()}, this release has {migrations.head()}" in say("current")
