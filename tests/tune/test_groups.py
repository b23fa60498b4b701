"""Trials that are data-parallel groups, on a machine that has room for one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.toys.duo import RECIPE as DUO
from tests.train.toys.duo import Duo
from train import history
from train.folder import RunFolder
from train.recipe import Gate
from train.run import run
from tune import sweep as sweeps
from tune.config import resolve
from tune.course import Course
from tune.journal import Status

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),  # Ray's own
]

RECIPE = replace(DUO, gates={"place": Gate(at_least=0, baseline="where it began")})


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Ray that the sweep starts for itself."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')


def test_groups_take_turns_and_one_that_is_stopped_makes_room(tmp_path: Path) -> None:
    """Each takes both CPUs; its own process must not want one, too."""
    config = {"steps": 40, "pause_s": 0.1}
    document = {
        "search": "grid",
        "space": {"seed": [4, 3, 7]},  # after 8 steps at 15.8, -6.6 and 5.0
        "config": config,
        "workers": 2,
        "scheduler": {"kind": "asha", "first": 20, "reduction": 2},
    }
    most = 0

    def watch(course: Course) -> None:
        nonlocal most
        most = max(most, sum(trial.status is Status.RUNNING for trial in course.trials))
        course.check_integrity()

    sweep = resolve(RECIPE, [document])
    trials = sweeps.run(RECIPE, sweep, tmp_path / "sweep", watch=watch)
    assert most == 1
    expected = [Status.FINISHED, Status.STOPPED, Status.FINISHED]
    assert [trial.status for trial in trials] == expected
    assert trials[1].steps < 40

    first = trials[0]
    assert first.final is not None
    assert first.final["workers"] == 2
    run(DUO, Duo(seed=4, steps=40), folder=RunFolder(tmp_path / "alone"))
    alone = [each.metrics["place"] for each in history.read(tmp_path / "alone")]
    assert [each.metrics["place"] for each in first.reports] == pytest.approx(alone)
