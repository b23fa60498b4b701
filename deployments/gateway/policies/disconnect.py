"""A client that hangs up cancels its request at once, streamed or not (spec A13)."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.gateway.exchange import exchange_of


class ClientGone(Exception):
    """The client hung up before its request was complete."""


class Disconnect:
    """Listens while the request is worked on, and cancels the work when the client has gone.

    Only a request whose body has been read is listened for: everything else is over at once.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = exchange_of(scope)
        work = asyncio.current_task()
        assert work is not None
        listener: asyncio.Task[None] | None = None

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            # Servers also say "disconnect" when the answer is complete.
            if not exchange.answered:
                exchange.client_gone = True
                work.cancel()

        async def receive_then_listen() -> Message:
            nonlocal listener
            message = await receive()
            if message["type"] == "http.disconnect":
                exchange.client_gone = True
                raise ClientGone
            if not message.get("more_body", False):
                listener = asyncio.create_task(listen())
            return message

        try:
            await self.app(scope, receive_then_listen, send)
        except ClientGone:
            pass
        except asyncio.CancelledError:
            if not exchange.client_gone or work.uncancel() > 0:
                raise
        finally:
            if listener is not None:
                listener.cancel()
