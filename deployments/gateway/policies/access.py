"""One event for each finished request, about how it ended rather than how it began."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway.exchange import exchange_of
from deployments.observability.events import Emit


class Access:
    """Notes the status and the last byte as they pass; the policies inside rely on it."""

    def __init__(self, app: ASGIApp, emit: Emit, clock: Callable[[], float]) -> None:
        self.app = app
        self.emit = emit
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)

        async def observe(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            elif not message.get("more_body", False):
                exchange.answered = True
            await send(message)

        try:
            await self.app(scope, receive, observe)
        except asyncio.CancelledError:
            # Ray Serve cancels the task of a client that has gone.
            exchange.client_gone = True
            raise
        finally:
            self.emit(exchange.finished(self.clock()))
