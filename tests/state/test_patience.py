"""What is waited for, for how long, and what becomes of what is late."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest

from deployments.tenants import idempotency, identity, meter
from state import patience
from state.cache import redis as redis_cache
from state.counters import redis as redis_counters
from state.counters import sqlite as sqlite_counters
from state.errors import StateUnavailable
from state.patience import LINE, Patience, promptly, watch_the_line

pytestmark = pytest.mark.outage


def test_the_budgets_fit_into_each_other() -> None:
    """Whoever changes one here breaks the promise, or keeps it."""
    assert patience.SERVER_S < patience.REQUEST_S < patience.ANSWER_S <= 1.0
    assert {identity.PATIENCE_S, idempotency.PATIENCE_S, meter.PATIENCE_S} == {patience.REQUEST_S}
    assert redis_counters.TIMEOUT_S == sqlite_counters.PATIENCE_S == patience.SERVER_S
    assert redis_cache.TIMEOUT_S < patience.SERVER_S


async def test_a_request_has_one_budget_for_all_its_questions() -> None:
    left = Patience(0.2)
    async with left.waiting("the first"):
        await asyncio.sleep(0.05)
    assert left.left_s < 0.16
    began = asyncio.get_running_loop().time()
    with pytest.raises(StateUnavailable, match="the second did not answer in time"):
        async with left.waiting("the second"):
            await asyncio.sleep(60)
    assert asyncio.get_running_loop().time() - began < 5
    with pytest.raises(StateUnavailable):
        async with left.waiting("the third"):
            await asyncio.sleep(60)


async def test_what_answers_at_once_may_be_asked_with_nothing_left() -> None:
    async with Patience(0).waiting("it"):
        pass


async def test_an_error_of_what_is_asked_stays_what_it_is() -> None:
    for error in (TimeoutError("its own"), KeyError()):
        with pytest.raises(type(error)):
            async with Patience(5).waiting("it"):
                raise error


class Work:
    """Is done when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go = asyncio.Event()
        self.error = error
        self.stopped = False

    async def run(self) -> str:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.stopped = True
            raise
        if self.error is not None:
            raise self.error
        return "done"


async def ended(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.001)


async def test_what_is_in_time_is_returned_or_raised() -> None:
    work = Work()
    work.go.set()
    assert await promptly(work.run(), within_s=5, what="it") == "done"
    for error in (KeyError(), TimeoutError("its own")):
        work.error = error
        with pytest.raises(type(error)):
            await promptly(work.run(), within_s=5, what="it")


async def test_what_is_late_goes_on_and_is_put_away() -> None:
    work, put_away = Work(), []

    async def away(result: str) -> None:
        put_away.append(result)

    with pytest.raises(StateUnavailable, match=r"it did not answer within 0\.01 s"):
        await promptly(work.run(), within_s=0.01, what="it", late=away)
    assert not work.stopped
    work.go.set()
    await ended(lambda: put_away == ["done"])
    await ended(lambda: not patience._late)


async def test_what_nobody_waits_for_any_more_goes_on() -> None:
    work, put_away = Work(), []

    async def away(result: str) -> None:
        put_away.append(result)
        raise KeyError  # which is nobody's business

    waiting = asyncio.create_task(promptly(work.run(), within_s=60, what="it", late=away))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not work.stopped
    work.go.set()
    await ended(lambda: put_away == ["done"])


async def test_what_is_late_and_fails_is_nobody_s_failure() -> None:
    work = Work(KeyError())
    with pytest.raises(StateUnavailable):
        await promptly(work.run(), within_s=0.01, what="it")
    work.go.set()
    await ended(lambda: not patience._late)


def test_a_line_is_watched() -> None:
    with socket.socket() as line:
        watch_the_line(line)
        assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for name, value in LINE.items():
            assert line.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
    with socket.socket(socket.AF_UNIX) as local:
        watch_the_line(local)
        assert not local.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
