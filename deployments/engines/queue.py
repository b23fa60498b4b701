"""The waiting room in front of every engine and batcher: who is served next.

Three rules, from the outside in:

1. *Between priority classes* — start-time fair queueing (Goyal, Vin, Cheng: "Start-time
   Fair Queuing", SIGCOMM 1996) with unit cost. A class has a virtual start tag; the
   smallest tag is picked, ``v`` becomes that tag, and the class's own tag grows by
   ``1 / weight``. A class that was empty comes back at ``max(own tag, v)``: it neither
   saves up credit while idle nor is punished for what it used before. Ties go to the
   heavier class, so a first vip request is picked next.
2. *Between tenants of a class* — weighted fair shares of the tokens that are computed
   (``fairness.py``): 900 requests of one tenant delay another tenant's single request by
   one place.
3. *Inside a tenant* — first in, first out; one whose turn was taken from it goes first.

When there is no more room to wait, large and low work goes first: ``shedding.py``.

Starvation bound. While class ``c`` of weight ``w_c`` waits, it is picked within
``1 + Σ_{i≠c} (⌊w_i / w_c⌋ + 1)`` picks, whatever arrives or leaves meanwhile. Proof: at
every moment ``v ≤ tag`` for each waiting class, and ``tag_c ≤ v + 1/w_c``, because
``tag_c`` last grew from a pick at a tag of at most ``v``. Picks made before ``c``
therefore have tags in ``[v, v + 1/w_c]``, and two of class ``i`` are ``1/w_i`` apart. With
the weights 8, 4, 1 that is 3, 5 and 15 picks. Shares (theorem 1 of the paper):
over any interval in which ``i`` and ``j`` both wait throughout,
``|picks_i / w_i - picks_j / w_j| ≤ 1/w_i + 1/w_j``.

Nothing here blocks, sleeps or locks: the caller serialises access.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from deployments.config import PriorityClass
from deployments.engines.drain import Drain
from deployments.engines.fairness import FairLine
from deployments.engines.shedding import displaced
from models.contracts import Place, Priority
from models.errors import Overloaded

T = TypeVar("T")

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 60.0


@dataclass(eq=False, slots=True)
class Ticket(Generic[T]):
    """A place in the queue. Times are those of the queue's clock, in seconds."""

    item: T
    tenant: str
    priority: Priority
    arrived: float
    deadline: float
    number: int
    """Order of arrival over the whole queue, below zero for one that came back; a ticket's
    identity."""
    weight: int
    """Of the tenant, beside others of the class."""
    cost: int
    """In tokens: what its turn takes of the tenant's share."""
    size: int
    """In tokens: all the work that it may come to, prompt and answer."""


class WaitingQueue(Generic[T]):
    """Bounded, weighted between classes, fair between tenants, with deadlines.

    ``peek``, ``pop`` and ``remove`` take O(log n), and so does ``push`` while there is room.

    Args:
        classes: one waiting room for each priority; a push to any other is a KeyError.
        capacity: of all rooms together; what they hold one by one unless given.
        clock: seconds, never running backwards.
    """

    def __init__(
        self,
        classes: Mapping[Priority, PriorityClass],
        *,
        capacity: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        unit = math.lcm(*(room.weight for room in classes.values()))  # tags stay integers
        heaviest_first = sorted(classes.items(), key=lambda named: -named[1].weight)
        self._rooms: dict[Priority, _Room[T]] = {
            priority: _Room(limits, unit // limits.weight) for priority, limits in heaviest_first
        }
        every = sum(room.capacity for room in classes.values())
        self._capacity = every if capacity is None else capacity
        self._virtual_time = 0
        self._pushed = 0
        self._returned = 0
        self._waiting: dict[int, Ticket[T]] = {}
        # (deadline, number); entries of tickets that left are skipped, and swept out
        # before they outnumber the live ones. Numbers only, so that no item is kept alive.
        self._deadlines: list[tuple[float, int]] = []

    def push(
        self,
        item: T,
        *,
        tenant: str,
        priority: Priority,
        timeout_s: float | None = None,
        weight: int = 1,
        cost: int = 1,
        size: int = 1,
    ) -> tuple[Ticket[T], Ticket[T] | None]:
        """Line up. The deadline is the class's timeout, or ``timeout_s`` if that is sooner.

        Returns:
            The place, and who lost its own to it, if there was no room: the caller tells it
            ``overloaded``.

        Raises:
            Overloaded: there is no room, and nobody makes any; ``retry_after`` says when to come
                back.
        """
        room = self._rooms[priority]
        now = self._clock()
        patience = room.limits.timeout_s
        if timeout_s is not None:
            patience = min(patience, timeout_s)
        ticket = Ticket(
            item, tenant, priority, now, now + patience, self._pushed + 1, weight, cost, size
        )
        gone = None
        if not self._has_room(room):
            gone = self._displaced(ticket)
            if gone is None:
                raise self.overloaded(priority)
            self.remove(gone)
        self._pushed += 1
        self._add(room, ticket)
        return ticket, gone

    def overloaded(self, priority: Priority) -> Overloaded:
        """What one of this class hears that finds no room, or has lost its place."""
        limits, waiting = self._rooms[priority].limits, self._rooms[priority].line.size
        what, capacity = f"The {priority} queue is full", limits.capacity
        if waiting < capacity:
            what, capacity, waiting = "The queues are full", self._capacity, len(self._waiting)
        wait = self.retry_after(priority)
        return Overloaded(
            f"{what} ({waiting} waiting); retry in {wait:.1f} s.",
            details={"priority": str(priority), "capacity": capacity},
            retry_after=wait,
        )

    def give_back(self, ticket: Ticket[T], *, deadline: float) -> Ticket[T]:
        """Wait again, before the others of the tenant, after a ``pop`` that came to nothing.

        Its turn is spent: shares and the bound hold as if it were new, but for its cost, which is
        paid. It is never refused, so a full class may hold a few more than its capacity.
        """
        self._returned += 1
        again = replace(ticket, deadline=deadline, number=-self._returned, cost=0)
        self._add(self._rooms[ticket.priority], again)
        return again

    def peek(self) -> Ticket[T] | None:
        """Whom ``pop`` would return, deadlines disregarded: call ``expire`` first."""
        room = self._next_room()
        return room.line.head() if room else None

    def pop(self, *, cost: int | None = None) -> Ticket[T] | None:
        """Take the next by policy, or None when nobody waits.

        Args:
            cost: in tokens, if it has turned out to be another than the ticket's.
        """
        room = self._next_room()
        if room is None:
            return None
        ticket = room.line.take(room.line.head().cost if cost is None else cost)
        room.drain.picked(self._clock(), waiting=room.line.size)
        self._virtual_time = room.tag
        room.tag += room.stride
        self._forget(ticket)
        return ticket

    def charge(self, ticket: Ticket[T], tokens: int) -> None:
        """Count what was computed for a ticket after its ``pop`` against its tenant's share."""
        self._rooms[ticket.priority].line.charge(ticket, tokens)

    def remove(self, ticket: Ticket[T]) -> bool:
        """Give up a place. False if the ticket no longer waits."""
        if self._waiting.get(ticket.number) is not ticket:
            return False
        room = self._rooms[ticket.priority]
        room.line.drop(ticket)
        if not room.line.size:
            room.drain.emptied()
        self._forget(ticket)
        return True

    def expire(self) -> list[Ticket[T]]:
        """Take out everyone whose deadline has come, soonest first. O(1) when there is none."""
        expired: list[Ticket[T]] = []
        if not self._deadlines:
            return expired
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            ticket = self._waiting.get(number)
            if ticket is not None:
                self.remove(ticket)
                expired.append(ticket)
        return expired

    def next_deadline(self) -> float | None:
        """When ``expire`` will next have something to do; None when nobody waits."""
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def depth(self) -> dict[Priority, int]:
        return {priority: room.line.size for priority, room in self._rooms.items()}

    def __len__(self) -> int:
        return len(self._waiting)

    def places(self) -> Iterator[tuple[Ticket[T], Place]]:
        """Everybody, in the order in which they will be served if nobody else comes or leaves.

        The wait is that of the class at its own measured rate. O(waiting) for all of them.
        """
        now, waiting = self._clock(), len(self._waiting)
        walks = [
            _Walk(room, room.drain.rate(now)) for room in self._rooms.values() if room.line.size
        ]
        for position in range(1, waiting + 1):
            walk = min(walks, key=lambda each: each.tag)  # the first of equals, as ``pop`` takes
            ticket = next(walk.turns)
            walk.passed()
            wait_s = walk.taken / walk.rate if walk.rate else None
            yield ticket, Place(position=position, waiting=waiting, wait_s=wait_s)
            if walk.taken == walk.size:
                walks.remove(walk)

    def retry_after(self, priority: Priority) -> float:
        """Seconds in which all that waits in this class now is served, at the measured rate.

        Never more than the class's timeout, since by then it has been served or has
        expired; that is also the answer before anything was measured.
        """
        room = self._rooms[priority]
        if not room.line.size:
            return MIN_RETRY_AFTER_S
        rate = room.drain.rate(self._clock())
        longest = min(room.limits.timeout_s, MAX_RETRY_AFTER_S)
        if not rate:
            return longest
        return max(MIN_RETRY_AFTER_S, min(longest, room.line.size / rate))

    def bound(self, priority: Priority) -> int:
        """Picks within which this class is picked while it waits (see the module)."""
        own = self._rooms[priority].limits.weight
        others = (room for name, room in self._rooms.items() if name is not priority)
        return 1 + sum(room.limits.weight // own + 1 for room in others)

    def check_integrity(self) -> None:
        """Assert every invariant. O(n); for tests and post-mortems."""
        found: dict[int, Ticket[T]] = {}
        fresh = 0
        for priority, room in self._rooms.items():
            room.line.check_integrity()
            new = [ticket for ticket in room.line if ticket.number > 0]
            assert len(new) <= room.limits.capacity
            fresh += len(new)
            for ticket in room.line:
                assert ticket.priority is priority
                found[ticket.number] = ticket
            assert room.tag <= self._virtual_time + room.stride
            assert not room.line.size or room.tag >= self._virtual_time
        assert found == self._waiting
        assert fresh <= self._capacity
        listed = [number for _, number in self._deadlines if number in self._waiting]
        assert sorted(listed) == sorted(self._waiting), "a deadline is missing or doubled"
        assert len(self._deadlines) <= _SWEEP_FACTOR * len(self._waiting) + _SWEEP_SLACK

    def _has_room(self, room: _Room[T]) -> bool:
        return room.line.size < room.limits.capacity and len(self._waiting) < self._capacity

    def _displaced(self, newcomer: Ticket[T]) -> Ticket[T] | None:
        own = self._rooms[newcomer.priority]
        if own.line.size >= own.limits.capacity:
            return displaced(newcomer, own.line)
        for priority in reversed(Priority):  # from the lowest up to the newcomer's own
            room = self._rooms.get(priority)
            if room and (goes := displaced(newcomer, room.line)):
                return goes
            if room is own:
                break
        return None

    def _next_room(self) -> _Room[T] | None:
        waiting = (room for room in self._rooms.values() if room.line.size)
        return min(waiting, key=lambda room: room.tag, default=None)  # the first of equals

    def _add(self, room: _Room[T], ticket: Ticket[T]) -> None:
        if not room.line.size:
            room.tag = max(room.tag, self._virtual_time)
        room.line.add(ticket)
        self._waiting[ticket.number] = ticket
        heapq.heappush(self._deadlines, (ticket.deadline, ticket.number))

    def _forget(self, ticket: Ticket[T]) -> None:
        del self._waiting[ticket.number]
        if len(self._deadlines) > _SWEEP_FACTOR * len(self._waiting) + _SWEEP_SLACK:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)


_SWEEP_FACTOR, _SWEEP_SLACK = 2, 64


class _Room(Generic[T]):
    """One class."""

    __slots__ = ("drain", "limits", "line", "stride", "tag")

    def __init__(self, limits: PriorityClass, stride: int) -> None:
        self.limits = limits
        self.stride = stride
        self.tag = 0
        self.line: FairLine[T] = FairLine()
        self.drain = Drain()


class _Walk(Generic[T]):
    """A class on the way through everybody's turns."""

    __slots__ = ("rate", "size", "stride", "tag", "taken", "turns")

    def __init__(self, room: _Room[T], rate: float | None) -> None:
        self.tag, self.stride, self.size, self.rate = room.tag, room.stride, room.line.size, rate
        self.taken = 0
        self.turns = room.line.turns()

    def passed(self) -> None:
        self.tag += self.stride
        self.taken += 1
