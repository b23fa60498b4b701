"""Fast state: quotas that are reserved before work and settled after it.

    memory    one process                    tests, a single gateway
    sqlite    all processes of a machine     a file beside the database; the default
    redis     all machines                   Lua, one round trip a decision

The three reckon alike (``limits.py``), and one suite of tests holds them to it.

A reservation is a *lease*: it counts as used at once, and ends when it is settled with what
was really used. A lease that nobody settles or renews expires; then it stays used as it was
reserved, since nobody knows better, and no longer runs.
"""

from __future__ import annotations

from state.counters.contract import Counters, Reservation
from state.counters.limits import Decision, Demand, Level, Limit, Strategy
from state.counters.open import open_counters

__all__ = [
    "Counters",
    "Decision",
    "Demand",
    "Level",
    "Limit",
    "Reservation",
    "Strategy",
    "open_counters",
]
