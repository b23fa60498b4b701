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
from tests.cluster.streams import Outcome, stream

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


SLOTS, QUEUE = 4, 100


@pytest.fixture(scope="module")
def single(long_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One replica with four slots and a short queue."""
    config = tiny_args(long_llama, replicas=1, slots=SLOTS, capacity=QUEUE)
    with serving(config, tmp_path_factory.mktemp("single")) as platform:
        yield platform


async def test_more_requests_than_the_queue_holds_are_refused_with_retry_after(
    single: Served,
) -> None:
    """While all slots are taken, so that what the queue holds is all that gets in."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=single.url, timeout=120, limits=limits) as client:
        begun = [asyncio.Event() for _ in range(SLOTS)]
        holders = [
            asyncio.create_task(stream(client, max_tokens=8000, begun=each)) for each in begun
        ]
        await asyncio.gather(*(each.wait() for each in begun))
        crowd = [asyncio.create_task(stream(client, max_tokens=50)) for _ in range(300)]
        refused: list[Outcome] = []
        for soonest in asyncio.as_completed(crowd):
            refused.append(await soonest)
            if len(refused) == len(crowd) - QUEUE:
                break
        assert not any(holder.done() for holder in holders), "the slots were free too soon"
        for holder in holders:
            holder.cancel()
        outcomes = await asyncio.gather(*crowd)
    assert {outcome.status for outcome in refused} == {429}
    assert Counter(outcome.status for outcome in outcomes) == {200: QUEUE, 429: 300 - QUEUE}
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
        waiting = asyncio.create_task(stream(client, max_tokens=5))  # the client does nothing
        red = await client.get("/readyz")
        assert red.status_code == 503
        components = red.json()["error"]["details"]["components"]
        assert components.pop("tiny") is not True
        assert components == {"database": True}
        outcome = await waiting
        assert outcome.complete, outcome
        assert asyncio.get_running_loop().time() - began < 30
        assert (await client.get("/readyz")).status_code == 200
