"""Names that nobody else has given: of requests, leases, entries of the ledger.

Drawn by this process from a generator that the system has seeded once, and a forked one again:
asking the system for each costs a request several calls into the kernel. Not for secrets.
"""

from __future__ import annotations

import os
import random

_draws = random.Random()
os.register_at_fork(after_in_child=_draws.seed)


def unique(digits: int = 32) -> str:
    """So many hexadecimal digits."""
    return f"{_draws.getrandbits(4 * digits):0{digits}x}"
