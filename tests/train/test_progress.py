"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from train.events import Reported, RunEnded, RunStarted
from train.progress import Bar, Lines, brief, duration, subscriber


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def started(step: int = 0) -> RunStarted:
    return RunStarted(run="r", recipe="walk", out=Path("/runs/r"), config={}, resumed_from=step)


def at(step: int, total: int | None = 100) -> Reported:
    return Reported(step=step, metrics={"loss": 0.5}, time=0.0, total=total)


ENDED = RunEnded(status="passed", metrics={}, seconds=1.0)


def test_lines_come_at_most_every_few_seconds_and_the_last_one_always() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, every_s=5, clock=clock)
    lines(started())
    for step in range(1, 14):
        clock.now += 1
        lines(at(step))
    lines(ENDED)
    first, *said = stream.getvalue().splitlines()
    assert first == "walk: /runs/r"
    assert [line.split()[1] for line in said] == ["1/100", "6/100", "11/100", "13/100"]
    assert said[1] == "step 6/100  loss 0.5  (1 steps/s, 1:34 left)"


def test_the_rate_of_a_resumed_run_is_of_its_own_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock=clock)
    lines(started(50))
    clock.now += 2
    lines(at(60))
    assert "goes on from step 50" in stream.getvalue()
    assert "(5 steps/s, 0:08 left)" in stream.getvalue()


def test_nobody_knows_how_long() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock=clock)
    lines(started())
    lines(at(0, None))
    assert stream.getvalue().splitlines()[-1] == "step 0  loss 0.5  (0 steps/s)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """As they stand in the end, without colours."""
        shown = self.getvalue().rpartition("\x1b[2K")[2]
        return [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()]


def test_who_gets_a_bar() -> None:
    assert isinstance(subscriber(Terminal()), Bar)
    assert isinstance(subscriber(io.StringIO()), Lines)


@pytest.mark.parametrize("columns", [80, 200])
def test_a_bar_tells_how_far_how_long_and_how_fast(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal, clock = Terminal(), Clock()
    bar = Bar(terminal, clock)
    bar(started(step=20))
    metrics = {"loss": 2.345, "grad_norm": 0.125, "tokens_per_s": 345.6, "learning_rate": 1e-3}
    clock.now += 4
    bar(Reported(step=40, metrics=metrics, time=0.0, total=1000))
    bar(ENDED)
    moving, told = terminal.lines()
    assert re.fullmatch(r"walk [━╸╺]+ +40/1000 \(5 steps/s, 3:12 left\)", moving)
    assert told == "loss 2.345  grad_norm 0.125  learning_rate 0.001  tokens_per_s 345.6"


def test_a_bar_that_never_began_ends_quietly() -> None:
    Bar(io.StringIO())(ENDED)


def test_brief() -> None:
    metrics = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "tokens_per_s": 12345.6}
    assert brief(metrics) == "a 1  b 2  c 3  tokens_per_s 1.235e+04"


def test_durations() -> None:
    assert [duration(s) for s in (0, 7.4, 61, 3723)] == ["0:00", "0:07", "1:01", "1:02:03"]
