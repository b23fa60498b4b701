"""A disk that is full while a checkpoint is written: a real one, and the real command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import environment
from tests.train.recipes.llm import experiment
from train import history
from train.folder import RunFolder
from train.recipes.llm import RECIPE
from train.run import run

OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
"""A process that may mount what only it sees."""

ON_A_SMALL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
from train.__main__ import main

size, disk, file, kept = sys.argv[1], *map(Path, sys.argv[2:])
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
first = main(["llm", "--config", str(file), "--out", str(disk / "run")])
there = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
second = main(["--resume", str(disk / "run")])
shutil.copytree(disk / "run", kept)
print("codes and checkpoints:", first, second, *there)
"""


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    words = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not may_mount(), reason="may not mount a small disk of its own")
def test_fine_tuning_on_a_full_disk_goes_on_with_the_same_losses(
    text: Path, tmp_path: Path
) -> None:
    """There is room for the first checkpoint, but not for two of them."""
    settings = experiment.config(text, steps=8, checkpoint_every=3, evaluate_every=2)
    asked = {"recipe": "llm", "plots": False, "config": settings.model_dump(mode="json")}
    file, disk, kept = tmp_path / "experiment.yaml", tmp_path / "disk", tmp_path / "kept"
    file.write_text(yaml.safe_dump(asked))
    disk.mkdir()
    whole = RunFolder(tmp_path / "whole")
    run(RECIPE, settings, folder=whole)
    checkpoint = whole.path / "checkpoints" / "step-0000000006"
    size = sum(path.stat().st_size for path in checkpoint.iterdir()) * 7 // 4
    words = [sys.executable, "-c", ON_A_SMALL_DISK, *map(str, (size, disk, file, kept))]
    done = subprocess.run(
        [*OWN_MOUNTS, *words],
        env=environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "The checkpoint of step 6 could not be written: the disk of" in done.stderr
    assert "step 3 is kept" in done.stderr
    assert "goes on from step 3" in done.stderr
    codes, _, checkpoints = done.stdout.splitlines()[-1].partition(" step-")
    assert codes in ("codes and checkpoints: 3 0", "codes and checkpoints: 3 1")  # a short run
    assert checkpoints == "0000000003"
    losses = {each.step: each.metrics["loss"] for each in history.read(whole.path)}
    assert losses[8] < losses[1], "nothing was learned that could be lost"
    assert {each.step: each.metrics["loss"] for each in history.read(kept)} == losses
    made = "artifact/adapter_model.safetensors"
    assert (kept / made).read_bytes() == (whole.path / made).read_bytes()
