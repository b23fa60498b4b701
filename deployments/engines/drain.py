"""How fast a line is served, measured."""

from __future__ import annotations

import math


class Drain:
    """Picks a second while a line stands: exponentially weighted over ``MEMORY_S``.

    The caller takes tickets in rounds (a batch, the free slots of a step). A round that
    leaves someone waiting took the time until the next round; a round that empties the
    line says nothing about how fast a line is served, and neither does idle time.
    """

    __slots__ = ("_picks", "_round_picks", "_round_start", "_seconds")

    ROUND_S = 0.001
    """Picks within this time of a round's first belong to the round."""
    MEMORY_S = 10.0

    def __init__(self) -> None:
        self._picks = 0.0
        self._seconds = 0.0
        self._round_start: float | None = None
        self._round_picks = 0

    def picked(self, now: float, *, waiting: int) -> None:
        if self._round_start is None:
            self._round_start = now
        elapsed = now - self._round_start
        if elapsed >= self.ROUND_S:
            keep = math.exp(-elapsed / self.MEMORY_S)
            self._picks = self._picks * keep + self._round_picks
            self._seconds = self._seconds * keep + elapsed
            self._round_start, self._round_picks = now, 0
        self._round_picks += 1
        if not waiting:
            self.emptied()

    def emptied(self) -> None:
        """Nobody waits: the open round will not be followed by another."""
        self._round_start, self._round_picks = None, 0

    def rate(self, now: float) -> float | None:
        """Picks a second; None before the first measurement. Falls while a round drags on."""
        if not self._seconds:
            return None
        rate = self._picks / self._seconds
        if self._round_start is None:
            return rate
        elapsed = now - self._round_start
        return min(rate, (self._picks + self._round_picks) / (self._seconds + elapsed))
