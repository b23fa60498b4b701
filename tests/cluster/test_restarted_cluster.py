"""The cluster is stopped and another one started: what the registry knows is served again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.cluster import registered
from tests.cluster.conftest import serving
from tests.cluster.registered import ADAPTERS, answer, ask, predicted

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_adapters_and_predictors_outlive_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    args = registered.poet_and_eye(tmp_path, replicas=1)
    asked = ("tiny:bard", "tiny:poet", "tiny:poet@1")
    with serving(args, tmp_path) as platform, httpx.Client(base_url=platform.url) as http:
        for name in ("bard", "gone"):
            body = {"name": name, "source": "registry:poet@2"}
            assert http.post(ADAPTERS, json=body, timeout=60).status_code == 200
        assert http.delete(f"{ADAPTERS}/gone", timeout=60).status_code == 200
        asyncio.run(registered.point("poet", 2))
        asyncio.run(registered.point("eye", 2))
        listed = http.get(ADAPTERS, timeout=60).json()["data"]["adapters"]
        first = answer(platform, "tiny:poet@1"), answer(platform, "tiny:poet@2")
        assert first[0] != first[1]
    with serving(args, tmp_path) as platform:
        assert [answer(platform, model) for model in asked] == [first[1], first[1], first[0]]
        assert ask(platform, "tiny:gone").status_code == 404
        again = httpx.get(platform.url + ADAPTERS, timeout=60).json()["data"]["adapters"]
        assert [each["id"] for each in again] == [each["id"] for each in listed]
        version, _ = predicted(platform)
        assert version == "eye@2"
