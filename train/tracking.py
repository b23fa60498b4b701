"""Who else keeps a run's metrics: TensorBoard always, W&B and MLflow when configured.

Each is a subscriber of a few lines. What fails here never fails a run: a tracker that
raises is told about once and left alone.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from models.errors import ConfigError
from train.config import Tracking
from train.events import Event, Reported, RunEnded, RunStarted, Subscriber


def subscribers(tracking: Tracking, warn: Callable[[str], None]) -> Iterator[Subscriber]:
    """TensorBoard, and what ``tracking`` configures.

    Raises:
        ConfigError: one of them is not installed.
    """
    yield Forgiving(TensorBoard(), warn)
    if tracking.wandb is not None:
        yield Forgiving(Wandb(tracking.wandb.project, tracking.wandb.mode), warn)
    if tracking.mlflow is not None:
        yield Forgiving(Mlflow(tracking.mlflow.uri, tracking.mlflow.experiment), warn)


class Forgiving:
    """A subscriber whose failure ends its telling, not the run."""

    def __init__(self, inner: Subscriber, warn: Callable[[str], None]) -> None:
        self._inner: Subscriber | None = inner
        self._warn = warn

    def __call__(self, event: Event) -> None:
        if self._inner is None:
            return
        try:
            self._inner(event)
        except Exception as error:
            name = type(self._inner).__name__
            self._warn(f"{name} is told no more of this run: {type(error).__name__}: {error}")
            self._inner = None


class TensorBoard:
    """Event files in ``tensorboard/`` of the run."""

    def __init__(self) -> None:
        self._writer: Any = None

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                # Steps after the checkpoint are reported again: the purge hides the old ones.
                purge = event.resumed_from + 1 if event.resumed_from else None
                self._writer = _summary_writer()(
                    str(event.out / "tensorboard"),
                    purge_step=purge,
                    filename_suffix=f".{secrets.token_hex(3)}",  # its names go by the second
                )
            case Reported():
                for name, value in event.metrics.items():
                    if math.isfinite(value):
                        self._writer.add_scalar(name, value, event.step, walltime=event.time)
            case RunEnded():
                self._writer.close()


def _summary_writer() -> Any:
    """tensorboardX imports torch where there is one, for tensors, which it never gets here.
    For a run without torch that would be most of its start.
    """
    without = "torch" not in sys.modules
    if without:
        sys.modules["torch"] = None  # type: ignore[assignment]  # as if not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if without:
            del sys.modules["torch"]
    return SummaryWriter


class Wandb:
    """Weights & Biases, offline unless configured: `wandb sync` uploads later."""

    def __init__(self, project: str, mode: str) -> None:
        self._wandb = _needed("wandb")
        self._project, self._mode = project, mode
        self._run: Any = None

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._run = self._wandb.init(
                    project=self._project,
                    mode=self._mode,
                    id=event.run,
                    name=event.run,
                    group=event.recipe,
                    resume="allow",
                    dir=str(event.out),
                    config=dict(event.config),
                    settings=self._wandb.Settings(console="off", silent=True),
                )
            case Reported():
                self._run.log(dict(event.metrics), step=event.step)
            case RunEnded():
                self._run.summary.update({"status": event.status, **event.metrics})
                self._run.finish(exit_code=1 if event.status == "failed" else 0)


class Mlflow:
    """MLflow: a run per run, found again by its id when it goes on."""

    TAG = "frontier.run"

    def __init__(self, uri: str | None, experiment: str) -> None:
        self._mlflow = _needed("mlflow")
        self._uri, self._experiment = uri, experiment
        self._client: Any = None
        self._run = ""

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                uri = self._uri or f"sqlite:///{event.out / 'mlflow.db'}"
                self._client = self._mlflow.MlflowClient(tracking_uri=uri)
                self._run = self._found(event) or self._made(event)
            case Reported():
                self._log(event.metrics, step=event.step, time_ms=int(event.time * 1000))
            case RunEnded():
                # What the run ended with, apart from the curves of the same names.
                self._log({f"final.{k}": v for k, v in event.metrics.items()}, step=0, time_ms=None)
                self._client.set_tag(self._run, "frontier.status", event.status)
                ended = "FAILED" if event.status == "failed" else "FINISHED"
                self._client.set_terminated(self._run, status=ended)

    def _experiment_id(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment)
        if known is not None:
            return str(known.experiment_id)
        return str(self._client.create_experiment(self._experiment))

    def _found(self, event: RunStarted) -> str:
        runs = self._client.search_runs(
            [self._experiment_id()], filter_string=f"tags.`{self.TAG}` = '{event.run}'"
        )
        return str(runs[0].info.run_id) if runs else ""

    def _made(self, event: RunStarted) -> str:
        tags = {self.TAG: event.run, "frontier.recipe": event.recipe}
        run = self._client.create_run(self._experiment_id(), run_name=event.run, tags=tags)
        for key, value in _flat(event.config):
            self._client.log_param(run.info.run_id, key, str(value)[:500])
        return str(run.info.run_id)

    def _log(self, metrics: Mapping[str, float], *, step: int, time_ms: int | None) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._client.log_metric(self._run, name, value, step=step, timestamp=time_ms)


def _needed(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracking.{module} needs pip install 'frontier-run[tracking]' ({error})"
        ) from None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
