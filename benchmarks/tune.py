"""What searchers find and what early stopping saves, each against plain random search.

``python -m benchmarks.tune [--only searchers|stopping]``

Searchers (system 14): Branin's function, whose minimum is 0.397887, in 40 trials; and C and
gamma of ``hyperparameters`` by nested cross-validation: of each sweep a fifth of the digits is
held out, and told is how much of it the best configuration recognises. The process ends with 1
if the Gaussian process does not pass the gates of ``branin`` and ``hyperparameters``.

Stopping: the recipe is ``vision`` on real digits, a step is an epoch. With the same seed every
way tries the very same configurations in the same order, so that only the scheduler differs.
"as good" allows one standard error of an accuracy measured on 1 000 images.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two trials side by side, a core each

import ray

from benchmarks.report import Report, table
from train.discover import find
from train.recipe import Recipe
from tune import sweep as sweeps
from tune.config import resolve
from tune.journal import Status, best

JUDGED_ON = 800
"""Images of the validation part."""
WAYS: dict[str, dict[str, Any]] = {
    "random": {"scheduler": "none"},
    "random + ASHA": {"scheduler": {"kind": "asha", "by": "step", "first": 1, "reduction": 3}},
    "random + median": {"scheduler": {"kind": "median", "by": "step", "after": 2}},
    "TPE + ASHA": {
        "search": "tpe",
        "scheduler": {"kind": "asha", "by": "step", "first": 1, "reduction": 3},
    },
}


SEARCHERS = ("random", "tpe", "gp")
BRANIN_TRIALS, SVC_TRIALS, FOLDS = 40, 15, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    way: str
    seed: int
    steps: int
    finished: int
    best: float
    seconds: float


def swept(recipe: Recipe[Any], way: str, seed: int, options: argparse.Namespace) -> Outcome:
    document = {
        "search": "random",
        **WAYS[way],
        "seed": seed,
        "trials": options.trials,
        "config": {
            "epochs": options.epochs,
            "train_images": options.images,
            "part": "validation",
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trials = sweeps.run(recipe, resolve(recipe, [document]), Path(folder))
        seconds = time.perf_counter() - began
    status = Counter(trial.status for trial in trials)
    assert not status[Status.FAILED], [trial.error for trial in trials]
    winner = best(trials, "accuracy", "max")
    assert winner is not None
    return Outcome(
        way=way,
        seed=seed,
        steps=sum(trial.steps for trial in trials),
        finished=status[Status.FINISHED],
        best=winner.value("accuracy") or 0.0,
        seconds=seconds,
    )


def found(name: str, document: Mapping[str, Any]) -> Mapping[str, float]:
    """What the best trial of a sweep ended with."""
    recipe = find(name)
    sweep = resolve(recipe, [document])
    with tempfile.TemporaryDirectory() as folder:
        trials = sweeps.run(recipe, sweep, Path(folder))
    first = best(trials, sweep.metric, sweep.mode)
    assert first is not None, [trial.error for trial in trials]
    assert first.final is not None
    return first.final


def searchers(report: Report, seeds: int) -> bool:
    """Whether the Gaussian process passes both gates with every seed."""
    lowest: dict[str, list[float]] = {}
    for kind, seed in itertools.product(SEARCHERS, range(seeds)):
        # One at a time, so that each trial is proposed with all before it known.
        document = {"search": kind, "seed": seed, "trials": BRANIN_TRIALS, "max_concurrent": 1}
        lowest.setdefault(kind, []).append(found("branin", document)["branin"])
        print(kind, seed, lowest[kind][-1], flush=True)
    seen: dict[str, list[float]] = {}
    held_out: dict[str, list[float]] = {}
    for kind, fold in itertools.product(SEARCHERS, range(FOLDS)):
        config = {"held_out": fold, "folds": FOLDS}
        document = {"search": kind, "seed": fold, "trials": SVC_TRIALS, "config": config}
        final = found("hyperparameters", document)
        seen.setdefault(kind, []).append(final["svc_accuracy"])
        held_out.setdefault(kind, []).append(final["held_out_accuracy"])
        print(kind, fold, dict(final), flush=True)
    rows = [
        (
            kind,
            " ".join(f"{value:.4f}" for value in lowest[kind]),
            f"{mean(seen[kind]):.4f}",
            f"{mean(held_out[kind]):.4f}",
        )
        for kind in SEARCHERS
    ]
    head = (
        "searcher",
        f"Branin after {BRANIN_TRIALS}, by seed",
        "SVC, as searched",
        "SVC, held out",
    )
    report.add(f"Searchers: {BRANIN_TRIALS} and {SVC_TRIALS} trials. Branin's minimum is 0.3979.")
    report.add(table(head, rows))
    branin = find("branin").gates["branin"]
    svc = find("hyperparameters").gates["svc_accuracy"]
    return all(map(branin.holds, lowest["gp"])) and svc.holds(mean(held_out["gp"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("searchers", "stopping"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()

    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
    )
    report = Report(theme="tune", title="Sweeps: searchers and early stopping")
    passed = True
    if options.only != "stopping":
        passed = searchers(report, options.seeds)
    if options.only != "searchers":
        stopping(report, options)
    ray.shutdown()
    report.write()
    return 0 if passed else 1


def stopping(report: Report, options: argparse.Namespace) -> None:
    recipe = find("vision")
    report.add(
        f"`vision` on {options.images} digits, judged on {JUDGED_ON} of its validation part,"
        f" {options.trials} trials of at most {options.epochs} epochs, two at a time."
    )
    outcomes = []
    for seed, way in itertools.product(range(options.seeds), options.ways):
        outcomes.append(swept(recipe, way, seed, options))
        print(outcomes[-1], flush=True)
    head = ("seed", "way", "epochs", "ran to the end", "best accuracy", "seconds")
    rows = [(o.seed, o.way, o.steps, o.finished, f"{o.best:.4f}", o.seconds) for o in outcomes]
    report.add(table(head, rows))
    report.add(summary(outcomes, options.ways))


def summary(outcomes: list[Outcome], ways: list[str]) -> str:
    """Each way against random search with the same seed."""
    full = {o.seed: o for o in outcomes if o.way == "random"}
    if not full:
        return "No random search to compare with."
    level = mean(o.best for o in full.values())
    error = math.sqrt(level * (1 - level) / JUDGED_ON)
    rows = []
    for way in ways:
        ours = [o for o in outcomes if o.way == way]
        less = [o.best - full[o.seed].best for o in ours]
        rows.append(
            (
                way,
                f"{mean(o.steps / full[o.seed].steps for o in ours):.0%}",
                f"{mean(o.best for o in ours):.4f}",
                f"{mean(less):+.4f}",
                f"{sum(each >= -error for each in less)} of {len(ours)}",
                f"{mean(o.seconds / full[o.seed].seconds for o in ours):.0%}",
            )
        )
    head = ("way", "steps", "best accuracy", "against random", "as good", "time")
    return table(head, rows) + f"\n\nOne standard error is {error:.4f}."


if __name__ == "__main__":
    sys.exit(main())
