"""Whole answers above a size are sent as gzip to clients that take it; streams never wait."""

from __future__ import annotations

import asyncio
import gzip
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

TAKES_GZIP = re.compile(rb"gzip(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
LEVEL = 6
LONG_BYTES = 131_072
"""From here on compressing takes milliseconds, so it leaves the event loop."""


class Compression:
    def __init__(self, app: ASGIApp, above_bytes: int) -> None:
        self.app = app
        self.above_bytes = above_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _takes_gzip(scope):
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def send_compressed(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                if not message.get("more_body", False) and len(message["body"]) > self.above_bytes:
                    message["body"] = await _compressed(message["body"])
                    start["headers"] = _headers(start, len(message["body"]))
                await send(start)
                start = None
            await send(message)

        await self.app(scope, receive, send_compressed)


def _takes_gzip(scope: Scope) -> bool:
    return any(
        name == b"accept-encoding" and TAKES_GZIP.search(value) for name, value in scope["headers"]
    )


async def _compressed(body: bytes) -> bytes:
    if len(body) < LONG_BYTES:
        return gzip.compress(body, LEVEL)
    return await asyncio.to_thread(gzip.compress, body, LEVEL)


def _headers(start: Message, length: int) -> list[tuple[bytes, bytes]]:
    return [
        *((name, value) for name, value in start["headers"] if name != b"content-length"),
        (b"content-length", str(length).encode("ascii")),
        (b"content-encoding", b"gzip"),
        (b"vary", b"accept-encoding"),
    ]
