"""One replica alone: more requests than it has room for, and its death."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.launcher.background import Served
from tests.cluster.conftest import serving, tiny_args
from tests.cluster.streams import stream

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def single(long_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One replica with four slots and a short queue."""
    config = tiny_args(long_llama, replicas=1, slots=4, capacity=100)
    with serving(config, tmp_path_factory.mktemp("single")) as platform:
        yield platform


async def test_more_requests_than_the_queue_holds_are_refused_with_retry_after(
    single: Served,
) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=single.url, timeout=120, limits=limits) as client:
        outcomes = await asyncio.gather(*(stream(client, max_tokens=50) for _ in range(300)))
    statuses = Counter(outcome.status for outcome in outcomes)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 100
    for outcome in outcomes:
        if outcome.status == 429:
            assert int(outcome.headers["retry-after"]) >= 1
            assert outcome.error is not None
            assert outcome.error["code"] == "OVERLOADED"
        else:
            assert outcome.complete


async def test_only_replica_is_back_within_30_s(single: Served) -> None:
    async with httpx.AsyncClient(base_url=single.url, timeout=120) as client:
        assert (await stream(client, max_tokens=5)).complete
        single.replicas("tiny")[0].send_signal(signal.SIGKILL)
        began = asyncio.get_running_loop().time()
        outcome = await stream(client, max_tokens=5)  # waits; the client does nothing
        assert outcome.complete, outcome
        assert asyncio.get_running_loop().time() - began < 30
