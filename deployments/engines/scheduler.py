"""Who joins the batch, who computes what, who leaves: iteration-level scheduling.

After Orca (Yu et al., OSDI 2022): the batch is formed anew at every step; and
Sarathi-Serve (Agrawal et al., OSDI 2024): every running stream decodes in every step, and
what the step's token budget leaves over is spent on chunks of waiting prompts; of long
ones, as much as the streams can bear (``pace.py``), so that none stalls them.

Pure Python: no torch, no threads, no asyncio. The engine's one thread calls it.

Slots. Sequence and KV slot belong together one to one. Sequences that run occupy the
lowest slots with as few holes as can be had: a newcomer fills the lowest hole, and when
nobody comes, the highest moves down. So the decode batch is one slice of the cache.

Shared prompts. A newcomer copies keys and values instead of computing them, where its tenant runs
a sequence with the same beginning and the same version of the same adapter (for the ``n`` choices
of one request that is the whole prompt), or has had one that is still kept (``prefixes.py``). Not
across tenants, unless that is wanted: timing would tell what others ask.

Shares. A tenant's share of its class is counted in the tokens that the engine computes for it:
a prompt's when it joins, but for what is copied, and those of the answer as they come.

Haste. A step that reads in a vip prompt leaves the others out, unless the step before did so too:
the first token of a vip answer waits for the step under way and for its own prompt, whatever the
load, and every stream goes on in every second step at least.

Preemption. When a vip call is next and no slot is free, the low call that began its answer last
makes room: its keys and values are dropped, it waits again before the others of its tenant, and
computes them anew when its turn comes, which changes no token (recomputation, as in vLLM: Kwon
et al., SOSP 2023). Each call makes room once at most, so none is kept from its end for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from deployments.engines.pace import Pace
from deployments.engines.prefixes import BLOCK, PrefixIndex
from deployments.engines.queue import WaitingQueue
from deployments.engines.sequence import Call, Chunk, Copy, Load, Move, Plan, Save, Sequence, Step
from models.contracts import Priority

SHORT_TOKENS = 64
"""A prompt that has no more left is read in at once: it stalls the streams once, and a batch that
fills slowly would cost them more."""
MIN_SHARED_TOKENS = 16
"""Below this a copy saves less than it costs to look for."""


class Scheduler:
    """Decides, step by step; computes nothing.

    Args:
        queue: where calls wait for their first slot.
        slots: sequences that may run together.
        step_tokens: tokens of one step; at least ``slots``, so that all can decode.
        pace: what a step may take while streams run.
        preemption: low calls make room for vip ones, and vip prompts go first.
        prefixes: beginnings that are kept.
        shared: between tenants too.
        clock: seconds, the queue's own.
    """

    def __init__(
        self,
        queue: WaitingQueue[Call],
        *,
        slots: int,
        step_tokens: int,
        pace: Pace | None = None,
        preemption: bool = True,
        prefixes: PrefixIndex | None = None,
        shared: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._slots: list[Sequence | None] = [None] * slots
        self._running = 0
        self._forks: deque[Sequence] = deque()
        """Further choices of calls that have started; they go before the queue."""
        self._step_tokens = max(step_tokens, slots)
        self._pace = pace or Pace(None)
        self._preemption = preemption
        self._hasty = False
        """The last step left others out."""
        self._prefixes = PrefixIndex(0) if prefixes is None else prefixes
        self._shared = shared
        self._clock = clock

    def add(self, call: Call) -> Call | None:
        """Line up. Returns the call that lost its place to this one, if any did; it is cancelled.

        Raises:
            Overloaded: there is no room to wait.
        """
        call.ticket, gone = self._queue.push(
            call,
            tenant=call.request.tenant,
            priority=call.request.priority,
            timeout_s=call.deadline - self._clock(),
            weight=call.request.weight,
            cost=len(call.prompt),
            size=len(call.prompt) + sum(sequence.max_tokens for sequence in call.sequences),
        )
        if gone is None:
            return None
        self.cancel(gone.item)
        return gone.item

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
        moves: list[Move] = []
        preempted: list[Call] = []
        started = self._join(moves, preempted)
        self._compact(moves)
        chunks = tuple(self._chunks())
        step = Step(moves=tuple(moves), chunks=chunks) if chunks else None
        return Plan(step=step, started=tuple(started), preempted=tuple(preempted))

    def commit(self, step: Step) -> None:
        """The step was computed: its tokens now lie in the slots."""
        for chunk in step.chunks:
            chunk.sequence.computed = chunk.start + len(chunk.tokens)
            ticket = chunk.sequence.call.ticket
            if chunk.decodes and ticket is not None:
                self._queue.charge(ticket, 1)

    def keep(self, sequence: Sequence, slot: int) -> Save | None:
        """Keep what was computed of a sequence, if that is new. The caller saves it at once."""
        tokens = sequence.tokens[: sequence.computed]
        start, blocks = self._prefixes.keep(self._space(sequence.call), tokens)
        return Save(slot=slot, start=start, blocks=blocks) if blocks else None

    def forget_kept(self) -> None:
        """What was to be kept could not be saved."""
        self._prefixes.clear()

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

    def _join(self, moves: list[Move], preempted: list[Call]) -> list[Call]:
        """Seat forks, then waiting calls, in the lowest free slots."""
        started: list[Call] = []
        while True:
            if self._running < len(self._slots):
                if fork := self._next_fork():
                    self._seat(fork, moves)
                    continue
            elif yields := self._yields():
                self._preempt(yields)
                preempted.append(yields)  # no fork: room was made for who is next
            else:
                break
            if not self._seat_next(moves, started):
                break
        return started

    def _seat_next(self, moves: list[Move], started: list[Call]) -> bool:
        """Seat the first choice of the call that is next; its others become forks."""
        ticket = self._queue.peek()
        if ticket is None:
            return False
        call = ticket.item
        first, *forks = (each for each in call.sequences if not each.finished)
        self._seat(first, moves)
        # What is copied costs nothing, and what was preempted has been paid.
        self._queue.pop(cost=None if call.preempted else len(call.prompt) - first.computed)
        self._forks.extend(forks)
        if call.started is None:
            call.started = self._clock()
            started.append(call)
        return True

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

    def _seat(self, sequence: Sequence, moves: list[Move]) -> None:
        call = sequence.call
        donor: int | None = None
        shared, blocks = 0, tuple[int, ...]()
        if not sequence.tells_prompt:
            donor, shared = self._donor(sequence)
            # The last prompt token is always computed: its logits give the first new one.
            blocks = self._prefixes.find(self._space(call), sequence.tokens[: len(call.prompt) - 1])
        slot = self._slots.index(None)
        self._slots[slot] = sequence
        sequence.slot = slot
        self._running += 1
        if len(blocks) * BLOCK > shared:
            shared = len(blocks) * BLOCK
            moves.append(Load(blocks=blocks, target=slot))
        elif donor is not None:
            moves.append(Copy(source=donor, target=slot, length=shared))
        sequence.computed = shared
        if sequence.index == 0 and not call.preempted:
            call.cached_tokens = shared  # counted once, whatever n is

    def _space(self, call: Call) -> tuple[str | None, int | None]:
        """Calls of one space may share keys and values."""
        tenant = None if self._shared else call.request.tenant
        return tenant, None if call.adapter is None else call.adapter.number

    def _unseat(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._slots[sequence.slot] = None
            sequence.slot = None
            self._running -= 1

    def _donor(self, newcomer: Sequence) -> tuple[int | None, int]:
        """The slot with the longest common beginning, and its length in tokens."""
        prompt, space = newcomer.call.prompt, self._space(newcomer.call)
        best_slot, best = None, MIN_SHARED_TOKENS - 1
        head = list(prompt[:MIN_SHARED_TOKENS])
        for sequence in self.running():
            if self._space(sequence.call) != space:
                continue
            if sequence.tokens[:MIN_SHARED_TOKENS] != head:
                continue
            shared = _common_prefix(prompt, sequence.tokens, sequence.computed)
            shared = min(shared, len(prompt) - 1)
            if shared > best:
                best_slot, best = sequence.slot, shared
        return best_slot, best if best_slot is not None else 0

    def _compact(self, moves: list[Move]) -> None:
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
            moves.append(
                Copy(
                    source=top,
                    target=hole,
                    length=sequence.computed,
                    wipe=not sequence.generated,
                )
            )
            self._slots[top], self._slots[hole] = None, sequence
            sequence.slot = hole

    def _chunks(self) -> Iterator[Chunk]:
        sequences = list(self.running())
        urgent = [s for s in sequences if s.call.request.priority is Priority.VIP]
        self._hasty = (
            self._preemption
            and not self._hasty
            and any(s.computed < len(s.tokens) - 1 for s in urgent)
        )
        prefilling: list[Sequence] = []
        budget = self._step_tokens
        for sequence in urgent if self._hasty else sequences:
            if sequence.computed == len(sequence.tokens) - 1:
                budget -= 1
                yield _chunk(sequence, 1)
            else:
                prefilling.append(sequence)
        streams = budget < self._step_tokens and not self._hasty
        paced = self._pace.prompt_tokens(budget) if streams else budget
        # Who started first prefills first: the budget ends one prompt before it begins the next.
        for sequence in sorted(prefilling, key=lambda s: s.call.started or 0.0):
            length = left = len(sequence.tokens) - sequence.computed
            if left > SHORT_TOKENS:
                length = min(left, paced)
                paced -= length
            length = min(length, budget)
            budget -= length
            if length:
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
    last = sequence.prompt_length - 1
    return Chunk(
        sequence=sequence,
        slot=sequence.slot,
        start=start,
        tokens=tuple(sequence.tokens[start:end]),
        samples=end == len(sequence.tokens),
        predicts=max(0, min(end, last) - start) if sequence.tells_prompt else 0,
    )


def _common_prefix(prompt: tuple[int, ...], other: list[int], limit: int) -> int:
    """Leading tokens both share, at most ``limit``."""
    limit = min(limit, len(prompt))
    if tuple(other[:limit]) == prompt[:limit]:
        return limit
    return next(i for i in range(limit) if prompt[i] != other[i])
