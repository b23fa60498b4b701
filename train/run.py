"""One run, from its request to its result: carry out, judge, seal.

run ── place ──► perform (in this process, or on workers: train/launch.py)
│                  recipe.run(config, context) ── report ──► history, checkpoints
└─ gates, artifact sealed, result.json
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from models import artifact
from models.artifact import GateResult, Manifest
from models.errors import InternalError
from train import data, disk, facts, history, inputs
from train.checkpoints import Best, Checkpoints
from train.context import (
    ALONE,
    Context,
    Enlist,
    FanOut,
    OnReport,
    kept_here,
    local_device,
    rehearse,
    serially,
)
from train.events import Reported, RunEnded, RunStarted, Subscriber
from train.folder import Request, RunFolder
from train.recipe import Config, Gate, Metrics, Recipe, Save, Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is carried to wherever the recipe runs; it pickles."""

    recipe: Recipe[Any]
    config: Config
    out: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    keep: int = 2
    best: Best | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(out=self.out, keep=self.keep, best=self.best)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    folder: RunFolder
    metrics: Metrics
    gates: tuple[GateResult, ...]
    manifest: Manifest | None
    """``None``: the recipe made no artifact."""
    seconds: float

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


Emit: TypeAlias = Callable[[Reported], None]
Place: TypeAlias = Callable[[Task, Emit], Metrics]
"""Where a task is carried out, telling of every report."""


def run(
    recipe: Recipe[Any],
    config: Config,
    *,
    folder: RunFolder,
    smoke: bool = False,
    inputs: Mapping[str, Path] | None = None,
    launch: Mapping[str, Any] | None = None,
    keep: int = 2,
    best: Best | None = None,
    place: Place | None = None,
    subscribers: Sequence[Subscriber] = (),
) -> Result:
    """Run ``recipe`` in ``folder``, or go on with the very run that was interrupted there.

    Args:
        smoke: judge by ``recipe.smoke_gates``.
        inputs: artifact folders by kind.
        launch: for the record only.
        keep: that many of the last checkpoints, and the ``best``.
        place: in this process unless given.
        subscribers: told of every event; what they raise ends the run.

    Raises:
        ConfigError: ``folder`` is in use or holds another run; or an input does not verify.
        Exception: whatever the recipe raises. The folder can be run again.
    """
    given = {kind: path.absolute() for kind, path in (inputs or {}).items()}
    parents = {kind: artifact.verify(path) for kind, path in given.items()}
    request = Request(
        recipe=recipe.name,
        smoke=smoke,
        config=config.model_dump(mode="json"),
        launch=dict(launch or {}),
        inputs={kind: str(path) for kind, path in given.items()},
        hashes={kind: parent.content_sha256 for kind, parent in parents.items()},
    )
    out = folder.path.absolute()
    folder = RunFolder(out)
    with folder.driven():
        if (ended := folder.result()) is not None:
            folder.check(request)
            return _ended(folder, ended)
        revision, environment = facts.code_revision(), facts.environment(local_device())
        folder.begin(
            request,
            {"code_revision": revision, "seed": config.seed, "run": folder.id} | environment,
        )
        task = Task(
            recipe=recipe,
            config=config,
            out=out,
            inputs=given,
            keep=keep,
            best=best or default_best(recipe),
        )
        began = time.monotonic()

        def tell(event: RunStarted | Reported | RunEnded) -> None:
            for subscriber in subscribers:
                subscriber(event)

        status, metrics = "failed", dict[str, float]()
        try:
            last = task.checkpoints.last()
            tell(
                RunStarted(
                    run=folder.id,
                    recipe=recipe.name,
                    out=out,
                    config=request.config,
                    resumed_from=last.step if last else 0,
                )
            )
            with disk.explain_full(out, "The run", "Free some space, then go on with --resume."):
                metrics = dict((place or in_process)(task, tell))
                gates = judge(recipe.smoke_gates if smoke else recipe.gates, metrics)
                manifest = _seal(
                    task, folder.id, metrics, gates, revision, environment,
                    tuple(parents.values()),
                )  # fmt: skip
            passed = all(gate.passed for gate in gates)
            status = "passed" if passed else "gates failed"
        finally:
            seconds = time.monotonic() - began
            tell(RunEnded(status=status, metrics=metrics, seconds=seconds))
        best_one = task.checkpoints.the_best()
        folder.finish(
            {
                "status": status,
                "metrics": {name: _finite(value) for name, value in metrics.items()},
                "gates": [asdict(gate) for gate in gates],
                "artifact": manifest.content_sha256 if manifest else None,
                "best_checkpoint": best_one.path.name if best_one else None,
                "seconds": round(seconds, 3),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        return Result(
            folder=folder, metrics=metrics, gates=gates, manifest=manifest, seconds=seconds
        )


def judge(gates: Mapping[str, Gate], metrics: Metrics) -> tuple[GateResult, ...]:
    """Every gate, with what was reached. A metric that is missing fails."""
    return tuple(
        GateResult(
            metric=name,
            value=_finite(metrics.get(name)),
            expected=str(gate),
            passed=name in metrics and gate.holds(metrics[name]),
        )
        for name, gate in gates.items()
    )


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def default_best(recipe: Recipe[Any]) -> Best | None:
    """By the recipe's first gate; checkpoints without that metric are never the best."""
    for name, gate in recipe.gates.items():
        return Best(metric=name, mode=gate.mode)
    return None


def in_process(task: Task, emit: Emit) -> Metrics:
    return perform(task, device=local_device(), emit=emit)


def perform(
    task: Task,
    *,
    device: str,
    workers: Workers = ALONE,
    fan_out: FanOut = serially,
    enlist: Enlist = kept_here,
    emit: Emit = lambda report: None,
    agree: Callable[[int], int] = lambda step: step,
) -> Metrics:
    """Carry ``task`` out as one of ``workers``; the first one writes.

    Args:
        agree: every worker gets the number that the first one calls it with.
    """

    def carry_out(checkpoint: Path | None, on_report: OnReport) -> Metrics:
        context = Context(
            out=task.out,
            inputs=task.inputs,
            device=device,
            workers=workers,
            checkpoint=checkpoint,
            on_report=on_report,
            fan_out=fan_out,
            enlist=enlist,
        )
        out = task.out if workers.rank == 0 else None
        with data.recorded_in(out, goes_on=checkpoint is not None):
            metrics = task.recipe.run(task.config, context)
        return {name: float(value) for name, value in metrics.items()}

    if workers.rank > 0:
        step = agree(-1)
        found = [each.path for each in task.checkpoints.all() if each.step == step]
        if step >= 0 and not found:
            raise InternalError(
                f"worker {workers.rank} does not see the checkpoint of step {step} in {task.out}; "
                "the folder of the runs (FRONTIER_RUNS) must be shared by all machines"
            )
        return carry_out(found[0] if found else None, rehearse)
    with RunFolder(task.out).written():
        task.checkpoints.sweep()
        last = task.checkpoints.last()
        history.cut(task.out, last.step if last else -1)
        if last is None:
            shutil.rmtree(task.out / "artifact", ignore_errors=True)
        agree(last.step if last else -1)
        with closing(history.Writer(task.out)) as writer:
            return carry_out(last.path if last else None, _Recorder(task, writer, emit))


@dataclass(frozen=True, slots=True)
class _Recorder:
    """History first, then the checkpoint, then whoever listens: see ``train/history.py``."""

    task: Task
    writer: history.Writer
    emit: Emit

    def __call__(self, report: Reported, save: Save | None) -> None:
        self.writer.append(report)
        if save is not None:
            self.writer.sync()
            self.task.checkpoints.commit(save, step=report.step, metrics=report.metrics)
        self.emit(report)


def _seal(
    task: Task,
    run_id: str,
    metrics: Metrics,
    gates: tuple[GateResult, ...],
    revision: str,
    environment: Mapping[str, Any],
    parents: tuple[Manifest, ...],
) -> Manifest | None:
    recipe, folder = task.recipe, task.out / "artifact"
    if not any(path.is_file() for path in folder.rglob("*")):
        return None
    licences = sorted({each["licence"] for each in data.recorded(task.out)})
    return artifact.seal(
        folder,
        artifact.Facts(
            name=recipe.name,
            kind=recipe.kind,
            loader=recipe.loader,
            metrics=metrics,
            gates=gates,
            config=task.config.model_dump(mode="json"),
            run=artifact.Run(
                id=run_id,
                recipe=recipe.name,
                seed=task.config.seed,
                code_revision=revision,
                environment=environment,
            ),
            data=artifact.Data(
                sha256=data.combined_sha256(task.out),
                description=data.description(task.out) or recipe.data,
                licence=" AND ".join(licences),
            ),
            licence=inputs.licence(recipe, task.config, parents),
            parents=tuple(parent.content_sha256 for parent in parents),
        ),
    )


def _ended(folder: RunFolder, result: Mapping[str, Any]) -> Result:
    """Of a run that is over."""
    return Result(
        folder=folder,
        metrics={k: math.nan if v is None else v for k, v in result["metrics"].items()},
        gates=tuple(GateResult(**gate) for gate in result["gates"]),
        manifest=artifact.verify(folder.path / "artifact") if result["artifact"] else None,
        seconds=result["seconds"],
    )
