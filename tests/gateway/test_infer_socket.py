"""Several requests on one WebSocket; the events are those of the stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from deployments.config import GatewayConfig
from deployments.gateway.app import create_app
from models.errors import Overloaded, UpstreamError
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer, wait_until
from tests.gateway.test_infer import SUMMARY

pytestmark = pytest.mark.integration

PATH = "/v1/infer/ws"


class Socket:
    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def say(self, **message: Any) -> None:
        await self.connection.send(orjson.dumps(message).decode())

    async def ask(self, id_: str, **fields: Any) -> None:
        await self.say(**{"type": "infer", "id": id_, "model": "smollm2", "prompt": "hi", **fields})

    async def hear(self) -> tuple[str, str | None, Any]:
        """Event, id, data."""
        async with asyncio.timeout(30):
            message = orjson.loads(await self.connection.recv())
        return message["event"], message["id"], message["data"]

    async def hear_all(self, id_: str) -> list[tuple[str, Any]]:
        """Events of ``id_`` up to its last one."""
        told: list[tuple[str, Any]] = []
        while not told or told[-1][0] == "token":
            event, whose, data = await self.hear()
            if whose == id_:
                told.append((event, data))
        return told


@pytest.fixture
async def socket(server: LiveServer) -> AsyncIterator[Socket]:
    url = server.url.replace("http", "ws") + PATH
    async with connect(url, additional_headers={"x-request-id": "conn"}) as connection:
        yield Socket(connection)


async def test_a_request(socket: Socket, world: World) -> None:
    await socket.ask("a", params={"seed": 1}, priority="vip")
    *tokens, (event, data) = await socket.hear_all("a")
    assert tokens == [("token", {"text": text}) for text in ("Hel", "lo", "!")]
    assert event == "done"
    assert data.pop("latency_ms") >= 0
    assert data == {**SUMMARY, "id": "conn.a"}
    wait_until(lambda: bool(world.recorder.finished))
    [finished] = world.recorder.finished
    assert (finished.route, finished.method) == (PATH, "WEBSOCKET")
    assert (finished.request_id, finished.status) == ("conn.a", 200)
    assert finished.ttft_s is not None
    assert world.generator.requests[0].sampling.seed == 1


async def test_the_handshake_carries_the_request_id(socket: Socket) -> None:
    response = socket.connection.response
    assert response is not None
    assert response.headers["x-request-id"] == "conn"


async def test_requests_share_the_connection(socket: Socket, world: World) -> None:
    world.generator.delay_s = 0.02
    ids = [f"r{number}" for number in range(8)]
    for id_ in ids:
        await socket.ask(id_)
    texts = dict.fromkeys(ids, "")
    order = []
    running = set(ids)
    while running:
        event, whose, data = await socket.hear()
        assert whose is not None
        order.append(whose)
        if event == "token":
            texts[whose] += data["text"]
        else:
            running.remove(whose)
    assert set(texts.values()) == {"Hello!"}
    assert order[:8] != [ids[0]] * 8  # side by side, not one after the other


async def test_cancel_frees_the_slot_and_spares_the_others(socket: Socket, world: World) -> None:
    world.generator.delay_s = 0.1
    await socket.ask("a")
    await socket.ask("b")
    wait_until(lambda: world.generator.running == 2)
    await socket.say(type="cancel", id="a")
    await socket.say(type="cancel", id="a")
    await socket.say(type="cancel", id="unknown")
    assert (await socket.hear_all("a"))[-1] == ("cancelled", None)
    assert (await socket.hear_all("b"))[-1][0] == "done"
    assert world.generator.cancelled == ["conn.a"]
    statuses = {event.request_id: event.status for event in world.recorder.finished}
    assert statuses["conn.a"] == 499


async def test_an_id_is_free_again_when_its_request_has_ended(socket: Socket) -> None:
    for _ in range(2):
        await socket.ask("a")
        assert (await socket.hear_all("a"))[-1][0] == "done"


async def test_an_id_that_is_running_is_not_disturbed(socket: Socket, world: World) -> None:
    world.generator.delay_s = 0.1
    await socket.ask("a")
    await socket.ask("a")
    event, id_, data = await socket.hear()
    assert (event, id_) == ("error", None)
    assert "'a' is running" in data["error"]["message"]
    assert (await socket.hear_all("a"))[-1][0] == "done"


@pytest.mark.parametrize(
    ("message", "id_", "words"),
    [
        ("{", None, "not valid JSON"),
        ("[]", None, "should be a JSON object"),
        ("{}", None, "type should be 'infer' or 'cancel' (given: None)"),
        ('{"type": ["infer"], "id": "a"}', "a", "type should be"),
        ('{"type": "infer", "id": "a"}', "a", "model is required"),
        ('{"type": "infer", "id": "a", "model": "m", "prompt": "p", "x": 1}', "a", "Unknown"),
        ('{"type": "infer", "id": "a", "model": "m", "prompt": "p"}', "a", "does not exist"),
        ('{"type": "infer", "id": "a b", "model": "m", "prompt": "p"}', "a b", "id "),
        ('{"type": "infer", "id": 7, "model": "m", "prompt": "p"}', None, "id "),
        ('{"type": "cancel"}', None, "id is required"),
    ],
)
async def test_a_message_at_fault(
    socket: Socket, world: World, message: str, id_: str | None, words: str
) -> None:
    await socket.connection.send(message)
    event, whose, data = await socket.hear()
    assert (event, whose, data["success"]) == ("error", id_, False)
    assert words in data["error"]["message"]
    await socket.ask("fine")
    assert (await socket.hear_all("fine"))[-1][0] == "done"
    assert world.recorder.finished[0].status in (400, 404)


async def test_failures_are_told_to_whom_they_concern(socket: Socket, world: World) -> None:
    world.generator.error, world.generator.error_after = UpstreamError("lost"), 1
    await socket.ask("a")
    told = await socket.hear_all("a")
    assert [event for event, _ in told] == ["token", "error"]
    assert told[-1][1]["error"]["code"] == "UPSTREAM_ERROR"
    world.generator.error, world.generator.error_after = Overloaded("full", retry_after=2), 0
    await socket.ask("b")
    [(event, data)] = await socket.hear_all("b")
    assert (event, data["error"]["details"]) == ("error", {"retry_after": 2})
    world.generator.error = ZeroDivisionError("secret")
    await socket.ask("c")
    [(event, data)] = await socket.hear_all("c")
    assert data["error"]["code"] == "INTERNAL_ERROR"
    assert "Quote request conn.c" in data["error"]["message"]


async def test_after_the_deadline() -> None:
    world = World(config=GatewayConfig(request_timeout_s=0.05))
    world.generator.delay_s = 60
    with LiveServer(create_app(world.services())) as server:
        async with connect(server.url.replace("http", "ws") + PATH) as connection:
            socket = Socket(connection)
            await socket.ask("a")
            [(event, data)] = await socket.hear_all("a")
    assert (event, data["error"]["code"]) == ("error", "TIMEOUT")
    assert world.generator.running == 0


async def test_more_requests_than_a_connection_may_have() -> None:
    world = World(config=GatewayConfig(socket_requests=2))
    world.generator.delay_s = 0.1
    with LiveServer(create_app(world.services())) as server:
        async with connect(server.url.replace("http", "ws") + PATH) as connection:
            socket = Socket(connection)
            for id_ in ("a", "b", "c"):
                await socket.ask(id_)
            [(event, data)] = await socket.hear_all("c")
            assert (event, data["error"]["code"]) == ("error", "OVERLOADED")
            await socket.hear_all("a")
            await socket.ask("c")
            assert (await socket.hear_all("c"))[-1][0] == "done"


async def test_a_client_that_goes_cancels_all_it_began(socket: Socket, world: World) -> None:
    world.generator.delay_s = 60
    await socket.ask("a")
    await socket.ask("b")
    wait_until(lambda: world.generator.running == 2)
    await socket.connection.close()
    wait_until(lambda: world.generator.running == 0)
    wait_until(lambda: len(world.recorder.finished) == 2)
    assert {event.status for event in world.recorder.finished} == {499}


async def test_a_client_that_drops_dead_while_it_is_written_to(
    socket: Socket, world: World
) -> None:
    world.generator.delay_s, world.generator.pieces = 0.001, ["a" * 1000] * 5000
    await socket.ask("a")
    await socket.hear()
    socket.connection.transport.abort()
    await asyncio.to_thread(wait_until, lambda: bool(world.recorder.finished))
    assert world.generator.running == 0
    assert world.recorder.finished[0].status == 499


@pytest.mark.parametrize(("message", "code"), [(b"{}", 1003), ("x" * 2000, 1009)])
async def test_what_breaks_the_rules_of_the_connection(message: bytes | str, code: int) -> None:
    world = World(config=GatewayConfig(max_body_bytes=1024))
    world.generator.delay_s = 60
    with LiveServer(create_app(world.services())) as server:
        async with connect(server.url.replace("http", "ws") + PATH) as connection:
            await Socket(connection).ask("a")
            wait_until(lambda: world.generator.running == 1)
            await connection.send(message)
            with pytest.raises(ConnectionClosed) as closed:
                await connection.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == code
        wait_until(lambda: world.generator.running == 0)


async def test_a_socket_where_there_is_none(server: LiveServer) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.url.replace("http", "ws") + "/v1/nope")
    assert refused.value.response.status_code == 403


class RawSocket:
    """Both ends of a socket in the test's hand: all that is said is there before it is heard."""

    def __init__(self, world: World, *messages: dict[str, Any], broken: bool = False) -> None:
        self.broken = broken
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "websocket.connect"})
        for message in messages:
            text = orjson.dumps(message).decode()
            self._incoming.put_nowait({"type": "websocket.receive", "text": text})
        scope = {"type": "websocket", "path": PATH, "headers": [], "query_string": b""}
        app = create_app(world.services())
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "websocket.disconnect", "code": 1006})

    async def _send(self, message: dict[str, Any]) -> None:
        if self.broken and message["type"] == "websocket.send":
            raise OSError("the peer is gone")
        self.sent.put_nowait(message)


ASK = {"type": "infer", "id": "a", "model": "smollm2", "prompt": "hi"}


async def test_a_request_that_is_cancelled_before_it_has_begun(world: World) -> None:
    socket = RawSocket(world, ASK, {"type": "cancel", "id": "a"})
    async with asyncio.timeout(30):
        assert (await socket.sent.get())["type"] == "websocket.accept"
        assert orjson.loads((await socket.sent.get())["text"])["event"] == "cancelled"
        socket.hang_up()
        await socket.task
    assert world.recorder.finished[0].status == 499


async def test_a_server_that_refuses_to_send_to_who_has_gone(world: World) -> None:
    world.generator.pieces, world.generator.delay_s = ["a"] * 1000, 0.01
    socket = RawSocket(world, ASK, broken=True)
    await asyncio.sleep(0.1)
    assert world.generator.running == 1  # until the server says that the client has gone
    socket.hang_up()
    async with asyncio.timeout(30):
        await socket.task
    assert world.generator.running == 0
    assert world.recorder.finished[0].status == 499


class UnreadSocket(RawSocket):
    """Its client takes the handshake, and then nothing."""

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "websocket.send":
            await asyncio.Event().wait()
        self.sent.put_nowait(message)


async def test_a_client_that_does_not_read_is_left() -> None:
    world = World(config=GatewayConfig(send_timeout_s=0.05))
    world.generator.pieces, world.generator.delay_s = ["a"] * 100_000, 0.001
    socket = UnreadSocket(world, ASK, {**ASK, "id": "b"})
    async with asyncio.timeout(5):
        await socket.task
    assert world.generator.running == 0
    assert [event.status for event in world.recorder.finished] == [499, 499]
    assert socket.sent.qsize() == 1  # a farewell would wait for ever, too


async def test_a_connection_on_which_nothing_happens_is_closed() -> None:
    world = World(config=GatewayConfig(socket_idle_s=0.05))
    with LiveServer(create_app(world.services())) as server:
        async with connect(server.url.replace("http", "ws") + PATH) as connection:
            with pytest.raises(ConnectionClosed) as closed:
                async with asyncio.timeout(5):
                    await connection.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1001


async def test_one_on_which_something_runs_is_not() -> None:
    world = World(config=GatewayConfig(socket_idle_s=0.05))
    world.generator.delay_s = 0.1
    with LiveServer(create_app(world.services())) as server:
        async with connect(server.url.replace("http", "ws") + PATH) as connection:
            socket = Socket(connection)
            await socket.ask("a")
            assert (await socket.hear_all("a"))[-1][0] == "done"
            with pytest.raises(ConnectionClosed):
                async with asyncio.timeout(5):
                    await connection.recv()
