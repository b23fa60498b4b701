"""Notice silence: one timer, however often there is something to hear."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self


class Heartbeat:
    """While entered, calls ``beat`` whenever ``interval_s`` have passed without a ``touch``."""

    def __init__(self, interval_s: float, beat: Callable[[], None]) -> None:
        self._interval_s = interval_s
        self._beat = beat
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        self.touch()
        self._timer = self._loop.call_later(self._interval_s, self._tick)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def touch(self) -> None:
        self._last = self._loop.time()

    def _tick(self) -> None:
        due = self._last + self._interval_s
        if due <= self._loop.time():
            self._beat()
            self.touch()
            due = self._last + self._interval_s
        self._timer = self._loop.call_at(due, self._tick)
