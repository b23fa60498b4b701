"""What the engine did for requests whose clients did not hear it.

A client that leaves takes its stream along, and with it the last delta, which would have said
what was used: it was never made, or it was on the way, or one choice was refused before it was
read. Whoever has to bill it asks here, by the receipt that the request came with. An account is
closed in the step that lets the request go, so nothing is missing from it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Future

from models.contracts import NO_USAGE, Usage

MOST_KEPT = 4096
"""Of requests that are over. Who asks does so at once."""
CLOSING_S = 1.0
"""How long a step may take until it lets a request go."""


class Accounts:
    """Opened and asked for in one event loop; closed by any thread, with ``set_result``."""

    def __init__(self) -> None:
        self._open: dict[str, Future[Usage]] = {}
        self._left: OrderedDict[str, Future[Usage]] = OrderedDict()

    def open(self, receipt: str | None) -> Future[Usage] | None:
        """``None``: nobody will ask."""
        if receipt is None:
            return None
        self._left.pop(receipt, None)
        account = self._open[receipt] = Future()
        return account

    def leave(self, receipt: str | None) -> None:
        """The request is over for whoever has asked here."""
        if receipt is None or (account := self._open.pop(receipt, None)) is None:
            return
        self._left[receipt] = account
        if len(self._left) > MOST_KEPT:
            self._left.popitem(last=False)

    async def spent(self, receipt: str) -> Usage | None:
        """``None``: there is no such request, or it is not let go."""
        account = self._left.get(receipt) or self._open.get(receipt)
        if account is None:
            return None
        try:
            async with asyncio.timeout(CLOSING_S):
                usage = await asyncio.shield(asyncio.wrap_future(account))
        except TimeoutError:
            return None
        self._left.pop(receipt, None)
        return usage

    def __len__(self) -> int:
        return len(self._open) + len(self._left)


def close(account: Future[Usage] | None, usage: Usage = NO_USAGE) -> None:
    """Doing so twice does no harm: the first word holds."""
    if account is not None and not account.done():
        account.set_result(usage)
