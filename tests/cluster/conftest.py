"""The platform as a person starts it, in a process of its own, on real Ray."""

from __future__ import annotations

import math
import subprocess
import sys
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
from deployments.launcher.background import REPOSITORY, Served
from tests import tiny_models
from tests.documents import ROOT
from tests.servers import free_port, free_ports

FIXED_PORTS = (
    "FRONTIER_DASHBOARD_PORT",
    "FRONTIER_METRICS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
"""Ports of a node that are the same at every start, unless told; here they are free ones, so
that tests run beside a platform that somebody uses."""


@contextmanager
def serving(
    args: Mapping[str, Any], folder: Path, *options: str, cpus: int = 8
) -> Iterator[Served]:
    """Serve ``args`` of the application, on a free port, in a Ray that believes in ``cpus``.

    Args:
        options: of ``scripts/serve``.
    """
    http, *others = free_ports(1 + len(FIXED_PORTS))
    document = {
        "http_options": {"host": "127.0.0.1", "port": http},
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
    env = {name: str(port) for name, port in zip(FIXED_PORTS, others, strict=True)}
    env |= {"FRONTIER_NUM_CPUS": str(cpus)}
    with background.serving(config, *options, env=env) as served:
        yield served


def on_a_free_port(folder: Path) -> Path:
    """``serve_config.yaml`` as it is, but for its port."""
    text = (ROOT / "serve_config.yaml").read_text()
    assert "port: 8000" in text
    config = folder / "serve_config.yaml"
    config.write_text(text.replace("port: 8000", f"port: {free_port()}"))
    return config


def metric(served: Served, name: str, **labels: str) -> float:
    """See ``on_page``; of this moment."""
    return on_page(metrics(served), name, **labels)


def metrics(served: Served) -> str:
    """The page of the whole cluster: one look at it takes seconds where engines have all cores."""
    return httpx.get(f"{served.url}/metrics", timeout=30).text


def on_page(page: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples that have these labels; if there are none, NaN, which equals and
    exceeds nothing.
    """
    # Its own lines alone: parsing all takes seconds beside streams that this process reads.
    lines = [line + "\n" for line in page.splitlines() if line.startswith(name)]
    values = [
        sample.value
        for family in text_string_to_metric_families("".join(lines))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return sum(values) if values else math.nan


def replica_ids(served: Served, deployment: str) -> dict[str, int]:
    """Process ids of a deployment's replicas that run, by the name that their metrics carry."""
    application = (served.dashboard.applications() or {})["frontier-run"]
    found = application["deployments"][deployment]["replicas"]
    return {each["replica_id"]: each["pid"] for each in found if each["state"] == "RUNNING"}


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float, what: str, every_s: float = 0.2
) -> float:
    """Seconds until ``condition()``; AssertionError after ``timeout_s``."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(every_s)
    return time.monotonic() - began


def tiny_args(folder: Path, *, replicas: int, slots: int, capacity: int = 1000) -> dict[str, Any]:
    """Application args that serve the model of ``folder`` as ``tiny``."""
    return {
        "models": {
            "tiny": {
                "task": "generate",
                "source": str(folder),
                "engine": {"slots": slots},
                "queue": {"standard": {"capacity": capacity, "weight": 4, "timeout_s": 120}},
                "replicas": {"min": replicas, "max": replicas, "cpus": 1, "drain_s": 1},
            }
        },
        "gateway": {"replicas": {"cpus": 0, "drain_s": 1}},
    }


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with room for streams that last seconds."""
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"), context=8192)


def python(module: str, *words: str, code: int = 0) -> str:
    """What a command of ours says, which ends with ``code``."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout
