"""A small run in this process: the tiny model, text of our own, every report kept."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from train.context import Context
from train.events import Reported
from train.recipe import Metrics, Save, Workers
from train.recipes.llm import LlmConfig
from train.recipes.llm.callbacks import Callback, StepEnd
from train.recipes.llm.config import OptimiserConfig
from train.recipes.llm.finetune import finetune

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird", "fly", "two")
ALONE = Workers()


def write_text(folder: Path, documents: int = 40) -> Path:
    """Documents of natural, that is uneven, lengths."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        words = (draw.choice(WORDS) for _ in range(draw.randint(3, 30)))
        (folder / f"{number:03}.txt").write_text(" ".join(words))
    return folder


def config(data: Path | str, **training: Any) -> LlmConfig:
    """Tiny and quick; ``model`` and ``seed`` are taken out of ``training``."""
    model = {"source": "tiny"} | training.pop("model", {})
    seed = training.pop("seed", 0)
    settings = {
        "steps": 6,
        "batch_size": 4,
        "sequence_length": 96,
        "checkpoint_every": 100,
        "evaluate_every": None,
        "optimiser": {"learning_rate": 1e-2},
    }
    return LlmConfig.model_validate(
        {
            "seed": seed,
            "model": model,
            "training": settings | training,
            "data": {"train": str(data), "held_out": 0.2},
            "logging": {"every": 1},
        }
    )


def rmsprop(groups: list[dict[str, Any]], settings: OptimiserConfig) -> torch.optim.Optimizer:
    """An optimiser that the configuration names."""
    return torch.optim.RMSprop(groups, lr=settings.learning_rate)


def halving(done: float, settings: OptimiserConfig) -> float:
    """A schedule that the configuration names: half as much at each quarter of the way."""
    return float(0.5 ** int(4 * done))


class Curve(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, event: StepEnd) -> None:
        self.losses.append(event.loss)


class Stopped(Exception):
    pass


class Pause(Callback):
    """Time enough to kill somebody between two steps."""

    def on_step(self, event: StepEnd) -> None:
        time.sleep(0.1)


class Halt(Callback):
    """A callback that the configuration names."""

    def on_step(self, event: StepEnd) -> None:
        raise Stopped


class Keeper:
    """Keeps reports and checkpoints, as the run directory would; may stop a run."""

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.folder = folder
        self.stop_after = stop_after
        self.reports: list[Reported] = []
        self.checkpoint: Path | None = None

    def __call__(self, report: Reported, save: Save | None) -> None:
        self.reports.append(report)
        if save is not None:
            self.checkpoint = self.folder / f"step-{report.step}"
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            self.checkpoint.mkdir(parents=True)
            save(self.checkpoint)
        if report.step == self.stop_after:
            raise Stopped

    def losses(self) -> Mapping[int, float]:
        return {report.step: report.metrics["loss"] for report in self.reports}


def train(
    settings: LlmConfig,
    out: Path,
    *,
    keeper: Keeper | None = None,
    checkpoint: Path | None = None,
    workers: Workers = ALONE,
    callbacks: Sequence[Callback] = (),
) -> tuple[Metrics, list[float]]:
    """Metrics, and the loss of every step."""
    curve = Curve()
    context = Context(
        out=out,
        workers=workers,
        checkpoint=checkpoint,
        on_report=keeper or Keeper(out / "kept"),
    )
    metrics = finetune(settings, context, [curve, *callbacks])
    return metrics, curve.losses


def train_in_group(rank: int, size: int, port: int, settings: LlmConfig, out: Path) -> None:
    """One of ``size`` processes; the first one writes ``result.json``. Goes on from
    ``out/checkpoint`` where there is one.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    try:
        here = out / f"worker-{rank}"
        shared = out / "checkpoint"
        metrics, losses = train(
            settings,
            here,
            keeper=Keeper(here / "kept"),
            checkpoint=shared if shared.is_dir() else None,
            workers=Workers(rank=rank, size=size),
        )
        result = {"metrics": dict(metrics), "losses": losses}
        (out / f"result-{rank}.json").write_text(json.dumps(result))
    finally:
        torch.distributed.destroy_process_group()
    # Not through the interpreter's end: Gloo's threads may still hold tensors then, and abort the
    # process when they let go of them (pytorch/pytorch#190489; seen here once in some dozen runs).
    os._exit(0)


def train_with(size: int, settings: LlmConfig, out: Path) -> list[dict[str, Any]]:
    """Each worker's result."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_in_group, (size, port, settings, out), nprocs=size)
    return [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(size)]
