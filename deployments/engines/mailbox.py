"""From the engine's thread to one asyncio consumer, bounded by merging.

A consumer that is slow does not make the engine wait, nor a list grow: deltas of one
choice that were not taken yet become one delta. What a mailbox holds is therefore at most
one delta a choice, and no larger than the answer itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from models.contracts import Delta
from models.errors import PlatformError


class Mailbox:
    """Output of one request. ``deliver`` is called from any thread, ``take`` from ``loop``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: dict[int, Delta] = {}
        self._error: PlatformError | None = None
        self._arrived = asyncio.Event()
        self.finished = False
        """The last delta or an error has been delivered."""

    @property
    def lost(self) -> bool:
        """Nobody can ever take: the consumer's event loop is closed."""
        return self._loop.is_closed()

    @staticmethod
    def deliver(posts: Iterable[tuple[Mailbox, Delta | PlatformError]]) -> bool:
        """Hand over a batch with one wake-up a loop. False if a mailbox among them is lost."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Delta | PlatformError]]] = {}
        for mailbox, post in posts:
            by_loop.setdefault(mailbox._loop, []).append((mailbox, post))
        reached = True
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # closed, perhaps this very moment
                reached = False
        return reached

    async def take(self) -> list[Delta]:
        """Wait for output: one delta for each choice that has any, the newest addition last.

        Raises:
            PlatformError: the request failed; what came before it has been taken.
        """
        await self._arrived.wait()
        self._arrived.clear()
        deltas = list(self._pending.values())
        self._pending.clear()
        if not deltas and self._error is not None:
            raise self._error
        if self._error is not None:
            self._arrived.set()
        return deltas

    def put(self, post: Delta | PlatformError) -> None:
        """In the loop's thread."""
        if isinstance(post, PlatformError):
            self._error = post
            self.finished = True
        else:
            waiting = self._pending.pop(post.index, None)
            self._pending[post.index] = post if waiting is None else merge(waiting, post)
            self.finished = self.finished or post.usage is not None
        self._arrived.set()


def _put_all(batch: list[tuple[Mailbox, Delta | PlatformError]]) -> None:
    for mailbox, post in batch:
        mailbox.put(post)


def merge(first: Delta, second: Delta) -> Delta:
    """Two neighbouring deltas of one choice as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or ()) + (second.logprobs or ())
    return Delta(
        index=first.index,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt=first.prompt if second.prompt is None else second.prompt,
        finish_reason=second.finish_reason,
        usage=second.usage,
        timings=second.timings,
        place=second.place,  # what was not heard before the output came is old news
    )
