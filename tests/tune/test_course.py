"""A sweep under every order of events and kills: no trial is lost, and none is run twice."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from tests.tune.conftest import Open
from tests.tune.hill import RECIPE
from tune.config import Sweep, resolve
from tune.course import ERROR, FINAL, REPORT, Assignment, Course
from tune.journal import NAME, Journal, Report, Status, Trial, best, read


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def report(step: int, value: float) -> dict[str, Any]:
    return {REPORT: {"step": step, "total": 10, "metrics": {"height": value}}}


class Story:
    """A sweep whose process is killed now and then; the clock goes on meanwhile."""

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.folder, self.sweep = folder, sweep
        self.clock = Clock()
        self.ended: Counter[int] = Counter()
        self.begin()

    def begin(self) -> None:
        self.journal = Journal(self.folder, self.clock)
        self.course = Course(RECIPE, self.sweep, self.journal)
        self.under_way: list[Assignment] = []

    def kill(self, torn: int) -> None:
        """Without warning, perhaps in the middle of a line."""
        self.journal.close()
        path = self.folder / NAME
        with path.open("ab") as file:
            file.write(b'{"event": "ended", "trial": 0, "at"'[:torn])
        self.clock.now += 1000
        self.begin()

    def end(self, place: int, how: str) -> None:
        trial = self.under_way.pop(place)
        self.ended[trial.number] += 1
        if how == "finished":
            self.course.told(trial, {FINAL: {"height": trial.number / 100}})
        elif how == "failed":
            self.course.told(trial, {ERROR: "fell"})
        elif how == "died":
            self.course.lost(trial.number, "its process died")
            return
        self.course.completed(trial.number)


steps = st.one_of(
    st.tuples(st.just("assign"), st.just(0), st.just("")),
    st.tuples(st.just("report"), st.integers(0, 9), st.just("")),
    st.tuples(
        st.just("end"),
        st.integers(0, 9),
        st.sampled_from(["finished", "stopped", "failed", "died"]),
    ),
    st.tuples(st.just("lost"), st.integers(0, 9), st.just("")),
    st.tuples(st.just("kill"), st.integers(0, 40), st.just("")),
)


@given(st.sampled_from(["grid", "random"]), st.lists(steps, max_size=60))
def test_every_trial_ends_once_whatever_happens(
    kind: str, story: list[tuple[str, int, str]]
) -> None:
    grid = {"space": {"pace": [0.1, 0.5], "rope.length": [1, 2, 4]}, "search": "grid"}
    sweep = resolve(RECIPE, [{**grid, "search": kind} | ({} if kind == "grid" else {"trials": 5})])
    with tempfile.TemporaryDirectory() as folder:
        told = Story(Path(folder), sweep)
        limit = 3
        for what, place, how in story:
            if what == "assign":
                trial = told.course.assign(limit=limit)
                if trial is not None:
                    told.under_way.append(trial)
                    told.course.started(trial.number)
                assert len(told.under_way) <= limit
            elif what == "kill":
                told.kill(place)
            elif place < len(told.under_way):
                if what == "report":
                    told.course.told(told.under_way[place], report(place + 1, 0.1))
                elif what == "lost":
                    told.course.lost(told.under_way[place].number, None)
                    told.course.started(told.under_way[place].number)
                else:
                    told.end(place, how)
            told.course.check_integrity()
        while True:
            trial = told.course.assign(limit=limit)
            if trial is not None:
                told.under_way.append(trial)
                told.course.started(trial.number)
            elif told.under_way:
                told.end(0, "finished")
            else:
                break
            told.course.check_integrity()
        assert told.course.all_assigned
        assert told.ended == Counter(range(sweep.trials or 0))
        points = [tuple(trial.point.items()) for trial in told.course.trials]
        assert len(points) == sweep.trials
        if kind == "grid":
            assert len(set(points)) == 2 * 2 * 3
        written = [(t.status, t.value("height"), t.error) for t in told.course.trials]
        told.journal.close()
        again = read(Path(folder)).trials
        assert [(t.status, t.value("height"), t.error) for t in again] == written


Make = Callable[..., tuple[Course, Clock]]


@pytest.fixture
def course(journal: Open, tmp_path: Path) -> Make:
    """A new session of one sweep, each time it is called."""

    def make(**document: Any) -> tuple[Course, Clock]:
        clock = Clock()
        sweep = resolve(RECIPE, [{"search": "random", "trials": 4, **document}])
        return Course(RECIPE, sweep, journal(tmp_path, clock)), clock

    return make


def begun(one: Course) -> Assignment:
    trial = one.assign(limit=None)
    assert trial is not None
    one.started(trial.number)
    return trial


def test_what_was_begun_comes_first_after_a_kill_and_with_the_same_values(
    course: Make, tmp_path: Path
) -> None:
    one, _ = course()
    first, second, third = (begun(one) for _ in range(3))
    one.told(second, {FINAL: {"height": 0.4}})
    one.completed(second.number)
    one.told(third, report(4, 0.2))
    other, _ = course()
    assert [begun(other) for _ in range(2)] == [first, third]
    assert begun(other).number == 3
    assert other.assign(limit=None) is None
    assert other.trials[1].final == {"height": 0.4}


def test_replaced_values_are_those_that_a_restart_goes_on_with(
    course: Make, tmp_path: Path
) -> None:
    one, _ = course()
    begun(one)
    changed = Assignment(number=0, point={"pace": 0.3, "boots": "nailed", "rope.length": 2}, turn=5)
    one.told(changed, report(3, 0.7))
    other, _ = course()
    assert begun(other) == changed
    assert changed.folder(tmp_path).path == tmp_path / "trials" / "0000-5"
    assert other.trials[0].first_point != other.trials[0].point


def test_steps_that_are_reported_again_replace_the_old_ones(course: Make, tmp_path: Path) -> None:
    one, _ = course()
    trial = begun(one)
    for step, value in [(2, 0.1), (4, 0.2), (6, 0.3), (4, 0.25), (5, 0.28)]:
        one.told(trial, report(step, value))
    assert [each.step for each in one.trials[0].reports] == [2, 4, 5]
    assert [each.step for each in read(tmp_path).trials[0].reports] == [2, 4, 5]
    assert one.trials[0].value("height") == 0.28


def test_time_stands_still_between_sessions_and_the_budget_counts_all(
    course: Make, tmp_path: Path
) -> None:
    one, clock = course(time_budget_s=40)
    trial = begun(one)
    clock.now += 20
    one.told(trial, report(1, 0.1))
    spent = one.journal.now()
    assert not one.out_of_time
    other, clock = course(time_budget_s=40)
    assert other.journal.now() == pytest.approx(spent, abs=3)
    assert not other.out_of_time
    clock.now += 20
    assert other.out_of_time
    trial = begun(other)
    other.told(trial, {FINAL: {"height": 1.0}})
    assert other.trials[0].seconds == pytest.approx(21, abs=4)  # without the time between


def test_a_damaged_journal_is_refused_by_line(course: Make, tmp_path: Path) -> None:
    one, _ = course()
    begun(one)
    path = tmp_path / NAME
    path.write_text(path.read_text() + '{"event": "danced", "trial": 0, "at": 3}\n')
    with pytest.raises(ConfigError, match=r"line 3: .*unknown event 'danced'"):
        read(tmp_path)


def trial(number: int, status: Status, *values: float, final: float | None = None) -> Trial:
    reports = [
        Report(step=step + 1, total=4, metrics={"loss": value}) for step, value in enumerate(values)
    ]
    ended = None if final is None else {"loss": final}
    return Trial(
        number=number, point={}, first_point={}, status=status, reports=reports, final=ended
    )


def test_the_best_is_one_that_ran_to_its_end_if_there_is_any() -> None:
    stopped = trial(0, Status.STOPPED, 0.2, 0.1)
    finished = [trial(1, Status.FINISHED, 0.9, final=0.5), trial(2, Status.FINISHED, final=0.3)]
    nothing = [
        trial(3, Status.FAILED, 0.01),
        trial(4, Status.FINISHED, final=float("nan")),
        trial(5, Status.RUNNING, 0.01),
    ]
    assert best([stopped, *finished, *nothing], "loss", "min") is finished[1]
    assert best([stopped, *finished, *nothing], "loss", "max") is finished[0]
    assert best([stopped, *nothing], "loss", "min") is stopped
    assert best(nothing, "loss", "min") is None
