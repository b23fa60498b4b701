"""A tenant's limits at the gateway: headers, refusals, and what each ending costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from deployments.caching.cache import ResponseCache
from deployments.config import Cors, GatewayConfig, PlanConfig, PriceConfig
from deployments.gateway.app import create_app
from deployments.tenants.idempotency import IdempotencyRecords
from deployments.tenants.meter import Meter
from deployments.tenants.principal import GRANTS, Principal, Role
from models.errors import InternalError, Overloaded, Timeout
from state.cache import Bounds, Lenient
from state.cache.memory import MemoryCache
from state.counters import Strategy
from state.counters.memory import MemoryCounters
from state.database import Database
from state.places import sqlite_url
from tests.gateway.asgi import BASE, RawCall
from tests.gateway.contract import Contract
from tests.gateway.fakes import World
from tests.gateway.test_chat import PATH as CHAT
from tests.gateway.test_chat import asking
from tests.gateway.test_embeddings import PATH as EMBEDDINGS

SMALL = PlanConfig(requests_per_minute=5, tokens_per_minute=1000, concurrent_requests=2)
PLANS = {"small": SMALL}


class Acme:
    """Everybody is this tenant."""

    async def principal(self, credential: str) -> Principal:
        return Principal(
            tenant="acme",
            subject="key:1",
            role=Role.DEVELOPER,
            scopes=GRANTS[Role.DEVELOPER],
            plan="small",
        )


@pytest.fixture
async def meter(world: World) -> AsyncIterator[Meter]:
    made = Meter(
        counters=MemoryCounters(lambda: 1_800_000_000.0),
        plans=PLANS,
        strategy=Strategy.FIXED_WINDOW,
        prices={"smollm2": PriceConfig(input_per_million=2, output_per_million=10)},
        emit=world.recorder,
    )
    world.meter, world.authenticator = made, Acme()
    yield made
    await made.close()


@pytest.fixture
async def client(
    world: World, meter: Meter, contract: Contract
) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(world.services()), raise_app_exceptions=False),
        base_url=BASE,
        headers={"authorization": "Bearer fr_1"},
        event_hooks={"response": [contract.check]},
    ) as client:
        yield client


async def left(meter: Meter) -> dict[str, int]:
    while meter._tasks:
        await asyncio.wait(meter._tasks)
    levels = await meter.levels(await Acme().principal(""))
    return {level.name: level.remaining for level in levels}


async def test_an_answer_says_where_the_limits_stand(
    client: httpx.AsyncClient, meter: Meter
) -> None:
    answer = await client.post(CHAT, json=asking(max_tokens=100))
    assert answer.status_code == 200
    told = {name: value for name, value in answer.headers.items() if "limit" in name}
    reserved = 1000 - int(told["x-tokenlimit-remaining-permin"])
    assert 100 < reserved < 300
    assert told.pop("ratelimit-policy").startswith('"requests_per_minute";q=5;w=60, "tokens')
    assert told.pop("ratelimit").startswith('"requests_per_minute";r=4;t=60, ')
    assert told == {
        "x-ratelimit-limit-rpm": "5",
        "x-ratelimit-remaining-rpm": "4",
        "x-ratelimit-reset-minute": "60",
        "x-ratelimit-limit": "5",
        "x-ratelimit-remaining": "4",
        "x-ratelimit-reset": "60",
        "x-tokenlimit-limit-permin": "1000",
        "x-tokenlimit-remaining-permin": f"{1000 - reserved}",
        "x-ratelimit-limit-requests": "5",
        "x-ratelimit-remaining-requests": "4",
        "x-ratelimit-reset-requests": "60s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": f"{1000 - reserved}",
        "x-ratelimit-reset-tokens": "60s",
    }
    assert await left(meter) == {
        "requests_per_minute": 4,
        "tokens_per_minute": 1000 - 8,  # 5 of the prompt and 3 of the answer, as the engine says
        "concurrent_requests": 2,
    }


async def test_openais_names_are_for_openais_routes(
    client: httpx.AsyncClient, meter: Meter
) -> None:
    answer = await client.post("/v1/models/digits/predict", json={"inputs": [1]})
    assert answer.headers["x-ratelimit-remaining"] == "4"
    assert not [name for name in answer.headers if name.endswith(("-requests", "-tokens"))]


async def test_a_script_of_an_allowed_origin_may_read_them(world: World, meter: Meter) -> None:
    world.config = GatewayConfig(cors=Cors(allow_origins=("https://a.example",)))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(world.services())),
        base_url=BASE,
        headers={"authorization": "Bearer fr_1", "origin": "https://a.example"},
    ) as client:
        answer = await client.post(CHAT, json=asking(max_tokens=100))
    exposed = answer.headers["access-control-expose-headers"].lower().split(", ")
    told = {name for name in answer.headers if "limit" in name}
    assert len(told) == 16
    assert told <= set(exposed)


async def test_a_stream_is_settled_by_its_usage(client: httpx.AsyncClient, meter: Meter) -> None:
    answer = await client.post(CHAT, json=asking(stream=True, max_tokens=100))
    assert answer.status_code == 200
    assert (await left(meter))["tokens_per_minute"] == 992


async def test_a_limit_that_is_reached(client: httpx.AsyncClient, meter: Meter) -> None:
    for _ in range(5):
        assert (await client.post(CHAT, json=asking(max_tokens=1))).status_code == 200
    refused = await client.post(CHAT, json=asking(max_tokens=1))
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "RATE_LIMITED"
    assert "5 requests per minute" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "60"
    assert refused.headers["x-ratelimit-remaining-rpm"] == "0"


async def test_what_cannot_be_reserved_is_not_begun(
    client: httpx.AsyncClient, world: World, meter: Meter
) -> None:
    for stream in (False, True):
        refused = await client.post(CHAT, json=asking(max_tokens=1500, stream=stream))
        assert refused.status_code == 429
        assert "ask for less" in refused.json()["error"]["message"]
        assert "retry-after" not in refused.headers
    assert world.generator.requests == []
    assert (await left(meter))["requests_per_minute"] == 5, "a refusal takes nothing"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "tokens"),
    [
        (Overloaded("full"), 0),
        (InternalError("the step failed"), 0),
        (Timeout("late", details={"phase": "queue"}), 0),
    ],
)
async def test_what_was_never_begun_costs_nothing(
    client: httpx.AsyncClient,
    world: World,
    meter: Meter,
    error: Exception,
    tokens: int,
    stream: bool,
) -> None:
    world.generator.error = error
    await client.post(CHAT, json=asking(stream=stream, max_tokens=100))
    assert (await left(meter))["tokens_per_minute"] == 1000 - tokens


async def test_a_stream_that_breaks_costs_what_was_seen(
    client: httpx.AsyncClient, world: World, meter: Meter
) -> None:
    world.generator.error, world.generator.error_after = InternalError("lost"), 2
    await client.post(CHAT, json=asking(stream=True, max_tokens=500))
    spent = 1000 - (await left(meter))["tokens_per_minute"]
    assert 2 < spent < 250, "two tokens and the bound of the prompt, not what was reserved"


async def test_a_client_that_leaves_frees_its_place_and_pays_what_it_got(
    client: httpx.AsyncClient, world: World, meter: Meter
) -> None:
    world.generator.delay_s, world.generator.pieces = 0.01, ("a",) * 500
    headers = {"content-type": "application/json", "authorization": "Bearer fr_1"}
    call = RawCall(
        create_app(world.services()), CHAT, asking(stream=True, max_tokens=600), headers=headers
    )
    await call.until(4)
    assert (await left(meter))["concurrent_requests"] == 1
    call.hang_up()
    await call.task
    after = await left(meter)
    assert after["concurrent_requests"] == 2
    assert 500 < after["tokens_per_minute"] < 998


@pytest.mark.parametrize("stream", [True, False])
async def test_a_deadline_amid_the_answer_is_settled(
    world: World, meter: Meter, stream: bool
) -> None:
    world.config = GatewayConfig(request_timeout_s=0.5)
    world.generator.delay_s, world.generator.pieces = 0.01, ("a",) * 10_000
    if not stream:
        world.generator.delay_s = 60.0
    headers = {"content-type": "application/json", "authorization": "Bearer fr_1"}
    call = RawCall(
        create_app(world.services()), CHAT, asking(stream=stream, max_tokens=600), headers=headers
    )
    await call.task
    [event] = world.recorder.finished
    assert event.code == "TIMEOUT"
    after = await left(meter)
    assert after["concurrent_requests"] == 2
    spent = 1000 - after["tokens_per_minute"]
    if stream:
        assert event.usage is not None
        assert spent == event.usage.prompt_tokens + event.usage.completion_tokens
        assert 0 < event.usage.completion_tokens < 100, "what had come, not what was reserved"
    else:
        assert spent > 600, "it was worked on, and nobody says how much"
    assert event.cost > 0


async def test_more_than_may_run_at_once(
    client: httpx.AsyncClient, world: World, meter: Meter
) -> None:
    world.generator.delay_s = 0.05
    answers = await asyncio.gather(
        *(client.post(CHAT, json=asking(max_tokens=1)) for _ in range(4))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]


async def test_embeddings_are_metered_too(client: httpx.AsyncClient, meter: Meter) -> None:
    answer = await client.post(EMBEDDINGS, json={"model": "minilm", "input": ["one", "two"]})
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-remaining-rpm"] == "4"
    spent = 1000 - (await left(meter))["tokens_per_minute"]
    assert spent == answer.json()["usage"]["prompt_tokens"]
    refused = await client.post(EMBEDDINGS, json={"model": "minilm", "input": ["x" * 900] * 2})
    assert refused.status_code == 429


async def test_predictions_are_requests(client: httpx.AsyncClient, meter: Meter) -> None:
    answer = await client.post("/v1/models/digits/predict", json={"inputs": [1]})
    assert answer.status_code == 200
    assert (await left(meter))["requests_per_minute"] == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_replay_costs_nothing(
    world: World, meter: Meter, contract: Contract, tmp_path: Path, stream: bool
) -> None:
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        services = replace(world.services(), idempotency=IdempotencyRecords(database, ttl_s=60))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(services)),
            base_url=BASE,
            headers={"authorization": "Bearer fr_1", "idempotency-key": "once"},
            event_hooks={"response": [contract.check]},
        ) as client:
            first = await client.post(CHAT, json=asking(max_tokens=100, stream=stream))
            after = await left(meter)
            again = await client.post(CHAT, json=asking(max_tokens=100, stream=stream))
    assert again.headers["idempotent-replayed"] == "true"
    assert again.text == first.text
    assert first.headers["x-ratelimit-remaining-rpm"] == "4"
    assert "x-ratelimit-remaining-rpm" not in again.headers
    assert await left(meter) == after
    assert [event.cost for event in world.recorder.finished] == [40, 0]
    assert len(world.generator.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_remembered_costs_nothing(
    world: World, meter: Meter, contract: Contract, stream: bool
) -> None:
    world.cache = ResponseCache(
        store=Lenient(MemoryCache(Bounds(max_bytes=10**6, max_entry_bytes=10**5))),
        ttl_s=60,
        emit=world.recorder,
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(world.services())),
        base_url=BASE,
        headers={"authorization": "Bearer fr_1"},
        event_hooks={"response": [contract.check]},
    ) as client:
        body = asking(max_tokens=100, stream=stream, temperature=0)
        answers = [await client.post(CHAT, json=body) for _ in range(2)]
    assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit"]
    assert (await left(meter))["tokens_per_minute"] == 992
    assert (await left(meter))["requests_per_minute"] == 3
    told = [(event.cost, event.worked) for event in world.recorder.finished]
    assert told == [(40, True), (0, False)]


async def test_what_it_cost_is_told_with_the_end(
    client: httpx.AsyncClient, world: World, meter: Meter
) -> None:
    await client.post(CHAT, json=asking(max_tokens=100))
    [event] = world.recorder.finished
    assert event.cost == 5 * 2 + 3 * 10
    assert event.subject == "key:1"
