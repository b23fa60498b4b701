"""The scheduler against a cache that remembers which token of which tenant lies where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from math import inf
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from deployments.config import PriorityClass, QueueConfig
from deployments.engines.admission import Limits, admit
from deployments.engines.pace import Pace
from deployments.engines.prefixes import BLOCK, PrefixIndex
from deployments.engines.queue import Ticket, WaitingQueue
from deployments.engines.scheduler import MIN_SHARED_TOKENS, Scheduler
from deployments.engines.sequence import Call, Copy, Load, Save, Sequence, Step
from models.contracts import GenerateRequest, Priority, Sampling
from models.errors import Overloaded

CONTEXT = 64
LIMITS = Limits(context=CONTEXT, vocabulary=4, max_choices=8)
TENANTS = ["ada", "bob"]
BEGINNINGS = [(), (1,) * 15, (1,) * 16, (1,) * 17, (2, 3) * 12]
"""Prompts begin alike, around the length from which a copy is worth it."""

endings = st.lists(st.integers(0, 3), min_size=1, max_size=30).map(tuple)
prompts = st.builds(tuple.__add__, st.sampled_from(BEGINNINGS), endings)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Cache:
    """What lies in slots and blocks, as ``(space, token)``; checks whatever is read."""

    def __init__(self, slots: int, *, shared: bool = False) -> None:
        self.slots: list[list[Any]] = [[None] * CONTEXT for _ in range(slots)]
        self.blocks: dict[int, list[Any]] = {}
        self._shared = shared

    def save(self, save: Save) -> None:
        for number, block in enumerate(save.blocks):
            begin = save.start + number * BLOCK
            self.blocks[block] = self.slots[save.slot][begin : begin + BLOCK]

    def run(self, step: Step) -> None:
        for move in step.moves:
            if isinstance(move, Load):
                rows = [row for block in move.blocks for row in self.blocks[block]]
                self.slots[move.target][: len(rows)] = rows
            else:
                assert move.source != move.target
                source = self.slots[move.source][: move.length]
                assert None not in source, "a copy of what was never computed"
                self.slots[move.target][: move.length] = source
        for chunk in step.chunks:
            tenant = "all" if self._shared else chunk.sequence.call.request.tenant
            slot = self.slots[chunk.slot]
            before = [(tenant, token) for token in chunk.sequence.tokens[: chunk.start]]
            assert slot[: chunk.start] == before, "other keys and values than the sequence's"
            end = chunk.start + len(chunk.tokens)
            assert list(chunk.tokens) == chunk.sequence.tokens[chunk.start : end]
            slot[chunk.start : end] = [(tenant, token) for token in chunk.tokens]


def make(
    scheduler_slots: int = 4,
    step_tokens: int = 16,
    *,
    clock: Clock | None = None,
    queue: QueueConfig | None = None,
    blocks: int = 0,
    shared: bool = False,
) -> Scheduler:
    clock = clock or Clock()
    queue = queue or QueueConfig()
    waiting: WaitingQueue[Call] = WaitingQueue(
        queue.classes(), capacity=queue.together, clock=clock
    )
    return Scheduler(
        waiting,
        slots=scheduler_slots,
        step_tokens=step_tokens,
        prefixes=PrefixIndex(blocks),
        shared=shared,
        clock=clock,
    )


def call(
    prompt: Items[int] = (1, 2, 3),
    *,
    n: int = 1,
    max_tokens: int | None = None,
    tenant: str = "ada",
    weight: int = 1,
    priority: Priority = Priority.STANDARD,
    timeout_s: float | None = None,
    arrived: float = 1000.0,
) -> Call:
    request = GenerateRequest(
        id="r",
        model="m",
        prompt=tuple(prompt),
        n=n,
        tenant=tenant,
        weight=weight,
        priority=priority,
        timeout_s=timeout_s,
        sampling=Sampling(max_tokens=max_tokens),
    )
    return admit(request, tuple(prompt), LIMITS, arrived=arrived)


def work(call: Call) -> int:
    """In tokens, all that it may come to."""
    return len(call.prompt) + sum(sequence.max_tokens for sequence in call.sequences)


def step_of(scheduler: Scheduler) -> Step:
    step = scheduler.plan().step
    assert step is not None
    return step


def advance(scheduler: Scheduler, step: Step, token: int = 0) -> None:
    """What the engine does after a forward pass, every draw being ``token``."""
    scheduler.commit(step)
    for chunk in step.chunks:
        if chunk.samples:
            sequence = chunk.sequence
            sequence.tokens.append(token)
            if sequence.generated >= sequence.max_tokens:
                scheduler.finish(sequence)


class SchedulerMachine(RuleBasedStateMachine):
    """Arbitrary arrivals, cancellations, failures, stops and time."""

    calls: Bundle[Call] = Bundle("calls")

    @initialize(
        slots=st.integers(1, 5),
        step_tokens=st.integers(1, 40),
        blocks=st.integers(0, 6),
        shared=st.booleans(),
    )
    def start(self, slots: int, step_tokens: int, blocks: int, shared: bool) -> None:
        self.clock = Clock()
        rooms = {
            priority.value: PriorityClass(capacity=3, weight=weight, timeout_s=8)
            for priority, weight in zip(Priority, (8, 4, 1), strict=True)
        }
        self.slots = slots
        self.budget = max(step_tokens, slots)
        self.scheduler = make(
            slots,
            step_tokens,
            clock=self.clock,
            queue=QueueConfig(**rooms),
            blocks=blocks,
            shared=shared,
        )
        self.cache = Cache(slots, shared=shared)
        self.waiting: list[Call] = []
        self.started: list[Call] = []
        self.was_hasty = False

    @rule(
        target=calls,
        prompt=prompts,
        n=st.sampled_from([1, 1, 1, 2, 5]),
        max_tokens=st.integers(1, 8),
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from(list(Priority)),
        timeout_s=st.none() | st.integers(1, 12),
    )
    def add(self, **options: Any) -> Any:
        made = call(arrived=self.clock.now, **options)
        priority = made.request.priority
        full = sum(c.request.priority is priority for c in self.waiting) >= 3
        no_room = full or len(self.waiting) >= 7  # three, three and the fifth of three
        try:
            gone = self.scheduler.add(made)
        except Overloaded:
            assert no_room
            return multiple()
        if gone is not None:
            assert no_room
            assert gone in self.waiting
            assert not gone.preempted
            assert gone.started is None
            self.check_gone(gone, made, full=full)
            self.forget(gone)
        else:
            assert not no_room
        self.waiting.append(made)
        return made

    def check_gone(self, gone: Call, newcomer: Call, *, full: bool) -> None:
        rank = list(Priority).index
        if full or gone.request.priority is newcomer.request.priority:
            assert gone.request.priority is newcomer.request.priority
            assert work(gone) > work(newcomer)
        else:
            fresh = [c for c in self.waiting if not c.preempted]
            lowest = max(rank(c.request.priority) for c in fresh)
            assert rank(newcomer.request.priority) < rank(gone.request.priority) == lowest

    @rule(gone=calls)
    def cancel(self, gone: Call) -> None:
        self.scheduler.cancel(gone)
        self.forget(gone)

    @rule(data=st.data(), fails=st.sampled_from([False, False, False, False, True]))
    def step(self, data: st.DataObject, fails: bool) -> None:
        yielded = {c for c in (*self.waiting, *self.started) if c.preempted}
        plan = self.scheduler.plan()
        step = plan.step
        running = list(self.scheduler.running())
        for each in plan.preempted:
            assert each not in yielded, "made room twice"
            assert each.request.priority is Priority.LOW
        if plan.preempted:
            vips = [s for s in running if s.call.request.priority is Priority.VIP]
            assert any(s.call in plan.started for s in vips), "room was made for nobody"
        for each in plan.started:
            assert each.started == self.clock.now
        for each in [*self.waiting, *self.started]:
            sits = any(s.slot is not None for s in each.sequences)
            if each in plan.started or (each.preempted and sits and each in self.waiting):
                self.waiting.remove(each)
                self.started.append(each)
            elif each in plan.preempted and not sits:
                self.started.remove(each)
                self.waiting.append(each)
        self.check_seats(running)
        if step is None:
            assert not running
            self.was_hasty = False  # nobody was left out
            return
        self.check_step(step, running)
        if fails:  # as the engine does: whoever was in it is told and goes
            for each in {s.call: None for s in running if s.slot in step.written}:
                self.cancel(each)
            return
        self.cache.run(step)
        self.scheduler.commit(step)
        saves = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert sequence.computed == chunk.start + len(chunk.tokens)
            assert chunk.samples == (sequence.computed == len(sequence.tokens))
            if chunk.samples:
                sequence.tokens.append(data.draw(st.integers(0, 3)))
                stops = data.draw(st.sampled_from([False, False, False, True]))
                if stops or sequence.generated >= sequence.max_tokens:
                    self.scheduler.finish(sequence)
                if sequence.finished or sequence.generated == 1:
                    saves.append(self.scheduler.keep(sequence, chunk.slot))
                if sequence.call.done:
                    self.forget(sequence.call)
        for save in saves:
            if save is not None:
                self.cache.save(save)

    def check_seats(self, running: list[Sequence]) -> None:
        assert [s.slot for s in running] == list(range(len(running))), "holes below a sequence"
        if len(running) < self.slots:
            assert not self.waiting
            for each in self.started:
                lead = each.sequences[0]
                if lead.finished or lead.computed >= len(each.prompt):
                    assert all(s.finished or s.slot is not None for s in each.sequences)

    def check_step(self, step: Step, running: list[Sequence]) -> None:
        chunks = {chunk.sequence: chunk for chunk in step.chunks}
        assert len(chunks) == len(step.chunks)
        total = sum(len(chunk.tokens) for chunk in step.chunks)
        assert total == step.prefill_tokens + step.decode_tokens
        assert total <= self.budget
        for sequence, chunk in chunks.items():
            assert chunk.tokens
            assert (chunk.slot, chunk.start) == (sequence.slot, sequence.computed)
        urgent = [s for s in running if s.call.request.priority is Priority.VIP]
        hasty = any(len(s.tokens) - s.computed > 1 for s in urgent) and not self.was_hasty
        self.was_hasty = hasty
        if hasty:
            assert set(chunks) <= set(urgent), "a vip prompt had to share its step"
        for sequence in urgent if hasty else running:
            missing = len(sequence.tokens) - sequence.computed
            if missing == 1:
                assert len(chunks[sequence].tokens) == 1, "a stream was stalled"
            elif total < self.budget:
                assert len(chunks[sequence].tokens) == missing, "budget left unused"
        among = urgent if hasty else running
        prefilling = [s for s in among if len(s.tokens) - s.computed > 1]
        if prefilling:
            first = min(prefilling, key=lambda s: s.call.started or 0)
            assert any(s in chunks for s in prefilling if s.call.started == first.call.started)
        for each in self.started:
            lead, *forks = each.sequences
            for fork in forks:
                if fork in chunks:
                    assert lead.finished or lead.computed >= len(each.prompt)
                    if not lead.finished and len(each.prompt) > MIN_SHARED_TOKENS:
                        assert chunks[fork].start >= len(each.prompt) - 1, "prompt computed twice"
            assert each.cached_tokens < len(each.prompt)

    @rule(seconds=st.integers(0, 5))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds
        late = self.scheduler.expire()
        now = self.clock.now
        patience = {c: inf if c.preempted else c.arrived + 8 for c in self.waiting}
        waited = [c for c in self.waiting if min(c.deadline, patience[c]) <= now]
        ran = [c for c in self.started if c.deadline <= now]
        assert {id(c) for c in late} == {id(c) for c in (*waited, *ran)}
        assert len(late) == len(waited) + len(ran), "told twice"
        for each in late:
            self.forget(each)

    def forget(self, gone: Call) -> None:
        assert all(s.finished and s.slot is None for s in gone.sequences)
        self.waiting = [c for c in self.waiting if c is not gone]
        self.started = [c for c in self.started if c is not gone]

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.scheduler.idle == (not self.waiting and not self.started)
            assert len(self.scheduler.queue) == len(self.waiting)

    def teardown(self) -> None:
        """Whoever is left is served: nobody starves."""
        if not hasattr(self, "scheduler"):
            return
        left = [*self.waiting, *self.started]
        # A low call may make room once, and compute anew what it had.
        times = {c: 2 if c.request.priority is Priority.LOW else 1 for c in left}
        work = sum(times[c] * (len(s.tokens) + s.max_tokens) for c in left for s in c.sequences)
        for _ in range(work):
            if self.scheduler.idle:
                break
            step = step_of(self.scheduler)
            self.cache.run(step)
            advance(self.scheduler, step)
            self.scheduler.check_integrity()
        assert self.scheduler.idle
        assert all(c.done for c in left)


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestScheduler = SchedulerMachine.TestCase


@pytest.mark.slow
class TestSchedulerAtLength(SchedulerMachine.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=60)


def answering(scheduler: Scheduler, *calls: Call) -> None:
    """All of them have begun to answer."""
    for each in calls:
        scheduler.add(each)
    while not all(s.generated for each in calls for s in each.sequences):
        advance(scheduler, step_of(scheduler))


def low(**options: Any) -> Call:
    return call(priority=Priority.LOW, **options)


def vip(**options: Any) -> Call:
    return call(priority=Priority.VIP, **options)


def test_a_vip_call_takes_the_slot_of_the_low_one_that_began_last() -> None:
    clock = Clock()
    scheduler = make(2, clock=clock)
    first, last, urgent = low(), low(), vip(max_tokens=1)
    answering(scheduler, first)
    clock.now += 1
    answering(scheduler, last)
    scheduler.add(urgent)
    had = list(last.sequences[0].tokens)
    plan = scheduler.plan()
    assert (plan.started, plan.preempted) == ((urgent,), (last,))
    assert plan.step is not None
    advance(scheduler, plan.step)
    assert urgent.done
    resumed = scheduler.plan()  # its slot is free, and the other one goes on
    assert (resumed.started, resumed.preempted) == ((), ())
    assert last.started == clock.now, "it is no new start"
    assert resumed.step is not None
    chunk = next(c for c in resumed.step.chunks if c.sequence is last.sequences[0])
    assert list(chunk.tokens) == had, "computed anew, and nothing was lost"
    assert chunk.samples
    assert resumed.step.prefill_tokens == len(had)


def test_a_call_makes_room_once() -> None:
    scheduler = make(1)
    victim = low()
    answering(scheduler, victim)
    scheduler.add(vip(max_tokens=1))
    assert scheduler.plan().preempted == (victim,)
    while victim.sequences[0].slot is None:
        advance(scheduler, step_of(scheduler))
    advance(scheduler, step_of(scheduler))
    scheduler.add(vip())
    assert scheduler.plan().preempted == ()


def test_all_choices_of_a_call_make_room_together() -> None:
    scheduler = make(3)
    victim, other = low(n=2), low()
    answering(scheduler, other, victim)
    victim.started = 1001.0
    scheduler.add(vip(max_tokens=1))
    scheduler.add(vip(max_tokens=1))
    plan = scheduler.plan()
    assert plan.preempted == (victim,)
    assert len(plan.started) == 2


@pytest.mark.parametrize(
    ("runs", "comes"),
    [
        (Priority.LOW, Priority.STANDARD),
        (Priority.STANDARD, Priority.VIP),
        (Priority.VIP, Priority.VIP),
    ],
)
def test_only_low_makes_room_and_only_for_vip(runs: Priority, comes: Priority) -> None:
    scheduler = make(1)
    answering(scheduler, call(priority=runs))
    scheduler.add(call(priority=comes))
    assert scheduler.plan().preempted == ()


def test_a_call_that_has_not_begun_to_answer_stays() -> None:
    scheduler = make(1, step_tokens=16)
    scheduler.add(low(prompt=(1,) * 40))
    advance(scheduler, step_of(scheduler))
    scheduler.add(vip())
    assert scheduler.plan().preempted == ()


def test_nobody_makes_room_where_that_is_not_wanted() -> None:
    waiting: WaitingQueue[Call] = WaitingQueue(QueueConfig().classes(), clock=Clock())
    scheduler = Scheduler(waiting, slots=1, step_tokens=16, preemption=False, clock=Clock())
    answering(scheduler, low())
    scheduler.add(vip())
    assert scheduler.plan().preempted == ()


def test_one_that_made_room_waits_until_its_own_deadline_and_can_leave() -> None:
    clock = Clock()
    scheduler = make(1, clock=clock)
    victim = low(timeout_s=200)
    answering(scheduler, victim)
    scheduler.add(vip(timeout_s=1000))
    advance(scheduler, step_of(scheduler))
    clock.now += 199  # longer than the class waits for a first turn
    assert scheduler.expire() == []
    clock.now += 1
    assert scheduler.expire() == [victim]
    assert victim.done


def computed(scheduler: Scheduler, steps: int) -> Counter[str]:
    """Tokens by tenant."""
    tokens: Counter[str] = Counter()
    for _ in range(steps):
        step = step_of(scheduler)
        for chunk in step.chunks:
            tokens[chunk.sequence.call.request.tenant] += len(chunk.tokens)
        advance(scheduler, step)
    return tokens


def test_tenants_share_tokens_and_not_requests() -> None:
    """Four times the answer, a quarter of the requests."""
    scheduler = make(1)
    for _ in range(100):
        scheduler.add(call(tenant="talker", max_tokens=40))
        scheduler.add(call(tenant="taciturn", max_tokens=7))
    tokens = computed(scheduler, 1000)
    assert tokens["talker"] == pytest.approx(tokens["taciturn"], abs=42 + 9)


def test_a_plan_that_weighs_twice_gets_twice_the_tokens() -> None:
    scheduler = make(2, step_tokens=64)
    for number in range(200):
        prompt = [number >> bit & 1 for bit in range(20)]  # no two begin alike
        scheduler.add(call(prompt, tenant="light", max_tokens=10))
        scheduler.add(call(prompt, tenant="heavy", weight=2, max_tokens=10))
    tokens = computed(scheduler, 900)
    assert tokens["heavy"] == pytest.approx(2 * tokens["light"], rel=0.05)


def test_what_is_copied_or_computed_again_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(2, step_tokens=64)
    costs: dict[int, int] = {}
    pop = scheduler.queue.pop

    def watched(*, cost: int | None = None) -> Ticket[Call] | None:
        ticket = pop(cost=cost)
        if ticket is not None:
            costs[ticket.number] = ticket.cost if cost is None else cost
        return ticket

    monkeypatch.setattr(scheduler.queue, "pop", watched)
    system = 10 * (0, 1, 2, 3)
    answering(scheduler, low(prompt=(*system, 1)))
    assert costs == {1: 41}
    answering(scheduler, low(prompt=(*system, 2)))
    assert costs == {1: 41, 2: 1}
    scheduler.add(vip(max_tokens=1))
    advance(scheduler, step_of(scheduler))
    advance(scheduler, step_of(scheduler))
    assert costs == {1: 41, 2: 1, 3: 3, -1: 0}


class Slow(Pace):
    """Streams can bear five prompt tokens."""

    def prompt_tokens(self, most: int) -> int:
        return min(most, 5)


def test_long_prompts_are_read_in_as_streams_can_bear_and_short_ones_at_once() -> None:
    waiting: WaitingQueue[Call] = WaitingQueue(QueueConfig().classes(), clock=Clock())
    scheduler = Scheduler(waiting, slots=4, step_tokens=256, pace=Slow(None), clock=Clock())
    long = admit_long(scheduler, 200)
    assert [len(chunk.tokens) for chunk in step_of(scheduler).chunks] == [200], "no stream yet"
    scheduler.cancel(long)
    answering(scheduler, call(max_tokens=50))
    admit_long(scheduler, 200)
    admit_long(scheduler, 100)
    scheduler.add(call((1,) * 60, max_tokens=1))
    step = step_of(scheduler)
    assert [len(chunk.tokens) for chunk in step.chunks] == [1, 5, 60]
    for _ in range(26):
        step = step_of(scheduler)
        assert sum(len(chunk.tokens) for chunk in step.chunks) <= 1 + 5 + 60
        advance(scheduler, step)


def admit_long(scheduler: Scheduler, length: int) -> Call:
    prompt = tuple(n % 4 for n in range(length))
    request = GenerateRequest(id="r", model="m", prompt=prompt, sampling=Sampling(max_tokens=1))
    limits = Limits(context=512, vocabulary=4, max_choices=1)
    made = admit(request, prompt, limits, arrived=1000.0)
    scheduler.add(made)
    return made


def test_who_copies_from_a_slot_does_so_before_another_has_it() -> None:
    """One newcomer copies from a call that then makes room for another, whose prompt is kept."""
    scheduler, cache = make(2, step_tokens=64, blocks=8), Cache(2)

    def run(step: Step) -> None:
        cache.run(step)
        advance(scheduler, step)
        for chunk in step.chunks:
            if (save := scheduler.keep(chunk.sequence, chunk.slot)) is not None:
                cache.save(save)

    kept, common = (1,) * 20, (2,) * 20
    scheduler.add(vip(prompt=kept, max_tokens=1))
    run(step_of(scheduler))
    scheduler.add(low(prompt=common))
    run(step_of(scheduler))
    for prompt in (common, kept):
        scheduler.add(vip(prompt=prompt, max_tokens=1))
    plan = scheduler.plan()
    assert len(plan.started) == 2
    assert len(plan.preempted) == 1
    assert plan.step is not None
    assert [type(move) for move in plan.step.moves] == [Copy, Load]
    run(plan.step)
