"""Who makes room, case by case; ``test_queue.py`` drives it at random."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deployments.config import PriorityClass, QueueConfig
from deployments.engines.queue import Ticket, WaitingQueue
from models.contracts import Priority
from models.errors import Overloaded

VIP, STANDARD, LOW = Priority


def queue_of(vip: int = 9, standard: int = 9, low: int = 9, *, together: int) -> WaitingQueue[str]:
    room = {VIP: vip, STANDARD: standard, LOW: low}
    classes = {p: PriorityClass(capacity=n, weight=1, timeout_s=9) for p, n in room.items()}
    return WaitingQueue(classes, capacity=together)


def push(
    queue: WaitingQueue[str],
    name: str,
    size: int,
    priority: Priority = STANDARD,
    tenant: str = "ada",
    weight: int = 1,
) -> str | None:
    """Who went for it."""
    _, gone = queue.push(name, tenant=tenant, priority=priority, size=size, weight=weight)
    queue.check_integrity()
    return None if gone is None else gone.item


def left(queue: WaitingQueue[str]) -> set[str]:
    return {ticket.item for ticket, _ in queue.places()}


def test_in_a_full_class_the_largest_goes_for_a_smaller_one() -> None:
    queue = queue_of(standard=3, together=99)
    for name, size in (("small", 10), ("large", 900), ("middle", 300)):
        assert push(queue, name, size) is None
    assert push(queue, "newcomer", 299) == "large"
    assert left(queue) == {"small", "middle", "newcomer"}
    with pytest.raises(Overloaded, match=r"The standard queue is full \(3 waiting\); retry in 9"):
        push(queue, "as large as any", 300)
    assert left(queue) == {"small", "middle", "newcomer"}


def test_of_equals_the_one_that_came_last_goes() -> None:
    queue = queue_of(standard=2, together=99)
    push(queue, "first", 50)
    push(queue, "last", 50)
    assert push(queue, "newcomer", 1) == "last"


def test_a_full_class_takes_no_place_of_a_lower_one() -> None:
    """What a class may hold is what can be served within its timeout."""
    queue = queue_of(vip=1, low=9, together=99)
    push(queue, "low", 900, LOW)
    push(queue, "vip", 10, VIP)
    with pytest.raises(Overloaded, match="The vip queue is full"):
        push(queue, "another vip", 10, VIP)


@pytest.mark.parametrize("size", [1, 10_000], ids=["small", "large"])
def test_when_all_are_full_the_lowest_class_gives_way_to_any_higher_one(size: int) -> None:
    queue = queue_of(together=4)
    for name, of, priority in (
        ("low, small", 5, LOW),
        ("low, large", 500, LOW),
        ("standard, larger", 900, STANDARD),
        ("vip, larger", 900, VIP),
    ):
        push(queue, name, of, priority)
    assert push(queue, "a", size, STANDARD) == "low, large"
    assert push(queue, "b", size, VIP) == "low, small"
    assert push(queue, "c", 1, VIP) in {"standard, larger", "a"}, "then the next one up"
    assert queue.depth()[LOW] == 0
    with pytest.raises(Overloaded, match=r"The queues are full \(4 waiting\)") as refused:
        push(queue, "d", 1, LOW)
    assert refused.value.details == {"priority": "low", "capacity": 4}


def test_a_crowd_of_small_requests_does_not_drive_out_another_tenants_large_one() -> None:
    queue = queue_of(standard=10, together=99)
    push(queue, "large", 40, tenant="bob")
    for number in range(9):
        push(queue, f"small {number}", 5, tenant="crowd")
    with pytest.raises(Overloaded):
        push(queue, "one more", 5, tenant="crowd")
    assert push(queue, "hers", 5, tenant="cyd") == "large", "who has less may"


def test_a_lower_class_is_thinned_from_the_tenant_that_holds_most_for_its_weight() -> None:
    queue = queue_of(low=10, together=10)
    push(queue, "large", 40, LOW, tenant="bob")
    push(queue, "heavy", 100, LOW, tenant="dee", weight=10)
    for number in range(8):
        push(queue, f"small {number}", 6, LOW, tenant="crowd")
    assert push(queue, "vip 1", 1, VIP) == "small 7"
    assert push(queue, "vip 2", 1, VIP) == "small 6", "42 beside 40"
    assert push(queue, "vip 3", 1, VIP) == "large", "40 beside 36"


def test_whose_answer_has_begun_stays() -> None:
    queue = queue_of(low=9, together=2)
    push(queue, "begun", 900, LOW)
    begun = queue.pop()
    assert begun is not None
    queue.give_back(begun, deadline=float("inf"))
    push(queue, "fresh", 1, LOW)
    assert push(queue, "vip", 1, VIP) == "fresh"
    with pytest.raises(Overloaded):
        push(queue, "another vip", 1, VIP)


def test_who_makes_room_hears_when_to_come_back_from_the_measured_rate() -> None:
    now = 1000.0
    classes = {LOW: PriorityClass(capacity=20, weight=1, timeout_s=60)}
    queue: WaitingQueue[int] = WaitingQueue(classes, clock=lambda: now)

    def fill() -> Sequence[Ticket[int] | None]:
        free = 20 - len(queue)
        return [queue.push(0, tenant="t", priority=LOW, size=9)[1] for _ in range(free)]

    for _ in range(10):  # four a second
        assert not any(fill())
        queue.pop()
        now += 0.25
    fill()
    _, gone = queue.push(1, tenant="t", priority=LOW, size=1)
    assert gone is not None
    assert queue.overloaded(gone.priority).retry_after == pytest.approx(20 / 4, rel=0.1)


def test_low_requests_always_find_some_places_by_default() -> None:
    config = QueueConfig()
    assert config.together == 1200
    queue: WaitingQueue[None] = WaitingQueue(config.classes(), capacity=config.together)
    for priority in (LOW, STANDARD, VIP):
        for _ in range(config.classes()[priority].capacity):
            queue.push(None, tenant="t", priority=priority)
    assert queue.depth() == {VIP: 100, STANDARD: 1000, LOW: 100}
