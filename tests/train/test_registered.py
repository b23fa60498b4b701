"""What a run starts from stays until the run has ended, whoever archives and collects it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from models import artifact
from models.versions import UseKind
from tests.train.collecting import archive_and_collect, uses
from tests.train.conftest import Train
from tests.train.toys import copy
from train import discover, registered
from train.recipe import Config, Metrics, RunContext


@pytest.fixture
def walk(train: Train, tmp_path: Path) -> str:
    """The content hash of ``walk@1``."""
    assert train("walk", "--register", "walk", "--out", str(tmp_path / "walk")).returncode == 0
    return artifact.read(tmp_path / "walk" / "artifact").content_sha256


@contextmanager
def carrying_out(body: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipe ``copy`` does something else."""
    recipe = replace(copy.RECIPE, run=body)  # type: ignore[arg-type]
    found = discover.Found(recipes={"copy": recipe}, broken={})
    with monkeypatch.context() as patch:
        patch.setattr(discover, "discover", lambda: found)
        yield


def test_inputs_of_a_run_are_not_collected_before_it_has_ended(
    walk: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a local store a run reads them where they lie."""
    seen: list[bool] = []

    def body(config: Config, context: RunContext) -> Metrics:
        seen.append(archive_and_collect("walk@1"))
        if len(seen) == 1:
            raise RuntimeError("stopped")
        return copy.run(config, context)

    out = tmp_path / "copy"
    with carrying_out(body, monkeypatch):
        words = ["copy", "--input", "walk=walk@1", "--out", str(out)]
        assert train(*words).returncode == 3
        (use,) = uses()
        assert (use.kind, use.name, use.replica) == (UseKind.RUN, "copy", "walk"), "it may go on"
        assert use.artifact == walk
        done = train("--resume", str(out))
        assert done.returncode == 0, done.stderr
    assert seen == [True, True]
    assert uses() == []
    assert not archive_and_collect("walk@1")


def test_a_use_is_repeated_until_it_is_over(home: Path) -> None:
    def seen() -> datetime:
        (use,) = uses()
        return use.seen

    needed, warnings = {"walk": "a" * 64}, list[str]()
    with registered.held(needed, by="run-1", warn=warnings.append, every_s=0.02):
        first, patience = seen(), time.monotonic() + 30
        while seen() == first:
            assert time.monotonic() < patience, "nobody repeats it"
            time.sleep(0.02)
    last = seen()
    time.sleep(0.1)
    assert seen() == last, "it is repeated by nobody"
    registered.release(needed, by="run-1", warn=warnings.append)
    assert uses() == []
    assert warnings == []


def test_a_registry_that_does_not_answer_costs_a_warning_and_no_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONTIER_DATABASE", "postgresql+asyncpg://127.0.0.1:1/nobody")
    warnings: list[str] = []
    with registered.held({"walk": "a" * 64}, by="run-1", warn=warnings.append):
        pass
    (warning,) = warnings
    assert warning.startswith("the registry does not know that this run needs its inputs: ")
