"""Who is stopped early: Ray Tune's schedulers, told what had happened before a restart."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune import schedulers
from ray.tune.experiment import Trial as RayTrial

from models.errors import ConfigError
from tune.config import Asha, Median, Pbt, Sweep, Watching, watched
from tune.journal import Report, Status, Trial
from tune.search import Point, Space, perturb

FAR, VALUE = "far", "watched"
"""Keys of a trial's reports: how far it is, and what the scheduler looks at."""
END = 101.0
"""How far a trial is in percent when it has ended: behind its last report, which is at 100."""


NOTHING = {FAR: -1.0, VALUE: math.nan}
"""Of a trial that broke or diverged: before every rung, so no other is measured by it."""


def make(sweep: Sweep, space: Space, *, turn: int = 1) -> Any:
    """Ray Tune's scheduler for this sweep.

    Args:
        turn: of population based training, the number of its next replacement.
    """
    _, mode = watched(sweep)
    match sweep.scheduler:
        case Asha(first=first, reduction=reduction, by=by):
            # In steps nobody knows the end beforehand; rungs behind it cost nothing.
            end = END if by == "progress" else first * reduction**40
            return schedulers.AsyncHyperBandScheduler(
                time_attr=FAR,
                metric=VALUE,
                mode=mode,
                grace_period=first,
                reduction_factor=reduction,
                max_t=end,
            )
        case Median(after=after, others=others):
            return schedulers.MedianStoppingRule(
                time_attr=FAR,
                metric=VALUE,
                mode=mode,
                grace_period=after,
                min_samples_required=others,
                min_time_slice=math.inf,  # else it pauses trials, which then begin again
            )
        case Pbt(every=every, quantile=quantile):
            turns = itertools.count(turn)
            draw = random.Random(f"{sweep.seed}/{turn}/pbt")

            def explore(config: dict[str, Any]) -> dict[str, Any]:
                copied = config["trial"]
                point = perturbed(space, copied["point"], draw)
                return {**config, "trial": {**copied, "point": point, "turn": next(turns)}}

            return schedulers.PopulationBasedTraining(
                time_attr=FAR,
                metric=VALUE,
                mode=mode,
                perturbation_interval=every,
                quantile_fraction=quantile,
                custom_explore_fn=explore,
                log_config=False,
                require_attrs=False,
            )
        case _:
            return schedulers.FIFOScheduler()


def perturbed(space: Space, point: Point, draw: random.Random) -> Point:
    """The values of the trial that is copied, each slightly changed."""
    return {key: perturb(domain, point[key], draw) for key, domain in space.items()}


def seen(sweep: Sweep, report: Report) -> dict[str, float]:
    """What a scheduler sees of a report; nothing, if the report lacks what it looks at.

    Raises:
        ConfigError: the scheduler goes by progress, and the recipe does not tell any.
    """
    metric, _ = watched(sweep)
    value = report.metrics.get(metric)
    if value is None:
        return {}
    if not math.isfinite(value):
        return NOTHING
    if isinstance(sweep.scheduler, Pbt) and report.total and report.step >= report.total:
        # Too late: who was replaced now would have values that it was never trained with.
        return {FAR: 0.0, VALUE: value}
    if not isinstance(sweep.scheduler, Watching) or sweep.scheduler.by == "step":
        return {FAR: report.step, VALUE: value}
    if report.progress is None:
        raise ConfigError(
            f"{sweep.recipe} reports no total, so nobody knows its progress;"
            " say scheduler.by: step, and the scheduler's distances in steps."
        )
    return {FAR: report.progress, VALUE: value}


def seen_at_end(sweep: Sweep, final: Mapping[str, float], last: Report | None) -> dict[str, float]:
    """What a scheduler sees of a trial that has run to its end."""
    metric, _ = watched(sweep)
    value = final.get(metric, last.metrics.get(metric) if last else None)
    if value is None or not math.isfinite(value):
        return NOTHING
    by_step = isinstance(sweep.scheduler, Watching) and sweep.scheduler.by == "step"
    return {FAR: float(last.step if last else 0) if by_step else END, VALUE: value}


def replay(scheduler: Any, sweep: Sweep, trials: Iterable[Trial]) -> None:
    """Show a new scheduler what ended trials of earlier sessions had reported.

    Without it the first trials after a restart would be judged by nobody, and in a short
    sweep that is most of them. Trials to be gone on with report again themselves.
    """
    if not isinstance(sweep.scheduler, Asha | Median):
        return
    for trial in trials:
        if trial.status not in (Status.FINISHED, Status.STOPPED):
            continue
        past = _Past(f"past-{trial.number}")
        scheduler.on_trial_add(_NOBODY, past)
        results = [result for report in trial.reports if (result := seen(sweep, report))]
        for result in results:
            scheduler.on_trial_result(_NOBODY, past, result)
        last = trial.reports[-1] if trial.reports else None
        end = results[-1] if results else NOTHING
        if trial.final is not None:
            end = seen_at_end(sweep, trial.final, last)
        scheduler.on_trial_complete(_NOBODY, past, end)


@dataclass(frozen=True)
class _Past:
    """As much of a Ray trial as its schedulers look at."""

    trial_id: str
    status: str = RayTrial.TERMINATED


class _Nobody:
    """A controller without trials."""

    def get_live_trials(self) -> Mapping[str, Any]:
        return {}


_NOBODY = _Nobody()
