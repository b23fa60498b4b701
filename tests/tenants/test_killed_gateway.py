"""A gateway that is killed with requests under way, over counters that others share with it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.config import PlanConfig
from deployments.tenants.meter import Meter, QuotaExceeded, Work
from deployments.tenants.plans import LimitName
from deployments.tenants.principal import EVERYBODY
from state.counters import Counters, Strategy, open_counters
from tests.servers import RedisServer, redis_server

__all__ = ["redis_server"]

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
LEASE_S = 3.0
PLANS = {"p": PlanConfig(concurrent_requests=2, tokens_per_day=1000)}
WHO = replace(EVERYBODY, tenant="acme", plan="p")
GATEWAY = """
import asyncio, sys
from state.counters import open_counters
from tests.tenants.test_killed_gateway import WHO, Work, metering

async def main(url):
    meter = metering(open_counters(url))
    settled = await meter.admit(WHO, None, Work(completion_tokens=100))
    meter.settle(settled, Work(completion_tokens=10))
    while meter._tasks:
        await asyncio.wait(meter._tasks)
    for _ in range(2):
        await meter.admit(WHO, None, Work(completion_tokens=300))
    print("two run", flush=True)
    await asyncio.sleep(600)

asyncio.run(main(sys.argv[1]))
"""


def metering(counters: Counters) -> Meter:
    return Meter(
        counters=counters,
        plans=PLANS,
        strategy=Strategy.FIXED_WINDOW,
        prices={},
        emit=lambda _: None,
        lease_s=LEASE_S,
    )


async def left(meter: Meter) -> tuple[int, int]:
    """Places and tokens."""
    levels = {level.name: level.remaining for level in await meter.levels(WHO)}
    return levels[LimitName.CONCURRENT_REQUESTS], levels[LimitName.TOKENS_PER_DAY]


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_what_a_killed_gateway_held_is_free_when_its_leases_are_over(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "sqlite":
        url = f"sqlite:///{tmp_path}/counters.db"
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        url = server.url
    gateway = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs yet
        [sys.executable, "-c", GATEWAY, url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    meter = metering(open_counters(url))
    try:
        assert gateway.stdout is not None
        assert (await asyncio.to_thread(gateway.stdout.readline)).strip() == "two run"
        await asyncio.sleep(1.5 * LEASE_S)
        assert await left(meter) == (0, 390), "while it lives its requests keep their places"
        gateway.send_signal(signal.SIGKILL)
        gateway.wait()
        killed = time.monotonic()
        with pytest.raises(QuotaExceeded, match="concurrent requests"):
            await meter.admit(WHO, None, Work(completion_tokens=1))
        while (await left(meter))[0] < 2:
            assert time.monotonic() - killed < LEASE_S + 20
            await asyncio.sleep(0.1)
        assert await left(meter) == (2, 390), "nobody knows how much of it was done: it stays used"
        admission = await meter.admit(WHO, None, Work(completion_tokens=390))
        meter.settle(admission, Work(completion_tokens=20))
        while meter._tasks:
            await asyncio.wait(meter._tasks)
        assert await left(meter) == (2, 370)
    finally:
        gateway.kill()
        gateway.communicate()
        await meter.close()
