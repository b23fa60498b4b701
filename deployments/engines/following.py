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
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from deployments.config import BatchLimits
from models.contracts import Json, Priority

logger = logging.getLogger(__name__)

RETRY_S = 60.0
"""Before a version that could not be loaded is tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What a source names at a moment."""

    content_sha256: str | None
    """``None``: of a source that has no versions."""
    name: str | None = None
    """NAME@VERSION in the registry."""


class Batching(Protocol):
    """The two ways to batch a fixed-cost model, seen from a replica."""

    def configure(self, limits: BatchLimits) -> None: ...

    async def submit(
        self, input: Json, *, tenant: str, priority: Priority, timeout_s: float | None = None
    ) -> Json: ...

    async def close(self) -> None:
        """Nobody waits any more: let the model go."""
        ...


@dataclass(eq=False, slots=True)
class Working:
    """One version at work."""

    version: Version
    batching: Batching
    users: int = 0


@dataclass(eq=False, kw_only=True)
class Following:
    """The version at work, and how it changes. All methods belong to one event loop.

    Args:
        first: the version to begin with, loaded.
        resolve: what the source names now; may raise anything.
        load: brings a version to work; runs in a thread and may take seconds.
    """

    first: Working
    limits: BatchLimits
    resolve: Callable[[], Awaitable[Version]]
    load: Callable[[Version], Batching]
    clock: Callable[[], float] = time.monotonic
    _refused: Version | None = field(default=None, init=False)
    _retry_at: float = field(default=0.0, init=False)
    _complaint: str = field(default="", init=False)
    _closing: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._working = self.first
        self._working.batching.configure(self.limits)

    @property
    def version(self) -> Version:
        """What a request that comes now will be answered by."""
        return self._working.version

    @contextmanager
    def pinned(self) -> Iterator[Working]:
        """The version at work, which stays at work until the block ends."""
        working = self._working
        working.users += 1
        try:
            yield working
        finally:
            working.users -= 1
            self._let_go(working)

    def configure(self, limits: BatchLimits) -> None:
        """Hold for this version and for those to come."""
        self.limits = limits
        self._working.batching.configure(limits)

    async def follow(self, every_s: float) -> None:
        """Never returns; cancel it."""
        while True:
            await asyncio.sleep(every_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Look once, and exchange what has changed. Never raises."""
        try:
            wanted = await self.resolve()
            at_work = self._working.version
            if wanted.content_sha256 == at_work.content_sha256:
                self._working.version = wanted  # the same under another name
                self._complaint = ""
                return
            if wanted == self._refused and self.clock() < self._retry_at:
                return
            try:
                batching = await asyncio.to_thread(self.load, wanted)
            except Exception:
                self._refused, self._retry_at = wanted, self.clock() + RETRY_S
                raise
        except Exception as error:
            self._complain(error)
            return
        batching.configure(self.limits)
        old, self._working = self._working, Working(wanted, batching)
        logger.info("%s takes over from %s", wanted.name, at_work.name)
        self._refused, self._complaint = None, ""
        self._let_go(old)

    def _let_go(self, working: Working) -> None:
        if working is not self._working and not working.users:
            closing = asyncio.get_running_loop().create_task(working.batching.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _complain(self, error: Exception) -> None:
        """Once for each reason: a database that is down is asked every few seconds."""
        if (complaint := f"{type(error).__name__}: {error}") != self._complaint:
            self._complaint = complaint
            name = self._working.version.name
            logger.error("%s stays at work; its source failed: %s", name, complaint)
