"""A fixed-cost model that follows its source: a moved alias is served without a failed request.

    every refresh_s:  what does the source name now? ─ the same ─► nothing
                                    │ another
                                    ▼
                      load it beside the one at work ─► the next request goes to it
                                                        the old one ends with its last request

A request keeps the version it began with, so that all of its outputs come from one. What
cannot be loaded is logged and tried again later; what works goes on working.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from deployments.config import BatchLimits
from deployments.engines.pointer import LookUp, Pointer, Version, clocked
from models.contracts import Json, Standing


class Batching(Protocol):
    """The two ways to batch a fixed-cost model, seen from a replica."""

    def configure(self, limits: BatchLimits) -> None: ...

    async def submit(self, input: Json, standing: Standing) -> Json: ...

    async def close(self) -> None:
        """Nobody waits any more: let the model go."""
        ...


@dataclass(eq=False, slots=True)
class Working:
    """One version at work."""

    batching: Batching
    users: int = 0


class Following:
    """The version at work, and how it changes. All methods belong to one event loop.

    Args:
        version: what the source names at first, and ``batching``, which brings it to work.
        look_up: what the source names now; may raise anything.
        load: brings a version to work; runs in a thread and may take seconds.
    """

    def __init__(
        self,
        version: Version,
        batching: Batching,
        limits: BatchLimits,
        *,
        look_up: LookUp,
        load: Callable[[Version], Batching],
        clock: Callable[[], float] = clocked,
    ) -> None:
        self.limits = limits
        self._load = load
        self._pointer = Pointer(version, Working(batching), look_up, self._bring, clock)
        self._closing: set[asyncio.Task[None]] = set()
        batching.configure(limits)

    @property
    def version(self) -> Version:
        """What a request that comes now will be answered by."""
        return self._pointer.version

    @contextmanager
    def pinned(self) -> Iterator[tuple[Version, Batching]]:
        """The version at work, which stays at work until the block ends."""
        working = self._pointer.value
        working.users += 1
        try:
            yield self._pointer.version, working.batching
        finally:
            working.users -= 1
            self._let_go(working)

    def configure(self, limits: BatchLimits) -> None:
        """Hold for this version and for those to come."""
        self.limits = limits
        self._pointer.value.batching.configure(limits)

    async def follow(self, every_s: float) -> None:
        """Never returns; cancel it."""
        while True:
            await asyncio.sleep(every_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Look once, and exchange what has changed. Never raises."""
        old = self._pointer.value
        await self._pointer.refresh()
        self._let_go(old)

    async def _bring(self, version: Version) -> Working:
        batching = await asyncio.to_thread(self._load, version)
        batching.configure(self.limits)
        return Working(batching)

    def _let_go(self, working: Working) -> None:
        if working is not self._pointer.value and not working.users:
            closing = asyncio.get_running_loop().create_task(working.batching.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
