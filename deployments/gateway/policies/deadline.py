"""The hard limit from arrival to the last byte of the answer (spec B3)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
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
    """``limit_s``: seconds for a path."""

    def __init__(self, app: ASGIApp, limit_s: Callable[[str], float]) -> None:
        self.app = app
        self.limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit_s = self.limit_s(scope["path"])
        exchange = exchange_of(scope)
        exchange.deadline = exchange.arrived + limit_s
        async with time_limit(limit_s):
            await self.app(scope, receive, send)
