"""What a reference of the registry names, kept at hand and kept up to date.

Requests read a pointer and never wait for the database; a poll moves it. It moves only after
the new version is ready, and stays where it is while the registry is out of reach.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from models.errors import NotFound

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 60.0
"""Before a version that could not be made ready is tried again."""
KEEP_S = 600.0
"""How long a reference that nobody asks for is kept up to date."""
UNKNOWN = 1000
"""So many names that do not exist are remembered."""

clocked = time.monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What a source names at a moment."""

    content_sha256: str | None
    """``None``: of a source that has no versions."""
    name: str | None = None
    """NAME@VERSION in the registry."""
    uri: str = ""
    """Where its artifact lies."""


LookUp: TypeAlias = Callable[[], Awaitable[Version]]


class Pointer(Generic[T]):
    """One reference: the version it names, and what was made of that.

    Args:
        look_up: what the reference names now; may raise anything.
        make: gets a version ready; may take seconds and may raise anything.
    """

    def __init__(
        self,
        version: Version,
        value: T,
        look_up: LookUp,
        make: Callable[[Version], Awaitable[T]],
        clock: Callable[[], float] = clocked,
    ) -> None:
        self.version = version
        self.value = value
        self._look_up = look_up
        self._make = make
        self._clock = clock
        self._refused: str | None = None
        self._retry_at = 0.0
        self._complaint = ""

    async def refresh(self) -> bool:
        """Look, and move if the reference did. False: it names nothing any more. Never raises."""
        try:
            wanted = await self._look_up()
        except NotFound as error:
            self._complain(error)
            return False
        except Exception as error:
            self._complain(error)
            return True
        if wanted.content_sha256 == self.version.content_sha256:
            self.version = wanted  # the same under another name
            self._refused, self._complaint = None, ""
            return True
        if wanted.content_sha256 == self._refused and self._clock() < self._retry_at:
            return True
        try:
            value = await self._make(wanted)
        except Exception as error:
            self._refused, self._retry_at = wanted.content_sha256, self._clock() + RETRY_S
            self._complain(error)
            return True
        logger.info("%s takes over from %s", wanted.name, self.version.name)
        self.version, self.value = wanted, value
        self._refused, self._complaint = None, ""
        return True

    def _complain(self, error: Exception) -> None:
        """Once for each reason: a database that is down is asked every few seconds."""
        if (complaint := f"{type(error).__name__}: {error}") != self._complaint:
            self._complaint = complaint
            logger.error("%s stays as it was; its source: %s", self.version.name, complaint)


class Pointers:
    """The references that requests have used. All methods belong to one event loop.

    Args:
        look_up: what a reference names now; raises ``NotFound`` if nothing, or anything else.
        ready: called with a version before a pointer moves to it; not at its first use.
        refresh_s: how long it may go unnoticed that a name has come into being.
    """

    def __init__(
        self,
        look_up: Callable[[str], Awaitable[Version]],
        ready: Callable[[Version], Awaitable[None]],
        *,
        refresh_s: float,
        clock: Callable[[], float] = clocked,
    ) -> None:
        self._look_up = look_up
        self._ready = ready
        self._refresh_s = refresh_s
        self._clock = clock
        self._known: dict[str, Pointer[None]] = {}
        self._used: dict[str, float] = {}
        self._unknown: dict[str, tuple[NotFound, float]] = {}
        self._looking: dict[str, asyncio.Task[Version]] = {}

    async def get(self, reference: str) -> Version:
        """What ``reference`` names, at once if anyone has asked before.

        Raises:
            NotFound: nothing.
            Exception: whatever ``look_up`` raised for a name that is new here.
        """
        if (pointer := self._known.get(reference)) is not None:
            self._used[reference] = self._clock()
            return pointer.version
        error, until = self._unknown.get(reference, (None, 0.0))
        if error is not None and self._clock() < until:
            raise NotFound(error.message, param=error.param, details=error.details)
        looking = self._looking.get(reference)
        if looking is None:  # one look for all who ask meanwhile
            looking = asyncio.create_task(self._find(reference))
            self._looking[reference] = looking
            looking.add_done_callback(partial(self._looked, reference))
        return await asyncio.shield(looking)

    def versions(self) -> list[Version]:
        """All that references name, each once."""
        return list({pointer.version: None for pointer in self._known.values()})

    async def refresh(self) -> None:
        """Look once at all that were used of late. Never raises."""
        for reference, pointer in list(self._known.items()):
            unused_s = self._clock() - self._used[reference]
            if unused_s > KEEP_S or not await pointer.refresh():
                del self._known[reference], self._used[reference]

    def _looked(self, reference: str, looking: asyncio.Task[Version]) -> None:
        del self._looking[reference]
        if not looking.cancelled():
            looking.exception()  # seen, should all who asked have gone

    async def _find(self, reference: str) -> Version:
        try:
            version = await self._look_up(reference)
        except NotFound as error:
            self._unknown.pop(reference, None)
            self._unknown[reference] = error, self._clock() + self._refresh_s
            if len(self._unknown) > UNKNOWN:
                del self._unknown[next(iter(self._unknown))]
            raise
        self._unknown.pop(reference, None)

        look_up = partial(self._look_up, reference)
        self._known[reference] = Pointer(version, None, look_up, self._ready, self._clock)
        self._used[reference] = self._clock()
        return version
