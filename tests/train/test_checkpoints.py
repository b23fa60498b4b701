"""Checkpoints: whole or not at all, the last few and the best."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from models.errors import Unavailable
from train.checkpoints import Best, Checkpoints


def save(folder: Path, text: str = "weights") -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "weights").write_text(text)


def break_off(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise RuntimeError("killed")


def fill_the_disk(folder: Path) -> None:
    (folder / "half").write_text("half")
    (folder / "weights").symlink_to("/dev/full")
    (folder / "weights").write_text("weights")


def test_a_checkpoint_has_what_was_saved(tmp_path: Path) -> None:
    made = Checkpoints(out=tmp_path).commit(save, step=3, metrics={"loss": 1.5})
    assert (made.path / "deep" / "weights").read_text() == "weights"
    last = Checkpoints(out=tmp_path).last()
    assert last == made
    assert last.metrics == {"loss": 1.5}


def test_none_at_first(tmp_path: Path) -> None:
    kept = Checkpoints(out=tmp_path, best=Best(metric="loss", mode="min"))
    assert kept.last() is None
    assert kept.the_best() is None
    kept.sweep()


@pytest.mark.parametrize(
    ("mode", "losses", "steps"),
    [
        ("min", [5.0, 1.0, 4.0, 3.0, 2.0], [2, 4, 5]),
        ("max", [5.0, 1.0, 4.0, 3.0, 2.0], [1, 4, 5]),
        ("min", [1.0, 1.0, 4.0, 3.0], [2, 3, 4]),
        ("min", [float("nan"), 5.0, float("inf"), 3.0], [3, 4]),
        ("min", [1.0, 2.0], [1, 2]),
    ],
)
def test_the_last_two_and_the_best_are_kept(
    mode: str, losses: list[float], steps: list[int], tmp_path: Path
) -> None:
    kept = Checkpoints(out=tmp_path, keep=2, best=Best(metric="loss", mode=mode))
    for step, loss in enumerate(losses, 1):
        kept.commit(save, step=step, metrics={"loss": loss})
    assert [each.step for each in kept.all()] == steps


def test_a_metric_that_nobody_reports_is_no_reason_to_keep(tmp_path: Path) -> None:
    kept = Checkpoints(out=tmp_path, keep=1, best=Best(metric="accuracy", mode="max"))
    for step in (1, 2, 3):
        kept.commit(save, step=step, metrics={"loss": 1.0})
    assert [each.step for each in kept.all()] == [3]
    assert kept.the_best() is None


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    kept = Checkpoints(out=tmp_path)
    before = kept.commit(save, step=1, metrics={})
    with pytest.raises(RuntimeError, match="killed"):
        kept.commit(break_off, step=2, metrics={})
    assert list(kept.folder.iterdir()) == [before.path]


def test_a_full_disk_is_one_clear_error_and_spares_the_others(tmp_path: Path) -> None:
    kept = Checkpoints(out=tmp_path)
    before = kept.commit(save, step=10, metrics={})
    with pytest.raises(Unavailable) as told:
        kept.commit(fill_the_disk, step=20, metrics={})
    assert "checkpoint of step 20" in told.value.message
    assert "is full" in told.value.message
    assert "step 10 is kept" in told.value.message
    assert kept.all() == [before]
    assert (before.path / "deep" / "weights").read_text() == "weights"
    assert list(kept.folder.iterdir()) == [before.path]


def test_a_full_disk_is_seen_behind_a_library(tmp_path: Path) -> None:
    def wrapped(folder: Path) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with pytest.raises(Unavailable, match="none was written before"):
        Checkpoints(out=tmp_path).commit(wrapped, step=1, metrics={})


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    kept = Checkpoints(out=tmp_path)
    whole = kept.commit(save, step=1, metrics={})
    save(_made(kept.folder / ".step-0000000002"))
    save(_made(kept.folder / ".step-0000000000.old"))
    assert kept.last() == whole
    kept.sweep()
    assert list(kept.folder.iterdir()) == [whole.path]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_run_that_began_anew_forgets_the_future(tmp_path: Path) -> None:
    kept = Checkpoints(out=tmp_path, keep=3)
    for step in (10, 20, 30):
        kept.commit(save, step=step, metrics={})
    kept.commit(partial(save, text="again"), step=20, metrics={})
    assert [each.step for each in kept.all()] == [10, 20]
    last = kept.last()
    assert last is not None
    assert (last.path / "deep" / "weights").read_text() == "again"


class Story(RuleBasedStateMachine):
    """Commits, failures, kills in mid-write and new processes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.out = Path(tempfile.mkdtemp())
        self.kept = Checkpoints(out=self.out, keep=2, best=Best(metric="loss", mode="min"))
        self.committed: dict[int, float] = {}
        self.step = 0

    @rule(loss=st.floats(-10, 10), stride=st.integers(1, 5))
    def commit(self, loss: float, stride: int) -> None:
        self.step += stride
        self.kept.commit(partial(save, text=str(loss)), step=self.step, metrics={"loss": loss})
        self.committed[self.step] = loss

    @rule(how=st.sampled_from([break_off, fill_the_disk]))
    def fail(self, how: object) -> None:
        with pytest.raises((RuntimeError, Unavailable)):
            self.kept.commit(how, step=self.step + 1, metrics={"loss": -100.0})  # type: ignore[arg-type]

    @rule()
    def kill_while_writing(self) -> None:
        partial_folder = self.kept.folder / f".step-{self.step + 1:010d}"
        partial_folder.mkdir(parents=True, exist_ok=True)
        (partial_folder / "half").write_text("half")

    @rule()
    def begin_again(self) -> None:
        self.kept.sweep()
        last = self.kept.last()
        self.step = last.step if last else 0

    @invariant()
    def the_newest_and_the_best_are_whole(self) -> None:
        there = {each.step: each for each in self.kept.all()}
        for step, each in there.items():
            assert (each.path / "deep" / "weights").read_text() == str(self.committed[step])
            assert json.loads((each.path / "checkpoint.json").read_text())["step"] == step
        assert set(sorted(self.committed)[-2:]) <= set(there)
        assert len(there) <= 3
        if self.committed:
            best = self.kept.the_best()
            assert best is not None
            assert best.metrics["loss"] == min(self.committed.values())

    def teardown(self) -> None:
        shutil.rmtree(self.out)


Story.TestCase.settings = settings(
    max_examples=15, stateful_step_count=15,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
test_any_story = Story.TestCase
