"""What the engine says it has done of requests that were closed early, to the token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deployments.config import EngineConfig
from deployments.engines import accounts as module
from deployments.engines.accounts import Accounts, close
from models.contracts import NO_USAGE, Usage
from models.errors import InvalidInput, Timeout, Underestimated
from tests.engines.clients import Start, answer, greedy, idle, request, until
from tests.engines.gate import Gate


async def left(client: asyncio.Task[object]) -> None:
    client.cancel()
    await asyncio.wait([client])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves(llama: Path, start: Start, stream: bool) -> None:
    engine = start(llama)
    gate = Gate(engine)
    what = request((1, 2, 3), greedy(50), n=2, stream=stream, receipt="a")
    client = asyncio.create_task(answer(engine, what))
    await gate.entered()
    await gate.steps(4)  # the prompt and a first token; then the second choice joins
    counted = sum(sequence.generated for sequence in engine._scheduler.running())
    await left(client)
    asking = asyncio.create_task(engine.spent(what))
    await asyncio.sleep(0.01)
    assert not asking.done(), "the step under way is not over"
    gate.open()
    used = await asking
    assert used is not None
    assert used.prompt_tokens == 3
    assert counted < used.completion_tokens <= counted + 2, "and what that step made"
    await idle(engine)
    assert len(engine.accounts) == 0


async def test_who_leaves_the_queue_has_used_nothing(llama: Path, start: Start) -> None:
    engine = start(llama, EngineConfig(slots=1, dtype="float64", threads=1))
    gate = Gate(engine)
    running = asyncio.create_task(answer(engine, request(sampling=greedy(3))))
    await gate.entered()
    what = request((1, 2), greedy(3), receipt="a")
    waiting = asyncio.create_task(answer(engine, what))
    await until(lambda: len(engine._scheduler.queue) == 1)
    await left(waiting)
    gate.open()
    assert await engine.spent(what) == NO_USAGE
    await running


async def test_a_deadline_while_generating(llama: Path, start: Start) -> None:
    now = 100.0
    engine = start(llama, clock=lambda: now)
    gate = Gate(engine)
    what = request((1, 2, 3), greedy(50), receipt="a", timeout_s=5)
    client = asyncio.create_task(answer(engine, what))
    await gate.entered()
    await gate.steps(3)
    now += 6
    gate.open()
    with pytest.raises(Timeout):
        await client
    used = await engine.spent(what)
    assert used is not None
    assert (used.prompt_tokens, used.completion_tokens >= 3) == (3, True)


async def test_an_answer_that_is_complete_may_be_lost_on_its_way(llama: Path, start: Start) -> None:
    engine = start(llama)
    what = request(sampling=greedy(3), receipt="a")
    usage = (await answer(engine, what))[-1].usage
    assert usage is not None
    assert await engine.spent(what) == usage
    assert await engine.spent(what) is None, "it was told"
    assert len(engine.accounts) == 0


async def test_what_was_refused_has_used_nothing(llama: Path, start: Start) -> None:
    engine = start(llama)
    for what, error in (
        (request(sampling=greedy(0), receipt="a"), InvalidInput),
        (request((1, 2, 3), greedy(1), receipt="b", max_prompt_tokens=2), Underestimated),
    ):
        with pytest.raises(error):
            await answer(engine, what)
        assert await engine.spent(what) == NO_USAGE
    assert await engine.spent(request(receipt="unknown")) is None
    assert await engine.spent(request()) is None


async def test_a_prompt_that_is_longer_than_what_was_reserved(llama: Path, start: Start) -> None:
    engine = start(llama)
    with pytest.raises(Underestimated, match="3 tokens, and 2 were reserved") as told:
        await answer(engine, request((1, 2, 3), greedy(1), max_prompt_tokens=2))
    assert told.value.details == {"prompt_tokens": 3}
    assert await answer(engine, request((1, 2, 3), greedy(1), max_prompt_tokens=3))


async def test_accounts_that_nobody_asks_for_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    accounts = Accounts()
    for name in "abcde":
        close(accounts.open(name), Usage(prompt_tokens=1, completion_tokens=2))
        accounts.leave(name)
    assert [await accounts.spent(name) is None for name in "abcde"] == [True, True, *[False] * 3]
    assert len(accounts) == 0


async def test_an_engine_that_does_not_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSING_S", 0.01)
    accounts = Accounts()
    account = accounts.open("a")
    accounts.leave("a")
    assert await accounts.spent("a") is None
    close(account, NO_USAGE)
    close(account, Usage(prompt_tokens=9, completion_tokens=9))
    assert await accounts.spent("a") == NO_USAGE, "the first word holds"
    assert accounts.open(None) is None
    close(None)
