"""A model that a tenant may not see is answered for as one that is not there, on every route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from deployments.caching.cache import ResponseCache
from deployments.config import GatewayConfig
from deployments.gateway.app import create_app
from deployments.gateway.services import PublishedAdapter
from deployments.observability.events import RequestFinished
from deployments.tenants.directory import Directory
from deployments.tenants.identity import FRESH_S, KeyAuthenticator
from deployments.tenants.keys import Peppers
from deployments.tenants.meter import Meter
from deployments.tenants.principal import Role
from deployments.tenants.visibility import Visibility, WithSight
from models.contracts import Delta, GenerateRequest
from models.versions import absent
from state.cache import Bounds
from state.cache.memory import MemoryCache
from state.counters import Strategy
from state.counters.memory import MemoryCounters
from state.database import Database
from state.places import sqlite_url
from tests.gateway.asgi import BASE
from tests.gateway.contract import Contract
from tests.gateway.fakes import FakeGenerator, World

RULES = "/admin/v1/visibility"
HIDDEN, UNKNOWN = "poet", "nope"
"""An adapter that there is, and one of an equally long name that there is not."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class KnowingGenerator(FakeGenerator):
    """One that has adapters, and says of others what the registry says."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        if request.adapter is not None and request.adapter.partition("@")[0] != HIDDEN:
            raise absent(request.adapter)
        async for delta in super().generate(request):
            yield delta


class Platform:
    """With keys, plans that count, a cache, and the tenants acme and other."""

    def __init__(self, world: World, directory: Directory, peppers: Peppers) -> None:
        self.world, self.clock = world, Clock()
        self.visibility = Visibility(directory.database)
        self.keys: dict[str, str] = {}
        self._directory = directory
        world.directory = directory
        world.authenticator = WithSight(
            KeyAuthenticator(directory, peppers, clock=self.clock),
            self.visibility,
            clock=self.clock,
        )
        world.generator = KnowingGenerator()
        world.adapters.add("smollm2", HIDDEN)
        bounds = Bounds(max_bytes=10**6, max_entry_bytes=10**6)
        world.cache = ResponseCache(store=MemoryCache(bounds), ttl_s=60, emit=world.recorder)
        world.meter = Meter(
            counters=MemoryCounters(lambda: 1_700_000_000.0),
            plans=GatewayConfig().plans,
            strategy=Strategy.FIXED_WINDOW,
            prices={},
            emit=world.recorder,
        )
        self.app = create_app(world.services())

    async def prepare(self) -> None:
        for name, role in (
            ("acme", Role.DEVELOPER),
            ("other", Role.DEVELOPER),
            ("staff", Role.ADMIN),
        ):
            await self._directory.create(name, plan="enterprise", by="me")
            _, minted = await self._directory.issue(name, role=role, by="me")
            self.keys[name] = minted.text

    def client(self, tenant: str, contract: Contract) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url=BASE,
            headers={"authorization": f"Bearer {self.keys[tenant]}"},
            event_hooks={"response": [contract.check]},
        )

    async def show(self, name: str, *tenants: str) -> None:
        await self.visibility.show(name, tenants, by="me")
        self.clock.now += FRESH_S + 0.01


@pytest.fixture
async def platform(world: World, tmp_path: Path) -> AsyncIterator[Platform]:
    peppers = Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        made = Platform(world, Directory(database, peppers), peppers)
        await made.prepare()
        yield made
        assert world.meter is not None
        await world.meter.close()


def asking(model: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every way to ask a model: what for → path and body."""
    chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    text = {"model": model, "prompt": "Hi"}
    return {
        "chat": ("/v1/chat/completions", chat),
        "chat, streamed": ("/v1/chat/completions", {**chat, "stream": True}),
        "chat, cached": ("/v1/chat/completions", {**chat, "temperature": 0}),
        "completion": ("/v1/completions", text),
        "completions": ("/v1/completions", {"model": model, "prompt": ["a", "b"]}),
        "infer": ("/v1/infer", text),
        "infer, streamed": ("/v1/infer/stream", text),
        "embeddings": ("/v1/embeddings", {"model": model, "input": "Hi"}),
        "predict": (f"/v1/models/{model}/predict", {"inputs": [1]}),
    }


WAYS = list(asking(""))
WORK = {"embeddings": "minilm", "predict": "digits"}
"""Which model answers; all else is asked of smollm2."""


def told(answer: httpx.Response, name: str) -> tuple[int, set[str], str]:
    """What an answer says, whatever the model that was asked for is called."""
    body = answer.text.replace(name, "NAME").replace(answer.headers["x-request-id"], "ID")
    if '"timestamp"' in body:
        answered = answer.json()
        answered.pop("timestamp")
        answered.pop("request_id")
        body = str(answered).replace(name, "NAME")
    return answer.status_code, set(answer.headers) - {"content-length"}, body


@pytest.mark.parametrize("way", WAYS)
async def test_a_hidden_model_is_an_unknown_one(
    platform: Platform, contract: Contract, way: str
) -> None:
    model = WORK.get(way, "smollm2")
    unknown = model[::-1]
    async with (
        platform.client("acme", contract) as acme,
        platform.client("other", contract) as other,
    ):
        await platform.show(model, "acme")
        path, body = asking(unknown)[way]
        expected = told(await other.post(path, json=body), unknown)
        path, body = asking(model)[way]
        assert told(await other.post(path, json=body), model) == expected
        assert expected[0] == 404
        assert (await acme.post(path, json=body)).status_code == 200


@pytest.mark.parametrize("which", ["", "@champion", "@1"])
@pytest.mark.parametrize("way", [way for way in WAYS if way not in WORK])
async def test_a_hidden_adapter_is_an_unknown_one(
    platform: Platform, contract: Contract, world: World, way: str, which: str
) -> None:
    hidden, unknown = f"smollm2:{HIDDEN}{which}", f"smollm2:{UNKNOWN}{which}"
    path, body = asking(hidden)[way]
    async with (
        platform.client("acme", contract) as acme,
        platform.client("other", contract) as other,
    ):
        # Whatever it may have asked and got before, in the cache for one.
        assert (await other.post(path, json=body)).status_code == 200
        await platform.show(f"smollm2:{HIDDEN}", "acme")
        asked = len(world.generator.requests)
        refused = await other.post(path, json=body)
        assert len(world.generator.requests) == asked
        path, body = asking(unknown)[way]
        expected = told(await other.post(path, json=body), UNKNOWN)
        assert told(refused, HIDDEN) == expected
        assert expected[0] == 404
        path, body = asking(hidden)[way]
        assert (await acme.post(path, json=body)).status_code == 200
        path, body = asking("smollm2")[way]
        assert (await other.post(path, json=body)).status_code == 200
    [first, second] = [
        event
        for event in world.recorder.events
        if isinstance(event, RequestFinished) and event.status == 404
    ]
    assert (first.cost, first.usage, first.worked) == (second.cost, second.usage, second.worked)
    assert (first.adapter or "").replace(HIDDEN, UNKNOWN) == second.adapter


async def test_what_was_reserved_for_it_is_given_back(
    platform: Platform, contract: Contract, world: World
) -> None:
    await platform.show(f"smollm2:{HIDDEN}", "acme")
    assert world.meter is not None
    principal = await world.authenticator.principal(platform.keys["other"])  # type: ignore[union-attr]
    before = {level.name: level.remaining for level in await world.meter.levels(principal)}
    async with platform.client("other", contract) as other:
        path, body = asking(f"smollm2:{HIDDEN}")["chat"]
        assert (await other.post(path, json=body)).status_code == 404
    while world.meter._tasks:
        await asyncio.wait(world.meter._tasks)
    after = {level.name: level.remaining for level in await world.meter.levels(principal)}
    assert after["tokens_per_day"] == before["tokens_per_day"]


async def test_lists_have_what_is_seen(platform: Platform, contract: Contract) -> None:
    await platform.show("minilm", "acme")
    await platform.show(f"smollm2:{HIDDEN}", "acme")

    async def names(tenant: str) -> list[str]:
        async with platform.client(tenant, contract) as client:
            listed = (await client.get("/v1/models")).json()["data"]
            for each in listed:
                assert (await client.get(f"/v1/models/{each['id']}")).status_code == 200
            return [each["id"] for each in listed]

    everything = ["digits", "minilm", "org/model:v1", "smollm2", f"smollm2:{HIDDEN}"]
    assert await names("acme") == await names("staff") == everything
    assert await names("other") == ["digits", "org/model:v1", "smollm2"]
    async with platform.client("other", contract) as other:
        for hidden, unknown in (
            ("minilm", "milnim"),
            (f"smollm2:{HIDDEN}", f"smollm2:{UNKNOWN}"),
            (f"smollm2:{HIDDEN}@1", f"smollm2:{UNKNOWN}@1"),
        ):
            refused = await other.get(f"/v1/models/{hidden}")
            expected = await other.get(f"/v1/models/{unknown}")
            assert told(refused, hidden) == told(expected, unknown)
            assert refused.status_code == 404
        nobodys = await other.post("/v1/infer", json={"model": "x", "prompt": "a"})
        assert "minilm" not in nobodys.text, "nor does any error name it"


async def test_a_hidden_model_hides_its_adapters(platform: Platform, contract: Contract) -> None:
    await platform.show("smollm2", "acme")
    async with platform.client("other", contract) as other:
        listed = (await other.get("/v1/models")).json()["data"]
        assert all("smollm2" not in each["id"] for each in listed)
        path, body = asking(f"smollm2:{HIDDEN}")["chat"]
        assert (await other.post(path, json=body)).status_code == 404


def test_a_socket_looks_again_for_each_request(platform: Platform) -> None:
    headers = {"authorization": f"Bearer {platform.keys['other']}"}
    with (
        TestClient(platform.app) as client,
        client.websocket_connect("/v1/infer/ws", headers=headers) as socket,
    ):

        def ask(model: str) -> Any:
            socket.send_json({"type": "infer", "id": "a", "model": model, "prompt": "Hi"})
            while (message := socket.receive_json())["event"] == "token":
                pass
            return message

        assert ask("smollm2")["event"] == "done"
        assert ask(f"smollm2:{HIDDEN}")["event"] == "done"
        assert client.portal is not None
        client.portal.call(platform.show, "smollm2", "acme")
        unknown = ask("2mlloms")["data"]["error"]
        for name in ("smollm2", f"smollm2:{HIDDEN}"):
            refused = ask(name)["data"]["error"]
            assert refused["code"] == "NOT_FOUND"
            assert refused["message"].replace(name, "X") == unknown["message"].replace(
                "2mlloms", "X"
            )


async def test_an_open_platform_shows_everything(
    client: httpx.AsyncClient, world: World, tmp_path: Path
) -> None:
    peppers = Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
    async with await Database.open(sqlite_url(tmp_path / "frontier.db")) as database:
        world.directory = Directory(database, peppers)
        await Visibility(database).show("smollm2", [], by="me")
        path, body = asking("smollm2")["chat"]
        assert (await client.post(path, json=body)).status_code == 200


# --- the rules over HTTP ---------------------------------------------------------------------


async def test_a_rule_over_http(platform: Platform, contract: Contract) -> None:
    path = f"/admin/v1/models/smollm2:{HIDDEN}/visibility"
    async with (
        platform.client("staff", contract) as staff,
        platform.client("other", contract) as other,
    ):
        everybodys = {"model": f"smollm2:{HIDDEN}", "tenants": "all"}
        assert (await staff.get(path)).json()["data"] == everybodys
        answer = await staff.put(path, json={"tenants": ["acme", "acme"]})
        assert answer.json()["data"] == {**everybodys, "tenants": ["acme"]}
        assert (await staff.get(path)).json()["data"] == answer.json()["data"]
        assert (await staff.get(RULES)).json()["data"] == {"models": [answer.json()["data"]]}
        platform.clock.now += FRESH_S + 0.01
        assert (await other.get(f"/v1/models/smollm2:{HIDDEN}")).status_code == 404
        assert (await staff.get(f"/v1/models/smollm2:{HIDDEN}")).status_code == 200
        assert (await staff.put(path, json={"tenants": "all"})).json()["data"] == everybodys
        platform.clock.now += FRESH_S + 0.01
        assert (await other.get(f"/v1/models/smollm2:{HIDDEN}")).status_code == 200
        assert (await staff.get(RULES)).json()["data"] == {"models": []}
        [entry, *_] = (await staff.get("/admin/v1/audit")).json()["data"]["entries"]
        assert (entry["what"], entry["details"]) == ("model.visibility", {"tenants": "all"})
        assert entry["who"].startswith("key:")


async def test_a_rule_may_be_there_before_the_adapter(
    platform: Platform, contract: Contract, world: World
) -> None:
    path = "/admin/v1/models/smollm2:later/visibility"
    async with (
        platform.client("staff", contract) as staff,
        platform.client("other", contract) as other,
    ):
        assert (await staff.put(path, json={"tenants": []})).status_code == 200
        platform.clock.now += FRESH_S + 0.01
        later: PublishedAdapter = world.adapters.add("smollm2", "later")
        assert later.id not in (await other.get("/v1/models")).text
        assert later.id in (await staff.get("/v1/models")).text


@pytest.mark.parametrize(
    ("name", "body", "status", "says"),
    [
        ("nope", {"tenants": "all"}, 404, "does not exist"),
        ("minilm:x", {"tenants": "all"}, 404, "does not exist"),
        ("smollm2:poet@1", {"tenants": "all"}, 400, "a name of its own"),
        ("smollm2", {"tenants": ["nobody"]}, 404, "no tenant 'nobody'"),
        ("smollm2", {"tenants": "some"}, 400, "all"),
        ("smollm2", {"tenants": ["A B"]}, 400, "tenants"),
        ("smollm2", {}, 400, "tenants"),
        ("smollm2", {"tenants": 7}, 400, "list of tenants"),
    ],
)
async def test_a_rule_at_fault(
    platform: Platform, contract: Contract, name: str, body: Any, status: int, says: str
) -> None:
    async with platform.client("staff", contract) as staff:
        answer = await staff.put(f"/admin/v1/models/{name}/visibility", json=body)
        assert answer.status_code == status
        assert says in answer.text


async def test_developers_set_no_rules(platform: Platform, contract: Contract) -> None:
    async with platform.client("acme", contract) as acme:
        path = "/admin/v1/models/smollm2/visibility"
        assert (await acme.put(path, json={"tenants": "all"})).status_code == 403
        assert (await acme.get(path)).status_code == 403
        assert (await acme.get(RULES)).status_code == 403
