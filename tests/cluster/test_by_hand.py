"""``serve run serve_config.yaml`` alone: no launcher, nothing of ``scripts/env.sh``."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from deployments.launcher import preflight, status
from deployments.launcher.__main__ import BIN
from tests.cluster.conftest import on_a_free_port, wait_until
from tests.documents import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.weights, pytest.mark.timeout(600)]


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[dict[str, str]]:
    """What a shell has that knows nothing of us; Ray's files and ours in folders of their own."""
    strange = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "FRONTIER_")) or name == "FRONTIER_CACHE"
    }
    with tempfile.TemporaryDirectory(prefix="fr-", ignore_cleanup_errors=True) as short:
        # Short, for the sockets' sake; and no other Ray's address lies there to be found.
        yield {**strange, "RAY_TMPDIR": short, "FRONTIER_HOME": str(tmp_path / "home")}


def test_it_starts_answers_and_stops_without_the_launcher(
    plain: dict[str, str], tmp_path: Path
) -> None:
    config = on_a_free_port(tmp_path)
    url, log = preflight.load(config).url, tmp_path / "serve.log"
    with log.open("wb") as output:
        serve = subprocess.Popen(
            [BIN / "serve", "run", config],
            cwd=ROOT,
            env=plain,
            stdout=output,
            stderr=output,
            # As in a terminal; a shell's background jobs inherit that Ctrl-C is ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
    started: list[psutil.Process] = []
    try:

        def ready() -> bool:
            assert serve.poll() is None, log.read_text()
            return status.is_ready(url)

        # Ray's workers are background work here, so whoever else works comes first.
        wait_until(ready, timeout_s=400, what="serve run")
        started = psutil.Process(serve.pid).children(recursive=True)
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]
        # Nobody greets here, so the gateway itself says what the launcher's greeting would.
        wait_until(
            lambda: "Open: whoever reaches this gateway" in log.read_text(),
            timeout_s=10,
            what="a warning",
        )
        serve.send_signal(signal.SIGINT)
        serve.wait(60)
    finally:
        print(log.read_text())
        if serve.poll() is None:
            serve.kill()
            serve.wait()
        _, left = psutil.wait_procs(started, timeout=20)
        for process in left:
            process.kill()
    assert not left
