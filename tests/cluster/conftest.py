"""The platform as a person starts it, in a process of its own, on real Ray."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deployments.launcher import background
from deployments.launcher.background import Served
from tests import tiny_models


@contextmanager
def serving(args: Mapping[str, Any], folder: Path, *, cpus: int = 8) -> Iterator[Served]:
    """Serve ``args`` of the application, on a free port, in a Ray that believes in ``cpus``."""
    document = {
        "http_options": {"host": "127.0.0.1", "port": _free_port()},
        "applications": [
            {
                "name": "frontier-run",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": dict(args),
            }
        ],
    }
    config = folder / "serve_config.yaml"
    config.write_text(yaml.safe_dump(document))
    with background.serving(config, env={"FRONTIER_NUM_CPUS": str(cpus)}) as served:
        yield served


def metric(served: Served, name: str, **labels: str) -> float:
    """Sum of a metric's samples that have these labels, over the whole cluster."""
    text = httpx.get(f"{served.url}/metrics", timeout=10).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float, what: str, every_s: float = 0.2
) -> float:
    """Seconds until ``condition()``; AssertionError after ``timeout_s``."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(every_s)
    return time.monotonic() - began


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with room for streams that last seconds."""
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"), context=8192)
