"""Curves of a run: ``plots/METRIC.png``, one for each metric that was reported."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path

from train import history
from train.events import Event, Reported, RunEnded, RunStarted

EVERY_S = 60.0


class Plots:
    """Draws every so often, and at the end; from the history, so that a resumed run is whole."""

    def __init__(
        self, *, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._every_s, self._clock = every_s, clock
        self._out: Path | None = None
        self._next = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._out = event.out
                self._next = self._clock() + self._every_s
            case Reported() if self._out is not None and self._clock() >= self._next:
                draw(self._out)
                self._next = self._clock() + self._every_s
            case RunEnded() if self._out is not None:
                draw(self._out)


def draw(out: Path) -> list[Path]:
    """Draw the curves of the run in ``out``; those with fewer than two points are left out."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for report in history.read(out):
        for name, value in report.metrics.items():
            if math.isfinite(value):
                curves.setdefault(name, []).append((report.step, value))
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return []
    from matplotlib.figure import Figure  # its own canvas (Agg): no window, no global state

    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    for name, points in curves.items():
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
        axes.set(xlabel="step", ylabel=name, title=out.name)
        axes.grid(alpha=0.3)
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.png"
        figure.savefig(path, dpi=100)
        drawn.append(path)
    return drawn
