"""Whole answers above a size go out as brotli or gzip, as clients take it; streams never wait."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Callable, Mapping
from functools import partial

import brotli
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CODINGS: Mapping[bytes, Callable[[bytes], bytes]] = {
    # The better one first. Levels at which an answer of 10 KB takes well under a millisecond.
    b"br": partial(brotli.compress, quality=4),
    b"gzip": partial(gzip.compress, compresslevel=6),
}
TAKES = {
    coding: re.compile(rb"\b" + coding + rb"\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))") for coding in CODINGS
}
LONG_BYTES = 131_072
"""From here on compressing takes milliseconds, so it leaves the event loop."""


class Compression:
    def __init__(self, app: ASGIApp, above_bytes: int) -> None:
        self.app = app
        self.above_bytes = above_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        coding = _coding(scope)
        if coding is None:
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
                    message["body"] = await _compressed(message["body"], coding)
                    start["headers"] = _headers(start, len(message["body"]), coding)
                await send(start)
                start = None
            await send(message)

        await self.app(scope, receive, send_compressed)


def _coding(scope: Scope) -> bytes | None:
    """The best coding that the client takes, if any."""
    if scope["type"] != "http":
        return None
    accepted = b",".join(v for name, v in scope["headers"] if name == b"accept-encoding")
    return next((coding for coding in CODINGS if TAKES[coding].search(accepted)), None)


async def _compressed(body: bytes, coding: bytes) -> bytes:
    compress = CODINGS[coding]
    if len(body) < LONG_BYTES:
        return compress(body)
    return await asyncio.to_thread(compress, body)


def _headers(start: Message, length: int, coding: bytes) -> list[tuple[bytes, bytes]]:
    return [
        *((name, value) for name, value in start["headers"] if name != b"content-length"),
        (b"content-length", str(length).encode("ascii")),
        (b"content-encoding", coding),
        (b"vary", b"accept-encoding"),
    ]
