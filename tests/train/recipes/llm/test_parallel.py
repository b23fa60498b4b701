"""Several workers are one: real processes, gloo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from models.errors import ConfigError
from tests.train.recipes.llm.experiment import Keeper, Stopped, config, train, train_with
from train.recipe import Workers
from train.recipes.llm.parallel import Group


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "adapter"), [("ddp", "lora"), ("fsdp", "none"), ("fsdp", "lora")]
)
def test_two_workers_equal_one(text: Path, tmp_path: Path, parallel: str, adapter: str) -> None:
    """Loss within 1e-4 over 20 steps, dropout and accumulation included."""
    settings = config(text, steps=20, parallel=parallel, model={"adapter": adapter})
    metrics, losses = train(settings, tmp_path / "one")
    first, second = train_with(2, settings, tmp_path / "two")
    assert first == second, "workers disagree"
    assert first["losses"] == pytest.approx(losses, abs=1e-4)
    assert first["metrics"] == pytest.approx(dict(metrics), rel=1e-3)
    assert losses[-1] < losses[0] - 0.1, "nothing was learned that could differ"
    written = sorted(path.name for path in (tmp_path / "two" / "worker-0" / "artifact").iterdir())
    assert written == sorted(path.name for path in (tmp_path / "one" / "artifact").iterdir())
    assert not list((tmp_path / "two" / "worker-1" / "artifact").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_workers(
    text: Path, tmp_path: Path, parallel: str
) -> None:
    """One worker → two → one, as when machines come and go."""
    settings = config(text, steps=9, checkpoint_every=3, parallel=parallel)
    _, losses = train(settings, tmp_path / "whole")
    keeper = Keeper(tmp_path / "kept", stop_after=3)
    with pytest.raises(Stopped):
        train(settings, tmp_path / "one", keeper=keeper)
    assert keeper.checkpoint is not None
    two = tmp_path / "two"
    shutil.copytree(keeper.checkpoint, two / "checkpoint")
    result = train_with(2, settings, two)[0]
    assert result["losses"] == pytest.approx(losses[3:], abs=1e-4)
    _, rest = train(settings, tmp_path / "three", checkpoint=two / "worker-0" / "kept" / "step-6")
    assert rest == pytest.approx(losses[6:], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_workers_that_cannot_share_a_batch_evenly_equal_one(
    text: Path, tmp_path: Path, parallel: str
) -> None:
    """As when a machine joins an elastic group."""
    settings = config(text, steps=6, parallel=parallel)
    _, losses = train(settings, tmp_path / "one")
    results = train_with(3, settings, tmp_path / "three")
    for result in results:
        assert result["losses"] == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("passes", range(1, 9))
@pytest.mark.parametrize("size", range(1, 5))
def test_every_pass_counts_once_and_every_worker_runs_as_many(passes: int, size: int) -> None:
    shares = [share(rank, size, passes) for rank in range(size)]
    assert len({len(each) for each in shares}) == 1
    assert sorted(n for each in shares for n, counts in each if counts) == list(range(passes))


def share(rank: int, size: int, passes: int) -> list[tuple[int, bool]]:
    group = Group(Workers(), torch.device("cpu"))
    group.rank, group.size = rank, size
    return group.share(range(passes))


def test_a_group_that_nobody_has_brought_together_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch\.distributed is not initialised"):
        train(config(text), tmp_path, workers=Workers(rank=0, size=3))
