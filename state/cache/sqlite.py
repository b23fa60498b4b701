"""A cache in one file, shared by the processes of a machine (``state/sqlite_file.py``).

Reading takes no lock. A hit is noted at most once in ``TOUCH_MS``, because a note is a write and
writers wait for each other; that is as exact as "unused for longest" needs to be. What a crash of
the machine loses is computed again.

Answers are their tenants': the file is for its owner's eyes only.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from state.cache.contract import Bounds, size
from state.sqlite_file import SqliteFile

TOUCH_MS = 1000
PATIENCE_S = 0.1
"""How long a call may wait for others; after that computing may well be quicker."""

# ``used`` is the time in milliseconds, and a little more where several fall together, so that
# no two entries have the same. The triggers keep the sum, whoever writes.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    owner TEXT NOT NULL, key TEXT NOT NULL, expires_ms INTEGER NOT NULL, used INTEGER NOT NULL,
    size INTEGER NOT NULL, value BLOB NOT NULL, PRIMARY KEY (owner, key)
);
CREATE INDEX IF NOT EXISTS entries_expire ON entries (expires_ms);
CREATE INDEX IF NOT EXISTS entries_used ON entries (used, size);
CREATE TABLE IF NOT EXISTS total (bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM total);
CREATE TRIGGER IF NOT EXISTS entry_comes AFTER INSERT ON entries
    BEGIN UPDATE total SET bytes = bytes + new.size; END;
CREATE TRIGGER IF NOT EXISTS entry_goes AFTER DELETE ON entries
    BEGIN UPDATE total SET bytes = bytes - old.size; END;
"""
_USED_NOW = "max(:now_ms, (SELECT coalesce(max(used), 0) + 1 FROM entries))"
_TOUCH = f"UPDATE entries SET used = {_USED_NOW} WHERE owner = :owner AND key = :key"
_INSERT = f"""
INSERT INTO entries (owner, key, expires_ms, used, size, value)
VALUES (:owner, :key, :expires_ms, {_USED_NOW}, :size, :value)
"""


class SqliteCache:
    """See ``Cache``.

    Args:
        file: made with its folder if it is not there.
        clock: Unix seconds.

    Raises:
        StateMisconfigured: the file cannot be made, or is something else.
    """

    def __init__(self, file: Path, bounds: Bounds, clock: Callable[[], float] = time.time) -> None:
        self._bounds = bounds
        self._clock = clock
        self._file = SqliteFile("the cache", file, _SCHEMA)

    async def get(self, owner: str, keys: Sequence[str]) -> list[bytes | None]:
        def act() -> list[bytes | None]:
            now_ms = self._now_ms()
            return [self._look(owner, key, now_ms) for key in keys]

        return await self._file.read(act, within_s=PATIENCE_S)

    async def put(self, owner: str, entries: Mapping[str, bytes], *, ttl_s: float) -> None:
        def act() -> None:
            now_ms = self._now_ms()
            execute = self._file.execute
            execute("DELETE FROM entries WHERE expires_ms <= ?", (now_ms,))
            for key, value in entries.items():
                execute("DELETE FROM entries WHERE owner = ? AND key = ?", (owner, key))
                if not self._bounds.fits(value):
                    continue
                entry = {
                    "owner": owner,
                    "key": key,
                    "expires_ms": now_ms + round(ttl_s * 1000),
                    "now_ms": now_ms,
                    "size": size(value),
                    "value": value,
                }
                execute(_INSERT, entry)
                self._make_room()

        await self._file.write(act, within_s=PATIENCE_S, patient=True)

    async def drop(self, owner: str) -> int:
        def act() -> int:
            return self._file.execute("DELETE FROM entries WHERE owner = ?", (owner,)).rowcount

        return await self._file.write(act, within_s=PATIENCE_S)

    async def ping(self) -> None:
        await self._file.read(
            lambda: self._file.execute("SELECT bytes FROM total").fetchone(), within_s=PATIENCE_S
        )

    async def close(self) -> None:
        self._file.close()

    def _look(self, owner: str, key: str, now_ms: int) -> bytes | None:
        found = self._file.execute(
            "SELECT value, used FROM entries WHERE owner = ? AND key = ? AND expires_ms > ?",
            (owner, key, now_ms),
        ).fetchone()
        if found is None:
            return None
        value: bytes
        value, used = found
        if now_ms - used >= TOUCH_MS:
            with suppress(sqlite3.OperationalError):  # another writes; the next hit will note it
                self._file.execute(_TOUCH, {"owner": owner, "key": key, "now_ms": now_ms})
        return value

    def _make_room(self) -> None:
        execute = self._file.execute
        [excess] = execute("SELECT bytes - ? FROM total", (self._bounds.max_bytes,)).fetchone()
        if excess <= 0:
            return
        victims = []
        for rowid, bytes_ in execute("SELECT rowid, size FROM entries ORDER BY used"):
            victims.append((rowid,))
            excess -= bytes_
            if excess <= 0:
                break
        self._file.executemany("DELETE FROM entries WHERE rowid = ?", victims)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
