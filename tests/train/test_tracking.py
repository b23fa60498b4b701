"""Who else keeps a run's metrics."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from train.config import Mlflow as MlflowConfig
from train.config import Tracking, Wandb
from train.events import Event, Reported, RunEnded, RunStarted
from train.plots import Plots, draw
from train.tracking import Forgiving, TensorBoard, subscribers


def story(out: Path, resumed_from: int = 0, until: int = 4) -> list[Event]:
    return [
        RunStarted(
            run="run-1",
            recipe="walk",
            out=out,
            config={"steps": 3, "noise": {"scale": 1.0}},
            resumed_from=resumed_from,
        ),
        *(
            Reported(step=step, metrics={"loss": 1 / step, "bad": float("nan")}, time=step)
            for step in range(resumed_from + 1, until)
        ),
        RunEnded(status="passed", metrics={"loss": 0.25}, seconds=1.0),
    ]


def tell(subscriber: Any, events: list[Event]) -> None:
    for event in events:
        subscriber(event)


def test_a_tracker_that_fails_is_left_alone() -> None:
    said: list[str] = []
    seen: list[Event] = []

    def broken(event: Event) -> None:
        seen.append(event)
        raise OSError("no network")

    tell(Forgiving(broken, said.append), story(Path("/nowhere")))
    assert len(seen) == 1
    assert said == ["function is told no more of this run: OSError: no network"]


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """What the event files say, by TensorBoard's own record format."""
    import struct

    from tensorboardX.proto.event_pb2 import Event as Record

    found = []
    for file in sorted(folder.iterdir()):
        raw, place = file.read_bytes(), 0
        while place < len(raw):
            (size,) = struct.unpack("<Q", raw[place : place + 8])
            record = Record.FromString(raw[place + 12 : place + 12 + size])
            found += [(record.step, v.tag, v.simple_value) for v in record.summary.value]
            place += 16 + size
    return found


def test_tensorboard(tmp_path: Path) -> None:
    tell(TensorBoard(), story(tmp_path))
    tell(TensorBoard(), story(tmp_path, resumed_from=2, until=5))
    told = scalars(tmp_path / "tensorboard")
    losses = sorted((step, round(value, 3)) for step, tag, value in told if tag == "loss")
    assert losses == [(1, 1.0), (2, 0.5), (3, 0.333), (3, 0.333), (4, 0.25)]


def test_what_is_not_installed_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"tracking\.wandb needs pip install 'frontier-run\[tracking\]'"
    ):
        list(subscribers(Tracking(wandb=Wandb()), print))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, told to MLflow
def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs frontier-run[tracking]")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking = Tracking(mlflow=MlflowConfig(uri=uri))
    for events in (story(tmp_path), story(tmp_path, resumed_from=2, until=5)):
        said: list[str] = []
        _, told = subscribers(tracking, said.append)
        tell(told, events)
        assert said == []
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("frontier-run")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["noise.scale"] == "1.0"
    assert run.data.metrics["final.loss"] == 0.25
    assert {m.step for m in client.get_metric_history(run.info.run_id, "loss")} == {1, 2, 3, 4}
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs frontier-run[tracking]")
    monkeypatch.setenv("HOME", str(tmp_path))
    said: list[str] = []
    _, told = subscribers(Tracking(wandb=Wandb()), said.append)
    tell(told, story(tmp_path))
    assert said == []
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-run-1")
    (log,) = folder.glob("*.wandb")
    until = time.monotonic() + 30
    while b"loss" not in log.read_bytes():  # its own process writes, a little later
        assert time.monotonic() < until
        time.sleep(0.1)


def test_curves_are_drawn_from_the_history(tmp_path: Path) -> None:
    from contextlib import closing

    from train import history

    with closing(history.Writer(tmp_path)) as writer:
        for step in range(1, 5):
            metrics = {"loss": 1 / step, "a/b": 1.0, "nan": float("nan")}
            writer.append(Reported(step=step, metrics=metrics, time=0.0))
    assert sorted(path.name for path in draw(tmp_path)) == ["a-b.png", "loss.png"]
    assert (tmp_path / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_plots_come_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    from train import history

    now = [0.0]
    plots = Plots(every_s=60, clock=lambda: now[0])
    events = story(tmp_path, until=6)
    plots(events[0])
    drawn = []
    with (tmp_path / history.NAME).open("a") as file:
        for event in events[1:-1]:
            assert isinstance(event, Reported)
            file.write(history.encode(event))
            file.flush()
            now[0] += 35
            plots(event)
            drawn.append((tmp_path / "plots").exists())
    assert drawn == [False, True, True, True, True]
    plots(events[-1])
