"""Engine and gateway go from one replica to two under load and back, and no request fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.cluster.conftest import metric, replica_ids, serving, wait_until
from tests.cluster.streams import Outcome, stream

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


async def test_engine_and_gateway_scale_up_and_down_without_a_failed_request(
    long_llama: Path, tmp_path: Path
) -> None:
    scaling = {
        "min": 1,
        "max": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 3,
        "metrics_interval_s": 1,
        "cpus": 1,
    }
    config = {
        "models": {
            "tiny": {
                "task": "generate",
                "source": str(long_llama),
                "engine": {"slots": 4},
                "replicas": scaling,
            }
        },
        "gateway": {"replicas": {**scaling, "cpus": 0}},
    }
    outcomes: list[Outcome] = []
    with serving(config, tmp_path) as platform:
        enough = asyncio.Event()

        async def client() -> None:
            async with httpx.AsyncClient(base_url=platform.url, timeout=120) as http:
                while not enough.is_set():
                    outcomes.append(await stream(http, max_tokens=200))

        def counts() -> set[int]:
            return {len(platform.replicas(name)) for name in ("tiny", "gateway")}

        def sharing() -> set[int]:
            """How many gateways run, and how many engines answer somebody."""
            busy = [
                each
                for each in replica_ids(platform, "tiny")
                if metric(platform, "frontier_running_sequences", replica=each) > 0
            ]
            return {len(replica_ids(platform, "gateway")), len(busy)}

        assert counts() == {1}
        clients = [asyncio.create_task(client()) for _ in range(6)]
        await asyncio.to_thread(
            wait_until, lambda: counts() == {2}, timeout_s=60, what="two replicas of both"
        )
        await asyncio.to_thread(
            wait_until,
            lambda: sharing() == {2},
            timeout_s=60,
            what="new ones that take their share",
        )
        enough.set()
        await asyncio.gather(*clients)
        async with httpx.AsyncClient(base_url=platform.url, timeout=120) as http:
            while counts() != {1}:  # a trickle goes on while one replica is being drained
                outcomes.append(await stream(http, max_tokens=20))
                await asyncio.sleep(0.2)
    assert len(outcomes) > 10
    assert all(outcome.complete for outcome in outcomes)
