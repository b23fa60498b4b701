"""The safety check through the gateway: refused, rerouted, or nobody there to ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from deployments.config import GatewayConfig, PlanConfig, PriceConfig, parse
from deployments.gateway.app import create_app
from deployments.gateway.services import ServedModel, Services
from deployments.guardrails.kinds import Done, Way
from deployments.observability.events import GuardrailActed
from deployments.tenants.meter import Meter
from models.errors import ConfigError, Unavailable
from state.counters import Strategy
from state.counters.memory import MemoryCounters
from tests.gateway.asgi import BASE
from tests.gateway.contract import chunks, data_lines, events
from tests.gateway.fakes import FakeGenerator, World
from tests.gateway.test_guardrails import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    INFER,
    PREDICT,
    STREAM,
    body,
)
from tests.gateway.test_quotas import Acme
from tests.guardrails.encoders import AlarmedEmbedder

REFUSE: dict[str, Any] = {"model": "minilm"}
REROUTE: dict[str, Any] = {"model": "minilm", "on_hit": "reroute", "reroute_to": "strict"}
BAD, FINE = "how to build a bomb", "how to build a shed"
GENERATING = pytest.mark.parametrize("path", [CHAT, COMPLETIONS, INFER, STREAM])


@dataclass
class SafeWorld:
    """A gateway with the check, and a second model that may answer in place of the first."""

    safety: dict[str, Any]
    world: World = field(default_factory=World)
    encoder: AlarmedEmbedder = field(default_factory=AlarmedEmbedder)
    strict: FakeGenerator = field(default_factory=lambda: FakeGenerator(pieces=("I ", "won't.")))
    settings: dict[str, Any] = field(default_factory=dict)

    def services(self) -> Services:
        config = GatewayConfig.model_validate(
            {"guardrails": {"safety": self.safety}, **self.settings}
        )
        made = replace(self.world, config=config).services()
        models = {
            **made.models,
            "minilm": replace(made.models["minilm"], embedder=self.encoder),
            "strict": ServedModel(
                name="strict", task="generate", created=1, generator=self.strict, context=512
            ),
        }
        return replace(made, models=models)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(create_app(self.services()), raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url=BASE, headers={"authorization": "Bearer fr_1"}
        ) as client:
            yield client

    @property
    def told(self) -> list[tuple[Done, Way]]:
        return [
            (event.done, event.way)
            for event in self.world.recorder.events
            if isinstance(event, GuardrailActed) and event.guardrail == "safety"
        ]


@GENERATING
async def test_a_harmless_prompt_is_answered(path: str) -> None:
    safe = SafeWorld(REFUSE)
    async with safe.client() as client:
        answer = await client.post(path, json=body(path, FINE))
    assert answer.status_code == 200
    assert safe.encoder.texts == [FINE]
    assert len(safe.world.generator.requests) == 1
    assert safe.told == []


@GENERATING
async def test_a_harmful_prompt_is_refused(path: str, caplog: pytest.LogCaptureFixture) -> None:
    safe = SafeWorld(REFUSE)
    async with safe.client() as client:
        answer = await client.post(path, json=body(path, BAD))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "INVALID_INPUT")
    assert "'safety' found the category 'unsafe'" in error["message"]
    assert BAD not in answer.text + caplog.text
    assert safe.world.generator.requests == []
    assert safe.told == [(Done.REFUSED, Way.INPUT)]


async def test_one_prompt_of_a_batch_refuses_it() -> None:
    safe = SafeWorld(REFUSE)
    async with safe.client() as client:
        answer = await client.post(COMPLETIONS, json={"model": "smollm2", "prompt": [FINE, BAD]})
    assert answer.status_code == 400
    assert safe.world.generator.requests == []


@GENERATING
@pytest.mark.parametrize("stream", [False, True])
async def test_a_harmful_prompt_is_rerouted(path: str, stream: bool) -> None:
    safe = SafeWorld(REROUTE)
    asked = body(path, BAD) if path in (INFER, STREAM) else body(path, BAD, stream=stream)
    async with safe.client() as client:
        answer = await client.post(path, json=asked)
    assert answer.status_code == 200
    assert safe.world.generator.requests == []
    [request] = safe.strict.requests
    assert request.model == "strict"
    match path:
        case "/v1/infer/stream":
            named = {events(answer.text)[-1][1]["model"]}
        case "/v1/infer":
            named = {answer.json()["data"]["model"]}
        case _ if stream:
            named = {chunk["model"] for chunk in chunks(answer.text)}
            assert data_lines(answer.text)[-1] == "[DONE]"
        case _:
            named = {answer.json()["model"]}
    assert named == {"strict"}, "the answer says who has answered"
    assert "won't" in answer.text
    assert safe.told == [(Done.REROUTED, Way.INPUT)]
    assert safe.world.recorder.finished[0].model == "strict"


async def test_a_batch_is_rerouted_as_a_whole() -> None:
    safe = SafeWorld(REROUTE)
    async with safe.client() as client:
        await client.post(COMPLETIONS, json={"model": "smollm2", "prompt": [FINE, BAD]})
    assert [request.prompt for request in safe.strict.requests] == [FINE, BAD]
    assert safe.world.generator.requests == []


async def test_an_adapter_stays_behind() -> None:
    safe = SafeWorld(REROUTE)
    async with safe.client() as client:
        answer = await client.post(CHAT, json={**body(CHAT, BAD), "model": "smollm2:poet"})
    assert answer.json()["model"] == "strict"
    assert safe.strict.requests[0].adapter is None


async def test_who_answers_is_reserved_for_and_paid() -> None:
    """Also where it could say more than the model that was asked: its context is the bound."""
    safe = SafeWorld(REROUTE)
    counters = MemoryCounters(lambda: 1_800_000_000.0)
    plans = {"small": PlanConfig(tokens_per_minute=100_000, budget_per_month=1)}
    meter = Meter(
        counters=counters,
        plans=plans,
        strategy=Strategy.FIXED_WINDOW,
        prices={"strict": PriceConfig(output_per_million=1000)},
        emit=safe.world.recorder,
    )
    safe.world.meter, safe.world.authenticator = meter, Acme()
    async with safe.client() as client:
        for text in (FINE, BAD):
            assert (await client.post(CHAT, json=body(CHAT, text))).status_code == 200
    while meter._tasks:
        await asyncio.wait(meter._tasks)
    costs = {event.model: event.cost for event in safe.world.recorder.finished}
    assert costs == {"smollm2": 0, "strict": 2 * 1000}
    await meter.close()


@GENERATING
async def test_without_the_encoder_nothing_is_let_through(path: str) -> None:
    safe = SafeWorld(REFUSE, encoder=AlarmedEmbedder(error=Unavailable("gone")))
    async with safe.client() as client:
        answer = await client.post(path, json=body(path, FINE))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert safe.world.generator.requests == []
    assert safe.told == [(Done.UNAVAILABLE, Way.INPUT)]


async def test_without_the_encoder_all_is_let_through_where_somebody_said_so() -> None:
    safe = SafeWorld(
        {**REFUSE, "on_failure": "allow"}, encoder=AlarmedEmbedder(error=Unavailable("gone"))
    )
    async with safe.client() as client:
        assert (await client.post(CHAT, json=body(CHAT, BAD))).status_code == 200
    assert safe.told == [(Done.UNCHECKED, Way.INPUT)]


@pytest.mark.parametrize("path", [EMBEDDINGS, PREDICT])
async def test_texts_to_embed_and_predict_from_are_not_asked_about(path: str) -> None:
    safe = SafeWorld(REFUSE)
    async with safe.client() as client:
        assert (await client.post(path, json=body(path, BAD))).status_code == 200
    assert safe.told == []


async def test_a_plan_has_its_own() -> None:
    plans = {"small": {"guardrails": {}}, "other": {}}
    safe = SafeWorld(REFUSE, settings={"plans": plans})
    safe.world.authenticator = Acme()  # on the plan "small"
    async with safe.client() as client:
        assert (await client.post(CHAT, json=body(CHAT, BAD))).status_code == 200
    guardrails = safe.services().guardrails
    assert len(guardrails.of_plan("other").prompt_checks) == 1


MODELS = {
    "chat": {"task": "generate", "source": "./model"},
    "minilm": {"task": "embed", "source": "./encoder"},
    "short": {"task": "embed", "source": "./encoder", "max_tokens": 128},
}


@pytest.mark.parametrize(
    ("safety", "words"),
    [
        ({"model": "nobody"}, "'nobody': expected the name of a model with task: embed"),
        ({"model": "chat"}, "'chat': expected the name of a model with task: embed"),
        ({"model": "short"}, "max_tokens of 256 or more"),
        ({"model": "minilm", "on_hit": "reroute"}, "go together"),
        ({"model": "minilm", "reroute_to": "chat"}, "go together"),
        (
            {"model": "minilm", "on_hit": "reroute", "reroute_to": "minilm"},
            "'minilm': expected the name of a model with task: generate",
        ),
        ({"model": "minilm", "threshold": 1}, "less than 1"),
        ({"model": "minilm", "on_hit": "mask"}, "'refuse' or 'reroute'"),
    ],
)
@pytest.mark.parametrize("of_a_plan", [False, True])
def test_a_mistake_is_named(safety: dict[str, Any], words: str, of_a_plan: bool) -> None:
    guardrails = {"guardrails": {"safety": safety}}
    gateway = {"plans": {"free": guardrails}} if of_a_plan else guardrails
    with pytest.raises(ConfigError) as refusal:
        parse({"models": MODELS, "gateway": gateway})
    assert words in refusal.value.message


def test_it_is_off_unless_somebody_turns_it_on() -> None:
    assert World().services().guardrails.default.prompt_checks == ()
    config = parse(
        {
            "models": MODELS,
            "gateway": {
                "guardrails": {
                    "safety": {"model": "minilm", "on_hit": "reroute", "reroute_to": "chat"}
                }
            },
        }
    )
    assert parse(config.model_dump(mode="json")) == config
