"""Batch size and wait of a fixed-cost model change while it serves; nothing restarts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests import tiny_models
from tests.cluster.conftest import serving, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.mark.parametrize("kind", ["queue", "serve"])
def test_batching_changes_in_place(kind: str, tmp_path: Path) -> None:
    folder = tiny_models.make("llama", tmp_path / "encoder")
    batcher = {"kind": kind, "max_batch_size": 4, "max_wait_s": 0.0}
    model = {
        "task": "embed",
        "source": str(folder),
        "max_tokens": 64,
        "batcher": batcher,
        "replicas": {"cpus": 0},
    }
    with serving({"models": {"encoder": model}}, tmp_path) as platform:

        def embed(texts: int = 1) -> float:
            """Seconds of one call."""
            answer = httpx.post(
                f"{platform.url}/v1/embeddings",
                json={"model": "encoder", "input": ["Hello"] * texts},
                timeout=60,
            )
            assert answer.status_code == 200, answer.text
            return answer.elapsed.total_seconds()

        embed()
        assert embed() < 4
        before = [process.pid for process in platform.replicas("encoder")]
        assert len(before) == 1

        # A wait so long that it shows: an idle model now waits for company, and for no more of
        # it than the smaller batch has room for.
        document: dict[str, Any] = yaml.safe_load((tmp_path / "serve_config.yaml").read_text())
        changed = copy.deepcopy(document)
        limits = {"max_batch_size": 2, "max_wait_s": 5.0}
        changed["applications"][0]["deployments"] = [{"name": "encoder", "user_config": limits}]
        platform.dashboard.deploy(changed)
        wait_until(lambda: embed() > 4, timeout_s=60, what="the longer wait")
        assert embed(texts=2) < 4
        assert [process.pid for process in platform.replicas("encoder")] == before
