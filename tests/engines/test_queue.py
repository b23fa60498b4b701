"""The waiting queue against a model that is too simple to be wrong."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from fractions import Fraction
from functools import partial
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from deployments.config import PriorityClass, QueueConfig
from deployments.engines.queue import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, Ticket, WaitingQueue
from models.contracts import Priority
from models.errors import Overloaded
from tests.engines.spread import Spread

T = TypeVar("T")
PRIORITIES = list(Priority)
TENANTS = ["ada", "bob", "cyd", "dee"]


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def room(weight: int = 1, capacity: int = 10_000, timeout_s: float = 60) -> PriorityClass:
    return PriorityClass(capacity=capacity, weight=weight, timeout_s=timeout_s)


def drain(queue: WaitingQueue[T]) -> list[Ticket[T]]:
    return list(iter(queue.pop, None))


rooms = st.fixed_dictionaries(
    {
        priority: st.builds(
            PriorityClass,
            capacity=st.integers(1, 8),
            weight=st.integers(1, 9),
            timeout_s=st.integers(1, 6),
        )
        for priority in PRIORITIES
    }
)


class QueueMachine(RuleBasedStateMachine):
    """Arbitrary arrivals, picks, cancellations and time; every promise is checked at each pick."""

    tickets: Bundle[Ticket[int]] = Bundle("tickets")

    @initialize(classes=rooms, data=st.data())
    def start(self, classes: dict[Priority, PriorityClass], data: st.DataObject) -> None:
        self.clock = Clock()
        self.classes = classes
        *higher, lowest = (classes[priority].capacity for priority in PRIORITIES)
        self.capacity = sum(higher) + data.draw(st.integers(1, lowest))
        self.queue: WaitingQueue[int] = WaitingQueue(
            classes, capacity=self.capacity, clock=self.clock
        )
        self.waiting: dict[int, Ticket[int]] = {}  # in order of arrival
        self.items = itertools.count()
        self.popped: Ticket[int] | None = None
        self.passed_over: Counter[Priority] = Counter()
        self.class_spread: dict[tuple[Priority, Priority], Spread] = {}

    def of(self, priority: Priority, tenant: str | None = None) -> list[Ticket[int]]:
        return [
            ticket
            for ticket in self.waiting.values()
            if ticket.priority is priority and tenant in (None, ticket.tenant)
        ]

    @rule(
        target=tickets,
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from(PRIORITIES),
        timeout_s=st.none() | st.integers(0, 8),
        count=st.integers(1, 4),
        weight=st.integers(1, 3),
        cost=st.integers(1, 9),
        size=st.integers(1, 9),
    )
    def push(
        self,
        tenant: str,
        priority: Priority,
        timeout_s: float | None,
        count: int,
        weight: int,
        cost: int,
        size: int,
    ) -> MultipleResults[Ticket[int]]:
        limits = self.classes[priority]
        made = []
        for _ in range(count):
            item = next(self.items)
            full = len(self.of(priority)) >= limits.capacity
            no_room = full or len(self.waiting) >= self.capacity
            among = priority if full else self.lowest_that_may_go()
            goes = self.able_to_go(among, tenant, priority, size / weight, size) if no_room else []
            push = partial(
                self.queue.push,
                item,
                tenant=tenant,
                priority=priority,
                timeout_s=timeout_s,
                weight=weight,
                cost=cost,
                size=size,
            )
            if no_room and not goes:
                with pytest.raises(Overloaded) as refused:
                    push()
                self.check_told(refused.value, priority)
                continue
            ticket, gone = push()
            if no_room:
                assert gone is not None
                assert gone is max(goes, key=lambda each: (each.size, each.number))
                assert self.waiting.pop(gone.item) is gone
                assert self.queue.remove(gone) is False
                self.check_told(self.queue.overloaded(gone.priority), gone.priority)
                self.forget_absent()
            else:
                assert gone is None
            patience = limits.timeout_s if timeout_s is None else min(limits.timeout_s, timeout_s)
            assert (ticket.item, ticket.tenant, ticket.priority) == (item, tenant, priority)
            assert (ticket.arrived, ticket.deadline) == (self.clock.now, self.clock.now + patience)
            self.waiting[item] = ticket
            made.append(ticket)
        return multiple(*made)

    def lowest_that_may_go(self) -> Priority | None:
        """Of those whose turn has not come once already."""
        fresh = {each.priority for each in self.waiting.values() if each.number > 0}
        return next((priority for priority in reversed(PRIORITIES) if priority in fresh), None)

    def able_to_go(
        self, among: Priority | None, tenant: str, priority: Priority, share: float, size: int
    ) -> list[Ticket[int]]:
        """Who may have to go for a newcomer: larger work, of a tenant that has no less."""
        if among is None or PRIORITIES.index(among) < PRIORITIES.index(priority):
            return []
        held = {t: sum(each.size / each.weight for each in self.of(among, t)) for t in TENANTS}
        fresh = [each for each in self.of(among) if each.number > 0]
        if among is not priority:
            most = max(held[each.tenant] for each in fresh)
            return [each for each in fresh if held[each.tenant] == most]
        larger = [each for each in fresh if each.size > size]
        return [t for t in larger if t.tenant == tenant or held[t.tenant] >= held[tenant] + share]

    def check_told(self, told: Overloaded, priority: Priority) -> None:
        assert told.retry_after is not None
        assert 0 < told.retry_after <= self.classes[priority].timeout_s

    @rule(count=st.integers(1, 12))
    def pop(self, count: int) -> None:
        for _ in range(count):
            expected = self.queue.peek()
            ticket = self.queue.pop()
            assert ticket is expected
            if ticket is None:
                assert not self.waiting
                return
            self.check_pick(ticket)
            assert self.waiting.pop(ticket.item) is ticket
            self.forget_absent()
            self.popped = ticket

    @precondition(lambda self: self.popped is not None)
    @rule(target=tickets, seconds=st.integers(0, 8))
    def give_back(self, seconds: int) -> Ticket[int]:
        before, self.popped = self.popped, None
        assert before is not None
        ticket = self.queue.give_back(before, deadline=self.clock.now + seconds)
        assert (ticket.item, ticket.tenant) == (before.item, before.tenant)
        assert (ticket.priority, ticket.arrived) == (before.priority, before.arrived)
        assert ticket.deadline == self.clock.now + seconds
        self.waiting = {ticket.item: ticket} | self.waiting
        return ticket

    def check_pick(self, ticket: Ticket[int]) -> None:
        assert ticket is self.of(ticket.priority, ticket.tenant)[0], "not first in, first out"

        classes = [priority for priority in PRIORITIES if self.of(priority)]
        for priority in classes:
            self.passed_over[priority] += 1
            assert self.passed_over[priority] <= self.queue.bound(priority), "starved"
        self.passed_over[ticket.priority] = 0
        for one, other in itertools.combinations(classes, 2):
            share = {p: Fraction(p is ticket.priority, self.classes[p].weight) for p in PRIORITIES}
            spread = self.class_spread.setdefault((one, other), Spread())
            weights = self.classes[one].weight, self.classes[other].weight
            assert spread.add(share[one] - share[other]) <= sum(Fraction(1, w) for w in weights)

    def forget_absent(self) -> None:
        """Comparisons hold only while both sides wait."""
        for priority in PRIORITIES:
            if not self.of(priority):
                self.passed_over[priority] = 0
        self.class_spread = {
            pair: spread for pair, spread in self.class_spread.items() if all(map(self.of, pair))
        }

    @rule(ticket=consumes(tickets))
    def remove(self, ticket: Ticket[int]) -> None:
        was_waiting = self.waiting.get(ticket.item) is ticket
        if was_waiting:
            del self.waiting[ticket.item]
        assert self.queue.remove(ticket) is was_waiting
        assert self.queue.remove(ticket) is False
        self.forget_absent()

    @rule(seconds=st.integers(0, 3))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        due = [ticket for ticket in self.waiting.values() if ticket.deadline <= self.clock.now]
        expired = self.queue.expire()
        assert expired == sorted(due, key=lambda ticket: (ticket.deadline, ticket.number))
        for ticket in expired:
            del self.waiting[ticket.item]
        self.forget_absent()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        self.queue.check_integrity()
        assert len(self.queue) == len(self.waiting)
        assert self.queue.depth() == {p: len(self.of(p)) for p in PRIORITIES}
        assert sum(each.number > 0 for each in self.waiting.values()) <= self.capacity
        deadlines = [ticket.deadline for ticket in self.waiting.values()]
        assert self.queue.next_deadline() == min(deadlines, default=None)

    def teardown(self) -> None:
        told = list(self.queue.places())
        assert [place.position for _, place in told] == list(range(1, len(self.waiting) + 1))
        assert {place.waiting for _, place in told} <= {len(self.waiting)}
        assert all(place.wait_s is None or place.wait_s > 0 for _, place in told)
        assert drain(self.queue) == [ticket for ticket, _ in told], "a position was wrong"
        self.queue.check_integrity()


QueueMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestQueue = QueueMachine.TestCase


class LongQueueMachine(QueueMachine):
    pass


LongQueueMachine.TestCase.settings = settings(max_examples=2000, stateful_step_count=100)
TestQueueLong = pytest.mark.slow(pytest.mark.timeout(1800)(LongQueueMachine.TestCase))


def test_default_weights_share_picks_eight_to_four_to_one() -> None:
    queue: WaitingQueue[object] = WaitingQueue(QueueConfig().classes())
    for _ in range(100):
        for priority in Priority:
            queue.push(None, tenant="t", priority=priority)
    picks = Counter(queue.pop().priority for _ in range(13 * 7))  # type: ignore[union-attr]
    assert picks == {Priority.VIP: 56, Priority.STANDARD: 28, Priority.LOW: 7}
    assert [queue.bound(priority) for priority in Priority] == [3, 5, 15]


def test_a_class_that_comes_back_is_next_but_has_earned_no_credit_by_idling() -> None:
    queue: WaitingQueue[object] = WaitingQueue({Priority.LOW: room(1), Priority.VIP: room(2)})
    for _ in range(50):
        queue.push(None, tenant="t", priority=Priority.LOW)
    for _ in range(20):
        queue.pop()
    for _ in range(6):
        queue.push(None, tenant="t", priority=Priority.VIP)
    assert "".join(ticket.priority[0] for ticket in drain(queue)[:10]) == "vvvlvvlvll"


def test_a_line_that_empties_at_every_pick_gets_no_more_than_its_share() -> None:
    """Otherwise one request at a time would be the way to overtake everybody."""
    queue: WaitingQueue[object] = WaitingQueue({Priority.VIP: room(3), Priority.LOW: room(1)})
    picks: Counter[Priority] = Counter()
    for _ in range(100):
        for priority, waiting in queue.depth().items():
            if not waiting:
                queue.push(None, tenant="t", priority=priority)
        ticket = queue.pop()
        assert ticket is not None
        picks[ticket.priority] += 1
    assert picks == {Priority.VIP: 75, Priority.LOW: 25}


def test_a_tenant_with_900_waiting_delays_a_single_request_by_one_place() -> None:
    queue: WaitingQueue[object] = WaitingQueue({Priority.LOW: room()})
    for _ in range(900):
        queue.push(None, tenant="crowd", priority=Priority.LOW)
    single, _ = queue.push(None, tenant="single", priority=Priority.LOW)
    assert drain(queue)[1] is single


def test_overloaded_says_which_class_how_many_and_when() -> None:
    queue: WaitingQueue[object] = WaitingQueue({Priority.LOW: room(capacity=2, timeout_s=7)})
    for _ in range(2):
        queue.push(None, tenant="t", priority=Priority.LOW)
    with pytest.raises(Overloaded, match=r"The low queue is full \(2 waiting\); retry in 7") as e:
        queue.push(None, tenant="t", priority=Priority.LOW)
    assert e.value.retry_after == 7, "unmeasured: by then all have been served or have expired"
    assert e.value.details == {"priority": "low", "capacity": 2}


@pytest.mark.parametrize("jitter_s", [0.0, 1e-6], ids=["at once", "microseconds apart"])
def test_retry_after_follows_the_measured_drain_rate(jitter_s: float) -> None:
    clock = Clock()
    queue: WaitingQueue[object] = WaitingQueue({Priority.LOW: room(timeout_s=1000)}, clock=clock)
    assert queue.retry_after(Priority.LOW) == MIN_RETRY_AFTER_S, "nobody waits"

    def round_of(size: int, seconds: float) -> None:
        for _ in range(size):
            queue.push(None, tenant="t", priority=Priority.LOW)
        for _ in range(size):
            clock.now += jitter_s
            queue.pop()
        clock.now += seconds - size * jitter_s

    # Bursts that an idle server swallows whole say nothing about how fast a line is served,
    # nor does the time after the last of a line has given up.
    for _ in range(50):
        round_of(32, 1.0)
        line = [queue.push(None, tenant="t", priority=Priority.LOW)[0] for _ in range(32)]
        for _ in line[1:]:
            clock.now += jitter_s
            queue.pop()
        queue.remove(line[-1])
        clock.now += 5.0

    for _ in range(400):
        queue.push(None, tenant="t", priority=Priority.LOW)
    assert queue.retry_after(Priority.LOW) == MAX_RETRY_AFTER_S, "unmeasured"
    for _ in range(10):  # 32 every 0.2 s: 160 a second
        round_of(32, 0.2)
    assert queue.retry_after(Priority.LOW) == pytest.approx(400 / 160, rel=0.01)

    for _ in range(300):  # half as fast
        round_of(32, 0.4)
    assert queue.retry_after(Priority.LOW) == pytest.approx(400 / 80, rel=0.01)

    clock.now += 3600  # stuck
    assert queue.retry_after(Priority.LOW) == MAX_RETRY_AFTER_S


def test_a_place_tells_the_wait_at_the_measured_rate() -> None:
    clock = Clock()
    rooms = {Priority.VIP: room(2, timeout_s=1000), Priority.LOW: room(1, timeout_s=1000)}
    queue: WaitingQueue[object] = WaitingQueue(rooms, clock=clock)
    for priority in (Priority.LOW, Priority.VIP):
        for _ in range(40):
            queue.push(None, tenant="t", priority=priority)
    assert {place.wait_s for _, place in queue.places()} == {None}, "nothing is measured"
    for _ in range(10):  # two vip and one low every half second
        for _ in range(3):
            queue.pop()
        clock.now += 0.5
    queue.pop()
    waits: dict[Priority, list[float]] = {Priority.VIP: [], Priority.LOW: []}
    for ticket, place in queue.places():
        assert place.wait_s is not None
        waits[ticket.priority].append(place.wait_s)
    for priority, rate in ((Priority.VIP, 4), (Priority.LOW, 2)):
        assert waits[priority] == sorted(waits[priority])
        assert waits[priority][0] == pytest.approx(1 / rate, rel=0.2)
        assert waits[priority][-1] == pytest.approx(len(waits[priority]) / rate, rel=0.2)


def test_expiry_is_exact_and_the_class_limits_what_a_caller_may_ask_for() -> None:
    clock = Clock()
    queue: WaitingQueue[object] = WaitingQueue({Priority.LOW: room(timeout_s=5)}, clock=clock)
    patient, _ = queue.push(None, tenant="t", priority=Priority.LOW, timeout_s=100)
    hasty, _ = queue.push(None, tenant="t", priority=Priority.LOW, timeout_s=2)
    clock.now = math.nextafter(1002, 0)
    assert queue.expire() == []
    clock.now = 1002
    assert queue.expire() == [hasty]
    clock.now = 1005
    assert queue.expire() == [patient]
    assert len(queue) == 0


def test_a_ticket_that_left_is_unknown() -> None:
    queue: WaitingQueue[object] = WaitingQueue({Priority.LOW: room()})
    ticket, _ = queue.push(None, tenant="t", priority=Priority.LOW)
    assert queue.pop() is ticket
    assert queue.remove(ticket) is False
    with pytest.raises(KeyError):
        queue.push(None, tenant="t", priority=Priority.VIP)


class Item:
    pass


@pytest.mark.parametrize("way_out", ["pop", "remove", "expire"])
def test_nothing_of_a_tenant_stays_behind(way_out: str) -> None:
    clock = Clock()
    queue: WaitingQueue[Item] = WaitingQueue({Priority.LOW: room(timeout_s=5)}, clock=clock)
    gone = []
    for number in range(1000):
        item = Item()
        ticket, none = queue.push(item, tenant=f"tenant {number}", priority=Priority.LOW)
        gone.append(weakref.ref(item))
        if way_out == "pop":
            queue.pop()
        elif way_out == "remove":
            queue.remove(ticket)
        else:
            clock.now += 5
            queue.expire()
        assert none is None
        del item, ticket
    assert not any(reference() for reference in gone)
    queue.check_integrity()  # no idle tenant, and few stale deadlines
