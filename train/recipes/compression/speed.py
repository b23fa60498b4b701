"""How long calls take, of the network as it came and of what became of it, side by side."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Way = Callable[[Tensor], object]
BATCHES = (1, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of one way, for one batch size."""

    median_us: float
    ratio: float
    """How many times as fast as the first way: the median over rounds."""


def compare(ways: Mapping[str, Way], pixels: Tensor, rounds: int) -> dict[int, dict[str, Speed]]:
    """Batch size → way → how fast it is, on one thread.

    What counts is the processor's time, and in each round all take turns: so neighbours on the
    machine hardly show.
    """
    with _one_thread():
        return {size: _compared(ways, pixels[:size].contiguous(), rounds) for size in BATCHES}


def slowest(table: Mapping[int, Mapping[str, Speed]], way: str) -> float:
    """The ratio of ``way`` where it gains least."""
    return min(speeds[way].ratio for speeds in table.values())


def write(table: Mapping[int, Mapping[str, Speed]], path: Path) -> None:
    found = {
        f"batch_{size}": {
            name: {"median_us": round(speed.median_us, 1), "ratio": round(speed.ratio, 2)}
            for name, speed in speeds.items()
        }
        for size, speeds in table.items()
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def _compared(ways: Mapping[str, Way], batch: Tensor, rounds: int) -> dict[str, Speed]:
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.thread_time()
            way(batch)
            if turn:  # the first one warms up
                took[name].append(time.thread_time() - began)
    first = next(iter(took.values()))
    return {
        name: Speed(
            median_us=1e6 * statistics.median(times),
            ratio=statistics.median(a / b for a, b in zip(first, times, strict=True)),
        )
        for name, times in took.items()
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
