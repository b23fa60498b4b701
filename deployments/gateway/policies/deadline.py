"""The hard limit from arrival to the last byte of the answer (spec B3)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.gateway.exchange import exchange_of
from models.errors import Timeout


@asynccontextmanager
async def time_limit(limit_s: float) -> AsyncIterator[None]:
    """Raises :class:`Timeout` in place of a body that takes longer, and cancels that body."""
    try:
        async with asyncio.timeout(limit_s) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise Timeout(
            f"The answer was not complete after {limit_s:g} s; ask for fewer tokens,"
            " or stream and keep what has come."
        ) from None


class Deadline:
    """``routes`` have limits of their own, in seconds; the others have ``default_s``."""

    def __init__(self, app: ASGIApp, default_s: float, routes: Mapping[str, float]) -> None:
        self.app = app
        self.default_s = default_s
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit_s = self.routes.get(scope["path"], self.default_s)
        exchange = exchange_of(scope)
        exchange.deadline = exchange.arrived + limit_s
        async with time_limit(limit_s):
            await self.app(scope, receive, send)
