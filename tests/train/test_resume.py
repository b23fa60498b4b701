"""A driver that is killed with SIGKILL and started again ends with the same curve."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.conftest import Train, environment
from train import history

pytestmark = pytest.mark.integration

STEPS = 150


def curve(out: Path) -> list[tuple[int, dict[str, float]]]:
    return [(each.step, dict(each.metrics)) for each in history.read(out)]


def test_a_killed_driver_goes_on_with_the_same_curve(
    train: Train, train_alone: Train, home: Path
) -> None:
    words = ["walk", "--set", f"steps={STEPS}", "--set", "every=7"]
    whole, broken = home / "whole", home / "broken"
    assert train(*words, "--out", str(whole)).returncode == 0
    words += ["--set", "pause_s=0.004"]
    kills = 0
    for wanted in (20, 90):  # once with some checkpoints behind it, once in a resumed attempt
        driver = subprocess.Popen(
            [sys.executable, "-m", "train", *words, "--out", str(broken)],
            env=environment(home),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        while driver.poll() is None and len(history.read(broken)) < wanted:
            time.sleep(0.02)
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
            kills += 1
        driver.wait()
    assert kills == 2
    done = train_alone("--resume", str(broken))
    assert done.returncode == 0, done.stderr
    assert "goes on from step" in done.stderr
    assert curve(broken) == curve(whole)
    assert curve(broken)[-1][0] == STEPS
    names = [path.name for path in (broken / "checkpoints").iterdir()]
    assert sorted(names) == ["step-0000000140", "step-0000000147"]


def test_sigterm_ends_a_run_in_order(home: Path) -> None:
    out = home / "run"
    driver = subprocess.Popen(
        [sys.executable, "-m", "train", "walk", "--set", "steps=5000", "--set", "pause_s=0.01",
         "--out", str(out)],
        env=environment(home),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    while driver.poll() is None and len(history.read(out)) < 3:
        time.sleep(0.01)
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=20)
    assert driver.returncode == 130
    assert f"python -m train --resume {out}" in said
    assert "Traceback" not in said
