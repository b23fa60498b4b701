"""``python -m train`` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.train.conftest import Train
from train import __main__
from train.recipes.llm import LlmConfig


def test_list_and_show(train: Train, train_alone: Train) -> None:
    listed = train_alone("--list")
    assert listed.returncode == 0
    assert "walk" in listed.stdout
    assert "A walk of known steps" in listed.stdout
    assert "vision" in listed.stdout
    shown = train("--show", "walk")
    assert shown.returncode == 0
    for text in ("noise.scale", "float > 0", "How far.", "steps >= 10 (one step)", "log=True"):
        assert text in shown.stdout


def test_a_run_from_a_file_with_settings(train: Train, tmp_path: Path, home: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text("recipe: walk\nrun_name: first\nconfig: {steps: 12, noise: {scale: 2}}\n")
    done = train("--config", str(file), "--set", "noise.scale=1e-1", "--set", "seed=4")
    assert done.returncode == 0, done.stderr
    assert "gate passed: steps 12, expected >= 10 (one step)" in done.stdout
    (out,) = (home / "runs" / "walk").iterdir()
    assert "first" in out.name
    config = yaml.safe_load((out / "config.yaml").read_text())["config"]
    assert config["noise"] == {"scale": 0.1}
    assert (config["steps"], config["seed"]) == (12, 4)
    assert (out / "plots" / "place.png").stat().st_size > 1000
    assert list((out / "tensorboard").iterdir())


def test_one_file_an_experiment_with_the_keys_of_the_specification(tmp_path: Path) -> None:
    """``run_name, seed, model, training, data, logging`` (spec G1), nothing around them."""
    keys = {
        "seed": 3,
        "model": {"source": "tiny"},
        "training": {"steps": 2, "optimiser": {"name": "lion"}},
        "data": {"train": "rows.jsonl"},
        "logging": {"every": 1},
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({"run_name": "first", **keys}))
    words = ["llm", "--config", str(file), "--set", "training.steps=4"]
    plan = __main__.plan(__main__.parser().parse_args(words))
    keys["training"] |= {"steps": 4}  # type: ignore[operator]
    assert plan.config == LlmConfig.model_validate(keys)
    assert "first" in plan.folder.id


def test_exit_codes_and_one_line_for_each_error(train: Train, tmp_path: Path) -> None:
    assert train("walk", "--set", "steps=3").returncode == 1
    wrong = train("walk", "--set", "wrong_at=2")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == "error: step 2 is wrong"
    full = train("walk", "--set", "full_at=5", "--out", str(tmp_path / "r"))
    assert full.returncode == 3
    assert "checkpoint of step 5 could not be written" in full.stderr
    assert "Traceback" not in full.stderr
    assert f"go on with: python -m train --resume {tmp_path / 'r'}" in full.stderr
    assert train("--resume", str(tmp_path / "r")).returncode == 0


def test_smoke(train: Train, tmp_path: Path) -> None:
    done = train("walk", "--smoke", "--out", str(tmp_path / "r"), "--set", "noise.scale=3")
    assert done.returncode == 0
    request = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert request["smoke"]
    assert request["config"]["steps"] == 5
    assert request["config"]["noise"] == {"scale": 3.0}


def test_resume_of_a_run_that_ended_says_its_result(train: Train, tmp_path: Path) -> None:
    out = str(tmp_path / "r")
    first = train("walk", "--out", out)
    again = train("--resume", out)
    assert (first.returncode, again.returncode) == (0, 0)
    assert again.stdout == first.stdout


def test_register_and_start_from_it(train: Train, tmp_path: Path) -> None:
    done = train("walk", "--register", "my-walk", "--out", str(tmp_path / "walk"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "registered my-walk@1"
    failed = train("walk", "--set", "steps=3", "--register", "my-walk")
    assert failed.returncode == 1
    assert "not registered" in failed.stderr
    copied = train("copy", "--input", "walk=my-walk@1", "--out", str(tmp_path / "copy"))
    assert copied.returncode == 0, copied.stderr
    parent, child = (
        json.loads((tmp_path / name / "artifact" / "manifest.json").read_text())
        for name in ("walk", "copy")
    )
    assert child["parents"] == [parent["content_sha256"]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["wlak"], "unknown recipe 'wlak'; did you mean 'walk'? Known: "),
        ([], "which recipe? Known: "),
        (["walk", "--set", "step=3"], "unknown key 'step'; did you mean 'steps'? Known: seed, "),
        (["walk", "--set", "noise.size=3"], "unknown key 'size'. Known: scale (in noise)"),
        (["walk", "--set", "steps=none"], "steps: Input should be a valid integer"),
        (["walk", "--set", "steps"], "--set steps: expected key=value"),
        (["walk", "--set", "steps.a=1", "--set", "steps.a.b=1"], "a is 1 and has no keys"),
        (["walk", "--workers", "two"], "--workers: "),
        (["walk", "--workers", "4-2"], "4 is more than 2"),
        (["walk", "--workers", "2"], "does not divide its work"),
        (["walk", "--input", "walk=/a"], "unknown input 'walk'. Known: none"),
        (["copy"], "starts from an artifact of kind 'walk': give --input walk=RUN_DIR"),
        (["copy", "--input", "walk=/nowhere"], "there is no such folder"),
        (["copy", "--input", "walk"], "expected KIND=RUN_DIR"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        (["--resume", "/nowhere"], "there is no run in this folder"),
        (["walk", "--register", "not a name"], "'not a name' cannot name a model"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], says: str, train: Train) -> None:
    done = train(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
