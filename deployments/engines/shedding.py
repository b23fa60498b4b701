"""Whose work goes when there is no more room to wait: low before high, large before small.

A newcomer finds its class full, or all classes together. Somebody then hears at once when to come
back, and it need not be the newcomer:

1. *All together are full*: the lowest class that waits gives a place to any higher one.
2. *Inside a class*, a newcomer takes the place of the largest work that is larger than its own.
   So every such change leaves less work waiting than before, and none can go round in a circle.
3. *Between tenants*, whoever holds more of the waiting tokens for its weight goes first, as shares
   of the class are counted. Inside a class nobody makes room for a tenant that holds more than it
   does itself: a crowd of small requests does not drive out the one large request of another.

Whoever came back after a turn (``number`` below zero) stays: its answer has begun.

The starvation bounds of the queue hold for all who wait, since a place that is lost changes
nobody's turn but to an earlier one. That every class always finds places is the configuration's:
all classes together hold more than those above the lowest may have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from deployments.engines.queue import Ticket

T = TypeVar("T")


def displaced(newcomer: Ticket[T], waiting: Iterable[Ticket[T]]) -> Ticket[T] | None:
    """Who makes room; ``None``: nobody does, and the newcomer goes. O(waiting).

    Args:
        waiting: those of one class, the newcomer's own or a lower one.
    """
    held: defaultdict[str, float] = defaultdict(float)
    fresh = []
    for ticket in waiting:
        held[ticket.tenant] += ticket.size / ticket.weight
        if ticket.number > 0:
            fresh.append(ticket)
    if not fresh:
        return None
    if fresh[0].priority is newcomer.priority:
        share = held[newcomer.tenant] + newcomer.size / newcomer.weight
        held[newcomer.tenant] = share  # with it, so that its own larger work may go for it
        able = [t for t in fresh if t.size > newcomer.size and held[t.tenant] >= share]
    else:
        most = max(held[ticket.tenant] for ticket in fresh)
        able = [ticket for ticket in fresh if held[ticket.tenant] == most]
    return max(able, key=lambda ticket: (ticket.size, ticket.number), default=None)
