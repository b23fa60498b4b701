"""Runs in processes of their own, with the recipes of tests/train/toys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.train.toys import copy, duo, walk
from train import __main__, discover

ROOT = Path(__file__).parents[2]
TOYS = Path(__file__).with_name("toys")

Train = Callable[..., subprocess.CompletedProcess[str]]


def environment(home: Path) -> dict[str, str]:
    """Of a process that finds the toys and keeps its things in ``home``."""
    return {
        **{name: text for name, text in os.environ.items() if not name.startswith("RAY_")},
        "FRONTIER_HOME": str(home),
        "FRONTIER_RECIPES": str(TOYS),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything durable goes."""
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys are the recipes there are."""
    recipes = {each.name: each for each in (copy.RECIPE, duo.RECIPE, walk.RECIPE)}
    found = discover.Found(recipes=recipes, broken={})
    monkeypatch.setattr(discover, "discover", lambda: found)
    monkeypatch.setattr(__main__, "discover", lambda: found)


@pytest.fixture
def train(home: Path, toys: None, capsys: pytest.CaptureFixture[str]) -> Train:
    """``python -m train WORDS…`` with the toys, in this process."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        code = __main__.main(words)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return run


@pytest.fixture
def train_alone(home: Path, tmp_path: Path) -> Train:
    """``python -m train WORDS…`` as a person runs it, from some other folder."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "train", *words],
            cwd=tmp_path,
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run
