"""A sweep on Ray Tune: proposals go out as trials, what they tell comes back.

::

    searcher ─► journal ─► Ray Tune ─► trial in a worker: train.run
        ▲                     │ told
        └───── journal ◄──────┴─► scheduler: go on, stop, copy a better one

Tune places trials, carries checkpoints from one to another, and does what the scheduler
decides. What survives a kill is in the journal and in the run directories.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from filelock import FileLock, Timeout
from ray import tune
from ray.tune.search import Searcher

from models.errors import ConfigError
from train import disk
from train.recipe import Recipe
from tune import schedulers
from tune import trial as trials
from tune.config import RESOLVED, Pbt, Sweep, domains, read_resolved
from tune.course import ERROR, FINAL, Assignment, Course
from tune.journal import Journal, Trial

Watch = Callable[[Course], None]


def run(
    recipe: Recipe[Any],
    sweep: Sweep,
    folder: Path,
    *,
    watch: Watch = lambda course: None,
) -> list[Trial]:
    """Run ``sweep`` in ``folder``, or go on with the very sweep that was interrupted there.

    Args:
        watch: told of everything that happens.

    Raises:
        ConfigError: the folder is in use or holds another sweep; or no machine of the
            cluster has room for a trial.
    """
    folder = folder.absolute()
    with _alone(folder):
        begin(sweep, folder)
        with closing(Journal(folder)) as journal:
            course = Course(recipe, sweep, journal, watch)
            if not (course.all_assigned or course.out_of_time):
                with _ray(groups=sweep.workers > 1), _scratch(folder) as scratch:
                    _check_room(sweep)
                    _fit(recipe, sweep, folder, scratch, course)
                course.suspend()
            return course.trials


def begin(sweep: Sweep, folder: Path) -> None:
    """Write down what is asked for, before anything else; or check that it is the same.

    More trials, more time and other resources may be given when a sweep goes on.

    Raises:
        ConfigError: the folder holds another sweep.
    """
    if (before := read_resolved(folder)) is not None:
        for key in Sweep.model_fields.keys() - _MAY_CHANGE:
            if getattr(before, key) != getattr(sweep, key):
                raise ConfigError(
                    f"{folder} holds another sweep: its {key} is {getattr(before, key)!r},"
                    f" not {getattr(sweep, key)!r}."
                )
    text = yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False)
    disk.write_text(folder / RESOLVED, text)


_MAY_CHANGE = {"trials", "time_budget_s", "max_concurrent", "resources", "workers", "retries"}


def _fit(recipe: Recipe[Any], sweep: Sweep, folder: Path, scratch: Path, course: Course) -> None:
    space = domains(recipe, sweep)
    job = trials.Job(recipe=recipe, sweep=sweep, folder=folder)
    scheduler = schedulers.make(
        sweep, space, turn=1 + max((t.turn for t in course.trials), default=0)
    )
    schedulers.replay(scheduler, sweep, course.trials)
    population: dict[str, Any] = {}
    searcher: Searcher | None = None
    if isinstance(sweep.scheduler, Pbt):
        # It wants to know all trials from the beginning, and takes no searcher.
        everyone = list(iter(lambda: course.assign(limit=None), None))
        population = {"trial": tune.grid_search([each.config() for each in everyone])}
        count = 1
    else:
        searcher = _Proposals(course, _at_a_time(sweep))
        count = len(course.trials) + course.goal  # more than enough; the searcher ends it
    tuner = tune.Tuner(
        tune.with_resources(trials.trainable(job), tune.PlacementGroupFactory([_bundle(sweep)])),
        param_space=population,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=count,
            # Else each trial imports torch anew. A group takes longer to go than Tune waits, and
            # the trial that was to have its process would be lost without a word.
            reuse_actors=sweep.workers <= 1,
            trial_name_creator=trials.name,
            trial_dirname_creator=trials.name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            stop=_Stopper(course),
            callbacks=[_Listener(course)],
            failure_config=tune.FailureConfig(max_failures=sweep.retries),
            verbose=0,
        ),
    )
    tuner.fit()


class _Proposals(Searcher):  # type: ignore[misc]  # Ray is untyped
    """The course as Tune asks for it."""

    def __init__(self, course: Course, at_a_time: int | None) -> None:
        super().__init__()
        self._course = course
        self._at_a_time = at_a_time

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        assignment = self._course.assign(limit=self._at_a_time)
        if assignment is not None:
            return {"trial": assignment.config()}
        return Searcher.FINISHED if self._course.all_assigned else None

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """The listener learns it, with our number of the trial."""

    def save(self, checkpoint_path: str) -> None:
        """The journal has it."""


class _Listener(tune.Callback):  # type: ignore[misc]  # Ray is untyped
    """Tells the course what happens to Tune's trials."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._course.started(_number(trial))

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._course.told(_assignment(trial), result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._course.completed(_number(trial))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._course.lost(_number(trial), None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._course.lost(_number(trial), f"its process died: {trial.get_error()!r:.500}")


class _Stopper(tune.Stopper):  # type: ignore[misc]  # Ray is untyped
    """Ends a trial that has diverged, and everything when the time is over."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        ended = ERROR in result or FINAL in result
        return not ended and result.get(schedulers.FAR) == schedulers.NOTHING[schedulers.FAR]

    def stop_all(self) -> bool:
        return self._course.out_of_time


def _assignment(trial: Any) -> Assignment:
    return trials.assignment(str(trial), trial.config)


def _number(trial: Any) -> int:
    return int(str(trial))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second driver out; let go also if this process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder} is being swept by another process; wait for it.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Where Tune keeps what nobody reads afterwards: snapshots, checkpoints on their way."""
    scratch = folder / ".ray"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_ENVIRON = {
    "RAY_AIR_NEW_OUTPUT": "0",  # a table of its own, which cannot be switched off
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the journal and the run directories have it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every report has the metric
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # snapshots that nobody reads
}


@contextmanager
def _ray(*, groups: bool) -> Iterator[None]:
    """The cluster that ``RAY_ADDRESS`` names, or one of our own on this machine.

    Args:
        groups: trials are groups of Ray Train, which learns from the dashboard's state API that
            a group was stopped from outside. Without it the room of such a group stays taken.
    """
    os.environ.update(_ENVIRON)
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    # One misses the log files that we have switched off, the other advises Tuner.restore.
    for name in ("ray.tune.analysis.experiment_analysis", "ray.tune.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    options = {} if address != "local" else {"include_dashboard": groups}
    ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _bundle(sweep: Sweep) -> dict[str, float]:
    """What Ray reserves for a trial's own process.

    With workers it only waits for them, and must not take the room of the last one: so
    nothing but a byte, since an empty request is refused.
    """
    if sweep.workers > 1:
        return {"memory": 1}
    return {"CPU": sweep.resources.cpus, "GPU": sweep.resources.gpus}


def _at_a_time(sweep: Sweep) -> int | None:
    """How many trials may be under way; ``None``: as many as Ray finds room for.

    Groups of workers are placed by Ray Train, which does not know of each other's trials: no
    more are begun than fit side by side.
    """
    if sweep.workers <= 1:
        return sweep.max_concurrent
    total = ray.cluster_resources()
    takes = _takes(sweep)
    fit = min(int(total.get(kind, 0) // much) for kind, much in takes.items() if much)
    return min(fit, sweep.max_concurrent or fit)


def _takes(sweep: Sweep) -> dict[str, float]:
    count = max(sweep.workers, 1)
    return {"CPU": count * sweep.resources.cpus, "GPU": count * sweep.resources.gpus}


def _check_room(sweep: Sweep) -> None:
    """A trial that fits nowhere would wait for ever.

    Raises:
        ConfigError: no machine has room for a process of a trial, or the cluster has none for
            a group.
    """
    one = {"CPU": sweep.resources.cpus, "GPU": sweep.resources.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(k, 0) >= v for k, v in one.items()) for node in nodes):
        largest = {kind: max(node.get(kind, 0) for node in nodes) for kind in one}
        raise ConfigError(
            f"A process of a trial takes {_say(one)}, but the largest machine of the cluster has"
            f" {_say(largest)}; change resources."
        )
    takes, total = _takes(sweep), ray.cluster_resources()
    if not all(total.get(kind, 0) >= much for kind, much in takes.items()):
        raise ConfigError(
            f"A trial takes {_say(takes)}, but the cluster has"
            f" {_say({kind: total.get(kind, 0) for kind in takes})}; change workers or resources."
        )


def _say(resources: Mapping[str, float]) -> str:
    return f"{resources['CPU']:g} CPUs and {resources['GPU']:g} GPUs"
