"""State that goes away under load: a real PostgreSQL and a real Redis, frozen or killed.

Whatever happens, an answer is either one that was metered, or 503 within a second; what was
in the middle is paid for once; and when the server is back nobody has to do anything.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import httpx
import orjson
import pytest
import sqlalchemy as sa
from starlette.types import ASGIApp

from deployments.config import PlanConfig, PriceConfig
from deployments.gateway.app import create_app
from deployments.observability.events import fan_out
from deployments.remote import readiness
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.identity import KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.ledger import Ledger
from deployments.tenants.meter import Meter
from deployments.tenants.principal import Principal, Role
from deployments.webhooks.inbox import Inbox
from deployments.webhooks.signature import signed
from deployments.webhooks.sources import Source, Sources
from state import tables
from state.counters import Counters, Strategy
from state.counters import redis as redis_counters
from state.counters.memory import MemoryCounters
from state.counters.redis import RedisCounters
from state.database import Database, LazyDatabase
from state.errors import StateUnavailable
from state.patience import ANSWER_S, SERVER_S
from state.places import sqlite_url
from tests.attacks.dial import Dial
from tests.gateway.asgi import BASE
from tests.gateway.fakes import NOW, FakeGenerator, World
from tests.gateway.server import LiveServer
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking
from tests.gateway.test_quotas import Acme
from tests.servers import PostgresServer, RedisServer, free_port

pytestmark = [
    pytest.mark.integration,
    pytest.mark.outage,
    pytest.mark.timeout(120),
    # A connection that was being made when its server went away is left to the collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

BUSY_S = 0.3
"""On top of the promise, and of what the event loop itself was late (``Pulse``): clients, gateway
and servers of this test share the machine's cores with whatever else it runs."""
KINDS = (
    *("whole", "stream", "once", "usage", "ready", "whole", "stream", "once"),
    *("infer", "infer/stream", "socket", "embeddings", "webhook"),
)
ALL = tuple(dict.fromkeys(KINDS))
UNMETERED = {"usage", "webhook"}
"""They need no counters."""
GOOD = {(200, None), (503, "STATE_UNAVAILABLE"), (503, "UNAVAILABLE"), (1013, None)}
SECRET = b"a secret of these tests"
DAY = 10**9
OUTAGE_S = 5.0
STALE_S = 1.2
"""After that nothing is used any more that was looked up before (``identity.FRESH_S``)."""


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[PostgresServer]:
    """In a folder that is none of pytest's, which other runs close to other users."""
    folder = Path(tempfile.mkdtemp(prefix="frontier-postgres-"))
    server = PostgresServer(folder, free_port())
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), free_port())
    server.start()
    yield server
    server.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One answer, as a client had it."""

    what: str
    status: int
    code: str | None
    began: float
    ended: float

    @property
    def took_s(self) -> float:
        return self.ended - self.began


class Pulse:
    """How late the event loop is, from moment to moment: time that nobody waits for state."""

    BEAT_S = 0.01

    def __init__(self) -> None:
        self._beats: list[tuple[float, float]] = []

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    def late_s(self, told: Told) -> float:
        return sum(late for at, late in self._beats if told.began < at < told.ended + 0.1)

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self.BEAT_S
            await asyncio.sleep(self.BEAT_S)
            self._beats.append((loop.time(), max(0.0, loop.time() - due)))


@dataclass
class Gateway:
    """One gateway over ``database`` and ``counters``, and all that it was asked and answered."""

    app: ASGIApp
    client: httpx.AsyncClient
    world: World
    ledger: Ledger
    database: LazyDatabase
    key: str
    admin: str
    meter: Meter
    reserved: list[str]
    """Leases that the counters gave."""
    answers: list[Told] = field(default_factory=list)
    pulse: Pulse = field(default_factory=lambda: Pulse())
    enough: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, what: str, **fields: Any) -> Told:
        loop, headers = asyncio.get_running_loop(), {"authorization": f"Bearer {self.key}"}
        began = loop.time()
        match what:
            case "usage":
                headers["authorization"] = f"Bearer {self.admin}"
                answer = await self.client.get("/admin/v1/usage", headers=headers)
            case "ready":
                answer = await self.client.get("/readyz")
            case "infer" | "infer/stream":
                body = {"model": "smollm2", "prompt": "hi", "params": {"max_tokens": 8}}
                answer = await self.client.post(f"/v1/{what}", json=body, headers=headers)
            case "socket":
                status, code = await self.dial(headers)
                return self.told(what, status, code, began)
            case "embeddings":
                body = {"model": "minilm", "input": "hi"}
                answer = await self.client.post("/v1/embeddings", json=body, headers=headers)
            case "webhook":
                body = orjson.dumps(
                    {"id": f"{len(self.answers)}-{began}", "type": "t", "payload": 1}
                )
                proof = {"x-webhook-signature": signed(body, (SECRET,), at=int(NOW))}
                headers = {"content-type": "application/json", **proof}
                answer = await self.client.post("/webhooks/ingest", content=body, headers=headers)
            case _:
                if what == "once":
                    headers["idempotency-key"] = f"{len(self.answers)}-{began}"
                body = asking(max_tokens=8, stream=what == "stream", **fields)
                answer = await self.client.post(CHAT, json=body, headers=headers)
        error = answer.json()["error"] if answer.status_code != 200 else None
        return self.told(what, answer.status_code, error and error["code"], began)

    def told(self, what: str, status: int, code: str | None, began: float) -> Told:
        ended = asyncio.get_running_loop().time()
        told = Told(what=what, status=status, code=code, began=began, ended=ended)
        self.answers.append(told)
        return told

    async def dial(self, headers: dict[str, str]) -> tuple[int, str | None]:
        """What one request on a socket of its own is told: as HTTP would say it, or the code with
        which the socket is refused.
        """
        async with Dial(self.app, "/v1/infer/ws", headers) as socket:
            if not socket.opened:
                return socket.code or 0, None
            await socket.say({"type": "infer", "id": "a", "model": "smollm2", "prompt": "hi"})
            while (told := await socket.hear())["event"] == "token":
                pass
        if told["event"] == "done":
            return 200, None
        return 503, told["data"]["error"]["code"]

    async def load(self, what: str) -> None:
        while not self.enough.is_set():
            await self.ask(what)
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def under_load(self) -> AsyncIterator[None]:
        """Clients of all kinds, until everything works again."""
        await self.healed()
        clients = [asyncio.create_task(self.load(what)) for what in KINDS]
        async with self.pulse:
            await asyncio.sleep(0.3)
            yield
            await self.healed()
            self.enough.set()
            await asyncio.gather(*clients)

    async def healed(self) -> None:
        """Every kind of request succeeds; nothing was done to this gateway."""
        async with asyncio.timeout(30):
            for what in ALL:
                while (await self.ask(what)).status != 200:  # noqa: ASYNC110  # as clients do
                    await asyncio.sleep(0.05)

    async def rows(self) -> list[dict[str, Any]]:
        async with asyncio.timeout(30):
            while self.ledger._waiting:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.05)
        async with self.database.read() as c:
            return [dict(row._mapping) for row in await c.execute(sa.select(tables.usage))]


@asynccontextmanager
async def gateway(url: str, counters: Counters) -> AsyncIterator[Gateway]:
    peppers = Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
    async with AsyncExitStack() as stack:
        database = LazyDatabase(url, patience_s=SERVER_S)
        stack.push_async_callback(database.close)
        directory = Directory(database, peppers)
        await eventually(database.ping)  # its tables are made, however busy the machine is
        async with database.write() as c:  # of the test before
            for table in (
                *(tables.usage, tables.idempotency, tables.webhook_events),
                *(tables.api_keys, tables.tenants),
            ):
                await c.execute(table.delete())
        await directory.create("acme", plan="busy", by="me")
        _, key = await directory.issue("acme", by="me")
        _, admin = await directory.issue("acme", role=Role.ADMIN, by="me")
        clock = asyncio.get_running_loop().time
        ledger = Ledger(database, now=lambda: 1_800_000_000.0, clock=clock)
        world = World(generator=FakeGenerator(delay_s=0.005))
        reserved: list[str] = []
        meter = Meter(
            counters=noting(counters, reserved),
            plans={"busy": PlanConfig(tokens_per_day=DAY, concurrent_requests=10**6)},
            strategy=Strategy.SLIDING_WINDOW,
            prices={"smollm2": PriceConfig(input_per_million=1, output_per_million=1)},
            emit=world.recorder,
            check=ledger.check,
            looks_s=(0.5, 1.0),
        )
        source = Source(name="default", tenant="acme", secrets=lambda: (SECRET,))
        state: dict[str, Callable[[], Awaitable[None]]] = {
            "database": database.ping,
            "counters": counters.ping,
        }
        services = replace(
            world.services(),
            authenticator=KeyAuthenticator(directory, peppers, clock=clock),
            directory=directory,
            idempotency=IdempotencyRecords(database, ttl_s=3600),
            inbox=Inbox(database, dedupe_s=3600),
            webhook_sources=Sources({"default": source}),
            meter=meter,
            emit=fan_out(world.recorder, ledger),
            ready=lambda: readiness({}, state),
        )
        app = create_app(services)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url=BASE, timeout=60)
        )
        yield Gateway(app, client, world, ledger, database, key.text, admin.text, meter, reserved)
        await meter.close()
        await ledger.close()
    gc.collect()  # what was being opened when its server went: here, and not in another test


class Busy(Acme):
    """As ``acme`` is in these tests."""

    async def principal(self, credential: str) -> Principal:
        return replace(await super().principal(credential), plan="busy")


def noting(counters: Counters, reserved: list[str]) -> Counters:
    """The same counters; every lease that they give is written down."""
    reserve = counters.reserve

    async def noted(owner: str, lease: str, *args: Any, **facts: Any) -> Any:
        told = await reserve(owner, lease, *args, **facts)
        if told.allowed:
            reserved.append(lease)
        return told

    counters.reserve = noted  # type: ignore[method-assign]
    return counters


def check_answers(gateway: Gateway) -> None:
    """What every answer must be, whenever it was asked for."""
    answered = Counter((told.status, told.code) for told in gateway.answers)
    assert set(answered) <= GOOD, answered
    for told in gateway.answers:
        if told.status == 1013:
            assert told.what == "socket"
        elif told.status == 503:
            assert told.code == ("UNAVAILABLE" if told.what == "ready" else "STATE_UNAVAILABLE")
        if told.status != 200:
            assert told.took_s - gateway.pulse.late_s(told) < ANSWER_S + BUSY_S, told


async def check_the_ledger(gateway: Gateway, *, counters_remember: bool = True) -> None:
    """Nothing was computed unmetered, nothing is lost, and nothing is there twice."""
    computed = [request.id for request in gateway.world.generator.requests]
    assert len(gateway.reserved) >= len(computed)
    everything = await gateway.rows()
    rows = [row for row in everything if row["model"] == "smollm2"]
    assert sorted(row["request_id"] for row in rows) == sorted(computed)
    assert {row["cost"] for row in rows} == {8}, "5 tokens in, 3 out"
    embedded = [row["prompt_tokens"] for row in everything if row["model"] == "minilm"]
    assert len(embedded) == len(gateway.world.embedder.calls)
    while gateway.meter._tasks:
        await asyncio.wait(gateway.meter._tasks)
    if counters_remember:
        levels = await gateway.meter.levels(await Busy().principal(""))
        used = DAY - {level.name: level.remaining for level in levels}["tokens_per_day"]
        assert used == 8 * len(rows) + sum(embedded), "the counters say what the ledger says"


@asynccontextmanager
async def outage(server: PostgresServer | RedisServer, way: str) -> AsyncIterator[list[float]]:
    """The server is gone inside; afterwards the list has the beginning and the end."""
    span: list[float] = []
    try:
        await asyncio.to_thread(server.freeze if way == "freeze" else server.stop)
        span.append(asyncio.get_running_loop().time())
        yield span
        span.append(asyncio.get_running_loop().time())
    finally:
        await asyncio.to_thread(server.thaw if way == "freeze" else server.start)


@pytest.mark.parametrize("way", ["freeze", "stop"])
async def test_a_database_that_goes_away_under_load(
    postgres_server: PostgresServer, way: str
) -> None:
    async with gateway(postgres_server.url, MemoryCounters()) as it:
        async with it.under_load():
            # One that runs through it: let in before, answered and written down after.
            it.world.generator.delay_s = OUTAGE_S / 2
            asked = len(it.world.generator.requests)
            long = asyncio.create_task(it.ask("stream"))
            async with asyncio.timeout(5):
                while len(it.world.generator.requests) == asked:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            async with outage(postgres_server, way) as span:
                await asyncio.sleep(OUTAGE_S / 4)
                it.world.generator.delay_s = 0.005
                await asyncio.sleep(OUTAGE_S * 3 / 4)
            assert (await long).status == 200, "who was let in is answered"
        check_answers(it)
        began, ended = span
        within = [t for t in it.answers if began + STALE_S < t.began and t.ended < ended]
        assert {told.what for told in within} == set(KINDS)
        for told in within:
            expected = 1013 if told.what == "socket" else 503
            assert told.status == expected, "what is not fresh is not known"
        await check_the_ledger(it)


@pytest.mark.parametrize("way", ["freeze", "stop"])
async def test_counters_that_go_away_under_load(
    postgres_server: PostgresServer, redis_server: RedisServer, way: str
) -> None:
    async with gateway(postgres_server.url, RedisCounters(redis_server.url)) as it:
        async with it.under_load(), outage(redis_server, way) as span:
            await asyncio.sleep(OUTAGE_S / 2)
        check_answers(it)
        began, ended = span
        within = [told for told in it.answers if began + 0.1 < told.began and told.ended < ended]
        for what in KINDS:
            statuses = Counter(told.status for told in within if told.what == what)
            if what == "webhook":  # which is written: on a busy machine that may once be late, too
                assert statuses.keys() <= {200, 503}
                assert statuses[200] > 9 * statuses[503]
            else:
                assert statuses.keys() == ({200} if what in UNMETERED else {503}), what
        await check_the_ledger(it, counters_remember=way == "freeze")


async def test_a_gateway_that_starts_while_the_database_is_frozen(
    postgres_server: PostgresServer,
) -> None:
    async with await Database.open(postgres_server.url):
        pass
    lazy = LazyDatabase(postgres_server.url, patience_s=SERVER_S)
    peppers = Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
    keys = KeyAuthenticator(
        Directory(lazy, peppers), peppers, clock=asyncio.get_running_loop().time
    )
    credential = f"fr_{'0' * 12}_{'0' * 40}"
    postgres_server.freeze()
    try:
        began = asyncio.get_running_loop().time()
        with pytest.raises(StateUnavailable):
            await keys.principal(credential)
        assert asyncio.get_running_loop().time() - began < ANSWER_S + BUSY_S
    finally:
        postgres_server.thaw()
    await eventually(lazy.ping)
    await lazy.close()


async def test_who_asks_a_frozen_database_first_waits_no_longer_than_others(
    postgres_server: PostgresServer,
) -> None:
    """Without any key to look up before: a webhook, and every route of an open platform."""
    loop = asyncio.get_running_loop()
    lazy = LazyDatabase(postgres_server.url, patience_s=SERVER_S)

    async def told_after() -> float:
        began = loop.time()
        with pytest.raises(StateUnavailable):
            await lazy.ping()
        return loop.time() - began

    postgres_server.freeze()
    try:
        at_once = await asyncio.gather(told_after(), told_after())
        again = await told_after()
    finally:
        postgres_server.thaw()
    assert max(*at_once, again) < ANSWER_S + BUSY_S
    await eventually(lazy.ping)
    await lazy.close()


async def test_a_database_is_opened_once_and_closed_while_it_opens(tmp_path: Path) -> None:
    lazy = LazyDatabase(sqlite_url(tmp_path / "frontier.db"))
    first, second = await asyncio.gather(lazy.opened(), lazy.opened())
    assert first is second
    await lazy.close()
    asking = asyncio.create_task(lazy.opened())
    await asyncio.sleep(0)
    await lazy.close()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await lazy.ping()
    await lazy.close()


async def test_a_transaction_is_not_left_to_a_server_that_froze(
    postgres_server: PostgresServer,
) -> None:
    async def in_the_middle(database: Database) -> None:
        async with database.write() as c:
            await c.execute(sa.text("SELECT 1"))
            await asyncio.to_thread(postgres_server.freeze)
            await c.execute(sa.text("SELECT 2"))

    async with await Database.open(postgres_server.url, patience_s=SERVER_S) as database:
        try:
            async with asyncio.timeout(10):
                with pytest.raises(StateUnavailable):
                    await in_the_middle(database)
        finally:
            postgres_server.thaw()
        await eventually(database.ping)


async def test_a_statement_may_take_as_long_as_it_needs(postgres_server: PostgresServer) -> None:
    async with (
        await Database.open(postgres_server.url, patience_s=2) as database,
        database.read() as c,
    ):
        await c.execute(sa.text("SELECT pg_sleep(2.5)"))


async def eventually(ping: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                return await ping()
            except StateUnavailable:
                await asyncio.sleep(0.05)


async def test_all_that_is_asked_before_a_request_is_let_in_has_one_budget() -> None:
    """A slow directory, and then counters that hang: not one patience after the other."""

    class Slow(Acme):
        async def principal(self, credential: str) -> Principal:
            await asyncio.sleep(SERVER_S / 2)
            return await super().principal(credential)

    class Hanging(MemoryCounters):
        async def reserve(self, *args: Any, **facts: Any) -> Any:
            await asyncio.sleep(60)

    world = World(authenticator=Slow())
    world.meter = Meter(
        counters=Hanging(),
        plans={"small": PlanConfig(tokens_per_day=1000)},
        strategy=Strategy.FIXED_WINDOW,
        prices={},
        emit=world.recorder,
    )
    transport = httpx.ASGITransport(create_app(world.services()))
    headers = {"authorization": "Bearer fr_1"}
    async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=headers) as client:
        began = asyncio.get_running_loop().time()
        answer = await client.post(CHAT, json=asking())
        took_s = asyncio.get_running_loop().time() - began
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "STATE_UNAVAILABLE"
    assert answer.headers["retry-after"] == "1"
    assert took_s < ANSWER_S + BUSY_S
    assert world.generator.requests == []


async def test_a_burst_is_no_server_that_is_down(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a connection: nobody is refused for there being too many."""
    monkeypatch.setattr(redis_counters, "TIMEOUT_S", 20)
    counters = RedisCounters(redis_server.url)
    try:
        await asyncio.gather(*(counters.ping() for _ in range(500)))
    finally:
        await counters.close()


async def test_who_has_no_limits_is_not_let_in_unpaid() -> None:
    """A ledger that cannot write lets nobody in, and does so again once it can."""

    class Gone:
        def write(self) -> object:
            raise StateUnavailable("gone")

    now = 0.0
    ledger = Ledger(Gone(), now=lambda: 0.0, clock=lambda: now)  # type: ignore[arg-type]
    world = World()
    world.meter = Meter(
        counters=MemoryCounters(),
        plans={},
        strategy=Strategy.FIXED_WINDOW,
        prices={},
        emit=fan_out(world.recorder, ledger),
        check=ledger.check,
    )
    services = replace(world.services(), emit=fan_out(world.recorder, ledger))
    transport = httpx.ASGITransport(create_app(services), client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await client.post(CHAT, json=asking())).status_code == 200
        now = 31.0
        refused = await client.post(CHAT, json=asking())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "STATE_UNAVAILABLE"
        assert len(world.generator.requests) == 1
        ledger._waiting.clear()
        ledger._since = None
        assert (await client.post(CHAT, json=asking())).status_code == 200
    if ledger._writing is not None:
        ledger._writing.cancel()


def test_a_gateway_that_stops_does_what_is_left_to_do() -> None:
    done: list[str] = []

    async def close() -> None:
        done.append("written")

    with LiveServer(create_app(replace(World().services(), close=close))) as server:
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert done == []
    assert done == ["written"]
