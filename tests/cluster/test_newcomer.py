"""What a newcomer does: serve the configuration as it is, ask, stop."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from deployments.launcher.background import Served, serving
from tests import documents
from tests.cluster.conftest import metric, wait_until
from tests.documents import ROOT, Block

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.weights,
    pytest.mark.smoke,
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A registry of our own, and `ray` as ``scripts/env.sh`` lets a person call it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRONTIER_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "token")
        yield


@pytest.fixture(scope="module")
def platform(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``serve_config.yaml`` on a port that is free; afterwards nothing of it is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path_factory.mktemp("newcomer") / "serve_config.yaml"
    text = (ROOT / "serve_config.yaml").read_text()
    assert "port: 8000" in text
    config.write_text(text.replace("port: 8000", f"port: {port}"))
    started: list[psutil.Process] = []
    with serving(config) as served:
        yield served
        started += served.processes()
    left = [process for process in started if process.is_running()]
    assert not left


def test_it_knows_the_capital_of_france(platform: Served) -> None:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    answer = httpx.post(f"{platform.url}/v1/chat/completions", json=body, timeout=60)
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]


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


def test_an_idle_engine_says_so(platform: Served) -> None:
    for name in ("frontier_running_sequences", "frontier_queue_depth"):
        # a gauge is seen a report later than what it counts
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
    assert f"curl {urlsplit(platform.url).netloc}/v1/chat/completions" in said
    assert Path(".cache/logs").as_posix() in said


def test_a_job_is_submitted_as_the_readme_says(platform: Served) -> None:
    ray = Path(sys.executable).with_name("ray")
    words = ["job", "submit", "--address", platform.dashboard.url, "--working-dir", str(ROOT)]
    done = subprocess.run(
        [ray, *words, "--", "python", "-m", "train", "--list"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vision " in done.stdout
