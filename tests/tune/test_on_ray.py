"""Sweeps on a real Ray with two CPUs: kills, crowds, schedulers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from tests.train.collecting import archive_and_collect, uses
from tests.tune import hill
from tests.tune.hill import RECIPE, Hill, height
from train import history, registered
from train.discover import Found, discover, find
from train.folder import RunFolder
from train.recipe import Recipe
from train.recipes.branin import RECIPE as BRANIN
from train.run import run
from tune import __main__ as cli
from tune import sweep as sweeps
from tune.config import load_yaml, resolve
from tune.course import Course
from tune.journal import Status, Trial, read

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # Ray's own
]

ROOT = Path(__file__).parents[2]
SHORT = {"steps": 10, "seconds": 0.01}
SWEPT = [recipe for recipe in discover().recipes.values() if recipe.space and not recipe.inputs]


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie in it, and their names have little room."""
    folder = Path(tempfile.mkdtemp(prefix="fr", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def two_cpus(short_folder: Path) -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=str(short_folder), log_to_driver=False)
    yield
    ray.shutdown()


def swept(folder: Path, recipe: Recipe[Any] = RECIPE, **document: Any) -> tuple[list[Trial], int]:
    """The trials, and how many ran at a time at most."""
    if recipe is RECIPE:
        log = {"log": str(folder / "log")}
        document["config"] = {**SHORT, **log, **document.get("config", {})}
    most = 0

    def watch(course: Course) -> None:
        nonlocal most
        running = sum(trial.status is Status.RUNNING for trial in course.trials)
        most = max(most, running)
        course.check_integrity()

    sweep = resolve(recipe, [{"search": "random", **document}])
    return sweeps.run(recipe, sweep, folder, watch=watch), most


def steps_taken(folder: Path) -> dict[str, list[int]]:
    """Steps by the folder of the run, as they were taken."""
    taken = defaultdict(list)
    for line in (folder / "log").read_text().splitlines():
        name, step, _ = line.split()
        taken[name].append(int(step))
    return taken


def folder_of_turn(trial: Trial) -> str:
    """Of the run that goes on from another one's checkpoint."""
    return f"{trial.number:04d}-{trial.turn}"


def test_a_crowd_of_trials_waits_for_room(two_cpus: None, tmp_path: Path) -> None:
    trials, most = swept(tmp_path, trials=5, max_concurrent=5, config={"seconds": 0.6})
    assert [trial.status for trial in trials] == [Status.FINISHED] * 5
    assert most == 2
    assert steps_taken(tmp_path) == {f"{n:04d}": list(range(1, 11)) for n in range(5)}
    assert all((tmp_path / "trials" / f"{n:04d}" / "result.json").exists() for n in range(5))


def test_a_trial_may_take_the_whole_machine_but_not_more(two_cpus: None, tmp_path: Path) -> None:
    trials, most = swept(tmp_path / "a", trials=2, max_concurrent=2, resources={"cpus": 2})
    assert [trial.status for trial in trials] == [Status.FINISHED] * 2
    assert most == 1
    with pytest.raises(ConfigError, match=r"takes 3 CPUs.*largest machine.* has 2 CPUs"):
        swept(tmp_path / "b", trials=2, resources={"cpus": 3})
    with pytest.raises(ConfigError, match=r"takes 4 CPUs.*the cluster has 2 CPUs"):
        swept(tmp_path / "c", trials=2, workers=4)


def test_a_grid_runs_every_point_once(two_cpus: None, tmp_path: Path) -> None:
    space = {"pace": [0.2, 0.7], "boots": ["leather", "nailed"], "rope.length": None}
    trials, most = swept(tmp_path, search="grid", space=space, max_concurrent=1)
    points = Counter((trial.point["pace"], trial.point["boots"]) for trial in trials)
    assert points == Counter((p, b) for p in (0.2, 0.7) for b in ("leather", "nailed"))
    assert most == 1
    best = max(trials, key=lambda trial: trial.value("height") or 0)
    assert best.point == {"pace": 0.7, "boots": "nailed"}


def test_asha_takes_fewer_steps(two_cpus: None, tmp_path: Path) -> None:
    trials, _ = swept(tmp_path, trials=9, scheduler={"kind": "asha"}, config={"steps": 30})
    status = Counter(trial.status for trial in trials)
    assert status[Status.STOPPED] >= 3
    assert status[Status.FINISHED] >= 1
    assert status.total() == 9
    taken = steps_taken(tmp_path)
    for trial in trials:
        steps = taken[f"{trial.number:04d}"]
        assert steps == list(range(1, len(steps) + 1))
        assert (len(steps) == 30) == (trial.status is Status.FINISHED)
    assert sum(map(len, taken.values())) < 0.75 * 9 * 30


def test_the_median_rule_stops_who_falls_behind(two_cpus: None, tmp_path: Path) -> None:
    trials, _ = swept(
        tmp_path, trials=9, scheduler={"kind": "median", "after": 20}, config={"steps": 30}
    )
    status = Counter(trial.status for trial in trials)
    assert status[Status.STOPPED] >= 2
    assert status.total() == status[Status.STOPPED] + status[Status.FINISHED]
    highest = max(trials, key=lambda trial: height(Hill(**top(trial)), 10))
    assert highest.status is Status.FINISHED
    taken = steps_taken(tmp_path)
    for trial in trials:
        steps = len(taken[f"{trial.number:04d}"])
        assert (steps == 30) == (trial.status is Status.FINISHED)
        assert steps >= 30 * 0.2


def top(trial: Trial) -> dict[str, Any]:
    """The part of its values that decides how high it comes."""
    return {key: trial.point[key] for key in ("pace", "boots")}


def test_a_gaussian_process_comes_to_the_bottom_of_branin(two_cpus: None, tmp_path: Path) -> None:
    """The file is the one that people are told of."""
    document = load_yaml((ROOT / "tune" / "sweeps" / "branin.yaml").read_text())
    assert document.pop("recipe") == BRANIN.name
    trials, most = swept(tmp_path / "gp", BRANIN, **document)
    assert [trial.status for trial in trials] == [Status.FINISHED] * 40
    assert most == 1
    lowest = min(trial.value("branin") or math.inf for trial in trials)
    assert BRANIN.gates["branin"].holds(lowest)
    chance, _ = swept(tmp_path / "random", BRANIN, trials=40)
    assert lowest < min(trial.value("branin") or math.inf for trial in chance)


def test_pbt_goes_on_from_better_checkpoints_with_other_values(
    two_cpus: None, tmp_path: Path
) -> None:
    trials, _ = swept(
        tmp_path, trials=4, scheduler={"kind": "pbt", "every": 20}, config={"steps": 20}
    )
    assert [trial.status for trial in trials] == [Status.FINISHED] * 4
    copies = [trial for trial in trials if trial.turn]
    assert copies, "nobody was copied"
    taken = steps_taken(tmp_path)
    for trial in copies:
        steps = taken[folder_of_turn(trial)]
        assert steps[0] > 1, "it began at the beginning"
        assert steps == list(range(steps[0], 21))
        assert trial.point != trial.first_point
        config = (tmp_path / "trials" / folder_of_turn(trial) / "config.yaml").read_text()
        assert f"pace: {trial.point['pace']!r}" in config


def test_networks_that_fall_behind_go_on_from_the_best(two_cpus: None, tmp_path: Path) -> None:
    """The file that people start from, with fewer digits."""
    document = load_yaml((ROOT / "tune" / "sweeps" / "vision-pbt.yaml").read_text())
    recipe = find(document.pop("recipe"))
    document["config"] |= {"train_images": 300, "epochs": 8}
    trials, _ = swept(tmp_path, recipe, **document)
    assert [trial.status for trial in trials] == [Status.FINISHED] * 4
    copies = [trial for trial in trials if trial.turn]
    assert copies, "nobody was copied"
    for trial in copies:
        steps = [
            report.step for report in history.read(tmp_path / "trials" / folder_of_turn(trial))
        ]
        assert steps[0] > 1, "it began at the beginning"
        assert steps[-1] == 8
        assert trial.point != trial.first_point


@pytest.mark.parametrize("recipe", SWEPT, ids=[recipe.name for recipe in SWEPT])
def test_a_recipe_is_swept_over_the_space_it_names(
    recipe: Recipe[Any], two_cpus: None, tmp_path: Path
) -> None:
    smoke = recipe.smoke.model_dump(exclude_unset=True)
    trials, _ = swept(tmp_path, recipe, trials=2, config=smoke)
    assert [trial.status for trial in trials] == [Status.FINISHED] * 2
    assert trials[0].point.keys() == recipe.space.keys()
    assert trials[0].point != trials[1].point
    metric = next(iter(recipe.gates))
    assert all(math.isfinite(trial.value(metric) or math.nan) for trial in trials)


def test_what_a_recipe_raises_ends_its_trial_and_no_other(two_cpus: None, tmp_path: Path) -> None:
    space = {"falls": [False, True], "pace": [0.3, 0.6], "boots": None, "rope.length": None}
    trials, _ = swept(tmp_path, search="grid", space=space)
    for trial in trials:
        fell = trial.point["falls"]
        assert trial.status is (Status.FAILED if fell else Status.FINISHED)
        assert ("RuntimeError('fell')" in trial.error) == fell
    taken = steps_taken(tmp_path)
    assert all(steps == list(range(1, len(steps) + 1)) for steps in taken.values()), "run again"
    assert "fell" in (tmp_path / "trials" / "0003" / "error.txt").read_text()


def test_a_trial_whose_process_dies_goes_on_from_its_checkpoint(
    two_cpus: None, tmp_path: Path
) -> None:
    killed: list[str] = []

    def kill_one(course: Course) -> None:
        if not killed and course.trials[0].steps == 5:
            name, _, pid = (tmp_path / "log").read_text().splitlines()[-1].split()
            killed.append(name)
            os.kill(int(pid), signal.SIGKILL)

    config = {"steps": 10, "seconds": 0.1, "log": str(tmp_path / "log")}
    document = {"search": "random", "trials": 1, "config": config}
    trials = sweeps.run(RECIPE, resolve(RECIPE, [document]), tmp_path, watch=kill_one)
    assert killed == ["0000"]
    assert trials[0].status is Status.FINISHED
    steps = steps_taken(tmp_path)["0000"]
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert steps[-4:] == [7, 8, 9, 10]
    assert len(steps) <= 11, "it began at the beginning"


def test_a_sweep_out_of_time_can_go_on(two_cpus: None, tmp_path: Path) -> None:
    log = {"log": str(tmp_path / "log"), "steps": 40, "seconds": 0.25}
    document = {"search": "random", "trials": 2, "config": log}
    short = resolve(RECIPE, [{**document, "time_budget_s": 6}])
    trials = sweeps.run(RECIPE, short, tmp_path)
    assert not any(trial.status.over for trial in trials)
    trials = sweeps.run(RECIPE, resolve(RECIPE, [document]), tmp_path)
    assert [trial.status for trial in trials] == [Status.FINISHED] * 2
    for steps in steps_taken(tmp_path).values():
        assert sorted(set(steps)) == list(range(1, 41))
        assert len(steps) <= 42


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(short_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """``start(document)``: a driver on a Ray of its own, for the sweep in ``tmp_path``."""
    drivers: list[subprocess.Popen[bytes]] = []

    def begin(document: dict[str, Any]) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "tests.tune.hill", str(tmp_path / "sweep")]
        temp = tempfile.mkdtemp(dir=short_folder)
        env = {**os.environ, "PYTHONPATH": "."}
        drivers.append(subprocess.Popen([*words, json.dumps(document), temp], cwd=ROOT, env=env))
        return drivers[-1]

    yield begin
    for driver in drivers:
        if driver.poll() is None:
            driver.kill()
            driver.wait()


def kill_when(
    driver: subprocess.Popen[bytes], folder: Path, due: Callable[[list[Trial]], bool]
) -> list[Trial]:
    """SIGKILL as soon as the trials are as wanted; how they were then."""
    deadline = time.monotonic() + 240
    while True:
        assert driver.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        if folder.exists() and due(read(folder).trials):
            break
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    return read(folder).trials


def test_a_killed_sweep_goes_on_and_repeats_nothing_that_had_ended(
    start: Start, tmp_path: Path
) -> None:
    config = {"steps": 8, "seconds": 0.25, "log": str(tmp_path / "log")}
    document = {"search": "tpe", "trials": 6, "config": config, "scheduler": "none"}
    folder = tmp_path / "sweep"

    def due(trials: list[Trial]) -> bool:
        over = [trial for trial in trials if trial.status is Status.FINISHED]
        halfway = [trial for trial in trials if not trial.status.over and trial.steps >= 3]
        return len(over) >= 2 and bool(halfway)

    before = kill_when(start(document), folder, due)
    ended = {f"{trial.number:04d}" for trial in before if trial.status.over}

    assert start(document).wait(timeout=150) == 0
    trials = read(folder).trials
    assert [trial.status for trial in trials] == [Status.FINISHED] * 6
    for trial in before:
        assert trials[trial.number].point == trial.point
        if trial.status.over:
            assert trials[trial.number].final == trial.final
    for name, steps in steps_taken(tmp_path).items():
        assert sorted(set(steps)) == list(range(1, 9)), "a step was left out"
        assert len(steps) <= (8 if name in ended else 10), "it began at the beginning"


@pytest.mark.timeout(600)
def test_a_killed_population_goes_on_with_the_values_that_it_had_come_to(
    start: Start, tmp_path: Path
) -> None:
    config = {"steps": 20, "seconds": 0.2, "log": str(tmp_path / "log")}
    document = {"trials": 4, "config": config, "scheduler": {"kind": "pbt", "every": 20}}
    folder = tmp_path / "sweep"

    def due(trials: list[Trial]) -> bool:
        """Somebody has gone on with copied values for a while, and has not ended."""
        return any(
            trial.turn and not trial.status.over and Counter(begun(trial))[trial.turn] >= 2
            for trial in trials
        )

    def begun(trial: Trial) -> list[int]:
        """Turns of the steps that were taken."""
        names = (line.split()[0] for line in (tmp_path / "log").read_text().splitlines())
        own = [name.split("-") for name in names if name.startswith(f"{trial.number:04d}")]
        return [int(rest[0]) if rest else 0 for _, *rest in own]

    before = kill_when(start(document), folder, due)
    already = len((tmp_path / "log").read_text().splitlines())
    latest = max(trial.turn for trial in before)
    assert start(document).wait(timeout=240) == 0

    trials = read(folder).trials
    assert [trial.status for trial in trials] == [Status.FINISHED] * 4
    again: dict[str, list[int]] = defaultdict(list)
    for line in (tmp_path / "log").read_text().splitlines()[already:]:
        name, step, _ = line.split()
        again[name].append(int(step))
    for old, new in zip(before, trials, strict=True):
        if new.turn == old.turn:
            assert new.point == old.point
        else:
            assert new.turn > latest, "a number of a turn was given twice"
        if old.status.over:
            assert new.final == old.final
            assert not any(name.startswith(f"{old.number:04d}") for name in again), "run again"
    for steps in steps_taken(tmp_path).values():
        assert sorted(set(steps)) == list(range(steps[0], max(steps) + 1)), "a step was left out"
    for old in before:
        name = f"{old.number:04d}" + (f"-{old.turn}" if old.turn else "")
        if old.steps > 2 and name in again:
            assert again[name][0] >= old.steps, "it began at the beginning"
    for trial in trials:
        name = f"{trial.number:04d}" + (f"-{trial.turn}" if trial.turn else "")
        assert (
            f"pace: {trial.point['pace']!r}"
            in (folder / "trials" / name / "config.yaml").read_text()
        )


def test_what_trials_start_from_is_not_collected_before_the_sweep_is_over(
    two_cpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a local store they read it where it lies."""
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    top = run(RECIPE, hill.Hill(), folder=RunFolder(tmp_path / "top"))
    assert top.manifest is not None
    registered.register(tmp_path / "top" / "artifact", top.manifest, by="test")
    higher = replace(RECIPE, name="higher", kind="higher", run=hill.climb_on, inputs=("hill",))
    found = Found(recipes={"higher": higher}, broken={})
    monkeypatch.setattr("train.discover.discover", lambda: found)
    words = ["higher", "--trials", "2", "--input", "hill=hill@1", "--out", str(tmp_path / "sweep")]
    assert cli.main(words) == cli.FOUND
    assert [trial.status for trial in read(tmp_path / "sweep").trials] == [Status.FINISHED] * 2
    assert uses() == []
    assert not archive_and_collect("hill@1")
