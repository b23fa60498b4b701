"""Keys and quotas on a platform of several gateways: real PostgreSQL, real Redis, real streams."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.launcher.background import REPOSITORY, Served
from state.patience import ANSWER_S
from tests import tiny_models
from tests.cluster.conftest import serving, tiny_args, wait_until
from tests.cluster.streams import Outcome, stream
from tests.databases import postgres, postgres_url
from tests.servers import PostgresServer, RedisServer, free_port

__all__ = ["postgres", "postgres_url"]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUOTA = 3000
"""Tokens of the day; far more streams ask for them at once."""
LONG_QUOTA = 100_000
CLIENTS = 64
ANSWER = 80


class Platform:
    def __init__(self, served: Served, redis: RedisServer, env: dict[str, str]) -> None:
        self.served, self.redis, self._env = served, redis, env
        self.admin = self.say("bootstrap")

    def say(self, *words: str) -> str:
        """What ``python -m deployments.admin`` prints."""
        done = subprocess.run(
            [sys.executable, "-m", "deployments.admin", *words],
            cwd=REPOSITORY,
            env={**os.environ, **self._env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def client(self, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.served.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=120,
            limits=httpx.Limits(max_connections=None),
        )

    def get(self, path: str, key: str | None = None, **params: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {key or self.admin}"}
        return httpx.get(self.served.url + path, headers=headers, params=params, timeout=10)

    def ask(self, key: str) -> httpx.Response:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
        headers = {"authorization": f"Bearer {key}"}
        url = f"{self.served.url}/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def platform(postgres_url: str, redis: RedisServer, tmp_path: Path) -> Iterator[Platform]:
    with platform_on(postgres_url, redis, tmp_path) as platform:
        yield platform


@contextmanager
def platform_on(
    database: str, redis: RedisServer, tmp_path: Path, *, replicas: int = 1, context: int = 512
) -> Iterator[Platform]:
    env = {
        "FRONTIER_HOME": str(tmp_path / "home"),
        "FRONTIER_DATABASE": database,
        "FRONTIER_COUNTERS": redis.url,
        "FRONTIER_KEY_SECRETS": "a secret of these tests",
        "FRONTIER_AUTH": "keys",
    }
    model = tiny_models.make("llama", tmp_path / "base", context=context)
    args = tiny_args(model, replicas=replicas, slots=16)
    gateway: dict[str, Any] = args["gateway"]
    gateway["replicas"] |= {"min": 2, "max": 2}
    gateway["plans"] = {
        "enterprise": {},
        "metered": {"tokens_per_day": QUOTA},
        "long": {"tokens_per_day": LONG_QUOTA},
        "busy": {"concurrent_requests": 1000},
    }
    gateway["prices"] = {"tiny": {"input_per_million": 1, "output_per_million": 2}}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        with serving(args, tmp_path) as served:
            yield Platform(served, redis, env)


async def crowd(platform: Platform, key: str) -> list[Outcome | None]:
    """Streams at once; every fourth client hangs up in the middle."""

    async def one(number: int, client: httpx.AsyncClient) -> Outcome | None:
        if number % 4:
            return await stream(client, max_tokens=ANSWER)
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": ANSWER, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as it:
            if it.status_code == 200:
                async for _ in it.aiter_lines():
                    return None
        return None

    async with platform.client(key) as client:
        return await asyncio.gather(*(one(number, client) for number in range(CLIENTS)))


def test_no_stream_passes_the_quota(platform: Platform) -> None:
    platform.say("create", "acme", "--plan", "metered")
    key = platform.say("issue", "acme")
    rounds = [asyncio.run(crowd(platform, key)) for _ in range(3)]
    outcomes = [each for outcomes in rounds for each in outcomes if each is not None]
    served = [each for each in outcomes if each.complete]
    refused = [each for each in outcomes if each.status == 429]
    assert len(served) + len(refused) == len(outcomes), "none was lost, none was cut off"
    assert served
    assert refused
    assert all(each.error and each.error["code"] == "RATE_LIMITED" for each in refused)

    def settled() -> bool:
        return reserved(platform, key) == billed(platform)["tokens"]

    wait_until(settled, timeout_s=40, what="nothing reserved, and all that was used in the ledger")
    used = billed(platform)
    assert used["tokens"] <= QUOTA, "overshoot"
    whole = sum(each.tokens for each in served)
    assert used["completion_tokens"] >= whole, "what was answered is paid for"
    assert used["tokens"] > QUOTA / 2, "and what was reserved too much could be used by others"


def billed(platform: Platform, tenant: str = "acme") -> dict[str, int]:
    answer = platform.get("/admin/v1/usage", by="tenant", tenant=tenant)
    assert answer.status_code == 200, answer.text
    [line] = answer.json()["data"]["lines"] or [{"prompt_tokens": 0, "completion_tokens": 0}]
    return line | {"tokens": line["prompt_tokens"] + line["completion_tokens"]}


def reserved(platform: Platform, key: str) -> int:
    """Of the day's tokens, as the next answer's headers say."""
    answer = platform.ask(key)
    told = dict(part.strip().split(";")[:2] for part in answer.headers["ratelimit"].split(","))
    left = int(told['"tokens_per_day"'].removeprefix("r="))
    asked = 3 + 1 if answer.status_code == 200 else 0  # what this very request has reserved
    return QUOTA - left - asked


def test_who_leaves_pays_for_what_was_done(platform: Platform) -> None:
    """Not for all that was reserved, though nothing had been sent yet."""
    platform.say("create", "leaver", "--plan", "metered")
    key = platform.say("issue", "leaver")
    asked, leavers = 450, 4
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": asked, "ignore_eos": True}

    headers = {"authorization": f"Bearer {key}"}
    for _ in range(leavers):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{platform.served.url}/v1/completions", json=body, headers=headers, timeout=0.3
            )

    wait_until_settled(platform, key, "leaver", QUOTA)
    assert 0 < billed(platform, "leaver")["completion_tokens"] < leavers * asked


def wait_until_settled(platform: Platform, key: str, tenant: str, quota: int) -> int:
    """Returns how many requests of one token that took, the last of which is not settled yet."""
    asked = 0

    def settled() -> bool:
        """Each time some tokens more, which are in the ledger when it is asked again."""
        nonlocal asked
        asked += 1
        written = billed(platform, tenant)["tokens"]
        answer = platform.ask(key)
        assert answer.status_code == 200
        told = dict(part.strip().split(";")[:2] for part in answer.headers["ratelimit"].split(","))
        left = int(told['"tokens_per_day"'].removeprefix("r="))
        return written == quota - left - (len("Hi") + 2 + 1)

    what = "nothing reserved, and all that was used in the ledger"
    wait_until(settled, timeout_s=40, what=what, every_s=2)
    return asked


def test_who_loses_a_replica_pays_for_what_was_sent(
    postgres_url: str, redis: RedisServer, tmp_path: Path
) -> None:
    count, asked = 12, 6000

    async def answers(platform: Platform, key: str) -> list[Outcome]:
        begun = [asyncio.Event() for _ in range(count)]
        async with platform.client(key) as client:
            streams = [
                asyncio.create_task(stream(client, max_tokens=asked, begun=each)) for each in begun
            ]
            await asyncio.gather(*(each.wait() for each in begun))
            platform.served.replicas("tiny")[0].send_signal(signal.SIGKILL)
            return await asyncio.gather(*streams)

    with platform_on(postgres_url, redis, tmp_path, replicas=2, context=8192) as platform:
        platform.say("create", "unlucky", "--plan", "long")
        key = platform.say("issue", "unlucky")
        outcomes = asyncio.run(answers(platform, key))
        broken = [each for each in outcomes if not each.complete]
        assert 0 < len(broken) < count
        assert all(each.error and each.error["code"] == "UPSTREAM_ERROR" for each in broken)
        asks = wait_until_settled(platform, key, "unlucky", LONG_QUOTA)
        used = billed(platform, "unlucky")
    assert used["requests"] in {count + asks - 1, count + asks}, "each is in the ledger, once"
    of_broken = used["completion_tokens"] - asked * (count - len(broken)) - asks
    assert 0 < of_broken < asked * len(broken), "what came, not what was reserved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    status: int
    code: str | None
    began: float
    ended: float


@contextmanager
def asking(platform: Platform, key: str, clients: int = 3) -> Iterator[list[Told]]:
    """Clients that ask again and again; the list grows by what they are told."""
    told: list[Told] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.wait(0.05):
            began = time.monotonic()
            answer = platform.ask(key)
            code = None if answer.status_code == 200 else answer.json()["error"]["code"]
            ended = time.monotonic()
            told.append(Told(status=answer.status_code, code=code, began=began, ended=ended))

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(ask) for _ in range(clients)]
        try:
            yield told
        finally:
            enough.set()
        for each in asked:
            each.result()


def test_state_that_is_down_admits_nobody_and_heals(redis: RedisServer, tmp_path: Path) -> None:
    """First the counters, then the database, while clients ask."""
    folder = Path(tempfile.mkdtemp(prefix="frontier-postgres-"))  # of another user than pytest's
    postgres = PostgresServer(folder, free_port())
    try:
        postgres.start()
        with platform_on(postgres.url, redis, tmp_path) as platform:
            platform.say("create", "acme", "--plan", "busy")
            key = platform.say("issue", "acme")
            assert platform.ask(key).status_code == 200
            with asking(platform, key) as told:
                for server, component in ((redis, "counters"), (postgres, "database")):
                    span = down(platform, server, component)
                    wait_until(
                        lambda: platform.ask(key).status_code == 200, timeout_s=20, what="healed"
                    )
                    wait_until(
                        lambda: platform.get("/readyz").status_code == 200,
                        timeout_s=20,
                        what="ready",
                    )
                    within = [each for each in told if span[0] < each.began < each.ended < span[1]]
                    assert within
                    assert {each.status for each in within} == {503}
    finally:
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)
    assert {(each.status, each.code) for each in told} == {(200, None), (503, "STATE_UNAVAILABLE")}
    refused = [each.ended - each.began for each in told if each.status == 503]
    assert max(refused) < ANSWER_S + 0.5, "clients, proxies and servers share the machine"


def down(
    platform: Platform, server: RedisServer | PostgresServer, what: str
) -> tuple[float, float]:
    """Stops a server for three seconds; since when nobody can have been let in, and until when."""
    server.stop()
    try:
        time.sleep(1.5)  # what was looked up before is fresh for a second
        since = time.monotonic()
        ready = platform.get("/readyz")
        assert ready.status_code == 503
        assert what in ready.text
        time.sleep(1.5)
        return since, time.monotonic()
    finally:
        server.start()


def test_what_an_administrator_changes_holds_within_a_second(platform: Platform) -> None:
    platform.say("create", "acme", "--plan", "busy")
    key = platform.say("issue", "acme")
    for _ in range(8):  # both gateways know it
        assert platform.ask(key).status_code == 200
    platform.say("revoke", key.split("_")[1])
    time.sleep(1)
    assert {platform.ask(key).status_code for _ in range(8)} == {401}
    assert httpx.get(f"{platform.served.url}/v1/models", timeout=10).status_code == 401
    assert httpx.get(f"{platform.served.url}/healthz", timeout=10).status_code == 200


def test_a_model_is_hidden_and_a_tenant_gone_within_a_second(platform: Platform) -> None:
    keys = {}
    for tenant in ("acme", "other"):
        platform.say("create", tenant, "--plan", "busy")
        keys[tenant] = platform.say("issue", tenant)

    def statuses(tenant: str) -> set[int]:
        """Of so many requests that both gateways have answered some."""
        return {platform.ask(keys[tenant]).status_code for _ in range(8)}

    assert statuses("acme") == statuses("other") == {200}
    platform.say("visibility", "tiny", "--only", "acme")
    time.sleep(1)
    assert (statuses("acme"), statuses("other")) == ({200}, {404})
    assert platform.get("/v1/models", keys["other"]).json()["data"] == []
    headers = {"authorization": f"Bearer {platform.admin}"}
    gone = httpx.delete(f"{platform.served.url}/admin/v1/tenants/acme", headers=headers, timeout=30)
    assert gone.status_code == 200, gone.text
    assert statuses("acme") == {401}
    called = gone.json()["data"]["called"]
    [line] = platform.get("/admin/v1/usage", by="tenant", tenant=called).json()["data"]["lines"]
    assert line["requests"] == 16
    assert platform.get("/admin/v1/usage", by="tenant", tenant="acme").json()["data"]["lines"] == []
    assert statuses("other") == {404}, "a rule that is left with nobody is not everybody's"
