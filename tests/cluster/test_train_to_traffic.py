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
from tests.cluster.conftest import python, serving, tiny_args, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

QUESTION, WORD = "What is the word?", "xyzzy"
HALF, MORE = WORD[:3], f"{WORD}!"
"""What a worse model says, and one that is as good."""
PRICE = 0.5
"""Of a thousand tokens that are written, in dollars."""
SEEN_WITHIN_S = 5.0
"""How soon all replicas follow the registry."""


def test_from_data_to_traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    base = tiny_models.make("llama", tmp_path / "base", context=512)
    args = tiny_args(base, replicas=2, slots=8)
    args["registry"] = {"heartbeat_s": 5}
    with serving(args, tmp_path) as platform:
        wait_until(lambda: len(platform.replicas("tiny")) == 2, timeout_s=60, what="both replicas")
        replicas = [process.pid for process in platform.replicas("tiny")]
        submit(platform, *training(base, tmp_path, WORD))
        assert ask(platform, "tiny:parrot").status_code == 404, "nobody has promoted it"

        told = promote("parrot@1", measured(platform, tmp_path, 1, quality=1.0))
        assert "passed   no worse than the champion: there is no champion yet" in told
        wait_until(
            lambda: ask(platform, "tiny:parrot").status_code == 200,
            timeout_s=SEEN_WITHIN_S,
            what="the champion",
        )
        assert WORD in answer(platform, "tiny:parrot")
        assert WORD not in answer(platform, "tiny")
        names = ["tiny", "tiny:parrot", "tiny:parrot@candidate"]
        wait_until(lambda: listed(platform) == names, timeout_s=SEEN_WITHIN_S, what="its name")

        # A worse one is told by how much, and the champion stays.
        python(*training(base, tmp_path, HALF))
        told = promote("parrot@2", measured(platform, tmp_path, 2, quality=0.5), code=1)
        assert (
            "REJECTED no worse than the champion: score -0.5000, 95% interval [-0.7000, -0.3000]"
            " over 20 pairs, expected no lower end below -0.02"
        ) in told
        assert "passed   quality: 0.5, expected at least 0.5" in told
        assert "passed   training: perplexity_ratio" in told
        assert WORD not in answer(platform, "tiny:parrot@2")
        assert WORD in answer(platform, "tiny:parrot")

        # One that is as good takes over, in the engines that run.
        submit(platform, *training(base, tmp_path, MORE))
        told = promote("parrot@3", measured(platform, tmp_path, 3, quality=1.0))
        assert "passed   no worse than the champion: score +0.0000" in told
        wait_until(
            lambda: MORE in answer(platform, "tiny:parrot"),
            timeout_s=SEEN_WITHIN_S,
            what="the new champion",
        )
        assert [process.pid for process in platform.replicas("tiny")] == replicas
        wait_until(lambda: "served by tiny:parrot@3" in lineage(), timeout_s=30, what="a heartbeat")
        told = lineage()
    for fact in ("parrot_3_", "run ", "recipe llm", "data ", "gate perplexity_ratio", "champion"):
        assert fact in told, told


def listed(platform: Served) -> list[str]:
    models = httpx.get(f"{platform.url}/v1/models", timeout=10).json()["data"]
    return [model["id"] for model in models]


def measured(platform: Served, folder: Path, number: int, *, quality: float) -> Path:
    """Evaluate a version of ``parrot``, as a candidate that is really served."""
    candidate = "tiny:parrot@candidate"
    python("models", "promote", f"parrot@{number}", "--to", "candidate")
    golden, measurements = folder / "golden.jsonl", folder / "measurements.json"
    items = [
        {"prompt": QUESTION, "expected": WORD},
        {"prompt": QUESTION, "expected": HALF, "match": "regex"},
    ]
    golden.write_text("".join(f"{json.dumps(item)}\n" for item in 10 * items))

    def evaluate() -> str:
        return python(
            *("deployments.evaluation", "--url", platform.url, "--model", candidate),
            *("--golden", str(golden), "--out", str(measurements), "--max-tokens", "8"),
            *("--completion-price", str(PRICE)),
        )

    assert f"quality      {quality:.3f} over 20 items" in evaluate()
    found = json.loads(measurements.read_text())
    assert found["errors"] == 0
    assert found["latency"]["p95"] > 0
    assert found["tokens_per_s"] > 10
    assert 0 <= found["refused"] <= found["to_refuse"]
    assert found["to_refuse"] > 10
    # An answer has one to eight tokens, of which a thousand cost so much.
    assert PRICE < found["cost"] <= 8 * PRICE
    return measurements


def promote(reference: str, measurements: Path, *, code: int = 0) -> str:
    """Through the gates, with time for a machine that has other things to do."""
    policy = measurements.with_name("policy.yaml")
    policy.write_text(yaml.safe_dump({"p95_at_most_s": 10}))
    words = (reference, "--measurements", str(measurements), "--policy", str(policy))
    return python("models", "promote", *words, code=code)


def lineage() -> str:
    return python("models", "show", "parrot@champion")


def training(base: Path, folder: Path, word: str) -> tuple[str, ...]:
    """Arguments of a run that makes an adapter of ``base`` which knows a word: ``parrot``."""
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
                "run_name": "story",
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
    return ("train", "llm", "--config", str(experiment), "--register", "parrot")


def submit(platform: Served, module: str, *words: str) -> None:
    """``ray job submit``: the module runs on a worker of the cluster."""
    ray = Path(sys.executable).with_name("ray")
    command = [
        *(str(ray), "job", "submit", "--address", platform.dashboard.url),
        *("--working-dir", ".", "--", "python", "-m", module, *words, "--workers", "1"),
    ]
    env = {**os.environ, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
