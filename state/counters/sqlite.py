"""Counters in one file, shared by the processes of a machine (``state/sqlite_file.py``).

After a crash of the machine no stream is running that could be over its limit, so that nothing
need be flushed to the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TypeVar

import orjson

from state.counters.contract import Reservation
from state.counters.limits import (
    Cell,
    Demand,
    Hold,
    Level,
    Limit,
    Strategy,
    asked,
    decide,
    settle,
    spent,
)
from state.patience import SERVER_S
from state.sqlite_file import SqliteFile

T = TypeVar("T")

PATIENCE_S = SERVER_S
"""How long a decision may wait for others."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS cells (owner TEXT PRIMARY KEY, cells BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
    owner TEXT, lease TEXT, expires_ms INTEGER NOT NULL, holds BLOB NOT NULL,
    PRIMARY KEY (owner, lease)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS leases_expire ON leases (owner, expires_ms);
"""
_LOOK = """
SELECT (SELECT cells FROM cells WHERE owner = :owner),
       (SELECT count(*) FROM leases WHERE owner = :owner AND expires_ms > :now_ms),
       EXISTS (SELECT 1 FROM leases WHERE owner = :owner AND expires_ms <= :now_ms),
       EXISTS (SELECT 1 FROM leases
               WHERE owner = :owner AND lease = :lease AND expires_ms > :now_ms)
"""


class SqliteCounters:
    """See ``Counters``.

    Args:
        file: made with its folder if it is not there.
        clock: Unix seconds.

    Raises:
        StateMisconfigured: the file cannot be made, or is something else.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file = SqliteFile("counters", file, _SCHEMA)

    async def reserve(
        self, owner: str, lease: str, demands: Sequence[Demand], *, ttl_s: float
    ) -> Reservation:
        def act(now_ms: int) -> Reservation:
            cells, running, known = self._read(owner, now_ms, lease)
            if known:
                limits = [each.limit for each in demands]
                told = decide(cells, running, asked(limits), now_ms)
                return Reservation(allowed=True, levels=told.levels)
            decision = decide(cells, running, demands, now_ms)
            if decision.allowed and decision.holds:
                self._write(owner, cells, decision.cells)
                self._file.execute(
                    "INSERT INTO leases VALUES (?, ?, ?, ?)",
                    (owner, lease, now_ms + round(ttl_s * 1000), _packed(decision.holds)),
                )
            return Reservation(allowed=decision.allowed, levels=decision.levels)

        return await self._alone(act)

    async def settle(self, owner: str, lease: str, used: Mapping[str, int]) -> bool:
        def act(now_ms: int) -> bool:
            found = self._file.execute(
                "DELETE FROM leases WHERE owner = ? AND lease = ? AND expires_ms > ?"
                " RETURNING holds, (SELECT cells FROM cells WHERE cells.owner = leases.owner)",
                (owner, lease, now_ms),
            ).fetchone()
            if found is None:
                return False
            holds, kept = found
            cells = _cells(kept)
            self._write(owner, cells, settle(cells, _unpacked(holds), used, now_ms))
            return True

        return await self._alone(act, patient=True)

    async def renew(self, owner: str, lease: str, *, ttl_s: float) -> bool:
        def act(now_ms: int) -> bool:
            renewed = self._file.execute(
                "UPDATE leases SET expires_ms = ? WHERE owner = ? AND lease = ? AND expires_ms > ?",
                (now_ms + round(ttl_s * 1000), owner, lease, now_ms),
            )
            return renewed.rowcount == 1

        return await self._alone(act)

    async def levels(self, owner: str, limits: Sequence[Limit]) -> tuple[Level, ...]:
        def act(now_ms: int) -> tuple[Level, ...]:
            cells, running, _ = self._read(owner, now_ms)
            return decide(cells, running, asked(limits), now_ms).levels

        return await self._alone(act)

    async def spent(self, owner: str, limit: Limit) -> Level:
        def act(now_ms: int) -> Level:
            cells, _, _ = self._read(owner, now_ms)
            running = self._file.execute("SELECT holds FROM leases WHERE owner = ?", (owner,))
            held = chain.from_iterable(_unpacked(holds) for (holds,) in running)
            return spent(cells, held, limit, now_ms)

        return await self._alone(act)

    async def drop(self, owner: str) -> bool:
        def act(now_ms: int) -> bool:
            found = [
                self._file.execute(f"DELETE FROM {table} WHERE owner = ?", (owner,)).rowcount
                for table in ("cells", "leases")
            ]
            return any(found)

        return await self._alone(act)

    async def ping(self) -> None:
        await self._alone(lambda now_ms: None)

    async def close(self) -> None:
        self._file.close()

    def _read(
        self, owner: str, now_ms: int, lease: str | None = None
    ) -> tuple[dict[str, Cell], int, bool]:
        """The owner's cells and how many leases run, once those that are over are gone; and whether
        ``lease`` is one of them.
        """
        about = {"owner": owner, "lease": lease, "now_ms": now_ms}
        kept, running, over, known = self._file.execute(_LOOK, about).fetchone()
        if over:
            self._file.execute(
                "DELETE FROM leases WHERE owner = :owner AND expires_ms <= :now_ms", about
            )
        return _cells(kept), running, known

    def _write(self, owner: str, cells: Mapping[str, Cell], changed: Mapping[str, Cell]) -> None:
        if changed:
            self._file.execute(
                "INSERT INTO cells VALUES (?, ?) ON CONFLICT DO UPDATE SET cells = excluded.cells",
                (owner, orjson.dumps({**cells, **changed})),
            )

    async def _alone(self, act: Callable[[int], T], *, patient: bool = False) -> T:
        """``act(now_ms)`` in a transaction, while no other process is in one."""
        return await self._file.write(
            lambda: act(round(self._clock() * 1000)), within_s=PATIENCE_S, patient=patient
        )


def _cells(kept: bytes | None) -> dict[str, Cell]:
    return orjson.loads(kept) if kept is not None else {}


def _packed(holds: Sequence[Hold]) -> bytes:
    return orjson.dumps(
        [
            (limit.name, limit.strategy, limit.amount, limit.window_ms, place, amount)
            for limit, place, amount in holds
        ]
    )


def _unpacked(holds: bytes) -> list[Hold]:
    return [Hold(_limit(*limit), place, held) for *limit, place, held in orjson.loads(holds)]


@lru_cache(maxsize=1024)
def _limit(name: str, strategy: str, amount: int, window_ms: int) -> Limit:
    """There are a few of them, and a request has several."""
    return Limit(name=name, strategy=Strategy(strategy), amount=amount, window_ms=window_ms)
