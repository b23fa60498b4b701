"""Every request has an id: the client's if it is sane, else ours; every answer carries it, and
every line that is logged on the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway.exchange import Exchange
from deployments.observability.logs import on_behalf_of
from models.unique import unique

METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
)
SANE = re.compile(rb"[A-Za-z0-9._:/+=@~-]{1,128}")
HEADER = b"x-request-id"


class RequestId:
    """Opens the exchange, so it stands outermost.

    Args:
        echoed: whether who serves the app sends the id of a request back by itself, as Ray Serve
            does: ours would be a second header.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float], *, echoed: bool = False) -> None:
        self.app = app
        self.clock = clock
        self.echoed = echoed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        method = scope.get("method", "WEBSOCKET")
        known = method in METHODS or scope["type"] == "websocket"
        given = _given(scope)
        exchange = Exchange(
            id=given or unique(),
            method=method if known else "OTHER",  # a metric's label is not whatever a client sends
            arrived=self.clock(),
        )
        scope["exchange"] = exchange
        header = (HEADER, exchange.id.encode("ascii"))

        starts = {"websocket.accept"}
        if not (self.echoed and given):
            starts.add("http.response.start")

        async def send_with_id(message: Message) -> None:
            if message["type"] in starts:
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        entered = on_behalf_of.set(exchange)
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            on_behalf_of.reset(entered)


def _given(scope: Scope) -> str | None:
    """The first that was sent, which a server that echoes sends back, if it is sane."""
    first = next((value for name, value in scope["headers"] if name == HEADER), b"")
    return str(first, "ascii") if SANE.fullmatch(first) else None
