"""The batcher in virtual time: arrivals, deadlines and batches meet in every order, at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.config import BatcherConfig, PriorityClass, QueueConfig
from deployments.engines.batcher import Batcher, predict_each
from deployments.gateway.admission import was_refused
from deployments.observability.events import (
    BatchFailed,
    BatchRan,
    EngineState,
    Event,
    RequestShed,
    RequestStarted,
)
from models.contracts import Json, Priority, Standing
from models.errors import (
    InternalError,
    InvalidInput,
    Overloaded,
    PayloadTooLarge,
    Timeout,
    Unavailable,
)
from tests.virtual_time import virtually

T = TypeVar("T")
VIP, STANDARD, LOW = Priority


class ModelTime(Executor):
    """A worker thread in virtual time: a batch takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        loop = asyncio.get_running_loop()
        loop.call_later(self.seconds, lambda: future.set_result(fn(*args, **kwargs)))
        return future


@dataclass
class Doubler:
    """Doubles numbers; refuses negative ones, breaks on 13, ends the process on 666."""

    batches: list[list[Json]] = field(default_factory=list)

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        self.batches.append(list(inputs))
        for index, number in enumerate(inputs):
            assert isinstance(number, int)
            if number < 0:
                raise PayloadTooLarge(
                    "Negative.", param="input", details={"index": index, "limit": 0}
                )
            if number == 13:
                raise ZeroDivisionError("thirteen")
            if number == 666:
                raise SystemExit(1)
        return [2 * number for number in inputs if isinstance(number, int)]


@dataclass
class Bench:
    """A batcher in virtual time with everything it told."""

    batch_s: float = 1.0
    config: BatcherConfig = field(default_factory=lambda: BatcherConfig(max_batch_size=4))
    queue: QueueConfig = field(default_factory=QueueConfig)
    events: list[Event] = field(default_factory=list)
    model: Doubler = field(default_factory=Doubler)

    def __post_init__(self) -> None:
        self.batcher = Batcher(
            self.model,
            model="doubler",
            limits=self.config,
            queue=self.queue,
            emit=self.events.append,
            clock=asyncio.get_running_loop().time,
            executor=ModelTime(self.batch_s),
        )

    def call(
        self,
        number: int,
        tenant: str = "t",
        priority: Priority = STANDARD,
        timeout_s: float | None = None,
    ) -> asyncio.Task[Json]:
        standing = Standing(tenant=tenant, priority=priority, timeout_s=timeout_s)
        return asyncio.create_task(self.batcher.submit(number, standing))

    def told(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]


def test_an_idle_model_starts_at_once_and_a_busy_one_gathers() -> None:
    async def story() -> None:
        bench = Bench()
        first = bench.call(0)
        await asyncio.sleep(0.5)
        others = [bench.call(number) for number in range(1, 7)]
        assert await first == 0
        assert asyncio.get_running_loop().time() == 1.0
        assert await asyncio.gather(*others) == [2, 4, 6, 8, 10, 12]
        assert asyncio.get_running_loop().time() == 3.0
        assert bench.model.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert [event.rows for event in bench.told(BatchRan)] == [1, 4, 2]
        assert [event.queue_s for event in bench.told(RequestStarted)] == [0] + 4 * [0.5] + 2 * [
            1.5
        ]

    virtually(story)


def test_a_first_request_waits_for_company_no_longer_than_it_was_told_to() -> None:
    async def story() -> None:
        time_now = asyncio.get_running_loop().time
        bench = Bench(config=BatcherConfig(max_batch_size=4, max_wait_s=10))
        some = [bench.call(1), bench.call(2)]
        await asyncio.gather(*some)
        assert time_now() == 11
        await asyncio.gather(*(bench.call(3) for _ in range(4)))
        assert time_now() == 12, "a full batch does not wait"
        await asyncio.gather(*(bench.call(4) for _ in range(5)))
        assert time_now() == 14, "nor does the rest, once the model is running"

        late = bench.call(5)
        await asyncio.sleep(3)
        bench.batcher.configure(BatcherConfig(max_batch_size=4, max_wait_s=5))
        await late
        assert time_now() == 14 + 5 + 1, "a shorter wait holds for those who wait already"

        alone = bench.call(6)
        await asyncio.sleep(1)
        bench.batcher.configure(BatcherConfig(max_batch_size=1, max_wait_s=5))
        await alone
        assert time_now() == 22, "one is a full batch now"

    virtually(story)


def test_the_batch_follows_the_queue_policy() -> None:
    async def story() -> None:
        bench = Bench()
        calls = [bench.call(0)]
        await asyncio.sleep(0)
        calls += [bench.call(number, tenant="crowd") for number in range(1, 5)]
        calls += [bench.call(5, tenant="single"), bench.call(6, priority=VIP)]
        await asyncio.gather(*calls)
        assert bench.model.batches[1] == [6, 1, 5, 2]

    virtually(story)


def test_a_bad_input_fails_alone() -> None:
    async def story() -> None:
        bench = Bench()
        results = await asyncio.gather(
            *(bench.call(number) for number in (1, -2, 3, -4)), return_exceptions=True
        )
        assert results[0::2] == [2, 6]
        for error in results[1::2]:
            assert isinstance(error, PayloadTooLarge)
            assert (error.message, error.param, error.details) == (
                "Negative.",
                "input",
                {"limit": 0},
            )
        assert results[1] is not results[3]
        assert bench.told(BatchRan) == [BatchRan(model="doubler", rows=2, duration_s=0)]
        assert bench.told(BatchFailed) == []

        with pytest.raises(InvalidInput):
            await bench.call(-1)
        assert len(bench.told(BatchRan)) == 1, "nothing was computed"

    virtually(story)


@pytest.mark.parametrize(
    ("number", "error"), [(13, "ZeroDivisionError: thirteen"), (666, "SystemExit: 1")]
)
def test_a_failing_batch_fails_alone_and_tells_everyone_in_it(number: int, error: str) -> None:
    async def story() -> None:
        bench = Bench(config=BatcherConfig(max_batch_size=2))
        results = await asyncio.gather(
            *(bench.call(n) for n in (1, number, 3, 4)), return_exceptions=True
        )
        assert results[2:] == [6, 8]
        for failure in results[:2]:
            assert isinstance(failure, InternalError)
            assert "thirteen" not in failure.message, "inner workings are not for clients"
            assert isinstance(failure.__cause__, ZeroDivisionError | SystemExit)
        assert results[0] is not results[1]
        assert bench.told(BatchFailed) == [BatchFailed(model="doubler", rows=2, error=error)]

    virtually(story)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (InvalidInput("Bad."), "without naming"),
        (InvalidInput("Bad.", details={"index": 2}), "without naming"),
        (InvalidInput("Bad.", details={"index": "0"}), "without naming"),
        (None, "returned 0 outputs for 2 inputs"),
    ],
)
def test_a_predictor_that_breaks_its_contract_is_our_fault_not_the_clients(
    refusal: InvalidInput | None, message: str
) -> None:
    class Careless:
        def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
            if refusal:
                raise refusal
            return []

    with pytest.raises(InternalError, match=message):
        predict_each(Careless(), [1, 2])


def test_a_platform_error_of_the_model_reaches_each_caller_as_its_own_copy() -> None:
    class Absent:
        def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
            raise Unavailable("Weights are being replaced.", retry_after=3)

    async def story() -> None:
        bench = Bench()
        bench.batcher._predictor = Absent()
        results = await asyncio.gather(bench.call(1), bench.call(2), return_exceptions=True)
        assert [type(error) for error in results] == [Unavailable, Unavailable]
        assert {error.retry_after for error in results if isinstance(error, Unavailable)} == {3}
        assert results[0] is not results[1]

    virtually(story)


def test_deadlines_are_kept_while_a_long_batch_runs() -> None:
    async def story() -> None:
        bench = Bench(batch_s=100)
        running = bench.call(1, timeout_s=2)
        await asyncio.sleep(1)
        waiting = bench.call(2, priority=VIP), bench.call(3, timeout_s=3)
        with pytest.raises(Timeout, match=r"'doubler' could not start within 3\.0 s in the stand"):
            await waiting[1]
        assert asyncio.get_running_loop().time() == 4
        with pytest.raises(Timeout, match=r"within 5\.0 s in the vip queue") as expired:
            await waiting[0]
        assert asyncio.get_running_loop().time() == 6, "the class's own limit"
        assert expired.value.retry_after == 0.1, "nobody waits any more"
        assert was_refused(expired.value), "nothing was computed, so nothing is paid"
        assert await running == 2, "what has started is finished"
        assert [event.reason for event in bench.told(RequestShed)] == ["expired", "expired"]

    virtually(story)


def test_a_cancelled_call_leaves_the_queue_and_a_computed_one_is_dropped() -> None:
    async def story() -> None:
        bench = Bench(config=BatcherConfig(max_batch_size=1))
        running, waiting, last = (bench.call(number) for number in range(3))
        await asyncio.sleep(0.5)
        running.cancel()
        waiting.cancel()
        await asyncio.wait({running, waiting})
        assert sum(bench.batcher.depth().values()) == 1
        assert await last == 4
        assert bench.model.batches == [[0], [2]]
        assert bench.told(RequestShed) == [
            RequestShed(model="doubler", priority=STANDARD, reason="cancelled")
        ]
        bench.batcher.check_integrity()

    virtually(story)


def test_company_that_leaves_again_does_not_keep_the_pump_waiting() -> None:
    async def story() -> None:
        bench = Bench(config=BatcherConfig(max_wait_s=10))
        call = bench.call(1)
        await asyncio.sleep(1)
        call.cancel()
        await asyncio.sleep(1)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        bench.batcher.check_integrity()

    virtually(story)


def test_a_full_class_sheds_and_the_others_go_on() -> None:
    async def story() -> None:
        tiny = PriorityClass(capacity=2, weight=1, timeout_s=9)
        bench = Bench(queue=QueueConfig(low=tiny), config=BatcherConfig(max_batch_size=1))
        calls = [bench.call(0, priority=LOW)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        calls += [bench.call(number, priority=LOW) for number in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await bench.call(3, priority=LOW)
        assert refused.value.retry_after == 9
        assert await bench.call(4, priority=VIP) == 8
        assert await asyncio.gather(*calls) == [0, 2, 4]
        assert [event.reason for event in bench.told(RequestShed)] == ["full"]

    virtually(story)


def test_when_all_classes_are_full_a_low_call_makes_room_and_hears_it_at_once() -> None:
    async def story() -> None:
        tiny = PriorityClass(capacity=1, weight=1, timeout_s=9)
        queue = QueueConfig(
            vip=tiny, standard=tiny, low=PriorityClass(capacity=3, weight=1, timeout_s=7)
        )
        bench = Bench(queue=queue, config=BatcherConfig(max_batch_size=1))
        calls = [bench.call(0, priority=LOW)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first, last = (bench.call(number, priority=LOW) for number in (1, 2))
        calls += [first, bench.call(3, priority=Priority.STANDARD)]
        await asyncio.sleep(0)
        calls.append(bench.call(4, priority=VIP))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert last.done(), "while the model computes"
        with pytest.raises(Overloaded) as refused:
            await last
        assert refused.value.retry_after == 7
        assert await asyncio.gather(*calls) == [0, 2, 6, 8]
        told = bench.told(RequestShed)
        assert [(event.priority, event.reason) for event in told] == [(LOW, "displaced")]

    virtually(story)


def test_close_finishes_what_waits_and_refuses_the_rest() -> None:
    async def story() -> None:
        bench = Bench(config=BatcherConfig(max_batch_size=2, max_wait_s=50))
        calls = [bench.call(number) for number in range(3)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(bench.batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="shutting down"):
            await bench.call(9)
        await closing
        assert asyncio.get_running_loop().time() == 2, "nobody waits for company any more"
        assert [call.result() for call in calls] == [0, 2, 4]
        await bench.batcher.close()

    virtually(story)


def test_the_request_that_starts_the_pump_does_not_lend_it_its_context() -> None:
    seen: list[str] = []
    request_id: ContextVar[str] = ContextVar("request_id", default="none")

    async def story() -> None:
        bench = Bench()
        bench.batcher._emit = lambda event: (
            seen.append(request_id.get()) if isinstance(event, RequestStarted) else None
        )
        request_id.set("the first")
        await bench.call(1)

    virtually(story)
    assert seen == ["none"]


@dataclass(frozen=True)
class Arrival:
    number: int
    tenant: str
    priority: Priority
    timeout_s: float | None
    patience_s: float | None
    """When the caller gives up and cancels."""


QUARTERS = st.integers(0, 12).map(lambda quarters: quarters / 4)
arrivals = st.builds(
    Arrival,
    number=st.sampled_from([1, 2, 3, 5, 8, 21, 34, -1, 13]),
    tenant=st.sampled_from("ab"),
    priority=st.sampled_from(Priority),
    timeout_s=st.none() | QUARTERS,
    patience_s=st.none() | QUARTERS,
)
configs = st.builds(
    BatcherConfig, max_batch_size=st.integers(1, 4), max_wait_s=st.sampled_from([0, 0.5])
)
rooms = st.builds(
    PriorityClass, capacity=st.integers(1, 5), weight=st.integers(1, 4), timeout_s=st.integers(1, 4)
)
queues = st.builds(QueueConfig, vip=rooms, standard=rooms, low=rooms)
stories = st.lists(st.tuples(QUARTERS, arrivals | configs), max_size=30)


def check_any_story(
    batch_s: float,
    config: BatcherConfig,
    queue: QueueConfig,
    steps: list[tuple[float, Arrival | BatcherConfig]],
) -> None:
    async def story() -> None:
        now = asyncio.get_running_loop().time
        bench = Bench(batch_s=batch_s, config=config, queue=queue)
        largest = config.max_batch_size
        running = False

        def watch(event: Event) -> None:
            """Work is never held back: a batch is full, or nobody is left waiting."""
            nonlocal running
            bench.events.append(event)
            if isinstance(event, EngineState):
                if event.running and not running:
                    assert event.running <= largest
                    assert event.running == largest or not any(event.waiting.values())
                running = bool(event.running)
            bench.batcher._queue.check_integrity()

        bench.batcher._emit = watch

        async def call(arrival: Arrival) -> str:
            arrived = now()
            try:
                async with asyncio.timeout(arrival.patience_s):
                    output = await bench.batcher.submit(
                        arrival.number,
                        Standing(
                            tenant=arrival.tenant,
                            priority=arrival.priority,
                            timeout_s=arrival.timeout_s,
                        ),
                    )
            except TimeoutError:
                assert now() - arrived == pytest.approx(arrival.patience_s)
                return "cancelled"
            except Timeout:
                limit = queue.classes()[arrival.priority].timeout_s
                if arrival.timeout_s is not None:
                    limit = min(limit, arrival.timeout_s)
                assert now() - arrived == pytest.approx(limit, abs=0.002)
                return "expired"
            except Overloaded:
                return "full"
            except InvalidInput:
                assert arrival.number == -1
                return "refused"
            except InternalError:
                return "failed"
            assert output == 2 * arrival.number
            return "done"

        calls = []
        for wait_s, step in steps:
            await asyncio.sleep(wait_s)
            if isinstance(step, BatcherConfig):
                bench.batcher.configure(step)
                largest = step.max_batch_size
            else:
                calls.append(asyncio.create_task(call(step)))
            bench.batcher.check_integrity()
        ends = await asyncio.gather(*calls)
        bench.batcher.check_integrity()
        await bench.batcher.close()
        bench.batcher.check_integrity()

        started = len(bench.told(RequestStarted))
        shed = [event.reason for event in bench.told(RequestShed)]
        assert started + len(shed) == len(calls), "each is started or shed, once"
        dropped = shed.count("expired") + shed.count("displaced")
        heard = ends.count("expired") + ends.count("full") - shed.count("full")
        unheard = dropped - heard  # gave up at that very instant
        assert 0 <= unheard <= ends.count("cancelled") - shed.count("cancelled")
        computed = sum(event.rows for event in bench.told(BatchRan))
        assert ends.count("done") <= computed <= started
        assert bool(ends.count("failed")) <= bool(bench.told(BatchFailed))

    virtually(story)


BATCH_S = st.sampled_from([0.0, 0.25, 1.0, 2.0])


@given(batch_s=BATCH_S, config=configs, queue=queues, steps=stories)
@settings(max_examples=100)
def test_any_story(batch_s: float, config: BatcherConfig, queue: QueueConfig, steps: Any) -> None:
    check_any_story(batch_s, config, queue, steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(batch_s=BATCH_S, config=configs, queue=queues, steps=stories)
@settings(max_examples=5000)
def test_any_story_at_length(
    batch_s: float, config: BatcherConfig, queue: QueueConfig, steps: Any
) -> None:
    check_any_story(batch_s, config, queue, steps)


async def test_with_a_real_thread_the_loop_stays_free_and_batches_never_overlap() -> None:
    threads: set[int] = set()
    busy = threading.Lock()

    class Sleeper:
        def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
            threads.add(threading.get_ident())
            assert busy.acquire(blocking=False)
            time.sleep(0.02)
            busy.release()
            return list(inputs)

    events: list[Event] = []
    batcher = Batcher(
        Sleeper(),
        model="sleeper",
        limits=BatcherConfig(max_batch_size=8),
        queue=QueueConfig(),
        emit=events.append,
    )
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    calls = [batcher.submit(n, Standing(priority=LOW)) for n in range(20)]
    assert await asyncio.gather(*calls) == list(range(20))
    await batcher.close()
    ticking.cancel()
    ran = [event for event in events if isinstance(event, BatchRan)]
    assert [event.rows for event in ran] == [8, 8, 4]
    assert all(0.02 <= event.duration_s < 1 for event in ran)
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    assert ticks > 5
    assert not any(thread.name.startswith("batcher-sleeper") for thread in threading.enumerate())
