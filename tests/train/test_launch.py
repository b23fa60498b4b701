"""Runs on real Ray: where they are carried out changes nothing, and neither does who dies."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from models.errors import ConfigError, Unavailable, UpstreamError
from tests.train.conftest import environment
from tests.train.recipes.llm import experiment
from tests.train.toys.duo import RECIPE as DUO
from tests.train.toys.duo import Duo
from tests.train.toys.walk import RECIPE as WALK
from tests.train.toys.walk import Walk
from train import history
from train.__main__ import main as train
from train.config import Launch, Resources
from train.events import Event, Reported, RunStarted
from train.folder import RunFolder
from train.recipe import Config, Metrics, Recipe, RunContext
from train.recipes.federated import RECIPE as FEDERATED
from train.recipes.federated import Federated
from train.recipes.llm import RECIPE as LLM
from train.run import Result, run

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # Ray Train imports Ray Data
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray with two CPUs."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def on_ray(
    recipe: Recipe[Any],
    config: Config,
    folder: Path,
    workers: int | tuple[int, int],
    events: list[Event] | None = None,
    **launch: Any,
) -> Result:
    from train.launch import place

    return run(
        recipe,
        config,
        folder=RunFolder(folder),
        place=place(recipe, Launch(**launch), workers=workers),
        subscribers=[] if events is None else [events.append],
    )


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(each.step, each.metrics["place"]) for each in history.read(folder)]


def expected(recipe: Recipe[Any], config: Config, folder: Path) -> list[tuple[int, float]]:
    """In this process, undisturbed."""
    run(recipe, config, folder=RunFolder(folder))
    return curve(folder)


def same(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> bool:
    """Within what adding up in another order changes."""
    return [step for step, _ in one] == [step for step, _ in other] and all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
        for (_, a), (_, b) in zip(one, other, strict=True)
    )


def workers_of_ray(name: str) -> list[psutil.Process]:
    """Of this test's Ray: its processes are our descendants."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may end at any moment
            if each.is_running() and name in " ".join(each.cmdline()[:1]):
                found.append(each)
    return found


def kill_one(folder: Path, name: str, *, after: int, rank: int = 0) -> threading.Thread:
    """SIGKILL a worker as soon as the history has so many reports."""

    def kill() -> None:
        while len(history.read(folder)) < after:
            time.sleep(0.01)
        found = sorted(workers_of_ray(name), key=lambda each: each.pid)
        found[rank].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_on_a_worker(tmp_path: Path) -> None:
    events: list[Event] = []
    config = Walk(steps=12)
    result = on_ray(WALK, config, tmp_path / "ray", 1, events)
    assert result.passed
    assert curve(tmp_path / "ray") == expected(WALK, config, tmp_path / "here")
    assert [event.step for event in events if isinstance(event, Reported)] == [*range(1, 13)]


def test_a_killed_worker_is_replaced_and_goes_on(tmp_path: Path) -> None:
    config = Walk(steps=60, every=7, pause_s=0.05)
    killer = kill_one(tmp_path / "ray", "train walk", after=20)
    on_ray(WALK, config, tmp_path / "ray", 1)
    killer.join(5)
    assert not killer.is_alive()
    assert curve(tmp_path / "ray") == expected(WALK, Walk(steps=60, every=7), tmp_path / "here")


def test_errors_of_a_worker_arrive_as_they_were_raised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="step 3 is wrong"):
        on_ray(WALK, Walk(wrong_at=3), tmp_path / "a", 1)
    with pytest.raises(Unavailable, match="checkpoint of step 10"):
        on_ray(WALK, Walk(full_at=10), tmp_path / "b", 1)


def test_two_workers_walk_as_one(tmp_path: Path) -> None:
    events: list[Event] = []
    config = Duo(steps=12)
    result = on_ray(DUO, config, tmp_path / "ray", 2, events)
    assert result.metrics["workers"] == 2
    assert same(curve(tmp_path / "ray"), expected(DUO, config, tmp_path / "here"))
    assert [event.step for event in events if isinstance(event, Reported)] == [*range(1, 13)]
    assert not (tmp_path / "ray" / ".ray").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_that_loses_a_worker_ends_with_the_same_curve(rank: int, tmp_path: Path) -> None:
    events: list[Event] = []
    config = Duo(steps=60, every=7, pause_s=0.05)
    killer = kill_one(tmp_path / "ray", "RayTrainWorker", after=20, rank=rank)
    result = on_ray(DUO, config, tmp_path / "ray", 2, events)
    killer.join(5)
    assert not killer.is_alive()
    assert result.metrics["workers"] == 2
    assert same(curve(tmp_path / "ray"), expected(DUO, Duo(steps=60, every=7), tmp_path / "here"))
    told = [event.step for event in events if isinstance(event, Reported)]
    assert told == [*range(1, 61)]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_fine_tuning_that_loses_a_worker_ends_with_the_same_losses(
    parallel: str, tmp_path: Path
) -> None:
    text = experiment.write_text(tmp_path / "text")
    settings = experiment.config(
        text,
        steps=24,
        checkpoint_every=5,
        parallel=parallel,
        callbacks=[f"{experiment.__name__}:Pause"],
    )
    killer = kill_one(tmp_path / "ray", "RayTrainWorker", after=12, rank=1)
    on_ray(LLM, settings, tmp_path / "ray", 2)
    killer.join(5)
    assert not killer.is_alive()
    run(LLM, settings, folder=RunFolder(tmp_path / "here"))
    losses = {each.step: each.metrics["loss"] for each in history.read(tmp_path / "here")}
    assert losses[24] < losses[1] - 0.1, "nothing was learned that could be lost"
    assert {
        each.step: each.metrics["loss"] for each in history.read(tmp_path / "ray")
    } == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
def test_fine_tuning_whose_driver_is_killed_goes_on_with_the_same_losses(
    workers: int, tmp_path: Path
) -> None:
    """The driver alone: its workers live on for a moment, and may still write."""
    import ray

    file = tmp_path / "experiment.yaml"
    settings = experiment.config(
        experiment.write_text(tmp_path / "text"),
        steps=16,
        checkpoint_every=5,
        callbacks=[f"{experiment.__name__}:Pause"],
    )
    file.write_text(yaml.safe_dump({"recipe": "llm", "config": settings.model_dump(mode="json")}))
    out = tmp_path / "ray"
    words = ["--config", str(file), "--workers", str(workers), "--out", str(out)]
    of_ray = {name: text for name, text in os.environ.items() if name.startswith("RAY_")}
    of_ray["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    environ = environment(tmp_path / "home") | of_ray  # its token, too

    def drive(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "train", *words],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    driver = drive(*words)
    while driver.poll() is None and len(history.read(out)) < 8:
        time.sleep(0.02)
    driver.kill()
    _, said = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, said
    again = drive("--resume", str(out))
    _, said = again.communicate(timeout=200)
    assert again.returncode in (0, 1), said  # 1: so short a run may miss the gate
    assert "goes on from step" in said
    run(LLM, settings, folder=RunFolder(tmp_path / "here"))
    losses = {each.step: each.metrics["loss"] for each in history.read(tmp_path / "here")}
    assert losses[16] < losses[1] - 0.1, "nothing was learned that could be lost"
    assert {each.step: each.metrics["loss"] for each in history.read(out)} == pytest.approx(
        losses, abs=1e-4
    )


def test_an_error_that_would_come_again_ends_a_group_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="step 3 is wrong"):
        on_ray(DUO, Duo(wrong_at=3), tmp_path / "a", 2)
    # Only the first worker writes, while the other one waits for it in the next step.
    with pytest.raises(Unavailable, match="checkpoint of step 10"):
        on_ray(DUO, Duo(full_at=10), tmp_path / "b", 2)
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-0000000005"]
    on_ray(DUO, Duo(full_at=10), tmp_path / "b", 2)  # with some space again
    assert same(curve(tmp_path / "b"), expected(DUO, Duo(), tmp_path / "here"))


def test_an_elastic_group_takes_the_room_there_is(tmp_path: Path) -> None:
    config = Duo(steps=12)
    result = on_ray(DUO, config, tmp_path / "ray", (1, 3))
    assert result.metrics["workers"] == 2
    assert same(curve(tmp_path / "ray"), expected(DUO, config, tmp_path / "here"))


def test_a_group_goes_on_with_what_another_number_of_workers_began(tmp_path: Path) -> None:
    config, folder = Duo(steps=30), RunFolder(tmp_path / "run")

    def stop(event: Event) -> None:
        if isinstance(event, Reported) and event.step == 13:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run(DUO, config, folder=folder, subscribers=[stop])
    events: list[Event] = []
    on_ray(DUO, config, folder.path, 2, events)
    assert isinstance(events[0], RunStarted)
    assert events[0].resumed_from == 10
    assert same(curve(folder.path), expected(DUO, config, tmp_path / "here"))


def test_a_recipe_that_cannot_divide_its_work_gets_no_group(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide its work"):
        on_ray(WALK, Walk(), tmp_path / "a", 2)


def test_what_fails_again_and_again_is_given_up(tmp_path: Path) -> None:
    def fail(config: Config, context: RunContext) -> Metrics:
        raise RuntimeError("bug")

    recipe = replace(DUO, run=fail)
    with pytest.raises(UpstreamError, match="bug"):
        on_ray(recipe, Duo(), tmp_path / "a", 2, retries=0)
    with pytest.raises(RuntimeError, match="bug"):
        on_ray(recipe, Duo(), tmp_path / "b", 1, retries=0)


def squared(number: int) -> int:
    return number * number


def wrong(number: int) -> int:
    if number == 7:
        raise ConfigError("7 is wrong")
    return number


@pytest.mark.parametrize(
    ("wanted", "workers", "told"),
    [
        (Resources(cpus=1), 2, ""),
        (Resources(cpus=2), 2, "4 CPU wanted, 2 of 8 free"),
        (Resources(cpus=1, gpus=1), 1, "1 GPU wanted, 0 of 0 free"),
        (Resources(cpus=3, gpus=0.5), 1, "3 CPU wanted, 2 of 8 free, 0.5 GPU wanted, 0 of 0 free"),
    ],
)
def test_what_a_run_has_to_wait_for_is_said(wanted: Resources, workers: int, told: str) -> None:
    from train.launch import lacking

    assert lacking(wanted, workers, free={"CPU": 2.0}, whole={"CPU": 8.0}) == told


def test_map_keeps_order_and_errors(tmp_path: Path) -> None:
    from train.launch import fan_out

    assert fan_out(squared, range(100)) == [number * number for number in range(100)]
    assert fan_out(squared, []) == []
    with pytest.raises(ConfigError, match="7 is wrong"):
        fan_out(wrong, range(20))


def test_map_in_this_process_and_on_a_worker(tmp_path: Path) -> None:
    def body(config: Config, context: RunContext) -> Metrics:
        return {"sum": float(sum(context.map(squared, range(50))))}

    recipe = replace(WALK, run=body, gates={})
    for workers in (0, 1):
        launch = {"resources": Resources(cpus=2)}  # all there is: the tasks take its place
        result = on_ray(recipe, Walk(), tmp_path / str(workers), workers, **launch)
        assert result.metrics == {"sum": 40425.0}


def test_m3_fanned_out_has_the_errors_of_one_process(tmp_path: Path) -> None:
    """As a person asks for it; Theta, smoothing and ARIMA on a part of every group."""
    series = ["series=24", "chunk=3", "networks=[]", "methods=[theta, ets, arima]"]
    words = ["timeseries", *(word for each in series for word in ("--set", each))]

    def metrics(name: str, *launch: str) -> dict[str, float]:
        train(["--out", str(tmp_path / name), *words, *launch])  # its gates are of all series
        result = RunFolder(tmp_path / name).result()
        assert result is not None
        found: dict[str, float] = result["metrics"]
        return found

    seen = set[int]()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            seen.update(each.pid for each in workers_of_ray("_apply"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    fanned = metrics("ray", "--workers", "1")
    stop.set()
    watcher.join(5)
    assert seen, "nothing was fanned out"
    here = metrics("here", "--workers", "0")
    assert {f"m3_smape_{method}" for method in ("theta", "ets", "arima")} <= here.keys()
    assert fanned == here


class Count:
    """Remembers what it was told."""

    def __init__(self, begin: int) -> None:
        self.total = begin

    def add(self, number: int) -> tuple[int, int]:
        if number < 0:
            raise ConfigError(f"{number} is wrong")
        self.total += number
        return self.total, os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_actors_remember_and_one_that_is_lost_begins_anew() -> None:
    from train.launch import enlisted

    with enlisted(Count, [0, 10, 20]) as counts:
        first = counts.call("add", {0: (1,), 1: (2,), 2: (3,)})
        assert {number: total for number, (total, _) in first.items()} == {0: 1, 1: 12, 2: 23}
        pids = {number: pid for number, (_, pid) in first.items()}
        assert len(set(pids.values())) == 2, "there are two CPUs"
        assert pids[0] == pids[2]
        assert os.getpid() not in pids.values()
        assert counts.call("add", {2: (1,)}) == {2: (24, pids[0])}
        with pytest.raises(ConfigError, match="-1 is wrong"):
            counts.call("add", {1: (-1,)})

        assert counts.call("die", {1: ()}) == {}
        again = counts.call("add", {0: (1,), 1: (5,)})
        assert again[0] == (2, pids[0]), "another process was lost, too"
        assert again[1][0] == 15, "it begins with what it was made of"
        assert again[1][1] not in pids.values()
    gone = [psutil.pid_exists(pid) for pid in pids.values()]
    deadline = time.monotonic() + 30
    while any(gone) and time.monotonic() < deadline:
        time.sleep(0.1)
        gone = [psutil.pid_exists(pid) for pid in pids.values()]
    assert not any(gone), "they outlived the run"


def test_federated_clients_are_actors_and_learn_the_same(tmp_path: Path) -> None:
    config = Federated(clients=4, rounds=2, epochs=1, batch_size=50, learning_rate=0.02)
    here = run(FEDERATED, config, folder=RunFolder(tmp_path / "here"))
    fanned = on_ray(FEDERATED, config, tmp_path / "ray", 1)
    assert fanned.metrics == here.metrics


def test_a_federated_run_survives_the_loss_of_a_process_with_clients(tmp_path: Path) -> None:
    config = Federated(clients=4, rounds=6, epochs=1, batch_size=50, learning_rate=0.02)
    killer = kill_one(tmp_path / "ray", "ray::_Keeper", after=2)
    on_ray(FEDERATED, config, tmp_path / "ray", 1)
    killer.join(5)
    assert not killer.is_alive()
    answers = [each.metrics["answers"] for each in history.read(tmp_path / "ray")]
    assert len(answers) == 6
    assert answers[:2] == [4.0, 4.0]
    assert min(answers) < 4, "nobody was missed"
    assert answers[-1] == 4, "those who were lost did not come back"
