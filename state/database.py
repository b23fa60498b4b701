"""The durable database: SQLite beside us or PostgreSQL by URL, the same tables in both.

    database = await Database.open(url)          # migrated, or StateError
    async with database.read() as connection:    # one consistent snapshot
        ...
    async with database.write("registry") as connection:   # committed at the end, or nothing
        ...

``write`` with a name runs alone among all writers of that name, on any machine: decide and
act inside without fearing what others do in between. Without a name only the rows you
touch are yours (on SQLite there is one writer at a time anyway).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from state import migrations
from state.errors import StateError, StateMisconfigured, StateUnavailable
from state.patience import promptly, watch_the_line
from state.places import Places

logger = logging.getLogger(__name__)

EXPECTED = "sqlite:////ABSOLUTE/FILE or postgresql://USER:PASSWORD@HOST/DATABASE"

CONNECT_S = 5.0
"""A server that does not answer for so long counts as unreachable."""
LOOK = 0.4
"""The part of its patience after which a transaction that takes longer is looked after."""
BUSY_S = 15.0
"""How long a writer waits for other writers."""
MIGRATE_S = 120.0
"""How long to wait for another process's migrations."""


class Database:
    """An open database. Belongs to the event loop that opened it.

    Args:
        patience_s: how long a server may take to say that it is there, before a transaction.
    """

    def __init__(self, engine: AsyncEngine, called: str, patience_s: float = CONNECT_S) -> None:
        self.called = called
        """Its URL without secrets, for messages."""
        self.engine = engine
        self._patience_s = patience_s
        sqlite = engine.dialect.name == "sqlite"
        if sqlite:
            _prepare_sqlite(engine)
            self._probing = None
        else:
            _prepare_postgres(engine)
            self._probing = create_async_engine(
                engine.url, poolclass=NullPool, connect_args={"timeout": patience_s}
            )
        self._reading = engine.execution_options(
            **{} if sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        )
        self._writing = engine.execution_options(sqlite_begin="IMMEDIATE")

    @classmethod
    async def open(
        cls, url: str | None = None, *, migrate: bool = True, patience_s: float = CONNECT_S
    ) -> Self:
        """Connect, and bring the tables to this release. Any number of processes may do so at once.

        Args:
            url: default: that of ``state.places``.
            migrate: without it the tables stay as they are, whatever that is.
            patience_s: how long a server may take to say that it is there, before a transaction.

        Raises:
            StateMisconfigured: the URL is wrong, the password refused, the file not
                writable, or the database of a newer release than this one.
            StateUnavailable: it cannot be reached.
        """
        parsed = parse_url(Places.of().database if url is None else url)
        called = describe(parsed)
        if parsed.get_backend_name() == "sqlite":
            assert parsed.database is not None
            with _explained(called):
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            arguments: dict[str, Any] = {"timeout": BUSY_S}
            pool: dict[str, Any] = {}
        else:
            arguments = {
                "timeout": CONNECT_S,
                "server_settings": {"lock_timeout": f"{BUSY_S:.0f}s"},
            }
            pool = {"pool_timeout": CONNECT_S}
        # What a statement carries (digests, bodies, answers) is nobody's to read in a log.
        engine = create_async_engine(
            parsed, pool_pre_ping=True, connect_args=arguments, hide_parameters=True, **pool
        )
        database = cls(engine, called, patience_s)
        try:
            if migrate:
                await database._migrate(parsed)
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        await self.engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """Raises StateUnavailable, now or from any statement inside."""
        async with self._transaction(self._reading) as connection:
            yield connection

    @asynccontextmanager
    async def write(self, alone: str | None = None) -> AsyncIterator[AsyncConnection]:
        """Everything inside is committed at its end; an exception undoes all of it.

        Args:
            alone: run as the only writer that gave this name.

        Raises:
            StateUnavailable: now, from any statement inside, or from the commit.
        """
        async with self._transaction(self._writing) as connection:
            if alone is not None and self.engine.dialect.name == "postgresql":
                await connection.execute(_ADVISORY_LOCK, {"key": _lock_key(alone)})
            yield connection

    async def ping(self) -> None:
        """Raises StateUnavailable unless it answers."""
        async with self.read() as connection:
            await connection.execute(sa.text("SELECT 1"))

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        with _explained(self.called):
            connection = await self._connected(engine)
        # Only what the database says is translated from here on: an OSError in the body of
        # a transaction is its author's.
        try:
            with _translated(self.called), self._watched(connection):
                async with connection.begin():
                    yield connection
        finally:
            await connection.close()

    @contextmanager
    def _watched(self, connection: AsyncConnection) -> Iterator[None]:
        """Cut the line of a transaction that waits for a server which answers nobody any more.

        A statement may take as long as it needs; but one that was sent to a server that has been
        frozen since would be waited for without end.
        """
        if self._probing is None:
            yield
            return
        loop, task = asyncio.get_running_loop(), None

        def look() -> None:
            nonlocal task
            task = loop.create_task(self._cut_if_silent(connection))

        timer = loop.call_later(self._patience_s * LOOK, look)
        try:
            yield
        finally:
            timer.cancel()
            if task is not None:
                task.cancel()

    async def _cut_if_silent(self, connection: AsyncConnection) -> None:
        assert self._probing is not None
        driver = connection.sync_connection.connection.driver_connection  # type: ignore[union-attr]

        async def answered(probing: AsyncEngine) -> None:
            async with probing.connect():
                pass

        while True:
            try:
                await promptly(
                    answered(self._probing),
                    within_s=self._patience_s * (1 - LOOK),
                    what=self.called,
                )
            except Exception as error:
                logger.warning("a transaction is given up: %s", error)
                driver.terminate()  # type: ignore[union-attr]
                return
            await asyncio.sleep(self._patience_s)

    async def _connected(self, engine: AsyncEngine) -> AsyncConnection:
        """A connection whose server has answered just now."""

        async def connected() -> AsyncConnection:
            return await engine.connect()

        if engine.dialect.name == "sqlite":
            return await connected()
        # Not stopped when it is late: to close the connection that it waits for takes as long.
        return await promptly(
            connected(), within_s=self._patience_s, what=self.called, late=AsyncConnection.close
        )

    async def _migrate(self, url: URL) -> None:
        try:
            with _explained(self.called):
                if await self._is_current():
                    return
        except StateUnavailable:
            if self.engine.dialect.name != "sqlite":
                raise  # a SQLite file that is being made may be locked; then wait for its maker
        async with self._sole_migrator(url):
            with _explained(self.called):
                async with self._writing.begin() as connection:
                    if self.engine.dialect.name == "postgresql":
                        await connection.execute(_ADVISORY_LOCK, {"key": _lock_key("migrations")})
                    await connection.run_sync(migrations.upgrade)

    async def _is_current(self) -> bool:
        async with self._reading.connect() as connection:
            return await connection.run_sync(_is_current, self.called)

    @asynccontextmanager
    async def _sole_migrator(self, url: URL) -> AsyncIterator[None]:
        """On SQLite a file lock; on PostgreSQL the advisory lock in the transaction suffices."""
        if self.engine.dialect.name != "sqlite":
            yield
            return
        # One thread takes the lock and another may give it back.
        lock = FileLock(f"{url.database}.migrating", thread_local=False)
        with _explained(self.called):
            try:
                await asyncio.to_thread(lock.acquire, timeout=MIGRATE_S)
            except Timeout:
                raise StateUnavailable(
                    f"{self.called}: another process has been migrating it for {MIGRATE_S:.0f} s"
                ) from None
        try:
            with _explained(self.called):
                async with self.engine.connect() as connection:
                    # Readers go on while one writes. Kept in the file; only here does nobody
                    # else have it open yet.
                    raw = await connection.get_raw_connection()
                    cursor = await raw.driver_connection.execute("PRAGMA journal_mode=WAL")  # type: ignore[union-attr]
                    await cursor.close()
            yield
        finally:
            lock.release()


class LazyDatabase:
    """A ``Database`` that is opened when it is first needed, and asked for again after it failed.

    Belongs to the event loop that uses it first.

    Args:
        url: default: that of ``state.places``.
        patience_s: see ``Database``.
    """

    def __init__(self, url: str | None = None, *, patience_s: float = CONNECT_S) -> None:
        self._url = url
        self._patience_s = patience_s
        self._opened: Database | None = None
        self._opening: asyncio.Task[Database] | None = None

    async def opened(self) -> Database:
        """Who asks waits no longer than for a server; the opening itself may take its time.

        Raises:
            StateMisconfigured, StateUnavailable
        """
        if self._opened is not None:
            return self._opened
        if (opening := self._opening) is None:  # all who ask wait for the same one
            opening = self._opening = asyncio.create_task(self._open())
            opening.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen
        await asyncio.wait({opening}, timeout=self._patience_s)
        if not opening.done():
            raise StateUnavailable("the database takes its time to open; it is still being asked")
        return opening.result()

    async def _open(self) -> Database:
        """Its failure is told to who waits now, not to who asks later."""
        try:
            self._opened = await Database.open(self._url, patience_s=self._patience_s)
            return self._opened
        finally:
            self._opening = None

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """See ``Database.read``."""
        async with (await self.opened()).read() as connection:
            yield connection

    @asynccontextmanager
    async def write(self, alone: str | None = None) -> AsyncIterator[AsyncConnection]:
        """See ``Database.write``."""
        async with (await self.opened()).write(alone) as connection:
            yield connection

    async def ping(self) -> None:
        """Raises StateUnavailable unless it answers."""
        await (await self.opened()).ping()

    async def close(self) -> None:
        if (opening := self._opening) is not None:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            self._opening = None  # it may never have begun
        if self._opened is not None:
            await self._opened.close()
            self._opened = None


_ADVISORY_LOCK = sa.text("SELECT pg_advisory_xact_lock(:key)")


def parse_url(text: str) -> URL:
    """A URL as people write it, for our asynchronous drivers.

    Raises:
        StateMisconfigured: it is none, or of a database that is not supported.
    """
    try:
        url = make_url(text)
    except (exc.ArgumentError, ValueError):
        raise StateMisconfigured(
            f"the URL of the database is not one; expected {EXPECTED}"
        ) from None
    called = describe(url)
    match url.get_backend_name():
        case "sqlite":
            if not url.database or not Path(url.database).is_absolute():
                raise StateMisconfigured(
                    f"{called} names no absolute file; expected {EXPECTED}, since the working "
                    "directory of a job goes away"
                )
            return url.set(drivername="sqlite+aiosqlite")
        case "postgresql" | "postgres":
            query = dict(url.query)
            if (mode := query.pop("sslmode", None)) is not None:  # libpq's word for asyncpg's
                query["ssl"] = mode
            return url.set(drivername="postgresql+asyncpg", query=query)
    raise StateMisconfigured(f"{called} is not supported; expected {EXPECTED}")


def describe(url: URL) -> str:
    """The URL without user, password and parameters, which may hold secrets, too."""
    shown = URL.create(url.get_backend_name(), host=url.host, port=url.port, database=url.database)
    return shown.render_as_string()


def _prepare_sqlite(engine: AsyncEngine) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA busy_timeout={int(BUSY_S * 1000)}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later could fail at once, whatever the
        # timeout, if another wrote in between; so writers say at the start that they will.
        kind = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {kind}")


def _prepare_postgres(engine: AsyncEngine) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, _: object) -> None:
        # asyncpg shows its socket to nobody.
        transport = connection.driver_connection._transport
        watch_the_line(transport.get_extra_info("socket"))


def _is_current(connection: Connection, called: str) -> bool:
    found = migrations.revision_of(connection)
    if found is not None and found not in migrations.known():
        raise StateMisconfigured(
            f"{called} is of a newer release (revision {found}); update this one"
        )
    return found == migrations.head()


def _lock_key(name: str) -> int:
    """A name as PostgreSQL's signed 64 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)


@contextmanager
def _explained(called: str) -> Iterator[None]:
    """Around connecting: whatever fails is the database's fault."""
    try:
        with _translated(called):
            yield
    except StateError:
        raise
    except PermissionError as error:
        raise StateMisconfigured(f"{called}: {error.strerror}") from None
    except TimeoutError:
        raise StateUnavailable(f"{called} did not answer within {CONNECT_S:.0f} s") from None
    except OSError as error:
        raise StateUnavailable(f"{called} cannot be reached ({error})") from None
    except Exception as error:
        if (translated := _of_asyncpg(error, called)) is None:
            raise
        raise translated from None


@contextmanager
def _translated(called: str) -> Iterator[None]:
    """What a database says → our words. Faults of our own statements stay as they are."""
    try:
        yield
    except exc.TimeoutError:
        raise StateUnavailable(f"{called}: all connections are in use") from None
    except exc.DBAPIError as error:
        found = _of_sqlite(error, called) or _of_asyncpg(error.orig, called)
        if found is None and error.connection_invalidated:
            found = StateUnavailable(f"{called}: the connection was lost")
        if found is None:
            raise
        raise found from None


_SQLITE_LATER = {5, 6, 10, 13}  # busy, locked, I/O error, full
_SQLITE_NEVER = {3, 8, 11, 14, 26}  # permission, read-only, corrupt, cannot open, not a database


def _of_sqlite(error: exc.DBAPIError, called: str) -> StateError | None:
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF  # without the extension
    if code in _SQLITE_LATER:
        return StateUnavailable(f"{called}: {error.orig}")
    if code in _SQLITE_NEVER:
        return StateMisconfigured(f"{called}: {error.orig}")
    return None


_POSTGRES_LATER = ("08", "40", "53", "55P03", "57")
"""Connection, serialisation, resources, lock timeout, operator intervention."""
_POSTGRES_NEVER = ("28", "3D")
"""Authorisation; no such database."""


def _of_asyncpg(error: BaseException | None, called: str) -> StateError | None:
    """By SQLSTATE, whose first two characters are its class."""
    state = getattr(error, "sqlstate", None)
    if not isinstance(state, str):
        return None
    told = f"{called}: {str(error).rpartition('>: ')[2]}"
    if state.startswith(_POSTGRES_NEVER):
        return StateMisconfigured(told)
    if state.startswith(_POSTGRES_LATER):
        return StateUnavailable(told)
    return None
