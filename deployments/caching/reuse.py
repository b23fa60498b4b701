"""What a request wishes of the cache, and what it got."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    max_age_s: float = math.inf
    """May be answered with what was computed for another request no longer ago than this; 0: not
    even with what is being computed."""
    write: bool = True
    """Its own answer may be kept, and shared with requests that come meanwhile."""

    @property
    def read(self) -> bool:
        return self.max_age_s > 0


class Outcome(StrEnum):
    HIT = "hit"
    """It was there."""
    JOIN = "join"
    """It was being computed for another request."""
    MISS = "miss"
    """It was computed for this one."""


BY_WORK = (Outcome.HIT, Outcome.JOIN, Outcome.MISS)
"""The least work first."""

Told: TypeAlias = Callable[[Outcome], None]
