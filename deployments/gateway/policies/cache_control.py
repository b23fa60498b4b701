"""What a request wishes of the cache, and what its answer says of it.

``Cache-Control: no-store``: neither answered from it nor kept in it, nor shared with whoever
asks meanwhile. ``max-age=N``: answered with what was computed no longer than N seconds ago.
``no-cache``, which is the same to us as ``max-age=0``: computed anew, and kept. All else is about
caches between us and the client.
"""

from __future__ import annotations

import math

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.caching.reuse import Wish
from deployments.gateway.exchange import exchange_of

HEADER = b"x-cache"
MAX_AGE = b"max-age="


class CacheControl:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)
        exchange.wish = wish_of(scope)

        async def send_with_outcome(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                outcome = exchange.outcome
                if outcome is not None:
                    header = (HEADER, outcome.value.encode("ascii"))
                    message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        await self.app(scope, receive, send_with_outcome)


def wish_of(scope: Scope) -> Wish:
    said = b",".join(value for name, value in scope["headers"] if name == b"cache-control")
    words = {word.strip() for word in said.lower().split(b",")}
    if b"no-store" in words:
        return Wish(max_age_s=0, write=False)
    if b"no-cache" in words:
        return Wish(max_age_s=0)
    # A cache may not guess; what is no number of seconds is taken for none (RFC 9111, 5.2.1.1).
    ages = [word.removeprefix(MAX_AGE) for word in words if word.startswith(MAX_AGE)]
    # Of digits there may be more than Python makes an int of.
    seconds = (float(age) if age.isdigit() else 0.0 for age in ages)
    return Wish(max_age_s=min(seconds, default=math.inf))
