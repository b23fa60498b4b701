"""What a newcomer meets when something is missing: one clear line, and nothing half-made.

The scripts run in a copy of the checkout where python, df, id and apt-get are fakes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_cluster_yaml import env_sh

ROOT = Path(__file__).parents[1]

PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *sys.version_info*) echo "${FAKE_VERSION-3.11}" ;;
  -V) echo "Python ${FAKE_VERSION-3.11}.2" ;;
  *ensurepip*) [[ -z ${FAKE_NO_ENSUREPIP-} || -e $CALLS.apt ]] ;;
  "-m venv "*) rm -rf "${!#}" && mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
  "-m deployments.launcher "*) env -0 >"$CALLS.env" ;;
  "-m models fetch "*) [[ -z ${FETCH_WITH-} ]] || exec "$FETCH_WITH" "$@" ;;
  "-m pip "*) echo "${FAKE_PIP-}" && [[ -z ${FAKE_PIP-} ]] ;;
esac
"""

FAKES = {
    "df": 'echo header; echo "disk 1 1 ${FAKE_FREE_KB-99000000} 1% /"',
    "id": 'echo "${FAKE_UID-1000}"',
    "apt-get": 'echo "apt-get $*" >>"$CALLS"; touch "$CALLS.apt"',
}


@dataclass(frozen=True)
class Checkout:
    folder: Path
    binaries: Path

    def run(self, script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.binaries}:{os.environ['PATH']}",
            "CALLS": str(self.folder / "calls"),
            **env,
        }
        return subprocess.run(
            [self.folder / "scripts" / script, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, word: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(word)]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    folder, binaries = tmp_path / "check out", tmp_path / "bin"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "requirements.lock").write_text("ray==2.60.0\n")
    binaries.mkdir()
    fakes = dict.fromkeys(("python3", "python3.11", "python3.12"), PYTHON)
    for name, body in {**fakes, **FAKES}.items():
        path = binaries / name
        path.write_text(body if body.startswith("#!") else f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    return Checkout(folder, binaries)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"FAKE_VERSION": "3.9"}, "Python 3.11 or 3.12 is needed; python3 is Python 3.9."),
        ({"FAKE_VERSION": ""}, "Python 3.11 or 3.12 is needed; there is no python3 on PATH."),
        ({"PYTHON": "python9"}, "Python 3.11 or 3.12 is needed; python9 does not run."),
        ({"FAKE_FREE_KB": "1500000"}, "4 GB of disk are needed for .venv and the weights, 1 GB"),
        ({"FAKE_NO_ENSUREPIP": "1"}, "on Debian run: sudo apt-get install python3.11-venv"),
        ({"FAKE_PIP": "x: NewConnectionError(y)"}, "(the package index is out of reach)"),
        ({"FAKE_PIP": "ERROR: No space left on device"}, "(the disk is full)"),
        ({"FAKE_PIP": "ERROR: No matching wheel"}, "(ERROR: No matching wheel)"),
    ],
    ids=lambda value: "=".join(*value.items()) if isinstance(value, dict) else "said",
)
def test_what_is_missing_is_one_clear_line(
    checkout: Checkout, env: dict[str, str], said: str
) -> None:
    refused = checkout.run("setup", **env)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert refused.stdout == ""
    assert not (checkout.folder / ".venv/installed.lock").exists()


def test_a_second_setup_finds_nothing_to_do(checkout: Checkout) -> None:
    assert checkout.run("setup").returncode == 0
    again = checkout.run("setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert len(checkout.calls("-m pip")) == 1
    assert len(checkout.calls("-m models fetch")) == 2  # it knows itself what is there


def test_another_lock_or_another_python_is_installed_afresh(checkout: Checkout) -> None:
    checkout.run("setup")
    (checkout.folder / "requirements.lock").write_text("ray==2.61.0\n")
    checkout.run("setup")
    assert len(checkout.calls("-m venv --clear")) == 2
    checkout.run("setup", FAKE_VERSION="3.12", PYTHON="python3.12")
    assert len(checkout.calls("-m venv --clear")) == 3


def test_an_interrupted_setup_is_begun_again(checkout: Checkout) -> None:
    assert checkout.run("setup", FAKE_PIP="killed").returncode == 1
    assert checkout.run("setup").returncode == 0
    assert len(checkout.calls("-m venv --clear")) == 2


def test_root_on_debian_gets_what_venv_needs(checkout: Checkout) -> None:
    done = checkout.run("setup", FAKE_NO_ENSUREPIP="1", FAKE_UID="0")
    assert done.returncode == 0
    assert "installing python3.11-venv with apt-get" in done.stderr
    assert any("python3.11-venv" in call for call in checkout.calls("apt-get install"))


def test_weights_are_those_of_the_configuration_that_is_served(checkout: Checkout) -> None:
    checkout.run("setup", "/else where/mine.yaml")
    (call,) = checkout.calls("-m models fetch")
    assert call.endswith("--config /else where/mine.yaml")


@pytest.mark.parametrize("script", ["setup", "serve", "test"])
def test_weights_that_are_not_to_be_had_are_one_clear_line(checkout: Checkout, script: str) -> None:
    """The real ``models fetch`` says it, and nothing else begins."""
    config = checkout.folder / "serve_config.yaml"
    model = "{task: generate, source: ./not there}"
    config.write_text(f"applications: [{{args: {{models: {{m: {model}}}}}}}]\n")
    refused = checkout.run(script, FETCH_WITH=sys.executable, PYTHONPATH=str(ROOT))
    assert refused.returncode == 1
    assert refused.stdout == ""
    *before, line = refused.stderr.splitlines()
    assert line.startswith("error: ")
    assert "not there" in line
    assert all(said.startswith("packages ") for said in before)
    assert checkout.calls("-m")[-1].startswith("-m models fetch")


@pytest.mark.parametrize("options", [[], ["--secure"]], ids=["open", "secure"])
def test_serve_hands_on_the_environment_that_ray_needs(
    checkout: Checkout, options: list[str]
) -> None:
    done = checkout.run("serve", *options, "/else where/mine.yaml")
    assert done.returncode == 0, done.stderr
    (call,) = checkout.calls("-m deployments.launcher")
    assert call.split(" ", 2)[2] == " ".join([*options, "/else where/mine.yaml"])
    given = (checkout.folder / "calls.env").read_text().split("\0")
    needed = env_sh(checkout.folder)
    assert needed.keys() > {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_AUTH_MODE"}
    assert {f"{name}={value}" for name, value in needed.items()} <= set(given)


def test_setup_installs_what_is_locked_and_nothing_else(checkout: Checkout) -> None:
    checkout.run("setup")
    (call,) = checkout.calls("-m pip")
    assert "requirements.lock" in call


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").iterdir()), ids=lambda p: p.name)
def test_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) == (path.suffix == "")
