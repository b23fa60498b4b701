"""A WebSocket on an ASGI app, in the event loop of the test."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Self

import orjson
from starlette.types import ASGIApp, Message


class Dial:
    """``opened`` says whether the app took the call."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        query: bytes = b"",
        subprotocols: tuple[str, ...] = (),
    ) -> None:
        scope = {
            "type": "websocket",
            "path": path,
            "query_string": query,
            "headers": [(n.encode(), v.encode("latin-1")) for n, v in (headers or {}).items()],
            "subprotocols": list(subprotocols),
            "client": ("127.0.0.1", 1),
        }
        self.opened = False
        self.code: int | None = None
        """Why the app hung up."""
        self._in: asyncio.Queue[Message] = asyncio.Queue()
        self._out: asyncio.Queue[Message] = asyncio.Queue()
        self._task = asyncio.ensure_future(app(scope, self._in.get, self._out.put))

    async def __aenter__(self) -> Self:
        self._in.put_nowait({"type": "websocket.connect"})
        first = await self._next()
        self.opened = first["type"] == "websocket.accept"
        self.code = first.get("code")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._in.put_nowait({"type": "websocket.disconnect", "code": 1000})
        async with asyncio.timeout(5):
            await self._task

    async def say(self, message: Mapping[str, Any] | str) -> None:
        text = message if isinstance(message, str) else orjson.dumps(message).decode()
        self._in.put_nowait({"type": "websocket.receive", "text": text})

    async def hear(self) -> Any:
        """The next message, or the code with which the app hung up."""
        message = await self._next()
        if message["type"] == "websocket.close":
            self.code = message["code"]
            return self.code
        return orjson.loads(message["text"])

    async def _next(self) -> Message:
        async with asyncio.timeout(5):
            return await self._out.get()
