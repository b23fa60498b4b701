"""What a sweep may vary. Plain values: ``tune`` turns them into what a searcher wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True, kw_only=True)
class Float:
    """Uniform in ``[low, high]``, or in its logarithm."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Int:
    """Uniform among ``low … high``, both included, or in their logarithm."""

    low: int
    high: int
    log: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these, without an order."""

    values: Sequence[bool | int | float | str]


Domain: TypeAlias = Float | Int | Choice
