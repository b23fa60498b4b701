"""Who is stopped: Ray Tune's schedulers with our settings, and after a restart."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest

from models.errors import ConfigError
from tests.tune.hill import RECIPE
from tune import schedulers
from tune.config import Sweep, domains, resolve
from tune.journal import Report, Status, Trial
from tune.schedulers import END, FAR, NOTHING, VALUE, perturbed, seen, seen_at_end


@dataclass(frozen=True)
class Running:
    """As much of Ray's trial as its schedulers look at."""

    trial_id: str
    status: str = "RUNNING"


class Controller:
    def get_live_trials(self) -> list[Running]:
        return []


def sweep(scheduler: dict[str, Any]) -> Sweep:
    return resolve(RECIPE, [{"scheduler": scheduler, "search": "random"}])


def make(one: Sweep) -> Any:
    return schedulers.make(one, domains(RECIPE, one))


def drive(scheduler: Any, one: Sweep, number: int, values: list[float]) -> Trial:
    """A trial that reports ``values``, one after the other, of 9 steps in all."""
    running = Running(f"t{number}")
    trial = Trial(number=number, point={}, first_point={}, status=Status.STOPPED)
    scheduler.on_trial_add(Controller(), running)
    for step, value in enumerate(values, 1):
        report = Report(step=step, total=len(values), metrics={"height": value})
        trial.reports.append(report)
        result = seen(one, report)
        if scheduler.on_trial_result(Controller(), running, result) == "STOP":
            scheduler.on_trial_complete(Controller(), running, result)
            return trial
    trial.status, trial.final = Status.FINISHED, {"height": values[-1]}
    end = seen_at_end(one, trial.final, trial.reports[-1])
    scheduler.on_trial_complete(Controller(), running, end)
    return trial


def curve(top: float) -> list[float]:
    return [top * (1 - 0.7**step) for step in range(1, 19)]


def test_asha_lets_only_the_best_of_each_rung_go_on() -> None:
    one = sweep({"kind": "asha", "first": 10, "reduction": 3})
    scheduler = make(one)
    tops = [0.9, 0.8, 0.7, 0.6, 0.5, 0.95, 0.4, 0.3]
    trials = [drive(scheduler, one, number, curve(top)) for number, top in enumerate(tops)]
    finished = [trial.number for trial in trials if trial.status is Status.FINISHED]
    assert finished == [0, 5]  # the first has nobody to be worse than
    assert sum(trial.steps for trial in trials) < 0.5 * 18 * len(trials)
    assert {trial.steps for trial in trials if trial.number not in finished} == {2}


def test_the_last_report_before_the_end_stops_nobody() -> None:
    """At 100 % the run has still to be judged and its artifact to be sealed."""
    one = sweep({"kind": "asha"})
    scheduler = make(one)
    for number, top in enumerate([0.5, 0.6, 0.7]):
        trial = drive(scheduler, one, number, curve(top))
        assert trial.status is Status.FINISHED
        assert trial.steps == 18


def test_the_median_stops_what_is_worse_than_half_of_the_others() -> None:
    one = sweep({"kind": "median", "after": 20, "others": 3})
    scheduler = make(one)
    trials = [drive(scheduler, one, n, curve(top)) for n, top in enumerate([0.9, 0.8, 0.7])]
    assert all(trial.status is Status.FINISHED for trial in trials)
    assert drive(scheduler, one, 3, curve(0.3)).steps == 4  # 22 %: the first after 20 %
    assert drive(scheduler, one, 4, curve(0.95)).status is Status.FINISHED


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "asha", "first": 10, "reduction": 2},
        {"kind": "asha", "first": 2, "by": "step"},
        {"kind": "median", "after": 10, "others": 2},
    ],
    ids=["asha", "steps", "median"],
)
def test_a_restarted_scheduler_decides_as_an_undisturbed_one(settings: dict[str, Any]) -> None:
    draw = random.Random(5)
    one = sweep(settings)
    undisturbed, tops = make(one), [draw.random() for _ in range(14)]
    expected = [drive(undisturbed, one, number, curve(top)) for number, top in enumerate(tops)]
    assert len({trial.steps for trial in expected}) > 1
    restarted = make(one)
    schedulers.replay(restarted, one, expected[:7])
    again = [drive(restarted, one, 7 + n, curve(top)) for n, top in enumerate(tops[7:])]
    assert [trial.steps for trial in again] == [trial.steps for trial in expected[7:]]
    fresh = make(one)
    forgetful = [drive(fresh, one, 7 + n, curve(top)) for n, top in enumerate(tops[7:])]
    assert [trial.steps for trial in forgetful] != [trial.steps for trial in expected[7:]]


def test_what_a_scheduler_sees() -> None:
    by_progress, by_step = sweep({"kind": "asha"}), sweep({"kind": "asha", "by": "step"})
    report = Report(step=3, total=12, metrics={"height": 0.5})
    assert seen(by_progress, report) == {FAR: 25.0, VALUE: 0.5}
    assert seen(by_step, report) == {FAR: 3, VALUE: 0.5}
    assert seen(by_progress, Report(step=3, total=12, metrics={"other": 0.5})) == {}
    assert seen(by_progress, Report(step=3, total=12, metrics={"height": math.nan})) is NOTHING
    without = Report(step=3, total=None, metrics={"height": 0.5})
    assert seen(by_step, without) == {FAR: 3, VALUE: 0.5}
    with pytest.raises(ConfigError, match=r"reports no total.*scheduler\.by: step"):
        seen(by_progress, without)
    assert seen_at_end(by_progress, {"height": 0.6}, report) == {FAR: END, VALUE: 0.6}
    assert seen_at_end(by_step, {"other": 1.0}, report) == {FAR: 3.0, VALUE: 0.5}
    assert seen_at_end(by_progress, {}, None) is NOTHING
    watching = sweep({"kind": "asha", "metric": "loss", "mode": "min"})
    assert seen(watching, Report(step=1, total=2, metrics={"loss": 2.0})) == {FAR: 50, VALUE: 2.0}


def test_nobody_is_replaced_when_there_is_nothing_left_to_train() -> None:
    one = sweep({"kind": "pbt", "every": 20})
    last = Report(step=12, total=12, metrics={"height": 0.5})
    assert seen(one, last)[FAR] == 0
    assert seen(one, Report(step=11, total=12, metrics={"height": 0.5}))[FAR] > 90


def test_a_diverged_trial_is_no_measure_for_others() -> None:
    one = sweep({"kind": "asha", "first": 10, "reduction": 2})
    scheduler = make(one)
    broken = Running("broken")
    scheduler.on_trial_add(Controller(), broken)
    scheduler.on_trial_result(Controller(), broken, dict(NOTHING))
    scheduler.on_trial_complete(Controller(), broken, dict(NOTHING))
    assert drive(scheduler, one, 1, curve(0.1)).status is Status.FINISHED


def test_a_copy_keeps_near_what_it_copies() -> None:
    one = sweep({"kind": "pbt"})
    space = domains(RECIPE, one)
    draw = random.Random(1)
    point = {"pace": 0.7, "boots": "nailed", "rope.length": 4}
    copies = [perturbed(space, point, draw) for _ in range(200)]
    assert all(copy.keys() == point.keys() for copy in copies)
    assert all(0.1 <= float(copy["pace"]) <= 1 for copy in copies)
    assert sum(abs(float(copy["pace"]) - 0.7) < 0.15 for copy in copies) > 150
    assert {copy["boots"] for copy in copies} == {"leather", "nailed"}
    scheduler = make(one)
    copied = {"trial": {"number": 3, "point": point, "turn": 0}}
    turns = [scheduler._custom_explore_fn(copied)["trial"]["turn"] for _ in range(3)]
    assert turns == [1, 2, 3]
    assert copied["trial"]["point"] is point
