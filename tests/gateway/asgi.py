"""One HTTP call on an ASGI app with both ends in the test's hand."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.types import ASGIApp, Message

BASE = "http://gateway"
HEADERS = {"content-type": "application/json"}


class RawCall:
    """Body pieces go in when the test says so; messages that come out are kept as they are."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.sent: list[Message] = []
        self.times: list[float] = []
        """When each message was sent, on the loop's clock."""
        self.writable = asyncio.Event()
        """Cleared: the client does not read."""
        self.writable.set()
        self._news = asyncio.Condition()
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        if body is not None:
            self.feed(orjson.dumps(body), more=False)
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [
                (name.encode(), value.encode()) for name, value in (headers or HEADERS).items()
            ],
        }
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    def feed(self, body: bytes, *, more: bool) -> None:
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Message) -> None:
        await self.writable.wait()
        async with self._news:
            self.sent.append(message)
            self.times.append(asyncio.get_running_loop().time())
            self._news.notify_all()

    async def until(self, messages: int) -> None:
        """Wait until so many messages were sent."""
        async with asyncio.timeout(30), self._news:
            await self._news.wait_for(lambda: len(self.sent) >= messages)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]
