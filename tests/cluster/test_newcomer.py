"""What a newcomer does: serve the configuration as it is, ask, stop."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from openai import AsyncOpenAI
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from websockets.asyncio.client import connect

from deployments.launcher.background import Served, serving
from tests import documents
from tests.cluster.conftest import metric, on_a_free_port, wait_until
from tests.documents import ROOT, Block

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.weights,
    pytest.mark.smoke,
    pytest.mark.timeout(300),
]


NOWHERE = "http://127.0.0.1:9"
ELSEWHERE = ("HTTPS_PROXY", "https_proxy", "PIP_INDEX_URL", "HF_ENDPOINT")
"""Ways to the world. Everything here is a second start, after ``scripts/setup``, which needs none;
so they lead nowhere."""


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A registry of our own, and `ray` as ``scripts/env.sh`` lets a person call it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ELSEWHERE:
            patch.setenv(name, NOWHERE)
        patch.setenv("FRONTIER_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "token")
        yield


@pytest.fixture(scope="module")
def platform(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``serve_config.yaml`` on a port that is free; afterwards nothing of it is left."""
    config = on_a_free_port(tmp_path_factory.mktemp("newcomer"))
    fetch = [sys.executable, "-m", "models", "fetch", "--config", str(config)]
    subprocess.run(fetch, cwd=ROOT, check=True)  # as scripts/serve does each time
    started: list[psutil.Process] = []
    with serving(config) as served:
        yield served
        started += served.processes()
    left = [process for process in started if process.is_running()]
    assert not left


def test_it_knows_the_capital_of_france(platform: Served) -> None:
    """Word for word what the issue, the README and the launcher tell people to send."""
    asked = (
        '{"model":"smollm2","messages":[{"role":"user",'
        '"content":"What is the capital of France?"}],"stream":true}'
    )
    headers = {"content-type": "application/json"}
    url = f"{platform.url}/v1/chat/completions"
    with httpx.stream("POST", url, content=asked, headers=headers, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines if "choices" in line]
    assert len(deltas) > 3
    assert "Paris" in "".join(delta.get("content") or "" for delta in deltas)


@pytest.mark.parametrize("given", [{}, {"x-request-id": "mine"}])
def test_an_answer_has_one_id(platform: Served, given: dict[str, str]) -> None:
    answer = httpx.get(f"{platform.url}/healthz", headers=given)
    assert answer.headers.get_list("x-request-id") == [answer.json()["request_id"]]


INFER: dict[str, Any] = {
    "model": "smollm2",
    "prompt": "Count from one to twenty in words.",
    "params": {"temperature": 0, "max_tokens": 40, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def output(platform: Served) -> str:
    """What all routes answer to ``INFER``, for they ask the same engine."""
    answer = httpx.post(f"{platform.url}/v1/infer", json=INFER, timeout=60).json()
    assert answer["success"]
    data = answer["data"]
    assert (data["model"], data["usage"]["completion_tokens"]) == ("smollm2", 40)
    assert data["latency_ms"] > 0
    return cast("str", data["output"])


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
def test_infer_streams_as_it_is_asked_to(platform: Served, output: str, accept: str) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    arrived: list[float] = []
    path = f"{platform.url}/v1/infer/stream"
    headers = {"accept": accept}
    with httpx.stream("POST", path, json=INFER, headers=headers, timeout=60) as answer:
        assert answer.headers["content-type"].startswith(accept)
        for line in answer.iter_lines():
            name, data = line.removeprefix("event: "), line.removeprefix("data: ")
            if accept == "application/x-ndjson":
                event = json.loads(line)
                told.append((event["event"], event["data"]))
            elif name != line:
                told.append((name, {}))
            elif data != line:
                told[-1] = (told[-1][0], json.loads(data))
            arrived.append(time.monotonic())
    *tokens, (last, summary) = told
    assert {name for name, _ in tokens} == {"token"}
    assert "".join(data["text"] for _, data in tokens) == output
    assert (last, summary["usage"]["completion_tokens"]) == ("done", 40)
    # As it is made: what held it back would hand it over at once.
    assert arrived[-1] - arrived[0] > summary["timings"]["decode_ms"] / 1000 / 2


async def test_infer_on_a_socket(platform: Served, output: str) -> None:
    """Two requests side by side; one is cancelled."""
    url = platform.url.replace("http", "ws", 1) + "/v1/infer/ws"
    texts = {"kept": "", "left": ""}
    ends: dict[str, str] = {}
    async with connect(url, proxy=None) as socket, asyncio.timeout(60):
        long = INFER | {"params": {"temperature": 0, "max_tokens": 1500, "ignore_eos": True}}
        for id_, asked in (("left", long), ("kept", INFER)):
            await socket.send(json.dumps({"type": "infer", "id": id_, **asked}))
        while ends.keys() != texts.keys():
            message = json.loads(await socket.recv())
            id_, event = message["id"], message["event"]
            if event == "token":
                texts[id_] += message["data"]["text"]
            else:
                ends[id_] = event
                if id_ == "kept":
                    await socket.send(json.dumps({"type": "cancel", "id": "left"}))
    assert ends == {"kept": "done", "left": "cancelled"}
    assert texts["kept"] == output
    assert texts["left"]


async def test_the_asynchronous_openai_client_streams(platform: Served, output: str) -> None:
    text, usage = "", None
    async with AsyncOpenAI(base_url=f"{platform.url}/v1", api_key="none", max_retries=0) as client:
        async for chunk in await client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": INFER["prompt"]}],
            temperature=0,
            max_tokens=40,
            extra_body={"ignore_eos": True},
            stream=True,
            stream_options={"include_usage": True},
        ):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
    assert text == output
    assert usage is not None
    assert usage.completion_tokens == 40


def test_embeddings_have_their_size(platform: Served) -> None:
    body = {"model": "minilm", "input": ["one", "two"]}
    answer = httpx.post(f"{platform.url}/v1/embeddings", json=body, timeout=60)
    assert [len(item["embedding"]) for item in answer.json()["data"]] == [384, 384]


def test_metrics_tell_of_gateway_and_engine(platform: Served) -> None:
    body = {"model": "smollm2", "prompt": "One, two,", "max_tokens": 8, "ignore_eos": True}
    httpx.post(f"{platform.url}/v1/completions", json=body, timeout=60).raise_for_status()

    def told() -> bool:
        return all(
            metric(platform, f"frontier_{name}", model="smollm2") > 0
            for name in (
                "requests_total",
                "request_duration_seconds_count",
                "time_to_first_token_seconds_count",
                "time_per_output_token_seconds_count",
                "queue_wait_seconds_count",
                "batch_size_count",
                "completion_tokens_total",
            )
        )

    wait_until(told, timeout_s=15, what="every kind of measurement")


def test_a_request_is_found_by_the_bucket_that_it_fell_into(platform: Served) -> None:
    body = {"model": "smollm2", "prompt": "One, two,", "max_tokens": 3}
    headers = {"X-Request-ID": "seen-in-a-bucket"}
    httpx.post(
        f"{platform.url}/v1/completions", json=body, headers=headers, timeout=60
    ).raise_for_status()

    def noted() -> set[str]:
        accepted = {"Accept": "application/openmetrics-text"}
        page = httpx.get(f"{platform.url}/metrics", headers=accepted, timeout=10).text
        return {
            sample.name
            for family in open_families(page)
            for sample in family.samples
            if sample.exemplar is not None
            and sample.exemplar.labels == {"request_id": "seen-in-a-bucket"}
        }

    wanted = {"frontier_request_duration_seconds_bucket", "frontier_decode_seconds_bucket"}
    wait_until(lambda: noted() >= wanted, timeout_s=15, what="its exemplars")


def test_an_idle_engine_says_so(platform: Served) -> None:
    for name in ("frontier_running_sequences", "frontier_queue_depth"):
        # a gauge is seen a report later than what it counts; one that is missing is not 0
        wait_until(
            lambda name=name: metric(platform, name, model="smollm2") == 0,  # type: ignore[misc]
            timeout_s=15,
            what=f"{name} 0",
        )


def test_the_dashboard_shows_the_application(platform: Served) -> None:
    application = (platform.dashboard.applications() or {})["frontier-run"]
    assert application["status"] == "RUNNING"
    assert {name: d["status"] for name, d in application["deployments"].items()} == {
        "gateway": "HEALTHY",
        "smollm2": "HEALTHY",
        "minilm": "HEALTHY",
    }


@pytest.mark.parametrize("block", documents.marked("served"), ids=str)
def test_documents_say_what_happens(platform: Served, block: Block) -> None:
    documents.run(block, address=urlsplit(platform.url).netloc)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", documents.marked("story"), ids=str)
def test_the_story_from_data_to_traffic(platform: Served, block: Block) -> None:
    """The README's second example: on the demo model, beside what is served, within two CPUs."""
    written = [documents.ROOT / name for name in ("rows.jsonl", "golden.jsonl", "measured.json")]
    assert not [path for path in written if path.exists()], "somebody's files"
    try:
        documents.run(block, address=urlsplit(platform.url).netloc)
    finally:
        for path in written:
            path.unlink(missing_ok=True)


def test_the_launcher_says_where_everything_is(platform: Served) -> None:
    said: str = platform.output()
    assert f"API        {platform.url}" in said
    port = platform.env.get("FRONTIER_DASHBOARD_PORT", "8265")
    assert f"Dashboard  http://localhost:{port}" in said.partition("platform  ready")[2]
    assert f"curl {urlsplit(platform.url).netloc}/v1/chat/completions" in said
    assert Path(".cache/logs").as_posix() in said
    assert "Open: whoever is on this machine may do everything. --secure asks for keys." in said


def test_a_job_is_submitted_as_the_readme_says(platform: Served) -> None:
    ray = Path(sys.executable).with_name("ray")
    words = ["job", "submit", "--address", platform.dashboard.url, "--working-dir", str(ROOT)]
    done = subprocess.run(
        [ray, *words, "--submission-id", "listed", "--", "python", "-m", "train", "--list"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vision " in done.stdout
    dashboard = platform.dashboard
    headers = {"authorization": f"Bearer {dashboard.token}"}
    shown = httpx.get(f"{dashboard.url}/api/jobs/", headers=headers, timeout=30).json()
    [job] = [job for job in shown if job["submission_id"] == "listed"]
    assert (job["status"], job["entrypoint"]) == ("SUCCEEDED", "python -m train --list")
