"""Progress for people: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from train.events import Event, Reported, RunEnded, RunStarted, Subscriber

LINE_EVERY_S = 5.0


def subscriber(stream: TextIO | None = None) -> Subscriber:
    """What fits ``stream`` (default: stderr)."""
    stream = stream or sys.stderr
    return Bar(stream) if stream.isatty() else Lines(stream)


class Pace:
    """Steps a second and seconds left, measured since this driver began."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began, self._from = clock(), 0
        self._step = 0
        self._total: int | None = None

    def start(self, step: int) -> None:
        self._began, self._from, self._step = self._clock(), step, step

    def move(self, step: int, total: int | None) -> None:
        self._step, self._total = step, total

    @property
    def rate(self) -> float:
        took = self._clock() - self._began
        return (self._step - self._from) / took if took > 0 else 0.0

    def left(self) -> float | None:
        """``None`` if nobody knows."""
        if self._total is None or not self.rate:
            return None
        return max(self._total - self._step, 0) / self.rate

    def __str__(self) -> str:
        words = [f"{self.rate:.3g} steps/s"]
        if (left := self.left()) is not None:
            words.append(f"{duration(left)} left")
        return ", ".join(words)


class Lines:
    """A line for the first report, then one every few seconds, and one for the last."""

    def __init__(
        self,
        stream: TextIO,
        *,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._pace = Pace(clock)
        self._next = 0.0
        self._unsaid: Reported | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                again = f", goes on from step {event.resumed_from}" if event.resumed_from else ""
                self._say(f"{event.recipe}: {event.out}{again}")
                self._pace.start(event.resumed_from)
                self._next = self._clock()
            case Reported():
                self._pace.move(event.step, event.total)
                self._unsaid = event
                if self._clock() >= self._next:
                    self._next = self._clock() + self._every_s
                    self._tell(event)
            case RunEnded():
                if self._unsaid is not None:
                    self._tell(self._unsaid)

    def _tell(self, event: Reported) -> None:
        self._unsaid = None
        of = f"/{event.total}" if event.total else ""
        self._say(f"step {event.step}{of}  {brief(event.metrics)}  ({self._pace})")

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class Bar:
    """One line that moves, and one of metrics below it: side by side they would cut off the time
    left on a terminal of 80 columns.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._pace = Pace(clock)
        self._progress: _TwoLines | None = None
        self._task = TaskID(0)

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._open(event)
            case Reported() if self._progress is not None:
                self._pace.move(event.step, event.total)
                self._progress.update(
                    self._task,
                    completed=event.step,
                    total=event.total,
                    metrics=brief(event.metrics),
                    pace=str(self._pace),
                )
            case RunEnded() if self._progress is not None:
                self._progress.stop()

    def _open(self, event: RunStarted) -> None:
        console = Console(file=self._stream)
        console.print(f"{event.recipe}: {event.out}", highlight=False, soft_wrap=True)
        self._progress = _TwoLines(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("({task.fields[pace]})"),
            console=console,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            event.recipe, total=None, completed=event.resumed_from, metrics="", pace="starting"
        )
        self._pace.start(event.resumed_from)


class _TwoLines(Progress):
    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield Text(task.fields["metrics"], no_wrap=True, overflow="ellipsis")


def brief(metrics: Any, most: int = 4) -> str:
    """The first few, rates per second among them."""
    rates = [name for name in metrics if name.endswith("_per_s")]
    names = [name for name in metrics if name not in rates][: most - len(rates[:1])] + rates[:1]
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in names)


def duration(seconds: float) -> str:
    """``0:07``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
