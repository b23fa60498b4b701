"""``python -m tune`` as a person runs it: a real recipe, a Ray of its own, what is left behind."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import ROOT, environment
from train.folder import RunFolder
from tune import results
from tune.config import read_resolved
from tune.journal import Status, best, read

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SWEEPS = ROOT / "tune" / "sweeps"
QUICK = ["--set", "folds=3", "--set", "samples=300"]


def python(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=tmp_path,
        env=environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_a_sweep_from_a_file_to_the_run_of_its_best_configuration(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    file = str(SWEEPS / "hyperparameters-asha.yaml")
    done = python(tmp_path, "tune", "--config", file, "--trials", "8", *QUICK, "--out", str(out))
    assert done.returncode == 0, done.stderr
    trials = read(out).trials
    sweep = read_resolved(out)
    assert sweep is not None
    assert len(trials) == 8
    assert {trial.status for trial in trials} <= {Status.FINISHED, Status.STOPPED}
    found = best(trials, "svc_accuracy", "max")
    assert found is not None
    assert found.final is not None
    reached = found.final["svc_accuracy"]
    assert reached > 0.8

    head, first, *_ = done.stdout.splitlines()
    assert head.split() == ["trial", "status", "svc_accuracy", "C", "gamma", "steps", "time"]
    assert first.split()[:3] == [str(found.number), "finished", f"{reached:.5g}"]
    assert f"trial {found.number} " in done.stdout
    assert "8/8 trials" in done.stderr
    names = (results.TABLE, results.BEST, results.REPORT, results.PARALLEL, results.HISTORY)
    for name in names:
        assert f"{out / name}\n" in done.stdout
    with (out / results.TABLE).open() as file_:
        rows = list(csv.DictReader(file_))
    assert [int(row["trial"]) for row in rows] == list(range(8))
    assert float(rows[found.number]["svc_accuracy"]) == reached
    for name in (results.PARALLEL, results.HISTORY):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"<script.*Plotly", (out / results.REPORT).read_text(), re.DOTALL)

    config = yaml.safe_load((out / results.BEST).read_text())
    assert config["recipe"] == "hyperparameters"
    assert config["config"]["C"] == found.point["C"]
    trained = python(
        tmp_path, "train", "--config", str(out / results.BEST), "--out", str(tmp_path / "run")
    )
    assert trained.returncode in (0, 1), trained.stderr  # few digits: the gate may be too high
    result = RunFolder(tmp_path / "run").result()
    assert result is not None
    assert result["metrics"]["svc_accuracy"] == reached
    assert (trained.returncode == 0) == (reached >= 0.985) == ("passes the gates" in done.stdout)


def test_a_sweep_in_which_every_trial_fails_ends_with_1_and_says_so(tmp_path: Path) -> None:
    """There are fewer digits of each kind than folds."""
    out = tmp_path / "sweep"
    done = python(
        tmp_path, "tune", "hyperparameters", "--search", "random", "--trials", "2",
        *("--set", "samples=100", "--set", "folds=50", "--out", str(out)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"no trial had a result; tracebacks are in {out}/trials/*/error.txt"
    )
    assert "Traceback" not in done.stderr
    assert [trial.status for trial in read(out).trials] == [Status.FAILED] * 2
    assert "trial 0 failed: ValueError('n_splits=50 cannot be greater" in done.stdout
    assert "n_splits=50" in (out / "trials" / "0001" / "error.txt").read_text()
    assert not (out / results.BEST).exists()
    assert not (out / results.HISTORY).exists()
    assert json.loads((out / "trials.jsonl").read_text().splitlines()[-1])["status"] == "failed"
