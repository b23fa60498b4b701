"""docs/add_a_system.md: its recipe, saved as it says, is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.conftest import ROOT
from tests.documents import marked

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (block,) = marked("recipe")
    assert block.path.name == "add_a_system.md"
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "ridge.py").write_text(block.code)
    return folder


def conform(folder: Path, which: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/conformance", "-k", "ridge",
         "-m", which, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=ROOT,
        env={**os.environ, "FRONTIER_RECIPES": str(folder)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_the_recipe_of_the_document_keeps_the_contract(folder: Path) -> None:
    assert conform(folder, "not slow").startswith("5 passed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_and_its_smoke_run_does(folder: Path) -> None:
    assert "skipped" not in conform(folder, "slow")


@pytest.mark.slow
def test_the_document_says_what_it_reaches(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train", "ridge", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "FRONTIER_RECIPES": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
