"""SIGTERM, as a supervisor sends it, while an answer is under way."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx
import pytest

from tests.cluster.conftest import serving, tiny_args, wait_until
from tests.cluster.streams import completion, stream

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

LONG = 6000
"""Tokens of a stream that lasts longer than it takes to close the door."""


async def test_an_open_stream_ends_as_it_should_and_nobody_else_comes_in(
    long_llama: Path, tmp_path: Path
) -> None:
    config = tiny_args(long_llama, replicas=1, slots=4)
    for section in (config["models"]["tiny"], config["gateway"]):
        section["replicas"]["drain_s"] = 100

    with serving(config, tmp_path) as platform:
        started = platform.processes()
        begun = asyncio.Event()

        def refused() -> bool:
            try:
                answer = httpx.post(
                    f"{platform.url}/v1/completions", json=completion("tiny", "Hi", 1), timeout=30
                )
            except httpx.TransportError:
                return True
            return answer.status_code in {404, 503}

        async with httpx.AsyncClient(base_url=platform.url, timeout=120) as client:
            assert not refused()
            running = asyncio.create_task(stream(client, max_tokens=LONG, begun=begun))
            await begun.wait()
            platform.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_until, refused, timeout_s=30, what="a closed door")
            assert not running.done(), "the stream was too short to tell"
            outcome = await running
        assert outcome.complete, outcome
        assert outcome.tokens == LONG
        assert await asyncio.to_thread(platform.process.wait, 60) == 0
        assert platform.output().splitlines()[-1] == "stopped"
    assert not [process for process in started if process.is_running()]
