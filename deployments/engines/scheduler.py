"""Who joins the batch, who computes what, who leaves: iteration-level scheduling.

After Orca (Yu et al., OSDI 2022): the batch is formed anew at every step; and
Sarathi-Serve (Agrawal et al., OSDI 2024): every running stream decodes in every step, and
what the step's token budget leaves over is spent on chunks of waiting prompts, so that a
long prompt never stalls the streams.

Pure Python: no torch, no threads, no asyncio. The engine's one thread calls it.

Slots. Sequence and KV slot belong together one to one. Sequences that run occupy the
lowest slots with as few holes as can be had: a newcomer fills the lowest hole, and when
nobody comes, the highest moves down. So the decode batch is one slice of the cache.

Shared prompts. A newcomer whose tenant already runs a sequence with the same beginning and
the same version of the same adapter copies those keys and values instead of computing them;
for the ``n`` choices of one request that is the whole prompt. Never across tenants: timing
would tell what others ask.

Preemption. When a vip call is next and no slot is free, the low call that began its answer last
makes room: its keys and values are dropped, it waits again before the others of its tenant, and
computes them anew when its turn comes, which changes no token (recomputation, as in vLLM: Kwon
et al., SOSP 2023). Each call makes room once at most, so none is kept from its end for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from deployments.engines.queue import WaitingQueue
from deployments.engines.sequence import Call, Chunk, Copy, Plan, Sequence, Step
from models.contracts import Priority

MIN_SHARED_TOKENS = 16
"""Below this a copy saves less than it costs to look for."""


class Scheduler:
    """Decides, step by step; computes nothing.

    Args:
        queue: where calls wait for their first slot.
        slots: sequences that may run together.
        step_tokens: tokens of one step; at least ``slots``, so that all can decode.
        preemption: low calls make room for vip ones.
        clock: seconds, the queue's own.
    """

    def __init__(
        self,
        queue: WaitingQueue[Call],
        *,
        slots: int,
        step_tokens: int,
        preemption: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._slots: list[Sequence | None] = [None] * slots
        self._running = 0
        self._forks: deque[Sequence] = deque()
        """Further choices of calls that have started; they go before the queue."""
        self._step_tokens = max(step_tokens, slots)
        self._preemption = preemption
        self._clock = clock

    def add(self, call: Call) -> None:
        """Line up.

        Raises:
            Overloaded: the call's priority class is full.
        """
        call.ticket = self._queue.push(
            call,
            tenant=call.request.tenant,
            priority=call.request.priority,
            timeout_s=call.deadline - self._clock(),
        )

    def cancel(self, call: Call) -> None:
        """Forget a call wherever it stands; its slots are free for the very next step."""
        if call.ticket is not None:
            self._queue.remove(call.ticket)
        for sequence in call.sequences:
            self.finish(sequence)
        self._forks = deque(fork for fork in self._forks if fork.call is not call)

    def finish(self, sequence: Sequence) -> None:
        """The sequence needs nothing more; frees its slot. Idempotent."""
        sequence.finished = True
        self._unseat(sequence)

    def expire(self) -> list[Call]:
        """Calls whose deadline has come, while they waited or ran. They are cancelled here."""
        now = self._clock()
        late = [ticket.item for ticket in self._queue.expire()]
        late += {
            id(s.call): s.call for s in (*self.running(), *self._forks) if s.call.deadline <= now
        }.values()
        for call in late:
            self.cancel(call)
        return late

    def plan(self) -> Plan:
        """Who makes room, who joins, and what is computed next."""
        copies: list[Copy] = []
        preempted: list[Call] = []
        started = self._join(copies, preempted)
        self._compact(copies)
        chunks = tuple(self._chunks())
        step = Step(copies=tuple(copies), chunks=chunks) if chunks else None
        return Plan(step=step, started=tuple(started), preempted=tuple(preempted))

    def commit(self, step: Step) -> None:
        """The step was computed: its tokens now lie in the slots."""
        for chunk in step.chunks:
            chunk.sequence.computed = chunk.start + len(chunk.tokens)

    @property
    def queue(self) -> WaitingQueue[Call]:
        return self._queue

    @property
    def running_count(self) -> int:
        return self._running

    @property
    def idle(self) -> bool:
        return not self._running and not self._forks and not len(self._queue)

    def running(self) -> Iterator[Sequence]:
        return (sequence for sequence in self._slots if sequence is not None)

    def _join(self, copies: list[Copy], preempted: list[Call]) -> list[Call]:
        """Seat forks, then waiting calls, in the lowest free slots."""
        started: list[Call] = []
        while True:
            if self._running < len(self._slots):
                sequence = self._next_fork() or self._next_call(started)
            elif yields := self._yields():
                self._preempt(yields)
                preempted.append(yields)
                sequence = self._next_call(started)  # no fork: room was made for this one
            else:
                break
            if sequence is None:
                break
            self._seat(sequence, copies)
        return started

    def _next_call(self, started: list[Call]) -> Sequence | None:
        """The first choice of the call that is next; its others become forks."""
        ticket = self._queue.pop()
        if ticket is None:
            return None
        call = ticket.item
        if call.started is None:
            call.started = self._clock()
            started.append(call)
        sequence, *forks = (each for each in call.sequences if not each.finished)
        self._forks.extend(forks)
        return sequence

    def _yields(self) -> Call | None:
        """The call that makes room for the one that is next."""
        head = self._queue.peek() if self._preemption else None
        if head is None or head.priority is not Priority.VIP:
            return None
        # Only answers that have begun: logits have vouched for what lies in their slots.
        seated: dict[Call, bool] = {}
        for sequence in self.running():
            call = sequence.call
            if call.request.priority is Priority.LOW and not call.preempted:
                seated[call] = seated.get(call, True) and sequence.generated > 0
        candidates = (call for call, begun in seated.items() if begun)
        return max(candidates, key=lambda call: call.started or 0.0, default=None)

    def _preempt(self, call: Call) -> None:
        call.preempted = True
        self._forks = deque(fork for fork in self._forks if fork.call is not call)
        for sequence in call.sequences:
            self._unseat(sequence)
            sequence.computed = 0
        assert call.ticket is not None
        call.ticket = self._queue.give_back(call.ticket, deadline=call.deadline)

    def _next_fork(self) -> Sequence | None:
        """The next choice whose sibling has computed the prompt, or is gone."""
        for fork in self._forks:
            sibling = fork.call.sequences[0]
            if sibling.finished or sibling.computed >= fork.prompt_length:
                self._forks.remove(fork)
                return fork
        return None

    def _seat(self, sequence: Sequence, copies: list[Copy]) -> None:
        donor, shared = self._donor(sequence)
        slot = self._slots.index(None)
        self._slots[slot] = sequence
        sequence.slot = slot
        self._running += 1
        if donor is not None:
            copies.append(Copy(source=donor, target=slot, length=shared))
            sequence.computed = shared
            if sequence.index == 0 and not sequence.call.preempted:
                sequence.call.cached_tokens = shared  # counted once, whatever n is

    def _unseat(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._slots[sequence.slot] = None
            sequence.slot = None
            self._running -= 1

    def _donor(self, newcomer: Sequence) -> tuple[int | None, int]:
        """The slot with the longest common beginning, and its length in tokens.

        The last prompt token is always computed: its logits give the first new token.
        """
        prompt = newcomer.call.prompt
        best_slot, best = None, MIN_SHARED_TOKENS - 1
        head = list(prompt[:MIN_SHARED_TOKENS])
        for sequence in self.running():
            if sequence.call.request.tenant != newcomer.call.request.tenant:
                continue
            if sequence.call.adapter is not newcomer.call.adapter:
                continue
            if sequence.tokens[:MIN_SHARED_TOKENS] != head:
                continue
            shared = _common_prefix(prompt, sequence.tokens, sequence.computed)
            shared = min(shared, len(prompt) - 1)
            if shared > best:
                best_slot, best = sequence.slot, shared
        return best_slot, best if best_slot is not None else 0

    def _compact(self, copies: list[Copy]) -> None:
        """Move the highest sequences into holes below them."""
        hole, top = 0, len(self._slots) - 1
        while True:
            while hole < top and self._slots[hole] is not None:
                hole += 1
            while top > hole and self._slots[top] is None:
                top -= 1
            if hole >= top:
                return
            sequence = self._slots[top]
            assert sequence is not None
            copies.append(Copy(source=top, target=hole, length=sequence.computed))
            self._slots[top], self._slots[hole] = None, sequence
            sequence.slot = hole

    def _chunks(self) -> Iterator[Chunk]:
        prefilling: list[Sequence] = []
        budget = self._step_tokens
        for sequence in self.running():
            if sequence.computed == len(sequence.tokens) - 1:
                budget -= 1
                yield _chunk(sequence, 1)
            else:
                prefilling.append(sequence)
        # Who started first prefills first: the budget ends one prompt before it begins the next.
        for sequence in sorted(prefilling, key=lambda s: s.call.started or 0.0):
            if budget <= 0:
                return
            length = min(budget, len(sequence.tokens) - sequence.computed)
            budget -= length
            yield _chunk(sequence, length)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every invariant holds; for tests."""
        self._queue.check_integrity()
        seated = [(i, s) for i, s in enumerate(self._slots) if s is not None]
        assert len(seated) == self._running
        assert len({id(s) for _, s in seated}) == len(seated)
        for slot, sequence in seated:
            assert sequence.slot == slot
            assert not sequence.finished
            assert 0 <= sequence.computed < len(sequence.tokens)
        for fork in self._forks:
            assert fork.slot is None
            assert not fork.finished
            assert fork.computed == 0


def _chunk(sequence: Sequence, length: int) -> Chunk:
    assert sequence.slot is not None
    start = sequence.computed
    end = start + length
    return Chunk(
        sequence=sequence,
        slot=sequence.slot,
        start=start,
        tokens=tuple(sequence.tokens[start:end]),
        samples=end == len(sequence.tokens),
    )


def _common_prefix(prompt: tuple[int, ...], other: list[int], limit: int) -> int:
    """Leading tokens both share, at most ``limit``."""
    limit = min(limit, len(prompt))
    if tuple(other[:limit]) == prompt[:limit]:
        return limit
    return next(i for i in range(limit) if prompt[i] != other[i])
