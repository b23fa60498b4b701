"""A SQLite file that several processes open at once."""

from __future__ import annotations

import sqlite3
import time

OPEN_S = 5.0
"""How long to wait for another process that makes the file."""


def share(connection: sqlite3.Connection) -> None:
    """Readers go on while one writes. SQLite does not wait by itself for others who say so, too.

    Raises:
        sqlite3.Error: somebody else has kept it for too long, or it is no database.
    """
    deadline = time.monotonic() + OPEN_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def is_busy(error: sqlite3.OperationalError) -> bool:
    """Whether another process is at it, and it is worth trying again."""
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
