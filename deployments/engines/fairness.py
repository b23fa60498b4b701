"""Whose turn it is among the tenants of one priority class: fair shares of tokens.

Weighted fair queueing in the form that learns only afterwards what a request has cost: the
virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024),
beside a virtual clock that runs on (as in WF²Q+; Bennett and Zhang, 1997), which is what lets
those who wait grow old.

Every tenant has a *tag*: the tokens that were computed for it, divided by its weight. The smallest
tag is next, of equals the one whose line is older; inside a line it is first in, first out. A tag
grows by what a ticket costs when it is taken, and by whatever is computed later (``charge``). The
clock ``v`` grows whenever a ticket is taken, by its cost divided by the weights of all who wait,
and is never behind the tag that was taken. A tenant that comes back starts at
``max(own tag, v)``: it has saved up no credit by idling, and what was computed for it while others
waited is not forgotten until nobody waits; then all are even.

Shares. While ``i`` and ``j`` both wait, and each has had a turn, what they are charged differs by
``|served_i / w_i - served_j / w_j| ≤ X_i / w_i + X_j / w_j`` over any time, with ``X`` the most
that is charged to a tenant from one of its turns to its next. Proof: tags of those who wait grow by
what is charged and by nothing else, and ``i`` is taken only when ``tag_i ≤ tag_j``; so
``tag_i - tag_j ≤ X_i / w_i`` ever after, and likewise for ``j``.

Starvation bound. Let a tenant wait with tag ``t`` at clock ``v``, and let all who wait weigh no
more than ``W`` together (they are no more than the class holds). While the clock is behind ``t``,
every ticket of cost ``c`` moves it by ``c / W`` at least: after ``(t - v) · W`` tokens it has
passed ``t``, whoever comes meanwhile. From then on newcomers line up behind, and each of those who
were there goes first only until its own tag has passed ``t``: with ``(t - tag_j) · w_j`` tokens and
one ticket more, at most.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from deployments.engines.queue import Ticket

T = TypeVar("T")

UNIT = 1 << 20
"""Of tags and clock: a token at weight 1. Integers, so that what adds up does not drift."""
MOST_IDLE = 4096
"""Tenants that do not wait and whose tags are remembered."""
_SLACK = 64


@dataclass(eq=False, slots=True)
class _Account(Generic[T]):
    tag: int
    weight: int
    line: OrderedDict[int, Ticket[T]] = field(default_factory=OrderedDict)
    """What waits, by number, in the order of its turns."""
    age: int = 0
    """The number of the ticket that began the line."""


class FairLine(Generic[T]):
    """The tickets of one class. ``add``, ``take`` and ``drop`` take O(log n), ``charge`` O(1)."""

    def __init__(self) -> None:
        self.size = 0
        self._clock = 0
        self._waiting: dict[str, _Account[T]] = {}
        self._weight = 0
        """Of all who wait, together."""
        self._idle: dict[str, int] = {}
        """Tags of those who do not wait, and would not start at the clock."""
        self._turns: list[tuple[int, int, str]] = []
        """A heap of (tag, age, tenant), one for every line. Tags may have grown since, and lines
        may be gone: ``_next`` mends what it meets."""

    def add(self, ticket: Ticket[T]) -> None:
        if not self.size:
            self._idle.clear()
        account = self._waiting.get(ticket.tenant)
        if account is None:
            tag = max(self._idle.pop(ticket.tenant, 0), self._clock)
            account = _Account(tag, weight=0, age=ticket.number)
            self._waiting[ticket.tenant] = account
            heapq.heappush(self._turns, (tag, account.age, ticket.tenant))
        self._weight += ticket.weight - account.weight
        account.weight = ticket.weight
        account.line[ticket.number] = ticket
        if ticket.number < 0:  # it came back
            account.line.move_to_end(ticket.number, last=False)
        self.size += 1

    def head(self) -> Ticket[T]:
        """Who is next. There must be one."""
        return next(iter(self._next().line.values()))

    def take(self, cost: int) -> Ticket[T]:
        """Take out the head, at a cost in tokens."""
        account = self._next()
        ticket = next(iter(account.line.values()))
        self._clock = max(account.tag, self._clock + cost * UNIT // self._weight)
        account.tag += cost * UNIT // ticket.weight
        self._leave(account, ticket)
        return ticket

    def drop(self, ticket: Ticket[T]) -> None:
        """Take out one that waits, at no cost."""
        self._leave(self._waiting[ticket.tenant], ticket)

    def charge(self, ticket: Ticket[T], tokens: int) -> None:
        """Add what was computed for a ticket that was taken. Of no effect while nobody waits."""
        if not self.size:
            return
        more = tokens * UNIT // ticket.weight
        if account := self._waiting.get(ticket.tenant):
            account.tag += more
        else:
            self._remember(ticket.tenant, max(self._idle.get(ticket.tenant, 0), self._clock) + more)

    def turns(self) -> Iterator[Ticket[T]]:
        """Everybody, in the order of their turns if nobody comes, leaves or is charged for more."""
        lines = [(a.tag, a.age, iter(a.line.values())) for a in self._waiting.values()]
        heapq.heapify(lines)
        while lines:
            tag, age, line = lines[0]
            ticket = next(line, None)
            if ticket is None:
                heapq.heappop(lines)
            else:
                yield ticket
                heapq.heapreplace(lines, (tag + ticket.cost * UNIT // ticket.weight, age, line))

    def __iter__(self) -> Iterator[Ticket[T]]:
        return (ticket for account in self._waiting.values() for ticket in account.line.values())

    def _next(self) -> _Account[T]:
        while True:
            tag, age, tenant = self._turns[0]
            account = self._waiting.get(tenant)
            if account is None or account.age != age:
                heapq.heappop(self._turns)
            elif account.tag != tag:
                heapq.heapreplace(self._turns, (account.tag, age, tenant))
            else:
                return account

    def _leave(self, account: _Account[T], ticket: Ticket[T]) -> None:
        del account.line[ticket.number]
        self.size -= 1
        if account.line:
            return
        self._weight -= account.weight
        del self._waiting[ticket.tenant]
        self._remember(ticket.tenant, account.tag)
        if len(self._turns) > 2 * len(self._waiting) + _SLACK:
            self._turns = [(a.tag, a.age, tenant) for tenant, a in self._waiting.items()]
            heapq.heapify(self._turns)

    def _remember(self, tenant: str, tag: int) -> None:
        self._idle[tenant] = tag
        if len(self._idle) > MOST_IDLE:
            owing = {name: tag for name, tag in self._idle.items() if tag > self._clock}
            self._idle = owing if len(owing) < MOST_IDLE // 2 else {}

    def check_integrity(self) -> None:
        """Assert every invariant. O(n)."""
        assert self.size == sum(len(account.line) for account in self._waiting.values())
        assert self._weight == sum(account.weight for account in self._waiting.values())
        assert not self._waiting.keys() & self._idle.keys()
        assert len(self._idle) <= MOST_IDLE
        assert len(self._turns) <= 2 * len(self._waiting) + _SLACK
        listed = {(age, tenant): tag for tag, age, tenant in self._turns}
        for tenant, account in self._waiting.items():
            assert account.line, f"idle tenant {tenant!r} is kept among those who wait"
            assert listed[account.age, tenant] <= account.tag, f"{tenant!r} is not found in time"
            numbers = list(account.line)
            assert numbers == sorted(numbers)
            for number, ticket in account.line.items():
                assert (ticket.number, ticket.tenant) == (number, tenant)
