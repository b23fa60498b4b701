"""What a newcomer does: serve the configuration as it is, ask, stop."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from deployments.launcher.background import Served, serving
from tests import documents
from tests.documents import ROOT, Block

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.weights,
    pytest.mark.smoke,
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
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


@pytest.mark.parametrize("block", documents.marked("served"), ids=str)
def test_documents_say_what_happens(platform: Served, block: Block) -> None:
    documents.run(block, address=urlsplit(platform.url).netloc)


def test_the_launcher_says_where_everything_is(platform: Served) -> None:
    said: str = platform.output()
    assert f"API        {platform.url}" in said
    assert f"curl {urlsplit(platform.url).netloc}/v1/chat/completions" in said
    assert Path(".cache/logs").as_posix() in said
