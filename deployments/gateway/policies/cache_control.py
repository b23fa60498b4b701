"""What a request wishes of the cache, and what its answer says of it.

``Cache-Control: no-store``: neither answered from it nor kept in it, nor shared with whoever
asks meanwhile. ``no-cache``, and ``max-age=0``, which is the same to us: computed anew, and
kept. All else is about caches between us and the client.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.caching.reuse import Wish
from deployments.gateway.exchange import exchange_of

HEADER = b"x-cache"


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
    store = b"no-store" not in words
    return Wish(read=store and not words & {b"no-cache", b"max-age=0"}, write=store)
