"""How long whoever asks waits for the platform's state: every budget, in one place.

A request that cannot be let in is told so within ``ANSWER_S``, whatever has happened to a
server: it refuses connections, it takes them and says nothing, or the network swallows all.

===============  ====  ==================================================================
``ANSWER_S``     1.0   the promise: 503 by then, and ``/readyz`` red
``REQUEST_S``    0.9   all questions of one request together: whose it is, whether its
                       ``Idempotency-Key`` is known, whether its limits allow it
``SERVER_S``     0.8   one question to one server, and one connection to it
``CACHE_S``      0.25  a cache that is no quicker is no help
===============  ====  ==================================================================

What is late is not stopped but left to itself: to stop a statement takes a server that
answers. It is bounded all the same (a silent line is cut by ``LINE``), or a gateway that was
never answered would wait for ever, and not heal.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from state.errors import StateUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_S = 1.0
REQUEST_S = 0.9
SERVER_S = 0.8
CACHE_S = 0.25

LINE: dict[str, int] = {
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 2,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 10_000,
}
"""Options of a connection, by which a host that is gone without a word is noticed in some ten
seconds instead of a quarter of an hour. By name: not every system has all of them."""


@dataclass(slots=True)
class Patience:
    """What one request has left to wait for state, over all that it asks of it."""

    left_s: float = field(default_factory=lambda: REQUEST_S)

    def waiting(self, what: str) -> _Waiting:
        """An ``async with`` that raises StateUnavailable in place of a body that takes longer than
        there is left.
        """
        return _Waiting(self, what)


class _Waiting:
    """Not a generator: each request passes several."""

    __slots__ = ("_began", "_limit", "_patience", "_what")

    def __init__(self, patience: Patience, what: str) -> None:
        self._patience, self._what = patience, what

    async def __aenter__(self) -> None:
        self._began = asyncio.get_running_loop().time()
        self._limit = asyncio.timeout(max(0.0, self._patience.left_s))
        await self._limit.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            raise StateUnavailable(f"{self._what} did not answer in time") from None
        finally:
            self._patience.left_s -= asyncio.get_running_loop().time() - self._began


_late: set[asyncio.Task[Any]] = set()
"""Held here, or nobody would hold them."""


async def promptly(
    work: Coroutine[Any, Any, T],
    *,
    within_s: float,
    what: str,
    late: Callable[[T], Coroutine[Any, Any, object] | None] = lambda _: None,
) -> T:
    """What ``work`` returns, if it does so in time.

    What is late, or no longer waited for, goes on by itself.

    Args:
        late: gets what was returned when nobody waited any more; a coroutine is run.

    Raises:
        StateUnavailable: ``what`` did not answer within ``within_s``.
    """
    task = asyncio.create_task(work)
    try:
        async with asyncio.timeout(within_s):
            return await asyncio.shield(task)
    except (TimeoutError, asyncio.CancelledError) as gone:
        if task.done() and not task.cancelled() and isinstance(task.exception(), TimeoutError):
            raise  # its own
        _late.add(task)
        task.add_done_callback(lambda done: _left_alone(done, late))
        if isinstance(gone, asyncio.CancelledError):
            raise
        raise StateUnavailable(f"{what} did not answer within {within_s:g} s") from None


def _left_alone(
    task: asyncio.Task[T], late: Callable[[T], Coroutine[Any, Any, object] | None]
) -> None:
    _late.discard(task)
    if task.cancelled():
        return
    if (error := task.exception()) is not None:
        logger.debug("nobody waited for this: %s", error)
    elif (more := late(task.result())) is not None:
        following = asyncio.create_task(_quietly(more))
        _late.add(following)
        following.add_done_callback(_late.discard)


async def _quietly(work: Coroutine[Any, Any, object]) -> None:
    try:
        await work
    except Exception as error:
        logger.debug("what came too late could not be put away: %s", error)


def watch_the_line(line: socket.socket) -> None:
    """See ``LINE``; a local socket needs none of it."""
    if line.family not in (socket.AF_INET, socket.AF_INET6):
        return
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in LINE.items():
        if (option := getattr(socket, name, None)) is not None:
            line.setsockopt(socket.IPPROTO_TCP, option, value)
