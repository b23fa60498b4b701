"""A POST that comes again with its key is answered again, and not carried out again (spec C5)."""

from __future__ import annotations

import asyncio
import gzip
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import sqlalchemy as sa
from openai import OpenAI
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.config import GatewayConfig, IdempotencyConfig
from deployments.gateway.app import create_app
from deployments.gateway.policies import idempotency as policy
from deployments.gateway.policies.idempotency import fingerprint_of, is_kept, key_of
from deployments.gateway.routes import webhooks
from deployments.tenants import idempotency as store
from deployments.tenants.directory import Directory
from deployments.tenants.idempotency import LEASE_S, Answer, Busy, IdempotencyRecords, Lease
from deployments.tenants.keys import Peppers
from deployments.tenants.principal import GRANTS, Principal, Role
from models.contracts import Delta, GenerateRequest
from models.errors import InvalidInput, Overloaded, Unauthorized, UpstreamError
from state import patience, tables
from state.database import Database, LazyDatabase
from state.errors import StateUnavailable
from state.places import sqlite_url
from tests.databases import database_url, postgres, postgres_url
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.contract import Contract, chunks
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.server import LiveServer
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking as chatting
from tests.gateway.test_disconnect import running, until
from tests.gateway.test_infer import PATH as INFER
from tests.gateway.test_infer import STREAM, asking

__all__ = ["database_url", "postgres", "postgres_url"]

KEY = {"idempotency-key": "5f9c6b1e"}
JSON = {"content-type": "application/json"}
UNREACHABLE = "postgresql://nobody@127.0.0.1:1/nowhere"


@dataclass
class SteppedGenerator(FakeGenerator):
    """Says what comes next when a test lets it."""

    steps: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self.steps.release()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        said = cast("AsyncGenerator[Delta]", super().generate(request))
        async with aclosing(said) as deltas:
            async for delta in deltas:
                await self.steps.acquire()
                yield delta


class Clock:
    """Unix seconds that stand still until somebody moves them."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Keys:
    """An authenticator of keys that read ``TENANT ROLE``."""

    async def principal(self, credential: str) -> Principal:
        tenant, _, role = credential.partition("-")
        if role not in list(Role):
            raise Unauthorized("no")
        return Principal(
            tenant=tenant, subject=credential, role=Role(role), scopes=GRANTS[Role(role)]
        )


@dataclass
class Process:
    """A gateway process. Several share a database and the models, and nothing else."""

    app: ASGIApp
    records: IdempotencyRecords
    database: Database

    @asynccontextmanager
    async def client(self, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url=BASE, headers={**KEY, **headers}
        ) as client:
            yield client

    def call(self, path: str, body: Any, **headers: str) -> RawCall:
        return RawCall(self.app, path, body, headers={**JSON, **KEY, **headers})


Start = Callable[[], Awaitable[Process]]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy is no database that is down."""
    monkeypatch.setattr(store, "PATIENCE_S", 30.0)
    monkeypatch.setattr(patience, "REQUEST_S", 30.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def start(database_url: str, world: World, clock: Clock) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def started() -> Process:
            database = await stack.enter_async_context(await Database.open(database_url))
            records = IdempotencyRecords(database, ttl_s=3600, now=clock)
            directory = Directory(database, Peppers([b"pepper" * 4]))
            services = replace(world.services(), idempotency=records, directory=directory)
            return Process(create_app(services), records, database)

        yield started
        await quiet()


@pytest.fixture
async def process(start: Start) -> Process:
    return await start()


@pytest.fixture
async def client(process: Process, contract: Contract) -> AsyncIterator[httpx.AsyncClient]:
    """Every request it sends has one key, every answer it gets is held to the OpenAPI document."""
    async with process.client() as client:
        client.event_hooks = {"response": [contract.check]}
        yield client


async def quiet() -> None:
    """Wait for what goes on beside the requests."""
    if left := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(left, timeout=30)


async def kept(process: Process) -> int:
    """How many records there are."""
    async with process.database.read() as connection:
        count = sa.select(sa.func.count()).select_from(tables.idempotency)
        return int(await connection.scalar(count) or 0)


def replayed(answer: httpx.Response | RawCall) -> bool:
    headers: Mapping[str, str]
    if isinstance(answer, RawCall):
        pairs = answer.sent[0]["headers"]
        headers = {name.decode(): value.decode() for name, value in pairs}
    else:
        headers = answer.headers
    return headers.get("idempotent-replayed") == "true"


def told(call: RawCall) -> bytes:
    """All of the body, which is complete."""
    assert not call.sent[-1].get("more_body", False)
    return b"".join(call.bodies)


# What is decided


def scope(*keys: bytes, **changes: Any) -> dict[str, Any]:
    headers = [(b"host", b"x"), *((b"idempotency-key", key) for key in keys)]
    known = {"type": "http", "method": "POST", "path": "/a", "query_string": b""}
    return {**known, "headers": headers, **changes}


@pytest.mark.parametrize("key", [b"k", b"!" * 255, b'"quoted"', b"a:b/c~"])
def test_a_key(key: bytes) -> None:
    assert key_of(scope(key)) == key.decode()
    assert key_of(scope()) is None


@pytest.mark.parametrize(
    "keys", [[b""], [b"a b"], [b"a\tb"], [b"\xe9"], [b"\x7f"], [b"k" * 256], [b"a", b"a"]]
)
def test_what_is_no_key(keys: list[bytes]) -> None:
    with pytest.raises(InvalidInput, match="1 to 255 visible ASCII") as refusal:
        key_of(scope(*keys))
    assert refusal.value.param == "Idempotency-Key"


def test_a_request_is_its_method_path_query_and_body() -> None:
    requests = [
        (scope(), b"body"),
        (scope(method="PUT"), b"body"),
        (scope(path="/ab"), b"ody"),
        (scope(path="/ab"), b"body"),
        (scope(query_string=b"b"), b"ody"),
        (scope(query_string=b"b"), b"body"),
        (scope(), b""),
    ]
    prints = {fingerprint_of(*request) for request in requests}
    assert len(prints) == len(requests)
    assert fingerprint_of(scope(b"other key"), b"body") in prints


@pytest.mark.parametrize("status", [200, 201, 204, 302, 400, 404, 409, 422])
def test_what_is_kept(status: int) -> None:
    assert is_kept(status, broken=False, size=10, max_bytes=10)
    assert not is_kept(status, broken=False, size=11, max_bytes=10)
    assert not is_kept(status, broken=True, size=10, max_bytes=10)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503, 504])
def test_what_is_not_kept(status: int) -> None:
    assert not is_kept(status, broken=False, size=0, max_bytes=10)


# Again, when all is done


async def test_an_answer_is_replayed(client: httpx.AsyncClient, world: World) -> None:
    first = await client.post(INFER, json=asking())
    again = await client.post(INFER, json=asking())
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.content == first.content
    assert again.headers["content-type"] == "application/json"
    assert (replayed(first), replayed(again)) == (False, True)
    assert "server-timing" in first.headers
    assert "server-timing" not in again.headers
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(world.generator.requests) == 1
    one, other = world.recorder.finished
    assert (one.route, other.route) == (INFER, INFER)
    assert (one.model, other.model) == ("smollm2", None)
    assert one.usage is not None
    assert one.timings is not None
    assert (other.usage, other.timings) == (None, None), "billed once"


@pytest.mark.parametrize(
    ("path", "body", "accept"),
    [
        (CHAT, chatting(stream=True, stream_options={"include_usage": True}), "*/*"),
        (STREAM, asking(), "*/*"),
        (STREAM, asking(), "application/x-ndjson"),
    ],
)
async def test_a_stream_is_replayed_as_a_stream(
    client: httpx.AsyncClient, world: World, path: str, body: Any, accept: str
) -> None:
    world.generator.pieces = ["é ", "x" * 10_000]  # longer than what is compressed
    first = await client.post(path, json=body, headers={"accept": accept})
    again = await client.post(path, json=body, headers={"accept": accept})
    assert again.content == first.content
    assert len(first.content) > 10_000
    for header in ("content-type", "x-accel-buffering"):
        assert again.headers[header] == first.headers[header]
    assert "content-encoding" not in again.headers
    assert "content-length" not in again.headers
    assert replayed(again)
    assert len(world.generator.requests) == 1
    assert world.recorder.finished[0].ttft_s is not None


async def test_without_a_key_each_request_is_its_own(
    client: httpx.AsyncClient, world: World
) -> None:
    del client.headers["idempotency-key"]
    for _ in range(2):
        assert not replayed(await client.post(INFER, json=asking()))
    await client.post(INFER, json=asking(), headers={"idempotency-key": "another"})
    assert len(world.generator.requests) == 3


async def test_a_key_means_one_request(client: httpx.AsyncClient, world: World) -> None:
    await client.post(INFER, json=asking())
    refused = await client.post(INFER, json=asking(prompt="other"))
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "CONFLICT"
    assert refused.json()["error"]["details"] == {"param": "Idempotency-Key"}
    elsewhere = await client.post(CHAT, json=chatting())
    assert elsewhere.status_code == 409
    assert elsewhere.json()["error"]["code"] == "CONFLICT"
    assert len(world.generator.requests) == 1


async def test_what_is_no_key_is_refused(client: httpx.AsyncClient, world: World) -> None:
    for key in ("a b", "k" * 256):
        refused = await client.post(CHAT, json=chatting(), headers={"idempotency-key": key})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "Idempotency-Key"
    assert world.generator.requests == []


async def test_a_refusal_is_replayed(client: httpx.AsyncClient, world: World) -> None:
    first = await client.post(CHAT, json=chatting(temperature=9))
    again = await client.post(CHAT, json=chatting(temperature=9))
    assert (first.status_code, again.status_code) == (400, 400)
    assert again.content == first.content
    assert (replayed(first), replayed(again)) == (False, True)
    assert [event.code for event in world.recorder.finished] == ["INVALID_INPUT", None]


@pytest.mark.parametrize("error", [Overloaded("full", retry_after=3), UpstreamError("lost")])
@pytest.mark.parametrize("path", [INFER, STREAM])
async def test_a_passing_failure_is_not_kept(
    client: httpx.AsyncClient, world: World, error: Exception, path: str
) -> None:
    world.generator.error = error
    first = await client.post(path, json=asking())
    assert first.status_code == cast("Any", error).status
    assert world.recorder.finished[0].code == cast("Any", error).code
    world.generator.error = None
    again = await client.post(path, json=asking())
    assert again.status_code == 200
    assert not replayed(again)
    assert replayed(await client.post(path, json=asking()))
    assert len(world.generator.requests) == 2


async def test_a_fault_of_ours_is_not_kept(client: httpx.AsyncClient, world: World) -> None:
    world.generator.error = ZeroDivisionError()
    assert (await client.post(INFER, json=asking())).status_code == 500
    world.generator.error = None
    assert (await client.post(INFER, json=asking())).status_code == 200


async def test_a_stream_that_broke_is_not_kept(client: httpx.AsyncClient, world: World) -> None:
    world.generator.error, world.generator.error_after = UpstreamError("lost"), 1
    broken = await client.post(CHAT, json=chatting(stream=True))
    assert chunks(broken.text)[-1]["error"]["code"] == "UPSTREAM_ERROR"
    assert world.recorder.finished[0].code == "UPSTREAM_ERROR"
    world.generator.error = None
    again = await client.post(CHAT, json=chatting(stream=True))
    assert again.text.endswith("data: [DONE]\n\n")
    assert not replayed(again)


@pytest.mark.parametrize("path", [INFER, STREAM])
async def test_what_is_too_long_is_not_kept(
    world: World, start: Start, path: str, contract: Contract
) -> None:
    world.config = GatewayConfig(idempotency=IdempotencyConfig(max_body_bytes=100))
    process = await start()
    async with process.client() as client:
        answers = [await client.post(path, json=asking()) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert not any(map(replayed, answers))
    assert len(world.generator.requests) == 2
    assert await kept(process) == 0


async def test_an_answer_is_kept_for_its_time(
    client: httpx.AsyncClient, world: World, clock: Clock
) -> None:
    await client.post(INFER, json=asking())
    clock.now += 3599
    assert replayed(await client.post(INFER, json=asking()))
    clock.now += 1
    assert not replayed(await client.post(INFER, json=asking(prompt="other")))
    assert len(world.generator.requests) == 2


async def test_it_is_kept_plain_and_goes_out_as_the_client_takes_it(
    process: Process, world: World
) -> None:
    world.generator.pieces = ("x" * 20_000,)
    sizes = []
    for coding in ("gzip", "identity", "gzip"):
        call = process.call(INFER, asking(), **{"accept-encoding": coding})
        await call.task
        body = told(call)
        if coding == "gzip":
            assert (b"content-encoding", b"gzip") in call.sent[0]["headers"]
            body = gzip.decompress(body)
        assert b"x" * 20_000 in body
        sizes.append(len(body))
    assert len(set(sizes)) == 1
    assert len(world.generator.requests) == 1


async def test_other_methods_have_no_use_for_a_key(world: World) -> None:
    services = replace(
        world.services(), idempotency=IdempotencyRecords(LazyDatabase(UNREACHABLE), ttl_s=1)
    )
    transport = httpx.ASGITransport(create_app(services))
    async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=KEY) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/nowhere")).status_code == 404
        assert (await client.post("/v1/models")).status_code == 405


# While it is at work


@pytest.fixture
def stepped(world: World) -> SteppedGenerator:
    generator = SteppedGenerator(pieces=["one ", "two ", "three"])
    world.generator = generator
    return generator


async def test_who_comes_in_mid_stream_hears_it_from_the_beginning(
    stepped: SteppedGenerator, process: Process, world: World
) -> None:
    first = process.call(STREAM, asking())
    stepped.let(1)
    await first.until(2)
    second = process.call(STREAM, asking())
    await second.until(2)
    assert second.bodies == first.bodies
    stepped.let(1)
    await asyncio.gather(first.until(3), second.until(3))
    third = process.call(STREAM, asking())
    await third.until(2)
    assert third.bodies == [b"".join(first.bodies)]
    stepped.let(10)
    await asyncio.gather(first.task, second.task, third.task)
    assert told(first) == told(second) == told(third)
    assert [replayed(call) for call in (first, second, third)] == [False, True, True]
    assert len(stepped.requests) == 1
    assert [event.usage is None for event in world.recorder.finished].count(False) == 1
    assert first.sent[0]["status"] == 200


async def test_who_comes_before_the_first_output_joins_too(
    stepped: SteppedGenerator, process: Process
) -> None:
    calls = [process.call(INFER, asking()) for _ in range(5)]
    await until(lambda: stepped.running == 1)
    stepped.let(10)
    await asyncio.gather(*(call.task for call in calls))
    assert len({told(call) for call in calls}) == 1
    assert [replayed(call) for call in calls] == [False, True, True, True, True]
    assert len(stepped.requests) == 1


async def test_another_request_cannot_join(stepped: SteppedGenerator, process: Process) -> None:
    first = process.call(INFER, asking())
    await until(lambda: stepped.running == 1)
    other = process.call(INFER, asking(prompt="other"))
    await other.task
    assert other.status == 409
    stepped.let(10)
    await first.task
    assert first.status == 200


async def test_who_has_joined_hears_of_a_failure(
    stepped: SteppedGenerator, process: Process, world: World
) -> None:
    stepped.error, stepped.error_after = UpstreamError("lost"), 1
    first = process.call(CHAT, chatting(stream=True))
    stepped.let(1)
    await first.until(2)
    second = process.call(CHAT, chatting(stream=True))
    await second.until(2)
    stepped.let(1)
    await asyncio.gather(first.task, second.task)
    assert told(first) == told(second)
    assert b"UPSTREAM_ERROR" in told(second)
    assert [event.code for event in world.recorder.finished] == ["UPSTREAM_ERROR"] * 2
    assert await kept(process) == 0


async def test_a_slow_client_holds_up_nobody(stepped: SteppedGenerator, process: Process) -> None:
    slow, quick = process.call(STREAM, asking()), process.call(STREAM, asking())
    slow.writable.clear()
    stepped.let(10)
    await quick.task
    assert not slow.task.done()
    slow.writable.set()
    await slow.task
    assert told(slow) == told(quick)


# In another process


@pytest.mark.parametrize("path", [INFER, STREAM])
async def test_another_process_waits_for_the_answer(
    stepped: SteppedGenerator, start: Start, path: str
) -> None:
    here, there = await start(), await start()
    first = here.call(path, asking())
    await until(lambda: stepped.running == 1)
    seen = asyncio.Event()
    look = there.records.look

    async def watched(tenant: str, key: str, fingerprint: str) -> Busy | Answer | None:
        seen.set()
        return await look(tenant, key, fingerprint)

    there.records.look = watched  # type: ignore[method-assign]
    second = there.call(path, asking())
    await asyncio.wait_for(seen.wait(), 30)
    refused = there.call(path, asking(prompt="other"))
    await refused.task
    assert refused.status == 409
    stepped.let(10)
    await asyncio.gather(first.task, second.task)
    assert told(first) == told(second)
    assert (replayed(first), replayed(second)) == (False, True)
    assert len(stepped.requests) == 1


async def test_what_a_crashed_process_began_is_done_when_its_lease_is_over(
    process: Process, world: World, clock: Clock
) -> None:
    body = b'{"model":"smollm2","prompt":"hi"}'
    fingerprint = fingerprint_of(scope(path=INFER), body)
    crashed = await process.records.begin("public", KEY["idempotency-key"], fingerprint)
    assert isinstance(crashed, Lease)
    call = process.call(INFER, asking())
    clock.now += LEASE_S - 1
    await asyncio.sleep(0.1)
    assert call.sent == []
    clock.now += 1
    await asyncio.wait_for(call.task, 30)
    assert call.status == 200
    assert not replayed(call)
    assert not await process.records.finish(crashed, None)


async def test_long_work_keeps_its_lease(
    stepped: SteppedGenerator, process: Process, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "LEASE_S", 0.03)
    call = process.call(INFER, asking())
    await until(lambda: stepped.running == 1)
    [fingerprint] = {fingerprint_of(scope(path=INFER), b'{"model":"smollm2","prompt":"hi"}')}
    ends = []
    for _ in range(3):
        clock.now += LEASE_S - 1
        async with asyncio.timeout(30):
            while True:
                found = await process.records.look("public", KEY["idempotency-key"], fingerprint)
                assert isinstance(found, Busy)
                if found.until.timestamp() == clock.now + LEASE_S:
                    break
        ends.append(found.until)
    assert ends == sorted(set(ends))
    stepped.let(10)
    await call.task
    assert call.status == 200


# Clients that go


async def test_who_goes_alone_takes_the_work_along(
    stepped: SteppedGenerator, process: Process, world: World
) -> None:
    gone = process.call(STREAM, asking())
    stepped.let(1)
    await gone.until(2)
    gone.hang_up()
    await asyncio.wait_for(gone.task, 30)
    await until(lambda: stepped.running == 0)
    assert stepped.cancelled == [stepped.requests[0].id]
    [event] = world.recorder.finished
    assert (event.status, event.model, event.usage) == (499, "smollm2", None)
    assert event.ttft_s is not None
    stepped.let(10)
    again = process.call(STREAM, asking())
    await again.task
    assert (again.status, replayed(again)) == (200, False)
    assert len(stepped.requests) == 2


@pytest.mark.parametrize("how", ["hang up", "cancel"])
async def test_who_goes_leaves_the_work_to_those_who_joined(
    stepped: SteppedGenerator, process: Process, world: World, how: str
) -> None:
    first = process.call(STREAM, asking())
    stepped.let(1)
    await first.until(2)
    second, third = process.call(STREAM, asking()), process.call(STREAM, asking())
    await asyncio.gather(second.until(2), third.until(2))
    for leaving in (first, third):
        leaving.hang_up() if how == "hang up" else leaving.task.cancel()  # as Ray Serve does
        await asyncio.wait([leaving.task], timeout=30)
        assert leaving.task.done()
    assert stepped.running == 1
    stepped.let(10)
    await second.task
    assert b"three" in told(second)
    events = world.recorder.finished
    assert [event.status for event in events] == [499, 499, 200]
    assert [event.usage is not None for event in events] == [False, False, True], "billed once"
    assert [event.model for event in events] == ["smollm2", None, "smollm2"]
    last = process.call(STREAM, asking())
    await last.task
    assert told(last) == told(second)
    assert len(stepped.requests) == 1


async def test_when_all_who_joined_have_gone_too(
    stepped: SteppedGenerator, process: Process
) -> None:
    calls = [process.call(INFER, asking()) for _ in range(3)]
    await until(lambda: stepped.running == 1)
    for call in calls:
        assert stepped.running == 1
        call.hang_up()
        await asyncio.wait_for(call.task, 30)
    await until(lambda: stepped.running == 0)
    assert len(stepped.cancelled) == 1
    await quiet()
    stepped.let(10)
    again = process.call(INFER, asking(prompt="other"))
    await again.task
    assert again.status == 200, "the key is free, for any request"


async def test_a_deadline_is_each_caller_s_own(
    stepped: SteppedGenerator, world: World, start: Start
) -> None:
    world.config = GatewayConfig(request_timeout_s=0.3)
    hasty = await start()
    world.config = GatewayConfig()
    patient = await start()
    late = hasty.call(CHAT, chatting(stream=True))
    stepped.let(1)
    await late.until(2)
    await asyncio.wait_for(late.task, 30)
    assert b"TIMEOUT" in told(late)
    await until(lambda: stepped.running == 0)
    stepped.let(10)
    again = patient.call(CHAT, chatting(stream=True))
    await again.task
    assert told(again).endswith(b"data: [DONE]\n\n")


# Whose key it is


async def test_tenants_share_nothing(world: World, start: Start) -> None:
    process = await start()
    services = replace(world.services(), idempotency=process.records, authenticator=Keys())
    shared = Process(create_app(services), process.records, process.database)
    async with shared.client() as client:
        answers: dict[str, bytes] = {}
        for tenant, prompt in [("acme", "a"), ("other", "b"), ("acme", "a"), ("other", "b")]:
            answer = await client.post(
                INFER, json=asking(prompt=prompt), headers={"x-api-key": f"{tenant}-developer"}
            )
            assert answer.status_code == 200
            assert replayed(answer) == (tenant in answers)
            assert answers.setdefault(tenant, answer.content) == answer.content
        assert answers["acme"] != answers["other"]
        stranger = await client.post(INFER, json=asking(prompt="a"))
        assert stranger.status_code == 401
        assert not replayed(stranger)
        # The same request of two tenants is carried out for each.
        third = await client.post(
            INFER, json=asking(prompt="a"), headers={"x-api-key": "third-admin"}
        )
        assert not replayed(third)
    assert len(world.generator.requests) == 3


async def test_a_replay_needs_the_right_that_the_route_asks_for(world: World, start: Start) -> None:
    process = await start()
    services = replace(
        world.services(),
        idempotency=process.records,
        directory=Directory(process.database, Peppers([b"pepper" * 4])),
        authenticator=Keys(),
    )
    shared = Process(create_app(services), process.records, process.database)
    async with shared.client() as client:

        async def create(role: str) -> httpx.Response:
            return await client.post(
                "/admin/v1/tenants", json={"name": "new"}, headers={"x-api-key": f"acme-{role}"}
            )

        refused = await create("developer")
        assert refused.status_code == 403
        assert await kept(process) == 0, "nor does a refusal stand in the way of who may"
        made = await create("admin")
        assert made.status_code == 200
        again = await create("admin")
        assert (again.content, replayed(again)) == (made.content, True)
        assert (await create("developer")).status_code == 403


async def test_a_secret_is_not_written_down(
    world: World, start: Start, tmp_path: Path, contract: Contract
) -> None:
    process = await start()
    directory = Directory(process.database, Peppers([b"pepper" * 4]))
    await directory.create("new", plan="free", by="me")
    services = replace(
        world.services(), idempotency=process.records, directory=directory, authenticator=Keys()
    )
    shared = Process(create_app(services), process.records, process.database)
    async with shared.client(**{"x-api-key": "acme-admin"}) as client:
        client.event_hooks = {"response": [contract.check]}
        wrong = await client.post("/admin/v1/tenants/nobody/keys", json={})
        assert wrong.status_code == 404
        client.headers["idempotency-key"] = "another"
        issued = await client.post("/admin/v1/tenants/new/keys", json={})
        assert issued.status_code == 200
        again = await client.post("/admin/v1/tenants/new/keys", json={})
        assert again.status_code == 409
        assert "secret" in again.json()["error"]["message"]
    assert len(await directory.keys("new")) == 1
    async with process.database.read() as connection:
        bodies = (await connection.scalars(sa.select(tables.idempotency.c.body))).all()
    assert [body is None for body in bodies].count(True) == 1
    assert not any(b"fr_" in body for body in bodies if body is not None)


# A database that is down


async def test_out_of_reach_is_503_and_nothing_is_done(world: World) -> None:
    services = replace(
        world.services(), idempotency=IdempotencyRecords(LazyDatabase(UNREACHABLE), ttl_s=1)
    )
    transport = httpx.ASGITransport(create_app(services))
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        down = await client.post(CHAT, json=chatting(), headers=KEY)
        assert down.status_code == 503
        assert down.json()["error"]["code"] == "STATE_UNAVAILABLE"
        assert down.headers["retry-after"] == "1"
        assert world.generator.requests == []
        assert (await client.post(CHAT, json=chatting())).status_code == 200


async def test_a_database_that_hangs_is_not_waited_for(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = sqlite_url(tmp_path / "frontier.db")
    async with await Database.open(url) as database, await Database.open(url) as other:
        records = IdempotencyRecords(database, ttl_s=3600)
        process = Process(
            create_app(replace(world.services(), idempotency=records)), records, database
        )
        async with other.write():  # longer than anybody waits, were it not for PATIENCE_S
            with monkeypatch.context() as patched:
                patched.setattr(store, "PATIENCE_S", 0.05)
                down = process.call(INFER, asking())
                await asyncio.wait_for(down.task, 30)
            assert down.status == 503
        assert world.generator.requests == []
        again = process.call(INFER, asking())
        await asyncio.wait_for(again.task, 30)
        assert (again.status, replayed(again)) == (200, False), "no lease came in after all"
        await quiet()


async def test_an_answer_goes_out_though_it_cannot_be_written_down_in_time(
    tmp_path: Path, world: World, stepped: SteppedGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = sqlite_url(tmp_path / "frontier.db")
    async with await Database.open(url) as database, await Database.open(url) as other:
        records = IdempotencyRecords(database, ttl_s=3600)
        process = Process(
            create_app(replace(world.services(), idempotency=records)), records, database
        )
        first = process.call(INFER, asking())
        await running(world)
        async with other.write():
            with monkeypatch.context() as patched:
                patched.setattr(store, "PATIENCE_S", 0.05)
                stepped.let(10)
                await asyncio.wait_for(first.task, 30)
            assert first.status == 200
        again = process.call(INFER, asking())
        await asyncio.wait_for(again.task, 30)
        assert replayed(again)
        assert told(again) == told(first)
        await quiet()


async def test_what_could_not_be_written_down_is_tried_again(
    process: Process, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "INSIST_S", (0, 0, 0))
    finish, tries = process.records.finish, 0

    async def unreliable(lease: Lease, answer: Answer | None) -> bool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise StateUnavailable("the power failed")
        return await finish(lease, answer)

    monkeypatch.setattr(process.records, "finish", unreliable)
    first = process.call(INFER, asking())
    await first.task
    again = process.call(INFER, asking())
    await asyncio.wait_for(again.task, 30)
    assert (first.status, tries) == (200, 3)
    assert replayed(again)
    assert told(again) == told(first)


# What is deleted


async def test_gateways_delete_what_has_expired(start: Start, world: World, clock: Clock) -> None:
    before = await start()
    async with before.client() as client:
        await client.post(INFER, json=asking())
    assert await kept(before) == 1
    clock.now += 3600
    process = await start()
    async with process.client(**{"idempotency-key": "another"}) as client:
        await client.post(INFER, json=asking())
    async with asyncio.timeout(30):
        while await kept(process) != 1:  # noqa: ASYNC110  # it is deleted beside the request
            await asyncio.sleep(0.01)


# The official client


def closing(app: ASGIApp, database: LazyDatabase) -> ASGIApp:
    """The server's loop is the one that can close what it has opened."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await database.close()
        await send({"type": "lifespan.shutdown.complete"})

    return served


def test_the_official_client(tmp_path: Path, world: World) -> None:
    url = sqlite_url(tmp_path / "frontier.db")

    async def migrate() -> None:
        await (await Database.open(url)).close()

    asyncio.run(migrate())
    database = LazyDatabase(url)
    records = IdempotencyRecords(database, ttl_s=3600)
    app = closing(create_app(replace(world.services(), idempotency=records)), database)
    with (
        LiveServer(app) as server,
        OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        for key, stream in (("whole", False), ("stream", True)):
            answers = []
            for _ in range(2):
                raw = client.chat.completions.with_raw_response.create(
                    model="smollm2",
                    messages=[{"role": "user", "content": "hi"}],
                    stream=stream,
                    extra_headers={"Idempotency-Key": key},
                )
                found: Any = raw.parse()
                if stream:
                    found = list(found)
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in found)
                else:
                    text = found.choices[0].message.content
                assert text == "Hello!"
                answers.append((found, raw.headers.get("idempotent-replayed")))
            assert answers[0][0] == answers[1][0]
            assert [header for _, header in answers] == [None, "true"]
    assert len(world.generator.requests) == 2
    with sqlite3.connect(tmp_path / "frontier.db") as file:
        assert file.execute("SELECT count(*) FROM idempotency").fetchone() == (2,)
    file.close()


def test_it_is_documented(contract: Contract) -> None:
    for path, operations in contract.document["paths"].items():
        for method, operation in operations.items():
            names = {parameter["name"] for parameter in operation["parameters"]}
            takes = method == "post"
            assert ("Idempotency-Key" in names) == takes, (path, method)
            if takes:
                assert "CONFLICT" in operation["responses"]["409"]["description"]
            if takes and path != webhooks.PATH:  # which knows deliveries by itself
                assert "Idempotent-Replayed" in operation["responses"]["200"]["headers"]
