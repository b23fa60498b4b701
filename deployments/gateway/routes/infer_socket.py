"""``WS /v1/infer/ws``: the events of ``/v1/infer/stream``, several requests on one connection.

The client sends ``{"type": "infer", "id", "model", "prompt", "params", "priority"}`` under an
id of its choice, and ``{"type": "cancel", "id"}``. The server sends ``{"event", "id", "data"}``:
``token`` …, and at last one of ``done``, ``error`` or ``cancelled``. An error that belongs to
no request has the id null. To cancel what has already ended is no error.

A connection on which nothing runs and nothing comes is closed after a while: it holds a place in
Serve's count of what a gateway has running. So is one whose client does not read.
"""

from __future__ import annotations

import asyncio
from functools import partial

import orjson
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from deployments.gateway.errors import as_platform_error, in_words
from deployments.gateway.exchange import Exchange, exchange_of
from deployments.gateway.policies.authentication import identify
from deployments.gateway.policies.deadline import time_limit
from deployments.gateway.routes.infer import start
from deployments.gateway.routes.infer_events import InferEvents
from deployments.gateway.schemas.infer import SocketCancel, SocketInfer
from deployments.gateway.services import Services
from deployments.gateway.validation import parse_json
from deployments.observability.logs import on_behalf_of
from deployments.tenants.principal import Scope as Right
from models.errors import InvalidInput, Overloaded, PlatformError

PATH = "/v1/infer/ws"
GOING_AWAY = 1001
UNSUPPORTED_DATA = 1003
MESSAGE_TOO_BIG = 1009
SCHEMAS: dict[object, type[SocketInfer] | type[SocketCancel]] = {
    "infer": SocketInfer,
    "cancel": SocketCancel,
}


def route(services: Services) -> WebSocketRoute:
    return WebSocketRoute(PATH, partial(serve, services))


async def serve(services: Services, socket: WebSocket) -> None:
    await socket.accept()
    connection = Connection(services, socket)
    try:
        await connection.listen()
    finally:
        await connection.close()


class SocketEvents(InferEvents):
    """The encoder for one request on a socket."""

    def __init__(self, services: Services, exchange: Exchange, id_: str | None) -> None:
        super().__init__(services, exchange)
        self._id = orjson.dumps(id_)

    def frame(self, event: bytes, data: bytes) -> bytes:
        return b'{"event":"' + event + b'","id":' + self._id + b',"data":' + data + b"}"

    def cancelled(self) -> bytes:
        return self.frame(b"cancelled", b"null")


class Connection:
    """What runs on one socket, by the client's ids."""

    def __init__(self, services: Services, socket: WebSocket) -> None:
        self._services = services
        self._socket = socket
        opening = exchange_of(socket.scope)
        self._id = opening.id
        self._wish = opening.wish
        self._running: dict[str, asyncio.Task[None]] = {}
        self._writing = asyncio.Lock()
        self._open = True
        self._unread = False
        """The client does not take what it is sent."""
        self._patience = asyncio.timeout(None)
        """Of :meth:`listen`, while nothing runs."""

    async def listen(self) -> None:
        """Take messages until the client goes, or breaks the rules of the connection, or does
        nothing for too long.
        """
        try:
            async with self._patience:
                await self._listen()
        except TimeoutError:
            if not self._patience.expired():
                raise
            if not self._unread:  # else it would not take this, either
                await self._hang_up(GOING_AWAY, "Nothing was asked for; connect again.")

    async def _listen(self) -> None:
        while True:
            self._be_patient()
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:
                await self._hang_up(UNSUPPORTED_DATA, "Send JSON as text messages.")
                return
            if len(text) > self._services.config.max_body_bytes:
                await self._hang_up(MESSAGE_TOO_BIG, "The message is too long.")
                return
            await self._take(text)

    def _be_patient(self) -> None:
        """From now on, and for as long as something runs."""
        idle_at = asyncio.get_running_loop().time() + self._services.config.socket_idle_s
        self._listen_until(None if self._running else idle_at)

    def _listen_until(self, when: float | None) -> None:
        if self._open and not self._patience.expired():  # else it ends already
            self._patience.reschedule(when)

    async def close(self) -> None:
        """Nobody listens any more: end all that runs."""
        self._open = False
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _take(self, text: str) -> None:
        id_ = None
        try:
            raw = _decode(text)
            id_ = _usable_id(raw)
            message = parse_json(_schema_of(raw), text)
            if isinstance(message, SocketCancel):
                task = self._running.get(message.id)
                if task is not None and not task.cancelling():
                    task.cancel()
                return
            if message.id in self._running:
                id_ = None  # an error under this id would seem to end the one that runs
                raise InvalidInput(f"A request with the id {message.id!r} is running.", param="id")
            if len(self._running) >= self._services.config.socket_requests:
                raise Overloaded(
                    f"{len(self._running)} requests are running on this connection, and no more"
                    " may; wait for one to end, or open another connection."
                )
        except PlatformError as error:
            exchange = self._exchange(id_)
            await self._fail(exchange, SocketEvents(self._services, exchange, id_), error)
            self._services.emit(exchange.finished(self._services.clock()))
        else:
            self._running[message.id] = asyncio.create_task(self._answer(message))
            await asyncio.sleep(0)  # a task cancelled before its first step could say nothing

    async def _answer(self, request: SocketInfer) -> None:
        services, exchange = self._services, self._exchange(request.id)
        events = SocketEvents(services, exchange, request.id)
        on_behalf_of.set(exchange)  # in this task: the connection has others
        try:
            # Each request anew: a connection may outlive the key that opened it.
            exchange.belongs_to(
                await identify(self._socket.scope, services.authenticator, exchange.patience)
            )
            exchange.require(Right.INFERENCE)
            async with (
                time_limit(services.config.request_timeout_s),
                start(services, exchange, request, stream=True) as generation,
            ):
                while (deltas := await generation.ready()) is not None:
                    exchange.first_output = exchange.first_output or services.clock()
                    if body := events.deltas(deltas):
                        await self._send(body)
            exchange.status = 200
            await self._send(events.end(exchange))
        except asyncio.CancelledError:
            exchange.client_gone = True
            # While the socket is open only the client's own message cancels.
            await self._send(events.cancelled())
        except Exception as error:
            failure = as_platform_error(error, exchange)
            await self._fail(exchange, events, in_words(failure, request.other_names))
        finally:
            del self._running[request.id]
            self._be_patient()
            services.emit(exchange.finished(services.clock()))

    async def _fail(self, exchange: Exchange, events: SocketEvents, error: PlatformError) -> None:
        exchange.error = error
        exchange.status = error.status
        await self._send(events.failure(error))

    async def _send(self, body: bytes) -> None:
        async with self._writing:
            if self._open:
                try:
                    async with asyncio.timeout(self._services.config.send_timeout_s) as limit:
                        await self._socket.send_text(body.decode())
                except WebSocketDisconnect:
                    self._open = False
                except TimeoutError:
                    if not limit.expired():
                        raise
                    self._listen_until(0)  # ends listening, and with it all that runs
                    self._open, self._unread = False, True

    async def _hang_up(self, code: int, reason: str) -> None:
        async with self._writing:
            self._open = False
            await self._socket.close(code, reason)

    def _exchange(self, id_: str | None) -> Exchange:
        arrived = self._services.clock()
        return Exchange(
            id=self._id if id_ is None else f"{self._id}.{id_}",
            method="WEBSOCKET",
            arrived=arrived,
            route=PATH,
            wish=self._wish,
            deadline=arrived + self._services.config.request_timeout_s,
        )


def _decode(text: str) -> dict[str, object]:
    try:
        raw = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"The message is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise InvalidInput("The message should be a JSON object.")
    return raw


def _usable_id(raw: dict[str, object]) -> str | None:
    """The client's name for the request, also where the rest of the message is wrong."""
    id_ = raw.get("id")
    return id_ if isinstance(id_, str) and len(id_) <= 64 else None


def _schema_of(raw: dict[str, object]) -> type[SocketInfer] | type[SocketCancel]:
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise InvalidInput(
            f"type should be 'infer' or 'cancel' (given: {kind!r:.80}).", param="type"
        )
    return SCHEMAS[kind]
