"""How a limit counts: three strategies over windows, and how many may run at once. Pure.

A *cell* is what one limit remembers of one owner, as a flat list of integers, so that every
store keeps it alike and Lua (``quota.lua``) reckons exactly as Python does::

    fixed_window     [window, used]                  used since the window began
    sliding_window   [slice, used, slice, used …]    the last ``SLICES`` + 1 slices
    token_bucket     [tick, level]                   level times ticks of a window, at that tick
    concurrent       []                              leases are counted, not cells

What is reserved counts as used until it is settled, in the window in which it was reserved.
Time never goes back in a cell, whatever a clock does.

Every request makes some dozens of these values: tuples, which cost a third of frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple, TypeAlias

Cell: TypeAlias = list[int]

SLICES = 10
"""Of a sliding window. One more is counted, so that no window of any beginning holds more than
the limit; in return a use is remembered up to a tenth longer than it must be."""
DAY_MS = 86_400_000
TICKS = 60_000
"""Of a token bucket's window, at most: its level is a whole number that a double holds exactly."""


class Strategy(StrEnum):
    FIXED_WINDOW = "fixed_window"
    """All of it is there again when a window begins; two windows may be used up back to back."""
    SLIDING_WINDOW = "sliding_window"
    """Never more than the limit in any window, wherever it begins."""
    TOKEN_BUCKET = "token_bucket"
    """Flows back evenly; a full bucket is a burst."""
    CONCURRENT = "concurrent"
    """So many at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    name: str
    strategy: Strategy
    amount: int
    """Most that may be used of it in a window."""
    window_ms: int = 0
    """0: a calendar month in UTC, of a fixed window; means nothing where things are concurrent."""
    key: str = field(init=False, repr=False, compare=False)
    """Of its cell: another strategy or window begins anew, another amount does not."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.name}:{self.strategy}:{self.window_ms}")
        if self.amount < 0:
            raise ValueError(f"{self.name}: amount is {self.amount}, expected 0 or more")
        months = self.strategy in (Strategy.FIXED_WINDOW, Strategy.CONCURRENT)
        if self.window_ms < (0 if months else SLICES):
            raise ValueError(f"{self.name}: window_ms is {self.window_ms}, expected a length")


class Demand(NamedTuple):
    limit: Limit
    amount: int
    """0: only ask."""


def asked(limits: Iterable[Limit]) -> list[Demand]:
    """To ask where they stand, and take nothing."""
    return [Demand(limit, 0) for limit in limits]


class Level(NamedTuple):
    """Where a limit stands."""

    name: str
    amount: int
    remaining: int
    reset_ms: int
    """Until all of it is there again, if nothing more is used."""
    retry_ms: int | None = 0
    """Until what was asked for will fit, if it does not now; ``None``: never."""

    @property
    def fits(self) -> bool:
        return self.retry_ms == 0


class Hold(NamedTuple):
    """What a lease holds of one limit."""

    limit: Limit
    place: int
    """The window or slice in which it counts."""
    amount: int


class Decision(NamedTuple):
    allowed: bool
    levels: tuple[Level, ...]
    """One a demand, in order; after the reservation if there is one."""
    cells: Mapping[str, Cell]
    """Those that changed."""
    holds: tuple[Hold, ...]


def decide(
    cells: Mapping[str, Cell], running: int, demands: Sequence[Demand], now_ms: int
) -> Decision:
    """Reserve all of ``demands`` or nothing.

    Args:
        cells: of the owner, by ``Limit.key``.
        running: leases of the owner that are neither settled nor expired.
        now_ms: Unix milliseconds.
    """
    changed: dict[str, Cell] = {}
    holds: list[Hold] = []
    for limit, amount in demands:
        if amount:
            place, cell = _charged(limit, cells.get(limit.key, []), amount, now_ms)
            if cell:
                changed[limit.key] = cell
            holds.append(Hold(limit, place, amount))
    after = [
        _level(
            limit,
            changed.get(limit.key, cells.get(limit.key, [])),
            0,
            running + bool(holds),
            now_ms,
        )
        for limit, _ in demands
    ]
    # Nearly all fits, so it is charged first and looked at then.
    if all(map(_fitted, demands, after)):
        levels = tuple([_shown(level) for level in after])
        return Decision(allowed=True, levels=levels, cells=changed, holds=tuple(holds))
    before = [
        _shown(_level(limit, cells.get(limit.key, []), amount, running, now_ms))
        for limit, amount in demands
    ]
    return Decision(allowed=False, levels=tuple(before), cells={}, holds=())


def settle(
    cells: Mapping[str, Cell], holds: Sequence[Hold], used: Mapping[str, int], now_ms: int
) -> dict[str, Cell]:
    """The cells that change when a lease ends.

    Args:
        used: by the limit's name; what is not named was used as reserved.
    """
    changed: dict[str, Cell] = {}
    for hold in holds:
        back = hold.amount - used.get(hold.limit.name, hold.amount)
        cell = cells.get(hold.limit.key)
        if back and cell:
            changed[hold.limit.key] = _given_back(hold, list(cell), back, now_ms)
    return changed


def spent(cells: Mapping[str, Cell], holds: Iterable[Hold], limit: Limit, now_ms: int) -> Level:
    """Where it would stand if all that is held were given back.

    Args:
        holds: of all running leases.
    """
    cell = list(cells.get(limit.key, []))
    for hold in holds:
        if cell and hold.limit.key == limit.key:
            cell = _given_back(hold, cell, hold.amount, now_ms)
    return _shown(_level(limit, cell, 0, 0, now_ms))


def _level(limit: Limit, cell: Cell, amount: int, running: int, now_ms: int) -> Level:
    """Where it stands for one who asks for ``amount``; below zero where too much is used."""
    retry_ms: int | None
    match limit.strategy:
        case Strategy.CONCURRENT:
            remaining, reset_ms, retry_ms = limit.amount - running, 0, 1000
        case Strategy.FIXED_WINDOW:
            window, end_ms = _window(limit, now_ms)
            used = cell[1] if cell and cell[0] >= window else 0
            remaining = limit.amount - used
            reset_ms = retry_ms = end_ms - now_ms
        case Strategy.SLIDING_WINDOW:
            used, reset_ms, retry_ms = _slid(limit, cell, amount, now_ms)
            remaining = limit.amount - used
        case Strategy.TOKEN_BUCKET:
            tick_ms, ticks = _ticks(limit)
            level = _refilled(limit, cell, now_ms)
            remaining = level // ticks
            reset_ms = retry_ms = 0
            if limit.amount:
                reset_ms = _ceil(limit.amount * ticks - level, limit.amount) * tick_ms
                retry_ms = _ceil(amount * ticks - level, limit.amount) * tick_ms
    if amount <= remaining or not amount:
        retry_ms = 0
    elif amount > limit.amount:
        retry_ms = None
    return Level(limit.name, limit.amount, remaining, reset_ms, retry_ms)


def _fitted(demand: Demand, after: Level) -> bool:
    """Whether there was enough before it was charged; at once, a lease counts as one."""
    limit, amount = demand
    charged = 1 if limit.strategy is Strategy.CONCURRENT else amount
    return not amount or after.remaining + charged >= amount


def _shown(level: Level) -> Level:
    """As others may see it: where a limit was lowered, nothing remains."""
    return level if level.remaining >= 0 else level._replace(remaining=0)


def _charged(limit: Limit, cell: Cell, amount: int, now_ms: int) -> tuple[int, Cell]:
    """The place of a use that fits, and the cell with it."""
    match limit.strategy:
        case Strategy.CONCURRENT:
            return 0, []
        case Strategy.FIXED_WINDOW:
            window, _ = _window(limit, now_ms)
            if cell and cell[0] >= window:
                return cell[0], [cell[0], cell[1] + amount]
            return window, [window, amount]
        case Strategy.SLIDING_WINDOW:
            slice_ = now_ms // (limit.window_ms // SLICES)
            kept = _kept(cell, slice_)
            if kept and kept[-2] >= slice_:
                kept[-1] += amount
            else:
                kept += [slice_, amount]
            return kept[-2], kept
        case Strategy.TOKEN_BUCKET:
            tick_ms, ticks = _ticks(limit)
            tick = max(now_ms // tick_ms, cell[0] if cell else 0)
            return 0, [tick, _refilled(limit, cell, now_ms) - amount * ticks]


def _given_back(hold: Hold, cell: Cell, back: int, now_ms: int) -> Cell:
    """Nothing where the window is over already."""
    match hold.limit.strategy:
        case Strategy.FIXED_WINDOW if cell[0] == hold.place:
            cell[1] -= back
        case Strategy.SLIDING_WINDOW:
            for at in range(0, len(cell), 2):
                if cell[at] == hold.place:
                    cell[at + 1] -= back
        case Strategy.TOKEN_BUCKET:
            tick_ms, ticks = _ticks(hold.limit)
            full = hold.limit.amount * ticks
            level = _refilled(hold.limit, cell, now_ms) + back * ticks
            cell = [max(now_ms // tick_ms, cell[0]), min(full, level)]
        case _:
            pass
    return cell


def _window(limit: Limit, now_ms: int) -> tuple[int, int]:
    """The number of the window, and when it ends in Unix milliseconds."""
    if limit.window_ms:
        window = now_ms // limit.window_ms
        return window, (window + 1) * limit.window_ms
    return _month(now_ms // DAY_MS)


@lru_cache(maxsize=4)
def _month(day: int) -> tuple[int, int]:
    """Of a day since 1970: its month's number, and when that ends in Unix milliseconds."""
    now = datetime.fromtimestamp(day * DAY_MS / 1000, UTC)
    month = now.year * 12 + now.month - 1
    year, following = divmod(month + 1, 12)
    return month, int(datetime(year, following + 1, 1, tzinfo=UTC).timestamp()) * 1000


def _kept(cell: Cell, slice_: int) -> Cell:
    """Without the slices that no longer count."""
    at = 0
    while at < len(cell) and cell[at] < slice_ - SLICES:
        at += 2
    return cell[at:]


def _slid(limit: Limit, cell: Cell, amount: int, now_ms: int) -> tuple[int, int, int]:
    """Used, and the milliseconds until nothing is and until ``amount`` fits."""
    width = limit.window_ms // SLICES
    kept = _kept(cell, now_ms // width)
    used = sum(kept[1::2])
    reset_ms = retry_ms = 0
    left = used
    for at in range(0, len(kept), 2):
        reset_ms = (kept[at] + SLICES + 1) * width - now_ms
        if amount > limit.amount - left:
            left -= kept[at + 1]
            retry_ms = reset_ms
    return used, reset_ms, retry_ms


def _ticks(limit: Limit) -> tuple[int, int]:
    """Milliseconds of a tick, and ticks of a window."""
    tick_ms = max(1, limit.window_ms // TICKS)
    return tick_ms, limit.window_ms // tick_ms


def _refilled(limit: Limit, cell: Cell, now_ms: int) -> int:
    """The level now; a bucket that nobody has used is full."""
    tick_ms, ticks = _ticks(limit)
    full = limit.amount * ticks
    if not cell:
        return full
    return min(full, cell[1] + max(0, now_ms // tick_ms - cell[0]) * limit.amount)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
