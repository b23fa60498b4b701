"""Batching of a fixed-cost model: when a batch ends, the next takes all that waits and fits.

    submit ─► WaitingQueue ─► pump (a task, while anyone waits) ─► one worker thread
       ▲                                                              predict_batch
       └────────────── one hop back to the event loop a batch ◄──────────┘

Batches grow with the load by themselves: while the model works, requests gather, and a
model that is idle starts at once (or after ``max_wait_s``, if company is worth the wait).
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass
from typing import TypeAlias

from deployments.config import BatchLimits, QueueConfig
from deployments.engines.queue import Ticket, WaitingQueue
from deployments.observability.events import (
    BatchFailed,
    BatchRan,
    Emit,
    EngineState,
    RequestShed,
    RequestStarted,
    discard,
)
from models.contracts import Json, Predictor, Priority, Standing
from models.errors import (
    InternalError,
    InvalidInput,
    Overloaded,
    PlatformError,
    Timeout,
    Unavailable,
)

Outcome: TypeAlias = "Json | PlatformError"
"""What became of one input. Errors travel as values, so that one does not hide another."""


def predict_each(predictor: Predictor, inputs: Sequence[Json]) -> list[Outcome]:
    """Run a batch in which one bad input fails alone.

    A predictor refuses an input with ``InvalidInput(details={"index": i})``; the others
    are then tried again without it, so predictors should validate before they compute.
    The index is dropped from the error: a client knows nothing of its batch mates.

    Raises:
        InternalError: the predictor broke its contract.
        Exception: whatever else the predictor raised; nobody has an output.
    """
    outcomes: list[Outcome] = [None] * len(inputs)
    left = list(range(len(inputs)))
    while left:
        try:
            outputs = predictor.predict_batch([inputs[place] for place in left])
        except InvalidInput as refusal:
            index = refusal.details.get("index")
            if not isinstance(index, int) or not 0 <= index < len(left):
                raise InternalError(
                    f"The model refused a batch of {len(left)} without naming the input at fault."
                ) from refusal
            error = copy.copy(refusal)
            error.details = {key: value for key, value in error.details.items() if key != "index"}
            outcomes[left.pop(index)] = error
        else:
            if len(outputs) != len(left):
                raise InternalError(
                    f"The model returned {len(outputs)} outputs for {len(left)} inputs."
                )
            for place, output in zip(left, outputs, strict=True):
                outcomes[place] = output
            break
    return outcomes


class Batcher:
    """Gathers single calls into batches. All methods belong to one event loop.

    Args:
        predictor: called in one thread only, never two batches at a time.
        model: the name under which events are told.
        executor: where batches are computed; a thread of its own unless given. Shut down
            by ``close``.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        model: str,
        limits: BatchLimits,
        queue: QueueConfig,
        emit: Emit = discard,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
    ) -> None:
        self._predictor = predictor
        self._model = model
        self._limits = limits
        self._queue: WaitingQueue[_Call] = WaitingQueue(
            queue.classes(), capacity=queue.together, clock=clock
        )
        self._emit = emit
        self._clock = clock
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix=f"batcher-{model}")
        self._running = 0
        self._pump_task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # wakes a pump that waits for company
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        self._closed = False

    async def submit(self, input: Json, standing: Standing) -> Json:
        """Wait for a batch, and for its output. Cancelling gives up the place in the queue.

        Args:
            standing: its timeout is how long to wait for a batch to start, if that is less than
                the class allows. Every input counts the same against a tenant's share.

        Raises:
            InvalidInput: the model refuses this input.
            Overloaded: there is no room to wait, or a higher priority took it; ``retry_after`` says
                when to come back.
            Timeout: the deadline passed before a batch had room.
            Unavailable: the batcher is closing.
            InternalError: the batch failed.
        """
        if self._closed:
            raise Unavailable(f"{self._model!r} is shutting down; retry on another replica.")
        call, priority = _Call(input, asyncio.get_running_loop().create_future()), standing.priority
        try:
            ticket, gone = self._queue.push(
                call,
                tenant=standing.tenant,
                weight=standing.weight,
                priority=priority,
                timeout_s=standing.timeout_s,
            )
        except Overloaded:
            self._emit(RequestShed(model=self._model, priority=priority, reason="full"))
            raise
        if gone is not None:
            gone.item.tell(self._queue.overloaded(gone.priority))
            self._emit(RequestShed(model=self._model, priority=gone.priority, reason="displaced"))
        self._wake_pump()
        self._set_alarm()
        self._tell_state()
        try:
            outcome = await call.outcome
        except asyncio.CancelledError:
            if self._queue.remove(ticket):
                self._changed.set()
                self._emit(RequestShed(model=self._model, priority=priority, reason="cancelled"))
                self._tell_state()
            raise
        if isinstance(outcome, PlatformError):
            raise outcome
        return outcome

    def configure(self, limits: BatchLimits) -> None:
        """Change batch size and wait; holds from the next batch on, and for a wait under way."""
        self._limits = limits
        self._changed.set()

    async def close(self) -> None:
        """Refuse new calls, finish those that wait, and let the thread go."""
        self._closed = True
        self._changed.set()
        if self._pump_task is not None:
            await asyncio.wait({self._pump_task})
        if self._alarm is not None:
            self._alarm.cancel()
        self._executor.shutdown()

    def depth(self) -> dict[Priority, int]:
        return self._queue.depth()

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and post-mortems."""
        self._queue.check_integrity()
        pumping = self._pump_task is not None and not self._pump_task.done()
        assert pumping or not (len(self._queue) or self._running), "somebody waits for nobody"
        deadline = self._queue.next_deadline()
        assert deadline is None or (self._alarm is not None and self._alarm_at <= deadline)

    # The pump and the alarm serve everyone, so they start in an empty context: the request
    # that happens to start them must not lend them its trace or its log fields.

    def _wake_pump(self) -> None:
        if self._pump_task is None or self._pump_task.done():
            self._pump_task = asyncio.create_task(self._pump(), context=Context())
        elif len(self._queue) >= self._limits.max_batch_size:
            self._changed.set()

    async def _pump(self) -> None:
        """Batch after batch while anyone waits; then end, so that idling holds no task."""
        await self._wait_for_company()
        while batch := self._take_batch():
            await self._run(batch)

    async def _wait_for_company(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not self._closed and 0 < len(self._queue) < self._limits.max_batch_size:
            patience = began + self._limits.max_wait_s - loop.time()
            if patience <= 0:
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(patience):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _take_batch(self) -> list[Ticket[_Call]]:
        self._shed_expired()
        batch: list[Ticket[_Call]] = []
        while len(batch) < self._limits.max_batch_size and (ticket := self._queue.pop()):
            batch.append(ticket)
        return batch

    async def _run(self, batch: list[Ticket[_Call]]) -> None:
        self._running = len(batch)
        now = self._clock()
        for ticket in batch:
            self._emit(
                RequestStarted(
                    model=self._model, priority=ticket.priority, queue_s=now - ticket.arrived
                )
            )
        self._tell_state()
        inputs = [ticket.item.input for ticket in batch]
        loop = asyncio.get_running_loop()
        outcomes, event = await loop.run_in_executor(self._executor, self._compute, inputs)
        self._running = 0
        for ticket, outcome in zip(batch, outcomes, strict=True):
            ticket.item.tell(outcome)
        if event is not None:
            self._emit(event)
        self._tell_state()

    def _compute(
        self, inputs: list[Json]
    ) -> tuple[Sequence[Outcome], BatchRan | BatchFailed | None]:
        """In the worker thread; never raises, since callers wait for an answer."""
        began = self._clock()
        try:
            outcomes = predict_each(self._predictor, inputs)
        except BaseException as error:
            failures = [self._failure(error) for _ in inputs]
            told = f"{type(error).__name__}: {error}"
            return failures, BatchFailed(model=self._model, rows=len(inputs), error=told)
        rows = sum(not isinstance(outcome, PlatformError) for outcome in outcomes)
        if not rows:
            return outcomes, None
        took = self._clock() - began
        return outcomes, BatchRan(model=self._model, rows=rows, duration_s=took)

    def _failure(self, error: BaseException) -> PlatformError:
        """One error object for each caller: a raised one collects its traceback."""
        if isinstance(error, PlatformError):
            told = copy.copy(error)
        else:
            told = InternalError(f"{self._model!r} failed on the batch this request was in.")
        told.__cause__ = error
        return told

    def _set_alarm(self) -> None:
        """Expire on time, also while a long batch keeps the pump waiting."""
        deadline = self._queue.next_deadline()
        if deadline is None or (self._alarm is not None and self._alarm_at <= deadline):
            return
        if self._alarm is not None:
            self._alarm.cancel()
        delay = min(max(deadline - self._clock(), _ALARM_MIN_S), _ALARM_MAX_S)
        loop = asyncio.get_running_loop()
        self._alarm = loop.call_later(delay, self._on_alarm, context=Context())
        self._alarm_at = deadline

    def _on_alarm(self) -> None:
        self._alarm = None
        if self._shed_expired():
            self._tell_state()
        self._set_alarm()

    def _shed_expired(self) -> bool:
        expired = self._queue.expire()
        for ticket in expired:
            waited = self._clock() - ticket.arrived
            ticket.item.tell(
                Timeout(
                    f"{self._model!r} could not start within {waited:.1f} s"
                    f" in the {ticket.priority} queue.",
                    details={"phase": "queue"},
                    retry_after=self._queue.retry_after(ticket.priority),
                )
            )
            self._emit(RequestShed(model=self._model, priority=ticket.priority, reason="expired"))
        return bool(expired)

    def _tell_state(self) -> None:
        self._emit(
            EngineState(model=self._model, running=self._running, waiting=self._queue.depth())
        )


_ALARM_MIN_S, _ALARM_MAX_S = 0.001, 3600.0


@dataclass(eq=False, slots=True)
class _Call:
    input: Json
    outcome: asyncio.Future[Outcome]

    def tell(self, outcome: Outcome) -> None:
        if not self.outcome.done():  # cancelled while it was computed
            self.outcome.set_result(outcome)
