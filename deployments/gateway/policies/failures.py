"""Every exception ends here: as an answer, and as a log line if nobody foresaw it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.errors import as_platform_error, error_response
from deployments.gateway.exchange import exchange_of

PATIENCE_S = 5.0
"""How long a client that has stopped reading may keep us from hanging up."""


class Failures:
    """Three cases: no answer yet, a stream that can say it, an answer that can only be cut off."""

    def __init__(self, app: ASGIApp, now: Callable[[], float]) -> None:
        self.app = app
        self.now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)
        try:
            await self.app(scope, receive, send)
            return
        except Exception as error:
            failure = exchange.error = as_platform_error(error, exchange)
        # What is raised from here on ends in Serve's log, which does not mask what an error says:
        # the one that nobody foresaw must not come along.
        async with asyncio.timeout(PATIENCE_S):
            if exchange.status is None:
                response = error_response(failure, scope["path"], exchange.id, self.now())
                await response(scope, receive, send)
            elif exchange.failure_frame is not None and not exchange.answered:
                frame = exchange.failure_frame(failure)
                await send({"type": "http.response.body", "body": frame})
            else:
                raise failure from None
