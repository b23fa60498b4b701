"""What happened in a sweep so far, one line an event; a killed sweep goes on from here.

The journal is the truth about a sweep. Ray Tune's own snapshots are pickles, taken every
now and then, and are not used. Each line is in the file before anything follows from it, so
that a trial that was told as ended is never run again, and one that was begun is never lost.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from tune.search import Mode, Outcome, Point, better

NAME = "trials.jsonl"


class Status(StrEnum):
    WAITING = "waiting"
    """Proposed; or interrupted, to be gone on with."""
    RUNNING = "running"
    FINISHED = "finished"
    """Ran to its end."""
    STOPPED = "stopped"
    """A scheduler saw no future in it, or its metric was not finite."""
    FAILED = "failed"

    @property
    def over(self) -> bool:
        return self in (Status.FINISHED, Status.STOPPED, Status.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a trial measured on the way."""

    step: int
    total: int | None
    metrics: Mapping[str, float]

    @property
    def progress(self) -> float | None:
        """Percent; ``None`` if the recipe does not say how far it goes."""
        return 100 * min(self.step / self.total, 1) if self.total else None


@dataclass(slots=True, kw_only=True)
class Trial:
    """The state of one trial, folded from its events."""

    number: int
    point: Point
    """The values it runs with."""
    first_point: Point
    """Those it was proposed with."""
    status: Status = Status.WAITING
    reports: list[Report] = field(default_factory=list)
    final: Mapping[str, float] | None = None
    """What the run ended with."""
    seconds: float = 0.0
    """In which it ran, over all sessions."""
    error: str = ""
    turn: int = 0
    """Which replacement of population based training gave it its values; 0: none."""
    began: float | None = None
    """Of the sweep's seconds, while it runs."""

    def value(self, metric: str) -> float | None:
        """What it ended with, else the last it reported."""
        if self.final is not None and metric in self.final:
            return self.final[metric]
        for report in reversed(self.reports):
            if metric in report.metrics:
                return report.metrics[metric]
        return None

    def outcome(self, metric: str) -> Outcome:
        """What a searcher learns from it."""
        value = self.value(metric)
        finite = value if value is not None and math.isfinite(value) else None
        stopped = self.status is Status.STOPPED
        return Outcome(
            value=None if self.status is Status.FAILED else finite,
            stopped_at=self.steps if stopped else None,
            failed=self.status is Status.FAILED,
        )

    def pause(self, at: float) -> None:
        """It does not run, at the sweep's second ``at``; an end stays an end."""
        if self.began is not None:
            self.seconds += max(at - self.began, 0.0)
            self.status, self.began = Status.WAITING, None

    @property
    def steps(self) -> int:
        """How far it has come."""
        return self.reports[-1].step if self.reports else 0


@dataclass(slots=True)
class Story:
    """What the events so far amount to."""

    trials: list[Trial] = field(default_factory=list)
    seconds: float = 0.0
    """In which the sweep was under way, over all sessions, up to the last event."""

    def apply(self, row: Mapping[str, Any]) -> None:
        """One line of the journal."""
        event, number, at = row["event"], row["trial"], row["at"]
        self.seconds = max(self.seconds, at)
        if event == "proposed":
            if number != len(self.trials):
                raise ValueError(f"trial {len(self.trials)} comes next, not {number}")
            point = row["point"]
            self.trials.append(Trial(number=number, point=point, first_point=point))
            return
        trial = self.trials[number]
        match event:
            case "started":
                trial.pause(at)
                trial.status, trial.began = Status.RUNNING, at
            case "report":
                metrics = {k: math.nan if v is None else v for k, v in row["metrics"].items()}
                report = Report(step=row["step"], total=row["total"], metrics=metrics)
                # After going back to a checkpoint, steps are reported again.
                while trial.reports and trial.reports[-1].step >= report.step:
                    trial.reports.pop()
                trial.reports.append(report)
            case "changed":
                trial.point, trial.turn = row["point"], row["turn"]
            case "interrupted":
                trial.pause(at)
            case "ended":
                trial.pause(at)
                trial.status, trial.error = Status(row["status"]), row["error"]
                if (final := row["final"]) is not None:
                    trial.final = {k: math.nan if v is None else v for k, v in final.items()}
            case _:
                raise ValueError(f"unknown event {event!r}")


def read(folder: Path) -> Story:
    """What happened in the sweep of ``folder``, but for a line that a crash cut short.

    Raises:
        ConfigError: the file is damaged.
    """
    return _read(folder / NAME)[0]


class Journal:
    """The trials of a sweep, and the file that keeps them. One process writes at a time.

    Args:
        folder: of the sweep. An existing journal is read; what ran there waits again.
        clock: seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        path = folder / NAME
        self._clock = clock
        self._story, whole = _read(path)
        for trial in self.trials:
            trial.pause(self._story.seconds)
        self.interrupted = [trial for trial in self.trials if not trial.status.over]
        """Begun or proposed by an earlier process and not ended."""
        self._began = clock() - self._story.seconds
        self._file = path.open("a")
        self._file.truncate(whole)

    @property
    def trials(self) -> list[Trial]:
        return self._story.trials

    def now(self) -> float:
        """The sweep's own time: it stands still between sessions."""
        return self._clock() - self._began

    def proposed(self, number: int, point: Point) -> None:
        self._write("proposed", number, point=dict(point))

    def started(self, number: int) -> None:
        self._write("started", number)

    def reported(self, number: int, report: Report) -> None:
        metrics = {name: _plain(value) for name, value in report.metrics.items()}
        self._write("report", number, step=report.step, total=report.total, metrics=metrics)

    def changed(self, number: int, point: Point, turn: int) -> None:
        """Population based training gave it other values."""
        self._write("changed", number, point=dict(point), turn=turn)

    def interrupt(self, number: int) -> None:
        """It was taken off, to be gone on with: out of time, or its process was lost."""
        self._write("interrupted", number)

    def ended(
        self,
        number: int,
        status: Status,
        *,
        final: Mapping[str, float] | None = None,
        error: str = "",
    ) -> None:
        plain = None if final is None else {name: _plain(value) for name, value in final.items()}
        self._write("ended", number, sync=True, status=status, final=plain, error=error)

    def close(self) -> None:
        self._file.close()

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and post-mortems."""
        assert [trial.number for trial in self.trials] == list(range(len(self.trials)))
        for trial in self.trials:
            assert (trial.began is not None) == (trial.status is Status.RUNNING), trial
            assert (trial.final is not None) == (trial.status is Status.FINISHED), trial

    def _write(self, event: str, number: int, *, sync: bool = False, **facts: Any) -> None:
        row = {"event": event, "trial": number, "at": round(self.now(), 3), **facts}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()  # from here on a kill of this process does not lose it
        if sync:
            os.fsync(self._file.fileno())
        self._story.apply(row)


def _read(path: Path) -> tuple[Story, int]:
    """The story, and how many bytes of the file it takes."""
    story = Story()
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return story, 0
    whole = text.rfind(b"\n") + 1
    for place, line in enumerate(text[:whole].splitlines(), 1):
        try:
            story.apply(json.loads(line))
        except (ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"{path}, line {place}: {error!r}.") from None
    return story, whole


def best(trials: list[Trial], metric: str, mode: Mode) -> Trial | None:
    """Of those that ran to their end; of the stopped ones where there is none."""
    for status in (Status.FINISHED, Status.STOPPED):
        found: Trial | None = None
        for trial, value in _measured(trials, metric):
            if trial.status is status:
                least = found.value(metric) if found else None
                if least is None or better(value, least, mode):
                    found = trial
        if found is not None:
            return found
    return None


def _measured(trials: list[Trial], metric: str) -> Iterator[tuple[Trial, float]]:
    for trial in trials:
        value = trial.value(metric)
        if value is not None and math.isfinite(value):
            yield trial, value


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
