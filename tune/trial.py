"""One trial, in a worker of Ray Tune: a run of the recipe whose reports Tune sees, too.

A trial is a run like any other, in a run directory below the sweep's; so it goes on from its
own last checkpoint after a kill, and one that has ended is not computed again. Population
based training lets a trial go on from another one's checkpoint with other values: that is
another run, which begins with a copy of that checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from ray import cloudpickle, tune

from models.errors import ConfigError, PlatformError
from train import facts
from train import run as running
from train.checkpoints import META, Checkpoints
from train.config import Launch
from train.events import Reported, RunEnded, RunStarted
from train.folder import Request, RunFolder
from train.recipe import Recipe
from tune import schedulers
from tune.config import Pbt, Sweep, trial_config
from tune.course import ERROR, FINAL, REPORT, Assignment
from tune.journal import Report

DONE = "done"
"""Tune's own word for the last report of a trial."""
PATIENCE_S = 60.0
"""How long a trial waits for a process of an earlier session that is still going away, or in its
own for the trial before it that was stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all trials of a sweep share; it pickles."""

    recipe: Recipe[Any]
    sweep: Sweep
    folder: Path
    """Of the sweep, absolute; every machine sees it."""


def name(trial: Any) -> str:
    """Of Tune's trial: our number, which stays when its configuration changes."""
    return f"{trial.config['trial']['number']:04d}"


def assignment(name: str, config: Mapping[str, Any]) -> Assignment:
    """What a trial of Tune is to do. After a copy its dictionary has the number of the trial
    that was copied; its name is still its own.
    """
    told = config["trial"]
    return Assignment(number=int(name), point=told["point"], turn=told["turn"])


def trainable(job: Job) -> Callable[[dict[str, Any]], None]:
    """The function that Tune runs in a worker.

    The job is packed, and only opened where the environment that finds recipes and places
    is the driver's.
    """
    environ = {key: text for key, text in os.environ.items() if key.startswith("FRONTIER_")}
    packed: bytes = cloudpickle.dumps(job)

    def trial(config: dict[str, Any]) -> None:
        os.environ.update(environ)
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = f"{PATIENCE_S:g}"
        # Tune moves to a folder of its own; paths of a person start where the person is.
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", os.curdir))
        run(cloudpickle.loads(packed), assignment(tune.get_context().get_trial_name(), config))

    return trial


def run(job: Job, assignment: Assignment) -> None:
    """Run, and tell Tune the end of it, be it an error: what a recipe raises it would only
    raise again, so Tune, which starts a broken trial anew, must not see it.
    """
    folder = assignment.folder(job.folder)
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    exploited = tune.get_checkpoint()
    teller = _Teller(job.sweep, Checkpoints(out=folder.path))
    try:
        with FileLock(f"{folder.path}.lock", timeout=PATIENCE_S):
            config = trial_config(job.recipe, job.sweep, assignment.point)
            if exploited is not None and assignment.turn:
                request = Request(
                    recipe=job.recipe.name,
                    smoke=False,
                    config=config.model_dump(mode="json"),
                    launch={},
                    inputs=job.sweep.inputs,
                )
                begin_with(Path(exploited.path), folder, request)
            result = running.run(
                job.recipe,
                config,
                folder=folder,
                place=place(job),
                inputs={kind: Path(path) for kind, path in job.sweep.inputs.items()},
                subscribers=[teller],
            )
            if isinstance(job.sweep.scheduler, Pbt) and not teller.checkpoints.all():
                raise ConfigError(
                    f"scheduler pbt copies checkpoints, and {job.recipe.name} has written none."
                )
    except Exception as error:
        told = error.message if isinstance(error, PlatformError) else repr(error)
        folder.path.mkdir(exist_ok=True)
        (folder.path / "error.txt").write_text(traceback.format_exc())
        tune.report({**schedulers.NOTHING, ERROR: told, DONE: True})
    else:
        metrics = dict(result.metrics)
        seen = schedulers.seen_at_end(job.sweep, metrics, teller.last)
        tune.report({**seen, FINAL: metrics, DONE: True})


def place(job: Job) -> running.Place | None:
    """In this process, or on a data-parallel group."""
    if job.sweep.workers <= 1:
        return None
    from train import launch

    here = Launch(workers=job.sweep.workers, resources=job.sweep.resources)
    return launch.place(job.recipe, here, workers=job.sweep.workers)


def begin_with(checkpoint: Path, folder: RunFolder, request: Request) -> None:
    """Make ``folder`` a run that was interrupted at ``checkpoint``, whole or not at all."""
    if folder.request() is not None:
        return
    new = RunFolder(folder.path.with_name(f".{folder.path.name}"))
    shutil.rmtree(new.path, ignore_errors=True)
    new.begin(request, {"code_revision": facts.code_revision()})
    meta = json.loads((checkpoint / META).read_text())

    def copy(into: Path) -> None:
        shutil.copytree(
            checkpoint, into, dirs_exist_ok=True, ignore=shutil.ignore_patterns(META, ".*")
        )

    Checkpoints(out=new.path).commit(copy, step=meta["step"], metrics=meta["metrics"])
    new.path.rename(folder.path)


class _Teller:
    """Subscribes to a run and tells Tune, which holds it until it may go on."""

    def __init__(self, sweep: Sweep, checkpoints: Checkpoints) -> None:
        self._sweep = sweep
        self.checkpoints = checkpoints
        self.last: Report | None = None

    def __call__(self, event: RunStarted | Reported | RunEnded) -> None:
        if not isinstance(event, Reported):
            return
        report = Report(step=event.step, total=event.total, metrics=event.metrics)
        self.last = report
        seen = schedulers.seen(self._sweep, report)
        checkpoint = None
        if isinstance(self._sweep.scheduler, Pbt):
            # Whoever is compared next may be copied, so each report needs its checkpoint.
            checkpoint = self._committed(event.step)
        told: Mapping[str, Any] = {
            **seen,
            REPORT: {"step": report.step, "total": report.total, "metrics": dict(event.metrics)},
        }
        tune.report(dict(told), checkpoint=checkpoint)

    def _committed(self, step: int) -> tune.Checkpoint | None:
        last = self.checkpoints.last()
        if last is None or last.step != step:
            return None
        return tune.Checkpoint.from_directory(str(last.path))
