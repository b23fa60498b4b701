"""A replica that dies beside another one, and a client that leaves."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.launcher.background import Served
from tests.cluster.conftest import (
    metric,
    metrics,
    on_page,
    replica_ids,
    serving,
    tiny_args,
    wait_until,
)
from tests.cluster.streams import Outcome, stream, whole

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

LONG = 8000
"""Tokens of a stream that lasts longer than metrics are old."""


@pytest.fixture(scope="module")
def pair(long_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two replicas with one slot each."""
    config = tiny_args(long_llama, replicas=2, slots=1)
    with serving(config, tmp_path_factory.mktemp("pair")) as platform:
        both_run(platform, within_s=60)  # it is ready as soon as one of them is
        yield platform


def both_run(platform: Served, *, within_s: float) -> None:
    def run() -> bool:
        return len(replica_ids(platform, "tiny")) == 2

    wait_until(run, timeout_s=within_s, what="two replicas")


async def test_killed_replica_fails_only_what_it_had_begun(pair: Served) -> None:
    replicas = replica_ids(pair, "tiny")  # before both engines keep Ray's dashboard from answering

    victims: list[int] = []
    """Processes of the replicas that answer one request while another one waits."""

    def crowded() -> bool:
        page = metrics(pair)
        victims[:] = [
            pid
            for replica, pid in replicas.items()
            if on_page(page, "frontier_running_sequences", replica=replica) == 1
            and on_page(page, "frontier_queue_depth", replica=replica) >= 1
        ]
        return bool(victims)

    async with httpx.AsyncClient(base_url=pair.url, timeout=120) as client:
        streams = [asyncio.create_task(stream(client, max_tokens=LONG)) for _ in range(4)]
        await asyncio.to_thread(wait_until, crowded, timeout_s=60, what="a request that waits")
        # None has ended, so those that waited when it was measured wait now.
        assert not any(task.done() for task in streams), "the streams were too short to tell"
        os.kill(victims[0], signal.SIGKILL)
        outcomes = await asyncio.gather(*streams)
    broken = [outcome for outcome in outcomes if not outcome.complete]
    assert len(broken) == 1
    assert broken[0].text
    assert broken[0].error is not None
    assert broken[0].error["code"] == "UPSTREAM_ERROR"
    assert all(outcome.tokens == LONG for outcome in outcomes if outcome.complete)
    both_run(pair, within_s=30)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
async def test_client_that_leaves_frees_its_slot(pair: Served, streamed: bool) -> None:
    """``httpx``, and so the openai client, sends its body in a packet of its own: an HAProxy that
    splices it does not see such a client leave.
    """

    def running() -> float:
        return metric(pair, "frontier_running_sequences", model="tiny")

    def ask(max_tokens: int) -> Coroutine[Any, Any, Outcome]:
        return (stream if streamed else whole)(client, max_tokens=max_tokens)

    async with httpx.AsyncClient(base_url=pair.url, timeout=120) as client:
        # More than two: Ray may send the first ones to the same replica, which it knows to be idle.
        leavers = [asyncio.create_task(ask(8000)) for _ in range(6)]
        await asyncio.to_thread(
            wait_until, lambda: running() == 2, timeout_s=10, what="running sequences"
        )
        for leaver in leavers:
            leaver.cancel()
        await asyncio.gather(*leavers, return_exceptions=True)
        await asyncio.to_thread(wait_until, lambda: running() == 0, timeout_s=10, what="free slots")
        # Both slots are free at once, or these would not finish before what was left behind.
        outcomes = await asyncio.gather(*(ask(20) for _ in range(2)))
    assert all(outcome.complete for outcome in outcomes)
