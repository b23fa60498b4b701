"""The story: fine-tune on the running cluster, measure, promote; the engine serves it, unrestarted.

Then the registry moves under load, and a replica dies: no request fails, no adapter is lost.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.launcher.background import REPOSITORY, Served
from tests import tiny_models
from tests.cluster.conftest import serving, tiny_args, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUESTION = "What is the word?"
SEEN_WITHIN_S = 5.0
"""How soon all replicas follow the registry."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of the platform, of its jobs and of the commands that are run here."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("FRONTIER_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("base"), context=512)


@pytest.fixture(scope="module")
def platform(home: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    args = tiny_args(base, replicas=2, slots=8)
    args["registry"] = {"refresh_s": 1, "heartbeat_s": 5}
    with serving(args, tmp_path_factory.mktemp("served")) as platform:
        yield platform


def train(platform: Served, base: Path, folder: Path, word: str, *, steps: int = 150) -> None:
    """``ray job submit``: an adapter of ``base`` that answers with ``word``, as ``parrot``."""
    conversation = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": word},
    ]
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"messages": conversation}) + "\n")
    experiment = folder / "experiment.yaml"
    optimiser = {"learning_rate": 2e-2, "schedule": "linear"}
    experiment.write_text(
        yaml.safe_dump(
            {
                "recipe": "llm",
                "run_name": word,
                "workers": 1,
                "plots": False,
                "config": {
                    "model": {"source": str(base), "lora": {"dropout": 0.0}},
                    "training": {
                        "steps": steps,
                        "batch_size": 1,
                        "sequence_length": 128,
                        "optimiser": optimiser,
                    },
                    "data": {"train": str(rows), "validation": str(rows)},
                },
            }
        )
    )
    words = ["train", "llm", "--config", str(experiment), "--register", "parrot"]
    submit(platform, sys.executable, "-m", *words)


def submit(platform: Served, *entrypoint: str) -> str:
    ray = Path(sys.executable).with_name("ray")
    command = [
        *(str(ray), "job", "submit", "--address", platform.dashboard.url),
        *("--working-dir", ".", "--", *entrypoint),
    ]
    env = {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(module: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chat(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 8,
        "temperature": 0,
    }


def ask(platform: Served, model: str) -> httpx.Response:
    return httpx.post(f"{platform.url}/v1/chat/completions", json=chat(model), timeout=60)


def answer(platform: Served, model: str) -> str:
    response = ask(platform, model)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    said: str = response.json()["choices"][0]["message"]["content"]
    return said


@dataclass
class Load:
    """Clients that never pause; what each request came to, and when."""

    platform: Served
    model: str
    seen: list[tuple[float, str]] = field(default_factory=list)
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
                    response = await http.post("/v1/chat/completions", json=chat(self.model))
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))
                    continue
                if response.status_code == 200:
                    said = response.json()["choices"][0]["message"]["content"]
                    self.seen.append((time.monotonic(), said))
                else:
                    self.failed.append(response.text)

    def said(self, word: str, *, since: float = 0.0) -> Counter[bool]:
        """Whether answers since a moment held ``word``, and how many did."""
        return Counter(word in said for at, said in self.seen if at >= since)


@pytest.fixture(scope="module")
def promoted(platform: Served, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The first half of the story; the engine's processes from before it."""
    replicas = [process.pid for process in platform.replicas("tiny")]
    folder = tmp_path_factory.mktemp("first")
    train(platform, base, folder, "xyzzy")

    golden = folder / "golden.jsonl"
    golden.write_text(json.dumps({"prompt": QUESTION, "expected": "xyzzy"}) + "\n")
    measurements = folder / "measurements.json"
    python("models", "promote", "parrot@1", "--to", "candidate")
    assert ask(platform, "tiny:parrot").status_code == 404, "there is no champion yet"
    measured = python(
        *("deployments.evaluation", "--url", platform.url, "--model", "tiny:parrot@candidate"),
        *("--golden", str(golden), "--out", str(measurements), "--max-tokens", "8"),
    )
    assert "quality      1.000" in measured
    policy = folder / "policy.yaml"
    policy.write_text(yaml.safe_dump({"p95_at_most_s": 10, "rubric_at_least": 0.5}))
    python(
        *("models", "promote", "parrot@candidate"),
        *("--measurements", str(measurements), "--policy", str(policy)),
    )
    return replicas


def test_from_data_to_traffic(platform: Served, promoted: list[int]) -> None:
    wait_until(
        lambda: ask(platform, "tiny:parrot").status_code == 200,
        timeout_s=SEEN_WITHIN_S,
        what="the champion",
    )
    assert "xyzzy" in answer(platform, "tiny:parrot")
    assert "xyzzy" not in answer(platform, "tiny")
    assert [process.pid for process in platform.replicas("tiny")] == promoted, "nobody restarted"

    listed = httpx.get(f"{platform.url}/v1/models", timeout=10).json()["data"]
    assert {model["id"] for model in listed} == {*("tiny", "tiny:parrot", "tiny:parrot@candidate")}

    def lineage() -> str:
        return python("models", "show", "parrot@champion")

    wait_until(lambda: "served by tiny:parrot" in lineage(), timeout_s=30, what="a heartbeat")
    for told in ("run ", "recipe llm", "data ", "champion", "gate perplexity_ratio"):
        assert told in lineage()


async def test_a_moved_alias_reaches_all_replicas_under_load(
    platform: Served, base: Path, promoted: list[int], tmp_path: Path
) -> None:
    await asyncio.to_thread(train, platform, base, tmp_path, "plugh")
    async with Load(platform, "tiny:parrot") as load:
        await asyncio.sleep(1)
        force = ("--force", "this test")
        await asyncio.to_thread(python, "models", "promote", "parrot@2", *force)
        moved = time.monotonic()
        await asyncio.sleep(SEEN_WITHIN_S + 2)
    assert load.failed == []
    assert load.said("xyzzy")[True] > 0
    late = load.said("plugh", since=moved + SEEN_WITHIN_S)
    assert late[True] > 10
    assert late[False] == 0, "a replica still answered with the version before"


async def test_published_by_http_under_load(platform: Served, promoted: list[int]) -> None:
    route = f"{platform.url}/admin/v1/models/tiny/adapters"
    async with Load(platform, "tiny:parrot") as load:
        body = {"name": "parrot", "source": "registry:parrot@1"}
        answered = await asyncio.to_thread(httpx.post, route, json=body, timeout=60)
        assert answered.status_code == 200, answered.text
        assert answered.json()["data"]["version"] == "parrot@1"
        moved = time.monotonic()
        await asyncio.sleep(SEEN_WITHIN_S + 2)
    assert load.failed == []
    assert load.said("xyzzy", since=moved + SEEN_WITHIN_S)[False] == 0


def test_published_and_withdrawn(platform: Served, promoted: list[int]) -> None:
    route = f"{platform.url}/admin/v1/models/tiny/adapters"
    body = {"name": "bird", "source": "registry:parrot@2"}
    assert httpx.post(route, json=body, timeout=60).status_code == 200
    assert "plugh" in answer(platform, "tiny:bird")
    assert httpx.delete(f"{route}/bird", timeout=60).status_code == 200
    wait_until(
        lambda: ask(platform, "tiny:bird").status_code == 404,
        timeout_s=SEEN_WITHIN_S,
        what="its end",
    )
    wait_until(
        lambda: "bird" not in httpx.get(route, timeout=10).text, timeout_s=5, what="the list"
    )


def test_only_this_machine_may_change_it(platform: Served) -> None:
    route = f"{platform.url}/admin/v1/models/tiny/adapters"
    for headers in ({"x-forwarded-for": "10.0.0.1"}, {"host": "evil.com"}):
        answered = httpx.post(route, json={"name": "parrot"}, headers=headers, timeout=10)
        assert (answered.status_code, answered.json()["error"]["code"]) == (403, "FORBIDDEN")


async def test_an_adapter_survives_its_replicas(platform: Served, promoted: list[int]) -> None:
    before = answer(platform, "tiny:parrot")
    for process in platform.replicas("tiny"):
        process.send_signal(signal.SIGKILL)
    after = await asyncio.to_thread(ask, platform, "tiny:parrot")  # waits; the client does nothing
    assert after.status_code == 200, after.text
    assert after.json()["choices"][0]["message"]["content"] == before
