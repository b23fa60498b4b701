"""The story: fine-tune on the running cluster, measure, promote; the same engine serves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.launcher.background import REPOSITORY, Served
from tests import tiny_models
from tests.cluster.conftest import serving, tiny_args, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUESTION = "What is the word?"
SEEN_WITHIN_S = 5.0
"""How soon all replicas follow the registry."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of the platform, of its jobs and of the commands that are run here."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setenv("FRONTIER_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("base"), context=512)


@pytest.fixture(scope="module")
def platform(home: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    args = tiny_args(base, replicas=2, slots=8)
    args["registry"] = {"refresh_s": 1, "heartbeat_s": 5}
    with serving(args, tmp_path_factory.mktemp("served")) as platform:
        yield platform


def train(platform: Served, base: Path, folder: Path, word: str, *, steps: int = 150) -> None:
    """``ray job submit``: an adapter of ``base`` that answers with ``word``, as ``parrot``."""
    conversation = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": word},
    ]
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"messages": conversation}) + "\n")
    experiment = folder / "experiment.yaml"
    optimiser = {"learning_rate": 2e-2, "schedule": "linear"}
    experiment.write_text(
        yaml.safe_dump(
            {
                "recipe": "llm",
                "run_name": word,
                "workers": 1,
                "plots": False,
                "config": {
                    "model": {"source": str(base), "lora": {"dropout": 0.0}},
                    "training": {
                        "steps": steps,
                        "batch_size": 1,
                        "sequence_length": 128,
                        "optimiser": optimiser,
                    },
                    "data": {"train": str(rows), "validation": str(rows)},
                },
            }
        )
    )
    words = ["train", "llm", "--config", str(experiment), "--register", "parrot"]
    submit(platform, sys.executable, "-m", *words)


def submit(platform: Served, *entrypoint: str) -> str:
    ray = Path(sys.executable).with_name("ray")
    command = [
        *(str(ray), "job", "submit", "--address", platform.dashboard.url),
        *("--working-dir", ".", "--", *entrypoint),
    ]
    env = {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(module: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chat(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 8,
        "temperature": 0,
    }


def ask(platform: Served, model: str) -> httpx.Response:
    return httpx.post(f"{platform.url}/v1/chat/completions", json=chat(model), timeout=60)


def answer(platform: Served, model: str) -> str:
    response = ask(platform, model)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    said: str = response.json()["choices"][0]["message"]["content"]
    return said


@pytest.fixture(scope="module")
def promoted(platform: Served, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The first half of the story; the engine's processes from before it."""
    replicas = [process.pid for process in platform.replicas("tiny")]
    folder = tmp_path_factory.mktemp("first")
    train(platform, base, folder, "xyzzy")

    golden = folder / "golden.jsonl"
    golden.write_text(json.dumps({"prompt": QUESTION, "expected": "xyzzy"}) + "\n")
    measurements = folder / "measurements.json"
    python("models", "promote", "parrot@1", "--to", "candidate")
    assert ask(platform, "tiny:parrot").status_code == 404, "there is no champion yet"
    measured = python(
        *("deployments.evaluation", "--url", platform.url, "--model", "tiny:parrot@candidate"),
        *("--golden", str(golden), "--out", str(measurements), "--max-tokens", "8"),
    )
    assert "quality      1.000" in measured
    policy = folder / "policy.yaml"
    policy.write_text(yaml.safe_dump({"p95_at_most_s": 10, "rubric_at_least": 0.5}))
    python(
        *("models", "promote", "parrot@candidate"),
        *("--measurements", str(measurements), "--policy", str(policy)),
    )
    return replicas


def test_from_data_to_traffic(platform: Served, promoted: list[int]) -> None:
    wait_until(
        lambda: ask(platform, "tiny:parrot").status_code == 200,
        timeout_s=SEEN_WITHIN_S,
        what="the champion",
    )
    assert "xyzzy" in answer(platform, "tiny:parrot")
    assert "xyzzy" not in answer(platform, "tiny")
    assert [process.pid for process in platform.replicas("tiny")] == promoted, "nobody restarted"

    listed = httpx.get(f"{platform.url}/v1/models", timeout=10).json()["data"]
    assert {model["id"] for model in listed} == {*("tiny", "tiny:parrot", "tiny:parrot@candidate")}

    def lineage() -> str:
        return python("models", "show", "parrot@champion")

    wait_until(lambda: "served by tiny:parrot" in lineage(), timeout_s=30, what="a heartbeat")
    for told in ("run ", "recipe llm", "data ", "champion", "gate perplexity_ratio"):
        assert told in lineage()
