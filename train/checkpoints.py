"""Checkpoints of a run, each committed whole or not at all.

::

    checkpoints/step-0000000120/   committed: what ``save`` wrote, and checkpoint.json
    checkpoints/.step-…/           being written; moved into place by one rename

The last few are kept, and the best one by a metric.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from models import durable
from train import disk
from train.recipe import Metrics, Save

META = "checkpoint.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """Which checkpoint is the best."""

    metric: str
    mode: str
    """``max`` or ``min``."""

    def score(self, metrics: Metrics) -> float:
        """More is better; minus infinity for what lacks the metric."""
        value = metrics.get(self.metric, math.nan)
        if math.isnan(value):
            return -math.inf
        return value if self.mode == "max" else -value


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    path: Path
    step: int
    metrics: Metrics
    """Reported together with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Those of the run in ``out``. One process writes at a time; see ``train.run.writing``."""

    out: Path
    keep: int = 2
    best: Best | None = None

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def all(self) -> list[Checkpoint]:
        """From the oldest to the newest."""
        found = []
        for path in sorted(self.folder.glob("step-*")):
            meta = json.loads((path / META).read_text())
            found.append(Checkpoint(path=path, step=meta["step"], metrics=meta["metrics"]))
        return found

    def last(self) -> Checkpoint | None:
        return max(self.all(), key=lambda each: each.step, default=None)

    def the_best(self) -> Checkpoint | None:
        """The newest of the best; ``None`` where none has the metric."""
        if self.best is None:
            return None
        scored = [(self.best.score(each.metrics), each.step, each) for each in self.all()]
        score, _, found = max(scored, key=lambda each: each[:2], default=(-math.inf, 0, None))
        return found if score > -math.inf else None

    def commit(self, save: Save, *, step: int, metrics: Metrics) -> Checkpoint:
        """Write what ``save`` writes, all of it, then forget what need not be kept.

        Raises:
            Unavailable: the disk is full; earlier checkpoints are as they were.
        """
        final = self.folder / f"step-{step:010d}"
        partial = self.folder / f".{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        last = self.last()
        kept = f"step {last.step} is kept" if last else "none was written before"
        advice = f"The last checkpoint: {kept}. Free some space, then run again with --resume."
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        try:
            with disk.explain_full(self.out, f"The checkpoint of step {step}", advice):
                partial.mkdir(parents=True)
                save(partial)
                (partial / META).write_text(json.dumps({"step": step, "metrics": finite}))
                disk.sync_tree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for abandoned in [each for each in self.all() if each.step >= step]:
            _remove(abandoned.path)  # by an attempt that began anew, without a checkpoint
        partial.rename(final)
        durable.sync(self.folder)
        self._prune()
        return Checkpoint(path=final, step=step, metrics=finite)

    def _prune(self) -> None:
        best = self.the_best()
        for each in self.all()[: -self.keep]:
            if best is None or each.step != best.step:
                _remove(each.path)

    def sweep(self) -> None:
        """Remove what a killed process left half written or half removed."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """First out of sight, so that a kill in between leaves nothing half there."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
