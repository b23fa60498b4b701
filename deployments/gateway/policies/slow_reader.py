"""A client that does not read its answer is treated as one that has gone.

Until then it costs nothing but patience: an engine does not wait for clients
(``engines/mailbox.py``), and a stream's deltas are merged while one is written to
(``generation.py``). But a stream goes on to use its slot, its quota and a connection for
somebody who may never look.

Not an error that is told: whoever does not read would not read that, either.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway.exchange import exchange_of
from deployments.gateway.heartbeat import Heartbeat
from deployments.gateway.policies.disconnect import ClientGone
from deployments.observability.logs import about

logger = logging.getLogger(__name__)


class SlowReader:
    """Inside :class:`Disconnect`, which ends the request. ``limit_s``: for one piece of an answer
    to be taken off our hands; buffers on the way take the first ones at once.
    """

    def __init__(self, app: ASGIApp, limit_s: float) -> None:
        self.app = app
        self.limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)
        sender: asyncio.Task[Any] | None = None
        late = False

        def look() -> None:
            nonlocal late
            if sender is not None and not late:
                late = True
                sender.cancel()

        async def send_in_time(message: Message) -> None:
            nonlocal sender
            patience.touch()
            sender = asyncio.current_task()
            try:
                await send(message)
            except asyncio.CancelledError:
                if not late or (sender is not None and sender.uncancel() > 0):
                    raise
                exchange.client_gone = True
                logger.warning(
                    "the client of request %s took nothing of its answer for %g s: hung up",
                    exchange.id,
                    self.limit_s,
                    extra=about(exchange),
                )
                raise ClientGone from None
            finally:
                sender = None

        # One timer a request, not one a piece: streams have many.
        with Heartbeat(self.limit_s, look) as patience:
            await self.app(scope, receive, send_in_time)
