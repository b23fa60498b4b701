"""What the launcher says; what it does is in tests/cluster/test_newcomer.py."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import deployments.launcher.__main__ as launcher
from deployments.launcher.__main__ import BIN, greeting, main, say, with_bin
from deployments.launcher.preflight import load
from state.places import sqlite_url
from tests.servers import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
ENV = {
    "FRONTIER_DASHBOARD_PORT": "8265",
    "FRONTIER_METRICS_PORT": "9464",
    "FRONTIER_LOGS": ".cache/logs",
}


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_closed_terminal_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Gone())
    say("stopping")
    say("stopped")
    sys.stdout.close()


def test_the_greeting_has_every_address_and_a_first_request() -> None:
    said = greeting(load(ROOT / "serve_config.yaml"), ENV)
    for expected in ("http://localhost:8000", ":8265", ":9464/metrics", '"model":"smollm2"'):
        assert expected in said
    assert "token" not in said
    assert "get-auth-token" in greeting(
        load(ROOT / "serve_config.yaml"), ENV | {"RAY_AUTH_MODE": "token"}
    )


def test_a_wrong_configuration_is_said_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("applications: [{import_path: 'deployments.app:build', args: {}}]")
    assert main([str(config)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(line.startswith("error: ") for line in printed.err.splitlines())
    assert "models" in printed.err


def test_a_port_in_use_is_one_line_before_anything_is_started(tmp_path: Path) -> None:
    config = tmp_path / "taken.yaml"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        model = "{task: generate, source: ./model}"
        config.write_text(
            f"http_options: {{port: {port}}}\n"
            f"applications: [{{import_path: 'deployments.app:build',"
            f" args: {{models: {{m: {model}}}}}}}]\n"
        )
        logs = tmp_path / "logs"
        refused = subprocess.run(
            [sys.executable, "-m", "deployments.launcher", config],
            cwd=ROOT,
            env={**os.environ, **other_ports(), "FRONTIER_LOGS": str(logs)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert (refused.returncode, refused.stdout) == (1, "")
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"error: port {port} is in use by pid {os.getpid()} (")
    assert line.endswith("; stop it or set http_options.port in taken.yaml")
    assert not logs.exists(), "Ray was started"


def other_ports() -> dict[str, str]:
    """For what else the launcher listens on, so that somebody's platform may run beside us."""
    names = ("FRONTIER_DASHBOARD_PORT", "FRONTIER_METRICS_PORT")
    return {name: str(free_port()) for name in names}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Mapping[str, str]]:
    """The environments in which something was to be served."""
    environments: list[Mapping[str, str]] = []
    monkeypatch.setattr(launcher, "run", lambda _, env: environments.append(env))
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path))
    monkeypatch.setenv("FRONTIER_DATABASE", sqlite_url(tmp_path / "frontier.db"))
    return environments


def test_secure_shows_an_administrators_key_once_and_asks_for_keys(
    served: list[Mapping[str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--secure"]) == 0
    assert len(re.findall(r"\bfr_\w+", capfd.readouterr().out)) == 1
    assert main(["--secure"]) == 0
    assert "fr_" not in capfd.readouterr().out
    assert [env["FRONTIER_AUTH"] for env in served] == ["keys", "keys"]
    assert main([]) == 0
    assert "FRONTIER_AUTH" not in served[-1]


def test_without_a_key_nothing_is_served_securely(
    served: list[Mapping[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FRONTIER_DATABASE", "postgresql://127.0.0.1:1/nowhere")
    assert main(["--secure"]) == 1
    assert "no administrator's key could be made" in capfd.readouterr().err
    assert served == []


def test_jobs_find_our_python_before_any_other() -> None:
    assert with_bin({"PATH": "/usr/bin", "A": "b"}) == {"PATH": f"{BIN}:/usr/bin", "A": "b"}
    assert with_bin({})["PATH"].startswith(f"{BIN}:")
