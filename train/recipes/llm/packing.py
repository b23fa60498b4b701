"""Which units are seen in which step: a pure function of lengths, seed and step.

Nothing is kept between steps, so a run that is resumed at step N, on as many workers as
there are then, sees exactly the batches of an undisturbed one.

    epoch ─ shuffled units ─► sequences (units side by side, up to the limit) ─► steps

Steps run across the ends of epochs, so every step has its full batch.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeAlias

Packed: TypeAlias = tuple[int, ...]
"""Indexes of the units in one sequence."""

OPEN = 32
"""Sequences that are looked at for room."""


def pack(order: Sequence[int], lengths: Sequence[int], limit: int) -> list[Packed]:
    """First fit among the last ``OPEN`` sequences; a unit longer than ``limit`` is alone."""
    packed: list[list[int]] = []
    room: list[int] = []
    for unit in order:
        length = lengths[unit]
        for place in range(max(0, len(packed) - OPEN), len(packed)):
            if length <= room[place]:
                packed[place].append(unit)
                room[place] -= length
                break
        else:
            packed.append([unit])
            room.append(limit - length)
    return [tuple(units) for units in packed]


class Schedule:
    """The batches of a run.

    Args:
        lengths: tokens of each unit.
        limit: tokens of a sequence.
        batch: sequences a step.
        packing: several units a sequence.
    """

    def __init__(
        self, lengths: Sequence[int], *, limit: int, batch: int, packing: bool, seed: int
    ) -> None:
        if not lengths:
            raise ValueError("no units")
        self._lengths = lengths
        self._limit = limit
        self._batch = batch
        self._packing = packing
        self._seed = seed
        self._starts = [0]
        """Sequences before each epoch, as far as known."""
        self._cached: tuple[int, list[Packed]] = (-1, [])

    def step(self, number: int) -> list[Packed]:
        """The batch of step ``number``, counted from 0."""
        return [self._sequence(i) for i in range(number * self._batch, (number + 1) * self._batch)]

    def epochs_before(self, number: int) -> int:
        """Whole epochs that have been seen when ``number`` steps are done."""
        self._know_up_to(number * self._batch)
        return bisect_right(self._starts, number * self._batch) - 1

    def steps_of(self, epochs: int) -> int:
        """Steps until every unit has been seen ``epochs`` times."""
        while len(self._starts) <= epochs:
            self._next_epoch()
        return math.ceil(self._starts[epochs] / self._batch)

    def epoch(self, number: int) -> list[Packed]:
        """All sequences of an epoch, each unit once."""
        if self._cached[0] != number:
            order = list(range(len(self._lengths)))
            random.Random(f"{self._seed}/{number}").shuffle(order)
            packed: list[Packed] = [(unit,) for unit in order]
            if self._packing:
                packed = pack(order, self._lengths, self._limit)
            self._cached = (number, packed)
        return self._cached[1]

    def _sequence(self, index: int) -> Packed:
        self._know_up_to(index)
        epoch = bisect_right(self._starts, index) - 1
        return self.epoch(epoch)[index - self._starts[epoch]]

    def _know_up_to(self, index: int) -> None:
        while self._starts[-1] <= index:
            self._next_epoch()

    def _next_epoch(self) -> None:
        self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))


def groups(batch: Sequence[Packed], micro: int) -> list[list[Packed]]:
    """The forward passes of a step, in order; which worker runs one changes nothing in it."""
    return [list(batch[i : i + micro]) for i in range(0, len(batch), micro)]
