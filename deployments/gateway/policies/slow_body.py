"""A body that trickles in is cut off (408), so that slow clients cannot hold requests for ever."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import BodyTimeout


class SlowBody:
    """``limit_s``: from the request's head to the last byte of its body.

    A limit for the whole, not between two pieces: a byte now and then would pass that.
    """

    def __init__(self, app: ASGIApp, limit_s: float) -> None:
        self.app = app
        self.limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        late = asyncio.get_running_loop().time() + self.limit_s
        received, complete = 0, False

        async def receive_in_time() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is at most that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(late) as limit:
                    message = await receive()
            except TimeoutError:
                if not limit.expired():
                    raise
                raise BodyTimeout(
                    f"After {self.limit_s:g} s the body was not complete; {received} bytes had"
                    " come. Send it faster, or send less."
                ) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, receive_in_time, send)
