"""How far shares drift apart, for tests of fairness."""

from __future__ import annotations

from fractions import Fraction


class Spread:
    """How far apart two things counted together were over any window since both began."""

    def __init__(self) -> None:
        self.now = self.low = self.high = Fraction(0)

    def add(self, step: Fraction) -> Fraction:
        self.now += step
        self.low, self.high = min(self.low, self.now), max(self.high, self.now)
        return self.high - self.low
