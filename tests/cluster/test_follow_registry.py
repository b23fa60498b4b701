"""The registry moves under load, and replicas die: no request fails, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from deployments.launcher.background import Served
from tests.cluster import registered
from tests.cluster.conftest import serving
from tests.cluster.registered import ADAPTERS, BLANK, PREDICT, answer, chat, predicted

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

FOLLOWED_WITHIN_S = 5.0
"""How soon all replicas do as the registry says."""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two replicas of each model, which follow the registry as often as they do by default."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRONTIER_HOME", str(folder / "home"))
        with serving(registered.poet_and_eye(folder, replicas=2), folder) as platform:
            yield platform


Ask = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


def asking(model: str) -> Ask:
    return lambda http: http.post("/v1/completions", json=chat(model))


def predicting() -> Ask:
    return lambda http: http.post(PREDICT, json={"inputs": [BLANK] * 3})


@dataclass
class Load:
    """Clients that never pause; what each request came to, and when."""

    platform: Served
    ask: Ask
    seen: list[tuple[float, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def __aenter__(self) -> Load:
        self._enough = asyncio.Event()
        self._clients = [asyncio.create_task(self._client()) for _ in range(4)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._enough.set()
        await asyncio.gather(*self._clients)

    async def _client(self) -> None:
        async with httpx.AsyncClient(base_url=self.platform.url, timeout=60) as http:
            while not self._enough.is_set():
                try:
                    response = await self.ask(http)
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))
                    continue
                if response.status_code == 200:
                    self.seen.append((time.monotonic(), response.json()))
                else:
                    self.failed.append(response.text)

    def answers(self, *, since: float = 0.0) -> list[Any]:
        return [body for at, body in self.seen if at >= since]


async def test_a_predictor_is_exchanged_under_load(platform: Served) -> None:
    async with Load(platform, predicting()) as load:
        await asyncio.sleep(1)
        moved = time.monotonic()
        await registered.point("eye", 2)
        await asyncio.sleep(FOLLOWED_WITHIN_S + 2)
    assert load.failed == []
    assert load.answers()[0]["data"]["version"] == "eye@1"
    late = [body["data"] for body in load.answers(since=moved + FOLLOWED_WITHIN_S)]
    assert {data["version"] for data in late} == {"eye@2"}
    by_version = {
        body["data"]["version"]: body["data"]["predictions"][0] for body in load.answers()
    }
    assert by_version["eye@1"] != by_version["eye@2"]
    for body in load.answers():
        assert body["data"]["predictions"] == [by_version[body["data"]["version"]]] * 3


def test_the_input_at_fault_is_named(platform: Served) -> None:
    answered = httpx.post(platform.url + PREDICT, json={"inputs": [BLANK, [1, 2]]}, timeout=30)
    error = answered.json()["error"]
    assert (answered.status_code, error["details"]["param"]) == (400, "inputs[1]")


async def test_an_adapter_is_exchanged_under_load(platform: Served) -> None:
    first, second = [await asyncio.to_thread(answer, platform, f"tiny:poet@{n}") for n in (1, 2)]
    assert len({first, second, await asyncio.to_thread(answer, platform, "tiny")}) == 3
    async with Load(platform, asking("tiny:poet")) as load:
        await asyncio.sleep(1)
        moved = time.monotonic()
        await registered.point("poet", 2)
        await asyncio.sleep(FOLLOWED_WITHIN_S + 2)
    assert load.failed == []
    assert load.answers()[0]["choices"][0]["text"] == first
    late = {body["choices"][0]["text"] for body in load.answers(since=moved + FOLLOWED_WITHIN_S)}
    assert late == {second}


async def test_published_by_http_under_load(platform: Served) -> None:
    first = await asyncio.to_thread(answer, platform, "tiny:poet@1")
    async with (
        Load(platform, asking("tiny:poet")) as load,
        httpx.AsyncClient(base_url=platform.url, timeout=60) as http,
    ):
        answered = await http.post(ADAPTERS, json={"name": "poet", "source": "registry:poet@1"})
        assert answered.status_code == 200, answered.text
        assert answered.json()["data"]["version"] == "poet@1"
        moved = time.monotonic()
        await asyncio.sleep(FOLLOWED_WITHIN_S + 2)
    assert load.failed == []
    late = {body["choices"][0]["text"] for body in load.answers(since=moved + FOLLOWED_WITHIN_S)}
    assert late == {first}


async def test_published_listed_and_withdrawn_under_load(platform: Served) -> None:
    async with httpx.AsyncClient(base_url=platform.url, timeout=60) as http:
        body = {"name": "bard", "source": "registry:poet@2"}
        assert (await http.post(ADAPTERS, json=body)).status_code == 200
        listed = (await http.get(ADAPTERS)).json()["data"]["adapters"]
        assert [adapter["id"] for adapter in listed] == ["tiny:bard", "tiny:poet"]
        models = (await http.get("/v1/models")).json()["data"]
        assert [each["id"] for each in models] == ["eyes", "tiny", "tiny:bard", "tiny:poet"]
        async with Load(platform, asking("tiny:bard")) as load:
            await asyncio.sleep(1)
            assert load.failed == []
            assert (await http.delete(f"{ADAPTERS}/bard")).status_code == 200
            withdrawn = time.monotonic()
            await asyncio.sleep(FOLLOWED_WITHIN_S + 2)
        refused = await http.post(ADAPTERS, json={"name": "eye"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "INVALID_INPUT")
    poem = await asyncio.to_thread(answer, platform, "tiny:poet@2")
    assert {body["choices"][0]["text"] for body in load.answers()} == {poem}
    assert load.answers(since=withdrawn + FOLLOWED_WITHIN_S) == [], "no replica has it any more"
    assert load.failed, "they went on asking"
    assert {json.loads(text)["error"]["code"] for text in load.failed} == {"NOT_FOUND"}


def test_only_this_machine_may_change_it(platform: Served) -> None:
    for headers in ({"x-forwarded-for": "10.0.0.1"}, {"host": "evil.com"}):
        answered = httpx.post(
            platform.url + ADAPTERS, json={"name": "poet"}, headers=headers, timeout=10
        )
        assert (answered.status_code, answered.json()["error"]["code"]) == (403, "FORBIDDEN")


def test_adapters_and_predictors_survive_their_replicas(platform: Served) -> None:
    poem = answer(platform, "tiny:poet")
    for name in ("tiny", "eyes"):
        for process in platform.replicas(name):
            process.send_signal(signal.SIGKILL)
    assert answer(platform, "tiny:poet") == poem  # waits; the client does nothing
    version, _ = predicted(platform)
    assert version == "eye@2"
