"""What a plan's weight becomes on its way to the queues."""

from __future__ import annotations

import httpx
import pytest

from deployments.config import GatewayConfig, PlanConfig
from deployments.gateway.app import create_app
from tests.gateway.asgi import BASE
from tests.gateway.fakes import World
from tests.gateway.test_quotas import Acme

CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("plans", "weight"),
    [({"small": PlanConfig(weight=7)}, 7), ({"other": PlanConfig(weight=7)}, 1)],
)
async def test_the_plan_of_whoever_asks_weighs(plans: dict[str, PlanConfig], weight: int) -> None:
    world = World(config=GatewayConfig(plans=plans), authenticator=Acme())
    transport = httpx.ASGITransport(create_app(world.services()))
    headers = {"authorization": "Bearer fr_1"}
    async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=headers) as client:
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/embeddings", {"model": "minilm", "input": "a"}),
            ("/v1/models/digits/predict", {"inputs": [1]}),
        ):
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
    assert [request.weight for request in world.generator.requests] == [weight]
    assert [standing.weight for _, standing in world.embedder.calls] == [weight]
    assert [standing.weight for _, standing in world.predictor.calls] == [weight]
