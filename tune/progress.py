"""Progress for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TextIO

from train.progress import duration
from tune.course import Course
from tune.journal import Status, best

LINE_EVERY_S = 5.0


def state(course: Course) -> str:
    """``3 stopped, 2 running, best accuracy 0.962 (trial 7), 1:20 left``."""
    count = Counter(trial.status for trial in course.trials)
    told = (Status.STOPPED, Status.FAILED, Status.RUNNING)
    words = [f"{count[status]} {status}" for status in told if count[status]]
    sweep = course.sweep
    if (found := best(course.trials, sweep.metric, sweep.mode)) is not None:
        words.append(f"best {sweep.metric} {found.value(sweep.metric):.5g} (trial {found.number})")
    if (left := seconds_left(course)) is not None:
        words.append(f"{duration(left)} left")
    return ", ".join(words) or "starting"


def done(course: Course) -> int:
    return sum(trial.status.over for trial in course.trials)


def seconds_left(course: Course) -> float | None:
    """If what is left takes as long as what is done did; ``None`` before anything is."""
    over = [trial.seconds for trial in course.trials if trial.status.over]
    if not over:
        return None
    mean, now = sum(over) / len(over), course.journal.now()
    running = [
        trial.seconds + now - trial.began for trial in course.trials if trial.began is not None
    ]
    under_way = sum(max(mean - ran, 0) for ran in running)
    ahead = mean * max(course.goal - len(over) - len(running), 0)
    left = (under_way + ahead) / max(len(running), 1)
    budget = course.sweep.time_budget_s
    return left if budget is None else min(left, max(budget - now, 0))


class Lines:
    """A line whenever a trial ends, and one every few seconds."""

    def __init__(
        self,
        stream: TextIO,
        *,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._next = 0.0
        self._done = -1

    def __call__(self, course: Course) -> None:
        now, over = self._clock(), done(course)
        if over != self._done or now >= self._next:
            self._done, self._next = over, now + self._every_s
            print(f"{over}/{course.goal} trials: {state(course)}", file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is open."""


class Bar:
    """One line that moves."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress: Any = Progress(
            TextColumn("trials"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=Console(file=stream),
        )
        self._task: Any = None

    def __call__(self, course: Course) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("trials", total=course.goal, state="")
        self._progress.update(
            self._task, completed=done(course), total=course.goal, state=state(course)
        )

    def close(self) -> None:
        self._progress.stop()


def teller(stream: TextIO | None = None) -> Lines | Bar:
    """What fits ``stream`` (default: stderr)."""
    stream = stream or sys.stderr
    return Bar(stream) if stream.isatty() else Lines(stream)
