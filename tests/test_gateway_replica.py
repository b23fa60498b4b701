"""The gateway's shell without a cluster: what it reads from configuration and environment."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments import replicas
from deployments.config import parse
from deployments.gateway.services import Services
from deployments.observability.events import discard
from deployments.replicas import GatewayReplica
from deployments.tenants.deletion import Deletion
from deployments.tenants.meter import Work
from deployments.tenants.principal import EVERYBODY
from deployments.tenants.retention import Retention
from deployments.webhooks.signature import signed
from models.errors import ConfigError
from state.counters import Limit, Strategy, open_counters
from state.errors import StateUnavailable
from state.places import Places

SECRET = "of-16-characters-or-more"
BODY = b'{"id":"evt_1","type":"t","payload":{}}'
STRIPE = {"sources": {"stripe": {"secrets": "${STRIPE_SECRETS}", "tenant": "acme"}}}


class NobodyThere:
    """A handle to a model that no test asks anything."""

    generate = answer = None

    def options(self, **_: object) -> NobodyThere:
        return self


def gateway_replica(webhooks: Mapping[str, Any], **gateway: Any) -> GatewayReplica:
    """Made as ``app.build`` has it made."""
    model = {"task": "generate", "source": "./model"}
    config = parse({"models": {"m": model}, "gateway": {"webhooks": webhooks, **gateway}})
    return GatewayReplica(config.model_dump(mode="json"), {"m": NobodyThere()})


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(replicas, "_observers", lambda: discard)
    monkeypatch.setattr(replicas, "bind_host", lambda: "127.0.0.1")
    of_this_process = gc.get_threshold()
    yield
    gc.set_threshold(*of_this_process)


@pytest.fixture
async def client(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setenv("STRIPE_SECRETS", SECRET)
    async with asking(gateway_replica(STRIPE)) as client:
        yield client


@asynccontextmanager
async def asking(replica: GatewayReplica) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that ends with it."""
    transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    for task in replica._tasks:
        task.cancel()
    await asyncio.gather(*replica._tasks, return_exceptions=True)
    await replica._database.close()


@pytest.mark.parametrize(
    ("mode", "asked"), [("open", {"database"}), ("keys", {"database", "counters"})]
)
async def test_readiness_asks_for_the_state_that_requests_need(
    monkeypatch: pytest.MonkeyPatch, mode: str, asked: set[str]
) -> None:
    """Idempotency, webhooks and the registry are in the database of an open platform, too."""
    monkeypatch.setenv("FRONTIER_AUTH", mode)
    monkeypatch.setenv("FRONTIER_DATABASE", "postgresql://127.0.0.1:1/nowhere")
    async with asking(gateway_replica({})) as client:
        answer = await client.get("/readyz")
    components = answer.json()["error"]["details"]["components"]
    assert answer.status_code == 503
    assert components.keys() == {"m"} | asked
    assert components["database"].startswith("out of reach: ")
    assert components.get("counters", True) is True


@pytest.mark.parametrize(("mode", "warned"), [("open", True), ("keys", False)])
async def test_an_open_gateway_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str, warned: bool
) -> None:
    monkeypatch.setenv("FRONTIER_AUTH", mode)
    async with asking(gateway_replica({})):
        pass
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert (("WARNING", replicas.OPEN) in said) == warned


async def test_webhooks_by_configuration_and_environment(client: httpx.AsyncClient) -> None:
    answer = await client.post(
        "/webhooks/ingest",
        content=BODY,
        headers={
            "content-type": "application/json",
            "x-webhook-source": "stripe",
            "x-webhook-signature": signed(BODY, (SECRET.encode(),), at=int(time.time())),
        },
    )
    assert answer.status_code == 200, answer.text
    [event] = (await client.get("/admin/v1/webhooks/events")).json()["data"]["events"]
    assert (event["tenant"], event["source"], event["event_id"]) == ("acme", "stripe", "evt_1")


@pytest.mark.parametrize("cached", [False, True])
async def test_housekeeping_by_configuration(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Retention, Deletion, float]] = []

    async def keep_house(retention: Retention, deletion: Deletion, *, every_s: float) -> None:
        called.append((retention, deletion, every_s))

    monkeypatch.setattr(replicas, "keep_house", keep_house)
    replica = gateway_replica(
        {}, retention={"usage_days": 7, "every_s": 60}, cache={"enabled": cached}
    )
    replica.__serve_build_asgi_app__()
    await asyncio.sleep(0)
    [(retention, deletion, every_s)] = called
    assert (retention.config.usage_days, every_s) == (7, 60)
    stores = {"counters", "cache_entries"} if cached else {"counters"}
    assert deletion.elsewhere.keys() == stores
    for task in replica._tasks:
        task.cancel()
    await asyncio.gather(*replica._tasks, return_exceptions=True)


@pytest.mark.parametrize("strategy", ["fixed_window", "sliding_window", "token_bucket"])
async def test_quotas_count_as_the_configuration_says(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Services] = []
    monkeypatch.setattr(replicas, "create_app", made.append)
    plans = {"small": {"tokens_per_minute": 7}}
    replica = gateway_replica({}, quota_strategy=strategy, plans=plans)
    replica.__serve_build_asgi_app__()
    [services] = made
    assert services.meter is not None
    who = replace(EVERYBODY, tenant="acme", plan="small")
    admission = await services.meter.admit(who, "m", Work(completion_tokens=5))
    assert [(level.name, level.remaining) for level in admission.levels] == [
        ("tokens_per_minute", 2)
    ]
    limit = Limit(name="tokens_per_minute", strategy=Strategy(strategy), amount=7, window_ms=60_000)
    [level] = await services.meter.counters.levels("acme", [limit])
    assert level.remaining == 2, "of this very strategy's cell"
    services.meter.settle(admission, Work())
    await services.meter.close()
    for task in replica._tasks:
        task.cancel()
    await asyncio.gather(*replica._tasks, return_exceptions=True)


async def test_a_gateway_that_ends_settles_what_its_requests_have_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Services] = []
    monkeypatch.setattr(replicas, "create_app", made.append)
    replica = gateway_replica({}, plans={"small": {"tokens_per_minute": 7}})
    replica.__serve_build_asgi_app__()
    [services] = made
    assert services.meter is not None
    assert services.close is not None
    counters = services.meter.counters
    settle, outages = counters.settle, [StateUnavailable("away for a moment")]

    async def at_second_try(*args: Any) -> bool:
        if outages:
            raise outages.pop()
        return await settle(*args)

    monkeypatch.setattr(counters, "settle", at_second_try)
    who = replace(EVERYBODY, tenant="acme", plan="small")
    admission = await services.meter.admit(who, "m", Work(completion_tokens=5))
    services.meter.settle(admission, Work(completion_tokens=1))
    await services.close()
    after = open_counters(Places.of().counters)
    strategy = Strategy(replica._config.gateway.quota_strategy)
    limit = Limit(name="tokens_per_minute", strategy=strategy, amount=7, window_ms=60_000)
    [level] = await after.levels("acme", [limit])
    assert level.remaining == 6
    await after.close()
    for task in replica._tasks:
        task.cancel()
    await asyncio.gather(*replica._tasks, return_exceptions=True)


async def test_a_source_without_its_secrets_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("STRIPE_SECRETS", raising=False)
    with pytest.raises(ConfigError, match="STRIPE_SECRETS is not set"):
        gateway_replica(STRIPE).__serve_build_asgi_app__()


def test_a_gateway_looks_for_cycles_seldom() -> None:
    before = gc.get_threshold()
    gateway_replica({})
    assert gc.get_threshold() == replicas.COLLECT_AFTER
    assert before < replicas.COLLECT_AFTER
