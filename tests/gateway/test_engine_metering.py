"""Quotas over a real engine: what is settled is what it did, and never more than was reserved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp

from deployments.caching.cache import ResponseCache
from deployments.config import EngineConfig, PlanConfig, PriorityClass, QueueConfig
from deployments.engines.engine import Engine
from deployments.gateway.app import create_app
from deployments.gateway.metering import prompt_bound
from deployments.gateway.services import ServedModel
from deployments.tenants.meter import Meter, Work
from deployments.tenants.plans import LimitName
from models.contracts import ChatMessage, Conversation
from state.cache import Bounds, Lenient
from state.cache.memory import MemoryCache
from state.counters import Strategy
from state.counters.memory import MemoryCounters
from tests import tiny_models
from tests.engines.clients import idle, until
from tests.engines.gate import Gate
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.fakes import World
from tests.gateway.test_quotas import Acme

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DAY = 100_000
HELLO = Conversation((ChatMessage(role="user", content="Hello"),))
KEY = {"authorization": "Bearer fr_1", "content-type": "application/json"}
WORDY = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }} {{ m.content }}"
    "{{ 'Be brief, be kind, and be right in all that you say to anybody. ' * 3 }}</{{ m.role }}>"
    "{% endfor %}<assistant>"
)
"""A template that adds more than anybody would reserve for one, and says everything twice."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("plain"), context=4096)


@pytest.fixture(scope="module")
def wordy(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.make("llama", tmp_path_factory.mktemp("wordy"), context=4096)
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.chat_template = WORDY
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


class Metered:
    """A gateway over one engine, and a tenant whose tokens of the day are counted."""

    def __init__(self, engine: Engine, *, cache: bool = False, **limits: int) -> None:
        self.engine = engine
        self.world = World(authenticator=Acme())
        self.meter = self.world.meter = Meter(
            counters=MemoryCounters(lambda: 1_800_000_000.0),
            plans={"small": PlanConfig(**({"tokens_per_day": DAY} | limits))},  # type: ignore[arg-type]
            strategy=Strategy.FIXED_WINDOW,
            prices={},
            emit=self.world.recorder,
        )
        if cache:
            bounds = Bounds(max_bytes=10**6, max_entry_bytes=10**5)
            store = Lenient(MemoryCache(bounds))
            self.world.cache = ResponseCache(store=store, ttl_s=60, emit=self.world.recorder)
        model = ServedModel(
            name="tiny", task="generate", created=1, generator=engine, identity="tiny-1"
        )
        services = self.world.services()
        self.app: ASGIApp = create_app(replace(services, models={"tiny": model}))

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=KEY) as client:
            yield client

    def call(self, path: str = COMPLETIONS, **fields: Any) -> RawCall:
        body = {"model": "tiny", "prompt": "Hello", "ignore_eos": True, "temperature": 0, **fields}
        return RawCall(self.app, path, body, headers=KEY)

    async def levels(self) -> dict[str, int]:
        while self.meter._tasks:
            await asyncio.wait(self.meter._tasks)
        return {each.name: each.remaining for each in await self.meter.levels(await who())}

    async def spent(self) -> int:
        return DAY - (await self.levels())[LimitName.TOKENS_PER_DAY]


async def who() -> Any:
    return await Acme().principal("")


def start(engines: list[Engine], folder: Path, *, slots: int = 4) -> Engine:
    told = EngineConfig(slots=slots, threads=1, dtype="float64")
    queue = QueueConfig(standard=PriorityClass(capacity=2, weight=4, timeout_s=30))
    engines.append(Engine("tiny", folder, told, queue))
    return engines[-1]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_pays_for_what_was_done(
    engines: list[Engine], plain: Path, stream: bool, again: bool
) -> None:
    """``again``: Ray Serve cancels the task of a client that has gone, as we do ourselves."""
    engine = start(engines, plain)
    gate, it = Gate(engine), Metered(engine)
    call = it.call(max_tokens=400, stream=stream)
    await gate.entered()
    await gate.steps(10)
    assert await it.spent() >= 400, "all of it is reserved"
    call.hang_up()
    if again:
        await asyncio.sleep(0.02)
        call.task.cancel()
        await asyncio.sleep(0.02)
    await until(lambda: bool(engine._cancelled))
    gate.open()
    await asyncio.wait([call.task])
    [event] = it.world.recorder.finished
    assert event.status == 499
    assert event.usage is not None
    assert event.usage.prompt_tokens == 5
    assert 10 <= event.usage.completion_tokens < 40
    assert await it.spent() == 5 + event.usage.completion_tokens
    await idle(engine)


async def test_a_client_that_leaves_the_queue_pays_nothing(
    engines: list[Engine], plain: Path
) -> None:
    engine = start(engines, plain, slots=1)
    gate, it = Gate(engine), Metered(engine)
    first = it.call(max_tokens=3)
    await gate.entered()
    second = it.call(max_tokens=300)
    await until(lambda: len(engine._scheduler.queue) == 1)
    second.hang_up()
    await until(lambda: bool(engine._cancelled))  # or it might begin before that is known
    gate.open()
    await asyncio.gather(first.task, second.task)
    assert await it.spent() == 5 + 3


async def test_a_client_that_leaves_several_prompts(engines: list[Engine], plain: Path) -> None:
    engine = start(engines, plain)
    gate, it = Gate(engine), Metered(engine)
    call = it.call(prompt=["a", "bcd"], max_tokens=200)
    await gate.entered()
    await gate.steps(6)
    call.hang_up()
    await until(lambda: len(engine._cancelled) == 2)
    gate.open()
    await call.task
    [event] = it.world.recorder.finished
    assert event.usage is not None
    assert event.usage.prompt_tokens == 4
    assert await it.spent() == 4 + event.usage.completion_tokens < 100


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_whose_length_is_left_open_fills_the_context(
    engines: list[Engine], tmp_path: Path, stream: bool
) -> None:
    """Nobody but the engine knows its context here: what is reserved is no demand."""
    it = Metered(start(engines, tiny_models.make("llama", tmp_path)))
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "tiny", "messages": messages, "ignore_eos": True, "stream": stream}
    async with it.client() as client:
        answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    assert await it.spent() == tiny_models.CONTEXT


async def test_an_engine_that_does_not_tell_is_paid_what_was_reserved(
    engines: list[Engine], plain: Path
) -> None:
    engine = start(engines, plain)
    gate, it = Gate(engine), Metered(engine)
    call = it.call(max_tokens=400)
    await gate.entered()
    engine.accounts._open.clear()  # as if the replica had been killed
    call.hang_up()
    gate.open()
    await call.task
    assert await it.spent() == prompt_bound("Hello") + 400


async def test_work_that_others_have_joined_is_paid_by_whoever_stays(
    engines: list[Engine], plain: Path
) -> None:
    """Or to begin, to join, and to leave would be the way to be answered for nothing."""
    engine = start(engines, plain)
    gate, it = Gate(engine), Metered(engine, cache=True)
    first = it.call(max_tokens=20, stream=True)
    await gate.entered()
    second, third = it.call(max_tokens=20), it.call(max_tokens=20, stream=True)
    await asyncio.sleep(0.05)
    await gate.steps(3)
    first.hang_up()
    await first.task
    gate.open()
    await asyncio.gather(second.task, third.task)
    assert len(it.world.recorder.finished) == 3
    paid = [
        event for event in it.world.recorder.finished if event.worked and event.usage is not None
    ]
    assert [event.usage.completion_tokens for event in paid if event.usage] == [20]
    assert await it.spent() == 5 + 20


@pytest.mark.parametrize("stream", [False, True])
async def test_a_template_that_adds_more_than_was_reserved(
    engines: list[Engine], wordy: Path, stream: bool
) -> None:
    it = Metered(start(engines, wordy), requests_per_day=10, concurrent_requests=5)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 4,
        "ignore_eos": True,
        "stream": stream,
    }
    async with it.client() as client:
        answer = await client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    [event] = it.world.recorder.finished
    assert event.usage is not None
    assert event.usage.prompt_tokens > prompt_bound(HELLO)
    levels = await it.levels()
    assert levels == {
        "requests_per_day": 9,
        "tokens_per_day": DAY - event.usage.prompt_tokens - 4,
        "concurrent_requests": 5,
    }


async def test_what_cannot_be_reserved_besides_is_not_begun(
    engines: list[Engine], wordy: Path
) -> None:
    message = {"role": "user", "content": "Hello"}
    reserved = prompt_bound(HELLO) + 4
    it = Metered(start(engines, wordy), tokens_per_day=reserved + 10)
    body = {"model": "tiny", "messages": [message], "max_tokens": 4}
    async with it.client() as client:
        answer = await client.post(CHAT, json=body)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "RATE_LIMITED"
    assert (await it.levels())[LimitName.TOKENS_PER_DAY] == reserved + 10, "nothing was used"


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    contents=st.lists(st.text(max_size=40), min_size=1, max_size=4),
    max_tokens=st.integers(1, 4),
    limit=st.integers(1, 2000),
)
def test_nothing_passes_a_limit_whatever_a_template_does(
    shared: Metered, contents: list[str], max_tokens: int, limit: int
) -> None:
    """Any conversation, any limit: what was used fits into what was there, or nothing was used."""

    async def ask() -> None:
        shared.meter.counters = MemoryCounters(lambda: 1_800_000_000.0)
        shared.meter.plans = {"small": PlanConfig(tokens_per_day=limit)}
        shared.world.recorder.events.clear()
        messages = [{"role": "user", "content": content or "x"} for content in contents]
        body = {"model": "tiny", "messages": messages, "max_tokens": max_tokens}
        async with shared.client() as client:
            answer = await client.post(CHAT, content=orjson.dumps(body))
        [event] = shared.world.recorder.finished
        left = (await shared.levels())[LimitName.TOKENS_PER_DAY]
        if answer.status_code == 200:
            assert event.usage is not None
            used = Work(
                prompt_tokens=event.usage.prompt_tokens,
                completion_tokens=event.usage.completion_tokens,
            )
            assert left == limit - used.tokens >= 0
        else:
            assert answer.status_code in (400, 429), answer.text
            assert left == limit

    asyncio.run(ask())


@pytest.fixture(scope="module")
def shared(wordy: Path) -> Iterator[Metered]:
    engine = Engine("tiny", wordy, EngineConfig(slots=4, threads=1), QueueConfig())
    yield Metered(engine)
    engine.close()


async def test_who_is_shed_is_told_when_to_come_back_by_the_measured_rate(
    engines: list[Engine], plain: Path
) -> None:
    """Three places of a queue, two of them full; each answer takes two seconds of this clock."""
    now = 100.0
    config = EngineConfig(slots=1, threads=1, dtype="float64")
    queue = QueueConfig(standard=PriorityClass(capacity=4, weight=4, timeout_s=600))
    engines.append(Engine("tiny", plain, config, queue, clock=lambda: now))
    gate, it = Gate(engines[-1]), Metered(engines[-1])
    calls = [it.call(max_tokens=1)]
    await gate.entered()
    calls += [it.call(max_tokens=1) for _ in range(4)]
    await until(lambda: len(engines[-1]._scheduler.queue) == 4)
    full = it.call(max_tokens=1)
    await full.task
    assert full.status == 429
    assert retry_after(full) == 60, "nothing is measured yet; a minute is the most that is said"
    for waiting in (3, 2, 1):
        now += 2
        await gate.steps()  # one answer, and the next takes its place
        await until(lambda waiting=waiting: len(engines[-1]._scheduler.queue) == waiting)  # type: ignore[misc]
    calls += [it.call(max_tokens=1) for _ in range(3)]
    await until(lambda: len(engines[-1]._scheduler.queue) == 4)
    full = it.call(max_tokens=1)
    await full.task
    assert full.status == 429
    told = orjson.loads(b"".join(full.bodies))["error"]
    assert told["code"] == "OVERLOADED"
    assert retry_after(full) == 8, "four wait, and one is served every two seconds"
    gate.open()
    await asyncio.gather(*(call.task for call in calls))


def retry_after(call: RawCall) -> int:
    return int(dict(call.sent[0]["headers"])[b"retry-after"])
