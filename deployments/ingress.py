"""What stands between a gateway replica's HTTP server and Ray Serve.

Serve watches for clients that leave, with two tasks and a queue for each request, and so does the
gateway, which knows what to do then (``gateway/policies/disconnect.py``). Once is enough: a header
that Serve knows switches its own watching off.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

HOOK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""The variable by which Serve finds ``middlewares``, in the replicas where it is set."""
UNWATCHED = b"x-request-disconnect-disabled"


def middlewares() -> list[Middleware]:
    return [Middleware(WatchedByUs)]


class WatchedByUs:
    """Tells Serve, of HTTP, not to watch. What a client says of it does not count."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = [header for header in scope["headers"] if header[0] != UNWATCHED]
            if scope["type"] == "http":
                headers.append((UNWATCHED, b"?1"))
            scope["headers"] = headers
        await self.app(scope, receive, send)
