"""A generation as a streamed response, in whatever protocol its encoder speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from deployments.gateway.exchange import Exchange
from deployments.gateway.generation import Generation
from deployments.gateway.heartbeat import Heartbeat
from deployments.gateway.services import Services
from models.contracts import Delta, Place
from models.errors import InvalidInput, PlatformError

POSITION = "X-Queue-Position"
POSITION_DOC = {
    POSITION: "`stream`: while a streamed request waits, tell its place in the queue, at most once"
    " a second: as a comment of the event stream, or as an event of NDJSON. The answer then begins"
    " with status 200 before the model does, and what goes wrong later is an event."
}
"""Of a route's documentation."""


def wants_place(headers: Headers) -> bool:
    """Raises InvalidInput: the header says what it cannot."""
    said = headers.get(POSITION)
    if said not in (None, "stream"):
        raise InvalidInput(f"{POSITION} is {said!r:.80}; expected stream.", param=POSITION)
    return said is not None


class Encoder(Protocol):
    """A protocol's words for what happens on a stream."""

    media_type: str
    keepalive: bytes

    def place(self, place: Place) -> bytes: ...

    def deltas(self, deltas: Sequence[Delta]) -> bytes: ...

    def end(self, exchange: Exchange) -> bytes: ...

    def failure(self, error: PlatformError) -> bytes: ...


class StreamedResponse:
    """An ASGI response.

    The header waits for the first output, so that a request the engine refuses is answered
    by a real 4xx; but no longer than ``sse_keepalive_s``, or proxies would give up on us, nor
    than it takes to learn the place in the queue, for a client that has asked for it. An
    error is raised on to the failure policy, which knows from ``exchange.failure_frame``
    how to say it in mid-stream.
    """

    def __init__(
        self,
        services: Services,
        exchange: Exchange,
        generation: Generation,
        encoder: Encoder,
    ) -> None:
        self._exchange = exchange
        self._generation = generation
        self._encoder = encoder
        self._keepalive_s = services.config.sse_keepalive_s
        self._clock = services.clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange, encoder = self._exchange, self._encoder
        async with self._generation as generation:
            with Heartbeat(self._keepalive_s, generation.nudge) as heartbeat:
                while (deltas := await generation.ready()) is not None:
                    heartbeat.touch()
                    if deltas and exchange.first_output is None:
                        exchange.first_output = self._clock()
                    if deltas:
                        body = encoder.deltas(deltas)
                    elif (place := generation.place()) is not None:
                        body = encoder.place(place)
                    else:
                        body = encoder.keepalive
                    if not body:
                        continue
                    if exchange.status is None:
                        await self._begin(send)
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        if exchange.status is None:
            await self._begin(send)
        await send({"type": "http.response.body", "body": encoder.end(exchange)})

    async def _begin(self, send: Send) -> None:
        self._exchange.failure_frame = self._encoder.failure
        headers = [
            (b"content-type", self._encoder.media_type.encode()),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
