"""``python -m deployments.evaluation`` against a gateway on a socket, and a registry on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.evaluation.__main__ import main
from models.promotion import Measurements
from tests.evaluation.test_golden import write
from tests.gateway.fakes import World
from tests.gateway.server import LiveServer
from tests.models.test_registry_source import notes, register


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))


def run(server: LiveServer, golden: Path, out: Path, *more: str) -> int:
    fixed = ["--url", server.url, "--golden", str(golden), "--out", str(out), "--requests", "5"]
    return main([*fixed, *more])


def test_a_predictor_is_measured_and_recorded_by_its_version(
    server: LiveServer, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = register(notes(tmp_path / "1", "one"), "digits", "champion")
    world.predictor.version = "digits@1"
    golden = write(tmp_path, {"input": 1, "expected": {"saw": 1}})
    out = tmp_path / "new" / "measurements.json"
    assert run(server, golden, out, "--model", "digits") == 0
    found = Measurements.decode(out.read_text())
    assert (found.artifact, found.quality, found.requests) == (version.artifact, 1.0, 5)
    assert "quality      1.000 over 1 items" in capsys.readouterr().out


def test_an_adapter_is_known_by_its_name_and_asked_for_by_its_number(
    server: LiveServer, world: World, tmp_path: Path
) -> None:
    version = register(notes(tmp_path / "1", "one"), "poet", "candidate")
    golden = write(tmp_path, {"prompt": "Hi", "expected": "hello"})
    out = tmp_path / "measurements.json"
    assert run(server, golden, out, "--model", "smollm2:poet@candidate") == 0
    assert Measurements.decode(out.read_text()).artifact == version.artifact
    asked = {request.adapter for request in world.generator.requests}
    assert asked == {"poet@1"}, "replicas follow an alias a moment later"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "smollm2"], "give its content hash with --artifact"),
        (["--model", "smollm2:ghost"], "the registry has no model ghost"),
        (["--model", "smollm2", "--artifact", "abc"], "expected 64 hexadecimal digits"),
        (["--model", "nope"], "404"),
    ],
)
def test_what_cannot_be_measured(
    server: LiveServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    golden = write(tmp_path, {"prompt": "Hi", "expected": "hello"})
    out = tmp_path / "measurements.json"
    assert run(server, golden, out, *arguments) == 1
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_a_given_hash_needs_no_registry(server: LiveServer, tmp_path: Path) -> None:
    golden = write(tmp_path, {"prompt": "Hi", "expected": "hello"})
    out = tmp_path / "measurements.json"
    assert run(server, golden, out, "--model", "smollm2", "--artifact", "b" * 64) == 0
    assert json.loads(out.read_text())["artifact"] == "b" * 64
    assert not (tmp_path / "home").exists()
