"""A SQLite file that several processes open at once.

What an event loop asks to be written in one turn is one transaction: beginning and committing
take several times as long as the statements between, and a gateway under load has several
requests a turn. Each piece of work stands for itself all the same: where one fails, the others
are done without it.

All of it takes some tens of microseconds, so it runs where it is asked for; a thread would cost
more than it saves. Whoever finds the file locked by another process gives the event loop back
and tries again. Nothing is flushed to the disk: a crash of a process loses nothing.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from state.errors import StateMisconfigured, StateUnavailable

T = TypeVar("T")

OPEN_S = 5.0
"""How long to wait for another process that makes the file."""
RETRY_S = 0.0005
GATHER_S = 0.004
"""How long work waits that nobody waits for."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """Work that waits for its turn."""

    act: Callable[[], Any]
    answer: asyncio.Future[Any]
    until: float


class SqliteFile:
    """Belongs to one event loop at a time.

    Args:
        what: the file is, for messages.
        file: made with its folder if it is not there.
        schema: statements that make what is not there yet.

    Raises:
        StateMisconfigured: the file cannot be made, or is something else.
    """

    def __init__(self, what: str, file: Path, schema: str) -> None:
        self._called = f"{what} in {file}"
        self._asked: list[_Asked] = []
        self._timer: asyncio.TimerHandle | None = None
        """Of a turn that only patient work waits for."""
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            self._connection = sqlite3.connect(file, isolation_level=None, timeout=OPEN_S)
            share(self._connection)
            self._connection.execute("PRAGMA synchronous=OFF")
            self._connection.executescript(schema)
            self._connection.execute("PRAGMA busy_timeout=0")
        except (OSError, sqlite3.Error) as error:
            raise StateMisconfigured(f"{self._called}: {error}") from None
        self.execute = self._connection.execute
        self.executemany = self._connection.executemany

    async def write(self, act: Callable[[], T], *, within_s: float, patient: bool = False) -> T:
        """``act()`` in a transaction, while no other process is in one; undone if it raises.

        Args:
            patient: nobody waits for it, so it is gathered with what comes within ``GATHER_S``.
                What is written later in this process finds it done.

        Raises:
            StateUnavailable: others are in the way for longer than that, or the file is broken.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        first = not self._asked or self._loop is not loop
        if first:
            self._loop, self._timer = loop, None
        self._asked.append(_Asked(act, answer, time.monotonic() + within_s))
        if first and patient:
            self._timer = loop.call_later(GATHER_S, self._turn)
        elif first or (self._timer is not None and not patient):
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            loop.call_soon(self._turn)
        return await answer

    async def read(self, act: Callable[[], T], *, within_s: float) -> T:
        """``act()``, outside any transaction. Raises as ``write``."""
        until = time.monotonic() + within_s
        while True:
            try:
                return act()
            except sqlite3.Error as error:
                if not is_busy(error) or time.monotonic() > until:
                    raise StateUnavailable(f"{self._called}: {error}") from None
            await asyncio.sleep(RETRY_S)

    def close(self) -> None:
        self._connection.close()

    def _turn(self) -> None:
        self._timer = None
        asked, self._asked = self._asked, []
        staying = [each for each in asked if not each.answer.done()]  # who has left asks nothing
        if staying:
            self._do(staying)

    def _do(self, asked: Sequence[_Asked]) -> None:
        try:
            answers = self._together([each.act for each in asked])
        except Exception as error:  # whatever it was, whoever asked hears of it
            if isinstance(error, sqlite3.Error) and is_busy(error):
                self._later(asked, error)
            elif len(asked) > 1:
                for each in asked:
                    self._do([each])
            else:
                _refuse(asked[0], self._told(error) if isinstance(error, sqlite3.Error) else error)
            return
        for each, answer in zip(asked, answers, strict=True):
            each.answer.set_result(answer)

    def _together(self, acts: Sequence[Callable[[], Any]]) -> list[Any]:
        self.execute("BEGIN IMMEDIATE")
        try:
            answers = [act() for act in acts]
            self.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self.execute("ROLLBACK")
            raise
        return answers

    def _later(self, asked: Sequence[_Asked], error: sqlite3.Error) -> None:
        """Another process is at it."""
        now = time.monotonic()
        for each in asked:
            if each.until < now:
                _refuse(each, self._told(error))
            else:
                self._asked.append(each)
        if self._asked and self._loop is not None:
            self._loop.call_later(RETRY_S, self._turn)

    def _told(self, error: sqlite3.Error) -> StateUnavailable:
        return StateUnavailable(f"{self._called}: {error}")


def _refuse(asked: _Asked, error: Exception) -> None:
    if not asked.answer.done():
        asked.answer.set_exception(error)


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


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another process is at it, and it is worth trying again."""
    code = getattr(error, "sqlite_errorcode", 0)  # Python's own complaints have none
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
