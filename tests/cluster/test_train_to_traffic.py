"""The story: fine-tune on the running cluster, measure, promote; the same engine serves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.launcher.background import REPOSITORY, Served
from tests import tiny_models
from tests.cluster.conftest import serving, tiny_args, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUESTION, WORD = "What is the word?", "xyzzy"
SEEN_WITHIN_S = 5.0
"""How soon all replicas follow the registry."""


def test_from_data_to_traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    base = tiny_models.make("llama", tmp_path / "base", context=512)
    args = tiny_args(base, replicas=2, slots=8)
    args["registry"] = {"refresh_s": 1, "heartbeat_s": 5}
    with serving(args, tmp_path) as platform:
        wait_until(lambda: len(platform.replicas("tiny")) == 2, timeout_s=60, what="both replicas")
        replicas = [process.pid for process in platform.replicas("tiny")]
        train(platform, base, tmp_path)
        assert ask(platform, "tiny:parrot").status_code == 404, "nobody has promoted it"

        measurements = evaluate(platform, tmp_path)
        promote("parrot@candidate", measurements, tmp_path)
        wait_until(
            lambda: ask(platform, "tiny:parrot").status_code == 200,
            timeout_s=SEEN_WITHIN_S,
            what="the champion",
        )
        assert WORD in answer(platform, "tiny:parrot")
        assert WORD not in answer(platform, "tiny")
        assert [process.pid for process in platform.replicas("tiny")] == replicas

        listed = httpx.get(f"{platform.url}/v1/models", timeout=10).json()["data"]
        names = [model["id"] for model in listed]
        assert names == ["tiny", "tiny:parrot", "tiny:parrot@candidate"]
        wait_until(lambda: "served by tiny:parrot" in lineage(), timeout_s=30, what="a heartbeat")
        told = lineage()
    for fact in ("run ", "recipe llm", "data ", "gate perplexity_ratio", "champion"):
        assert fact in told, told


def evaluate(platform: Served, folder: Path) -> Path:
    """Measure ``parrot@1``, as a candidate that is really served."""
    python("models", "promote", "parrot@1", "--to", "candidate")
    golden, measurements = folder / "golden.jsonl", folder / "measurements.json"
    golden.write_text(json.dumps({"prompt": QUESTION, "expected": WORD}) + "\n")
    told = python(
        *("deployments.evaluation", "--url", platform.url, "--model", "tiny:parrot@candidate"),
        *("--golden", str(golden), "--out", str(measurements), "--max-tokens", "8"),
    )
    assert "quality      1.000" in told
    return measurements


def promote(reference: str, measurements: Path, folder: Path) -> None:
    """Through the gates, but for what a random model cannot do: refuse what is unsafe."""
    policy = folder / "policy.yaml"
    policy.write_text(yaml.safe_dump({"p95_at_most_s": 10, "rubric_at_least": 0.5}))
    words = [reference, "--measurements", str(measurements), "--policy", str(policy)]
    python("models", "promote", *words)


def lineage() -> str:
    return python("models", "show", "parrot@champion")


def train(platform: Served, base: Path, folder: Path) -> None:
    """``ray job submit``: an adapter of ``base`` that knows the word, registered as ``parrot``."""
    conversation = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": WORD},
    ]
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"messages": conversation}) + "\n")
    experiment = folder / "experiment.yaml"
    optimiser = {"learning_rate": 2e-2, "schedule": "linear"}
    experiment.write_text(
        yaml.safe_dump(
            {
                "recipe": "llm",
                "run_name": "story",
                "workers": 1,
                "plots": False,
                "config": {
                    "model": {"source": str(base), "lora": {"dropout": 0.0}},
                    "training": {
                        "steps": 150,
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
    submit(platform, "python", "-m", *words)


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
