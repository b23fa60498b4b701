"""What goes wrong around an engine: failing steps, leaving clients, load, deadlines, the end."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import aclosing
from pathlib import Path

import pytest

from deployments.config import EngineConfig, PriorityClass, QueueConfig
from deployments.engines.engine import Engine
from deployments.engines.text import TextStream
from deployments.observability.events import (
    BatchFailed,
    BatchRan,
    EngineState,
    Event,
    RequestShed,
    RequestStarted,
)
from models.contracts import Delta, Priority, Sampling
from models.errors import (
    InternalError,
    Overloaded,
    PlatformError,
    Timeout,
    Unavailable,
)
from tests.engines.clients import (
    LONG,
    Start,
    answer,
    greedy,
    idle,
    kinds,
    request,
    stream,
    text,
    tokens,
    until,
)
from tests.engines.gate import POISON, Failure, Gate, Poison
from tests.engines.reference import Reference

# --- faults -------------------------------------------------------------------------------


async def test_an_exception_in_one_sequence_ends_that_one(
    llama: Path,
    start: Start,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fragile(TextStream):
        def push(self, token: int) -> str:
            if "boom" in self._stop and token == fatal:
                raise ZeroDivisionError("a bug")
            return super().push(token)

    fatal = reference.answer(request(LONG)).tokens[4]
    monkeypatch.setattr("deployments.engines.output.TextStream", Fragile)
    engine = start(llama)
    fine, broken, pair = await asyncio.gather(
        answer(engine, request(LONG, greedy(20))),
        answer(engine, request(LONG, greedy(20, stop=("boom",)))),
        answer(engine, request(LONG, greedy(20, stop=("boom",)), n=2)),
        return_exceptions=True,
    )
    assert isinstance(fine, list)
    assert tokens(fine) == reference.answer(request(LONG, greedy(20))).tokens
    for failed in (broken, pair):
        assert isinstance(failed, InternalError)
        assert "a bug" in failed.message
    assert "sequence of request r failed" in caplog.text
    await idle(engine)


async def test_a_failing_step_is_told_to_its_requests_and_the_engine_goes_on(
    llama: Path, start: Start, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Event] = []
    config = EngineConfig(slots=2, step_tokens=16, dtype="float64", threads=1)
    engine = start(llama, config, emit=events.append)
    Poison(engine)  # so that what the failing pass leaves behind is NaN
    gate, failure = Gate(engine), Failure(engine)
    decodes = asyncio.create_task(answer(engine, request()))
    await gate.entered()
    prefills = asyncio.create_task(answer(engine, request((POISON, *LONG))))
    waits = asyncio.create_task(answer(engine, request(LONG)))
    await until(lambda: len(engine._scheduler.queue) == 2)
    await gate.steps()
    failure.on = True
    await gate.steps()
    failure.on = False
    for told in (decodes, prefills):
        with pytest.raises(InternalError, match="retry"):
            await told
    gate.open()
    assert tokens(await waits) == reference.answer(request(LONG)).tokens
    failed = kinds(events, BatchFailed)
    assert [e.rows for e in failed] == [2]
    assert "on fire" in failed[0].error
    assert "step with 2 requests failed" in caplog.text
    await idle(engine)
    await beside_long_neighbours(engine, reference, long_slot=0)


async def beside_long_neighbours(engine: Engine, reference: Reference, long_slot: int) -> None:
    """Short answers whose decode batch spans what former owners of their slots have left."""
    crowd = [request((i,), greedy(20)) for i in range(1, 8)]
    crowd.insert(long_slot, request(LONG))
    for what, got in zip(
        crowd, await asyncio.gather(*(answer(engine, w) for w in crowd)), strict=True
    ):
        assert tokens(got) == reference.answer(what).tokens


@pytest.mark.parametrize("n", [1, 2, 3])
async def test_logits_that_are_not_finite_end_their_own_request(
    n: int, llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    Poison(engine)
    dies_decoding = greedy(20, logit_bias={POISON: 100.0})  # every choice draws it at once
    good = [request(LONG, greedy(30)), request((5,), greedy(30))]
    bad = [request((*LONG[:40], POISON), n=n), request(LONG[:50], dies_decoding, n=n)]
    answers = await asyncio.gather(
        *(answer(engine, what) for what in (*good, *bad)), return_exceptions=True
    )
    for what, got in zip(good, answers[:2], strict=True):
        assert isinstance(got, list)
        assert tokens(got) == reference.answer(what).tokens
    for got in answers[2:]:
        assert isinstance(got, InternalError)
        assert "not finite" in got.message
    await idle(engine)
    await beside_long_neighbours(engine, reference, long_slot=1)


async def test_choices_that_fail_in_the_same_step_leave_no_nan_behind(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama, EngineConfig(slots=4, step_tokens=64, dtype="float64", threads=1))
    poison, gate = Poison(engine), Gate(engine)
    task = asyncio.create_task(answer(engine, request(LONG, n=4)))
    await gate.entered()
    await gate.steps(3)  # all four decode
    poison.everywhere = True
    gate.open()
    with pytest.raises(InternalError, match="not finite"):
        await task
    poison.everywhere = False
    await beside_long_neighbours(engine, reference, long_slot=0)


async def test_a_client_that_leaves_before_a_nan_was_seen(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    Poison(engine)
    gate = Gate(engine)
    prompt = (*LONG[:10], POISON, *LONG[10:])
    task = asyncio.create_task(answer(engine, request(prompt)))
    await gate.entered()
    await gate.steps(2)  # two of its chunks are computed; it has not drawn yet
    task.cancel()
    await asyncio.wait([task])
    gate.open()
    await idle(engine)
    await beside_long_neighbours(engine, reference, long_slot=1)


# --- leaving ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["aclose", "cancel"])
async def test_a_client_that_leaves_frees_its_slot_within_one_step(
    how: str, llama: Path, start: Start
) -> None:
    events: list[Event] = []
    engine = start(llama, emit=events.append)
    gate = Gate(engine)
    stays = asyncio.create_task(answer(engine, request(sampling=greedy(10))))
    await gate.entered()
    leaver = stream(engine, request(stream=True))
    first = asyncio.ensure_future(anext(leaver))
    await until(lambda: len(engine._scheduler.queue) == 1)
    await gate.steps(2)
    await first
    if how == "aclose":
        await leaver.aclose()
    else:
        task = asyncio.ensure_future(anext(leaver))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    events.clear()
    await gate.steps(2)
    engine.check_integrity()
    gate.open()
    await stays
    rows = [e.rows for e in kinds(events, BatchRan)]
    assert rows[:2] == [2, 1], "the step that ran, and the next"
    assert kinds(events, EngineState)[0].running == 1
    assert kinds(events, RequestShed) == []


async def test_a_client_that_leaves_while_waiting(llama: Path, start: Start) -> None:
    events: list[Event] = []
    config = EngineConfig(slots=1, dtype="float64", threads=1)
    engine = start(llama, config, emit=events.append)
    gate = Gate(engine)
    runs = asyncio.create_task(answer(engine, request(sampling=greedy(3))))
    await gate.entered()
    waits = asyncio.create_task(answer(engine, request(priority=Priority.LOW)))
    await until(lambda: len(engine._scheduler.queue) == 1)
    waits.cancel()
    await asyncio.wait([waits])
    await gate.steps()
    assert len(engine._scheduler.queue) == 0
    gate.open()
    await runs
    await idle(engine)
    assert kinds(events, RequestShed) == [
        RequestShed(model="tiny", priority=Priority.LOW, reason="cancelled")
    ]
    assert len(kinds(events, RequestStarted)) == 1


async def test_an_iterator_never_begun_asks_for_nothing(llama: Path, start: Start) -> None:
    engine = start(llama)
    await stream(engine, request()).aclose()
    assert engine._scheduler.idle


def test_an_event_loop_that_closes_early(llama: Path, start: Start, reference: Reference) -> None:
    events: list[Event] = []
    engine = start(llama, emit=events.append)
    gate = Gate(engine)
    loop = asyncio.new_event_loop()
    abandoned = stream(engine, request(stream=True))

    async def begin() -> None:
        first = asyncio.ensure_future(anext(abandoned))
        await gate.entered()
        await gate.steps()
        await first

    loop.run_until_complete(begin())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.open()
    asyncio.run(idle(engine))
    assert len(kinds(events, BatchRan)) < 6, "nobody generates for nobody"
    got = asyncio.run(answer(engine, request(LONG)))
    assert tokens(got) == reference.answer(request(LONG)).tokens
    assert engine.alive


async def test_a_slow_consumer_loses_nothing_and_hoards_nothing(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    sampling = Sampling(seed=4, max_tokens=60, ignore_eos=True)
    what = request(LONG[:20], sampling, n=2, stream=True)
    deltas: list[Delta] = []
    async with aclosing(stream(engine, what)) as slow:
        async for delta in slow:
            deltas.append(delta)
            await idle(engine)
    # of 120 tokens: the first of each choice, what was made meanwhile as one delta a choice, and
    # perhaps the last step's, which leaves the thread after the scheduler counts as idle
    assert len(deltas) <= 6
    for i in range(2):
        expected = reference.answer(what, i)
        assert (tokens(deltas, i), text(deltas, i)) == (expected.tokens, expected.text)


async def test_without_streaming_each_choice_comes_whole(llama: Path, start: Start) -> None:
    engine = start(llama)
    deltas = await answer(engine, request(LONG, Sampling(seed=1, max_tokens=20), n=3))
    assert sorted(d.index for d in deltas) == [0, 1, 2]
    assert all(d.finish_reason for d in deltas)


# --- load and deadlines ---------------------------------------------------------------------


def room(capacity: int = 1000, timeout_s: float = 30) -> QueueConfig:
    return QueueConfig(standard=PriorityClass(capacity=capacity, weight=4, timeout_s=timeout_s))


async def test_a_full_queue_refuses(llama: Path, start: Start) -> None:
    events: list[Event] = []
    config = EngineConfig(slots=1, dtype="float64", threads=1)
    engine = start(llama, config, room(capacity=2), emit=events.append)
    gate = Gate(engine)
    running = asyncio.create_task(answer(engine, request(sampling=greedy(3))))
    await gate.entered()
    waiting = [asyncio.create_task(answer(engine, request(sampling=greedy(3)))) for _ in range(2)]
    await until(lambda: len(engine._scheduler.queue) == 2)
    with pytest.raises(Overloaded) as refused:
        await answer(engine, request())
    assert refused.value.retry_after is not None
    assert refused.value.retry_after > 0
    gate.open()
    for each in (running, *waiting):
        assert len(tokens(await each)) == 3
    assert [e.reason for e in kinds(events, RequestShed)] == ["full"]


async def test_large_and_low_work_makes_room_and_hears_it_during_a_step(
    llama: Path, start: Start
) -> None:
    events: list[Event] = []
    one = PriorityClass(capacity=1, weight=1, timeout_s=30)
    queue = QueueConfig(vip=one, standard=one, low=one.model_copy(update={"capacity": 2}))
    config = EngineConfig(slots=1, dtype="float64", threads=1)
    engine = start(llama, config, queue, emit=events.append)
    gate = Gate(engine)

    async def line_up(priority: Priority, tokens: int) -> asyncio.Task[list[Delta]]:
        waiting, shed = engine._scheduler.queue.depth(), len(kinds(events, RequestShed))
        what = request(sampling=greedy(tokens), priority=priority, stream=True, tell_place=True)
        client = asyncio.create_task(answer(engine, what))
        await until(
            lambda: (
                engine._scheduler.queue.depth() != waiting or len(kinds(events, RequestShed)) > shed
            )
        )
        return client

    running = asyncio.create_task(answer(engine, request(sampling=greedy(3))))
    await gate.entered()  # a step that does not end before the gate is opened
    large = await line_up(Priority.STANDARD, 9)
    small = await line_up(Priority.STANDARD, 2)
    lows = [await line_up(Priority.LOW, tokens) for tokens in (2, 4)]
    vip = await line_up(Priority.VIP, 5)
    for client in (large, lows[1]):
        with pytest.raises(Overloaded) as refused:
            await asyncio.wait_for(client, 30)  # the step still runs
        assert refused.value.retry_after is not None
        assert 0 < refused.value.retry_after <= 30
    gate.open()
    for client, count in ((running, 3), (small, 2), (lows[0], 2), (vip, 5)):
        assert len(tokens(await client)) == count
    told = [(event.priority, event.reason) for event in kinds(events, RequestShed)]
    assert told == [(Priority.STANDARD, "displaced"), (Priority.LOW, "displaced")]
    await idle(engine)


async def test_three_hundred_clients_against_a_queue_of_a_hundred(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama, queue=room(capacity=100))
    gate = Gate(engine)
    crowd = [request((1 + i % 5,), greedy(4), stream=i % 2 == 0) for i in range(300)]
    clients = [asyncio.create_task(answer(engine, what)) for what in crowd]
    await gate.entered()
    # How many of the first the thread took before the queue was full is between 1 and all 4.
    await until(lambda: sum(client.done() for client in clients) >= 196)
    gate.open()
    served = 0
    for what, got in zip(
        crowd, await asyncio.gather(*clients, return_exceptions=True), strict=True
    ):
        if isinstance(got, Overloaded):
            assert got.retry_after is not None
            assert got.retry_after > 0
        else:
            assert isinstance(got, list)
            assert tokens(got) == reference.answer(what).tokens
            served += 1
    assert 100 <= served <= 104
    await idle(engine)


async def test_a_deadline_in_the_queue(llama: Path, start: Start) -> None:
    now = 100.0
    events: list[Event] = []
    config = EngineConfig(slots=1, dtype="float64", threads=1)
    engine = start(llama, config, clock=lambda: now, emit=events.append)
    gate = Gate(engine)
    running = asyncio.create_task(answer(engine, request(sampling=greedy(5))))
    await gate.entered()
    own = asyncio.create_task(answer(engine, request(timeout_s=5)))
    class_s = asyncio.create_task(answer(engine, request()))
    await until(lambda: len(engine._scheduler.queue) == 2)
    now = 105.0
    await gate.steps()
    with pytest.raises(Timeout, match="waiting") as caught:
        await own
    assert caught.value.details["phase"] == "queue"
    assert not class_s.done()
    now = 130.0  # the class's own patience
    await gate.steps()
    with pytest.raises(Timeout):
        await class_s
    gate.open()
    assert len(tokens(await running)) == 5
    assert [e.reason for e in kinds(events, RequestShed)] == ["expired", "expired"]
    await idle(engine)


async def test_a_deadline_while_generating(llama: Path, start: Start) -> None:
    now = 100.0
    engine = start(llama, clock=lambda: now)
    gate = Gate(engine)
    late = stream(engine, request(timeout_s=5, stream=True, n=3))
    first = asyncio.ensure_future(anext(late))
    await gate.entered()
    other = asyncio.create_task(answer(engine, request(sampling=greedy(8))))
    await until(lambda: len(engine._scheduler.queue) == 1)
    await gate.steps()
    assert (await first).token_ids
    now = 105.0
    await gate.steps()
    with pytest.raises(Timeout, match="being answered") as caught:
        async for _ in late:
            pass
    assert caught.value.details["phase"] == "generation"
    assert engine._scheduler.running_count == 1
    gate.open()
    assert len(tokens(await other)) == 8
    await idle(engine)


async def test_a_call_that_left_with_choices_in_line_does_not_expire_later(
    llama: Path, start: Start
) -> None:
    """Its further choices once stayed in line, and their deadline ended the thread."""
    now = 100.0
    engine = start(llama, EngineConfig(slots=2, dtype="float64", threads=1), clock=lambda: now)
    gate = Gate(engine)
    others = [asyncio.create_task(answer(engine, request(sampling=greedy(9)))) for _ in range(1)]
    await gate.entered()
    leaver = asyncio.create_task(answer(engine, request(n=5, timeout_s=5)))
    await until(lambda: len(engine._scheduler.queue) == 1)
    await gate.steps(2)
    others += [asyncio.create_task(answer(engine, request(sampling=greedy(9)))) for _ in range(3)]
    leaver.cancel()
    await asyncio.wait([leaver])
    await gate.steps()
    now = 106.0
    gate.open()
    for each in others:
        assert len(tokens(await each)) == 9
    assert engine.alive


# --- the end --------------------------------------------------------------------------------


async def test_closing_tells_everyone(llama: Path, start: Start) -> None:
    engine = start(llama, EngineConfig(slots=1, dtype="float64", threads=1))
    gate = Gate(engine)
    clients = [asyncio.create_task(answer(engine, request(stream=True))) for _ in range(3)]
    await gate.entered()
    await until(lambda: len(engine._scheduler.queue) == 2)
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    await until(lambda: engine._closing)
    with pytest.raises(Unavailable):
        await answer(engine, request())
    gate.open()
    await closing
    for got in await asyncio.gather(*clients, return_exceptions=True):
        assert isinstance(got, Unavailable)
    assert not engine.alive
    engine.close()
    with pytest.raises(Unavailable):
        await answer(engine, request())


def test_the_thread_ends_with_the_engine(llama: Path, start: Start) -> None:
    before = threading.active_count()
    engine = start(llama)
    assert threading.active_count() == before + 1
    engine.close()
    assert threading.active_count() == before


async def test_when_the_thread_itself_fails_nobody_is_left_waiting(
    llama: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def emit(event: Event) -> None:
        if isinstance(event, BatchRan) and event.decode_tokens:
            raise ZeroDivisionError("a subscriber that breaks its promise")

    engine = start(llama, EngineConfig(slots=1, dtype="float64", threads=1), emit=emit)
    clients = [answer(engine, request(stream=True)) for _ in range(3)]
    with caplog.at_level(logging.CRITICAL, logger="deployments.engines.engine"):
        results = await asyncio.gather(*clients, return_exceptions=True)
    assert all(isinstance(got, Unavailable) for got in results)
    await until(lambda: not engine.alive)
    with pytest.raises(PlatformError):
        await answer(engine, request())
