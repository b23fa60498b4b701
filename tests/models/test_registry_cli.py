"""``python -m models`` on the registry: what a person types, sees and can rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import artifact
from models.__main__ import main
from models.promotion import Latency, Measurements
from tests.models.artifacts import make

pytestmark = pytest.mark.integration

Say = Callable[..., str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DATABASE", "ARTIFACTS", "RUNS"):
        monkeypatch.delenv(f"FRONTIER_{name}", raising=False)
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """What a command prints; it must succeed, or end with ``code`` and say one line why."""

    def run(*words: object, code: int = 0) -> str:
        assert main([str(word) for word in words]) == code
        said = capsys.readouterr()
        if code:
            return said.out + said.err
        return said.out

    return run


@pytest.fixture
def registered(tmp_path: Path, say: Say) -> list[artifact.Manifest]:
    """Two versions of one model."""
    made = [make(tmp_path / content, content) for content in "12"]
    assert say("register", tmp_path / "1").startswith("digits-cnn_1_")
    assert say("register", tmp_path / "2").startswith("digits-cnn_2_")
    return made


def measured(manifest: artifact.Manifest, **change: Any) -> Measurements:
    return replace(
        Measurements(
            artifact=manifest.content_sha256,
            measured="2026-01-31T12:00:00+00:00",
            golden_set="g" * 64,
            scores={str(n): 1.0 for n in range(50)},
            requests=1000,
            errors=0,
            latency=Latency(p50=0.1, p95=0.2),
        ),
        **change,
    )


def write(path: Path, measurements: Measurements) -> Path:
    path.write_text(measurements.encode())
    return path


def test_a_run_is_registered_by_its_directory(tmp_path: Path, say: Say) -> None:
    manifest = make(tmp_path / "run" / "artifact")
    version = json.loads(say("register", tmp_path / "run", "--name", "other", "--json"))
    assert (version["name"], version["number"]) == ("other", 1)
    assert version["artifact"] == manifest.content_sha256
    assert "expected the directory of a finished run" in say("register", tmp_path, code=1)


def test_lists(registered: list[artifact.Manifest], say: Say) -> None:
    say("promote", "digits-cnn@1", "--to", "canary")
    head, line = say("list").splitlines()
    assert head.split() == ["name", "kind", "versions", "newest", "aliases"]
    assert line.split()[:3] == ["digits-cnn", "classifier", "2"]
    assert line.endswith("canary → 1")
    newest, older = say("list", "digits-cnn").splitlines()[1:]
    assert newest.startswith("digits-cnn_2_")
    assert older.startswith("digits-cnn_1_")
    page = say("list", "digits-cnn", "--limit", 1).splitlines()
    assert page[1] == newest
    cursor = page[2].removeprefix("more: --cursor ")
    assert say("list", "digits-cnn", "--cursor", cursor).splitlines()[1] == older
    assert json.loads(say("list", "--json"))["items"][0]["name"] == "digits-cnn"
    assert say("list", "nobody", code=1) == "error: the registry has no model nobody\n"


def test_a_champion_is_made_by_measurements(
    registered: list[artifact.Manifest], tmp_path: Path, say: Say
) -> None:
    first, second = registered
    assert "was never measured; evaluate it" in say("promote", "digits-cnn@1", code=1)
    good = write(tmp_path / "good.json", measured(first))
    said = say("promote", "digits-cnn@1", "--measurements", good)
    assert "passed   quality: 1, expected at least 0.5" in said
    assert "there is no champion yet" in said
    assert said.splitlines()[-1].startswith("digits-cnn@champion → digits-cnn_1_")
    bad = write(tmp_path / "bad.json", measured(second, errors=6))
    said = say("promote", "digits-cnn@2", "--measurements", bad, code=1)
    assert "REJECTED errors: 0.006, expected at most 0.005" in said
    assert "champion → 1" in say("list")
    better = write(tmp_path / "better.json", measured(second))
    assert "score +0.0000" in say("promote", "digits-cnn@2", "--measurements", better)
    assert "champion → 2" in say("list")
    assert say("rollback", "digits-cnn", "--reason", "complaints") == "digits-cnn@champion → 1\n"


def test_measurements_of_another_artifact(
    registered: list[artifact.Manifest], tmp_path: Path, say: Say
) -> None:
    other = write(tmp_path / "other.json", measured(registered[1]))
    said = say("promote", "digits-cnn@1", "--measurements", other, code=1)
    assert "the measurements are of artifact" in said


def test_the_champion_must_be_measured_too(
    registered: list[artifact.Manifest], tmp_path: Path, say: Say
) -> None:
    say("promote", "digits-cnn@1", "--force", "the first")
    good = write(tmp_path / "good.json", measured(registered[1]))
    said = say("promote", "digits-cnn@2", "--measurements", good, code=1)
    assert "the champion, digits-cnn@1, was never measured" in said


def test_force_is_kept_in_the_audit_log(registered: list[artifact.Manifest], say: Say) -> None:
    assert "wants a reason" in say("promote", "digits-cnn@1", "--force", " ", code=1)
    said = say("promote", "digits-cnn@1", "--force", "a demonstration")
    assert "promoted all the same: a demonstration" in said
    newest = json.loads(say("audit", "digits-cnn@champion", "--json"))["items"][0]
    assert newest["details"]["forced"] == "a demonstration"
    assert "never measured" in newest["details"]["refusal"]
    assert "a demonstration" in say("audit")


def test_a_policy_of_ones_own(
    registered: list[artifact.Manifest], tmp_path: Path, say: Say
) -> None:
    good = write(tmp_path / "good.json", measured(registered[0]))
    policy = tmp_path / "policy.yaml"
    words = ("promote", "digits-cnn@1", "--measurements", good, "--policy", policy)
    policy.write_text("p95_at_most_s: 0.1\n")
    assert "REJECTED latency: 0.2, expected at most 0.1" in say(*words, code=1)
    policy.write_text("p95: 0.1\n")
    said = say(*words, code=1)
    assert "policy.yaml: p95: Extra inputs are not permitted; known keys: quality_at_least" in said
    policy.write_text("[")
    assert "policy.yaml: is not YAML" in say(*words, code=1)


def test_show_prints_the_whole_lineage(
    registered: list[artifact.Manifest], tmp_path: Path, say: Say
) -> None:
    parent, _ = registered
    make(tmp_path / "3", "3", name="child", parents=(parent.content_sha256,))
    say("register", tmp_path / "3")
    say("promote", "child@1", "--force", "the first")
    tree = say("show", "child")
    for part in (
        "child_1_",
        "├─ artifact ",
        "│  ├─ run 20260131-a1: recipe vision, seed 0, code c0ffee1",
        "│  │  └─ data dddddddddddd Digits-5k (CC-BY-SA-3.0)",
        "│  ├─ gate accuracy 0.962, expected >= 0.955 (logistic): passed",
        f"│  └─ made from {parent.content_sha256[:12]}  digits-cnn_1_",
        "├─ alias champion since ",
        "└─ history\n   └─ ",
        "promote champion: none → 1",
    ):
        assert part in tree
    assert "went into" in say("show", "digits-cnn@1")
    assert say("show", "digits-cnn").startswith("digits-cnn_2_"), "no champion: the newest"
    assert json.loads(say("show", "child@1", "--json"))["version"]["name"] == "child"
    assert "has no version 9; it has 1" in say("show", "child@9", code=1)


def test_cards_and_licences(registered: list[artifact.Manifest], say: Say) -> None:
    assert say("card", "digits-cnn@1").startswith("# digits-cnn\n")
    assert say("card", "digits-cnn@1", "--data").startswith("# Data of digits-cnn\n")
    assert [line.split()[1:3] for line in say("licences").splitlines()[1:]] == [
        ["Apache-2.0", "CC-BY-SA-3.0"]
    ] * 2
    assert len(json.loads(say("licences", "--json"))) == 2


def test_verify_and_export(
    registered: list[artifact.Manifest], tmp_path: Path, home: Path, say: Say
) -> None:
    first, _ = registered
    assert say("verify", tmp_path / "1").startswith(f"{first.content_sha256}  digits-cnn: 2 files")
    assert say("verify", "digits-cnn@1") == say("verify", tmp_path / "1")
    target = tmp_path / "out" / "model"
    assert say("export", "digits-cnn@1", target) == f"{target}\n"
    assert artifact.verify(target) == first
    assert (target / artifact.CARD).read_text() == say("card", "digits-cnn@1")
    assert "exists; expected a folder to be made" in say("export", "digits-cnn@1", target, code=1)
    stored = home / "artifacts" / first.content_sha256 / "weights.safetensors"
    stored.write_bytes(b"x" * 100)
    for words in (("verify", "digits-cnn@1"), ("export", "digits-cnn@1", tmp_path / "no")):
        assert "weights.safetensors is damaged" in say(*words, code=1)
    assert not (tmp_path / "no").exists()


def test_gc_says_first_and_does_then(
    registered: list[artifact.Manifest], home: Path, say: Say
) -> None:
    first, second = registered
    say("archive", "digits-cnn@1", "--reason", "old")
    assert say("gc") == "0 of no use, 2 needed\n", "it is new"
    would = f"would remove {first.content_sha256}: archived: digits-cnn@1\n"
    assert say("gc", "--grace", 0) == f"{would}1 of no use, 1 needed\n"
    assert (home / "artifacts" / first.content_sha256).exists()
    assert say("gc", "--grace", 0, "--yes").startswith(f"removed {first.content_sha256}")
    assert not (home / "artifacts" / first.content_sha256).exists()
    assert (home / "artifacts" / second.content_sha256).exists()
    assert "the files of digits-cnn@1 are gone" in say("verify", "digits-cnn@1", code=1)
    assert "the files of digits-cnn@1 are gone" in say("restore", "digits-cnn@1", code=1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("promote", "digits-cnn"), "names no version"),
        (("promote", "digits-cnn@1", "--to", "Champion"), "cannot be an alias"),
        (("promote", "digits-cnn@1", "--measurements", "/nowhere"), "cannot be read"),
        (("rollback", "digits-cnn@1"), "is a version; expected NAME@ALIAS"),
        (("rollback", "digits-cnn"), "has no alias champion"),
        (("archive", "digits-cnn"), "names no version"),
        (("show", "a b"), "expected NAME@VERSION or NAME@ALIAS"),
        (("list", "--limit", "0"), "expected 1 to 500"),
        (("list", "--cursor", "x"), "start again without it"),
        (("verify", "nobody@1"), "the registry has no model nobody"),
    ],
)
def test_errors_are_one_line(
    words: tuple[str, ...], says: str, registered: list[artifact.Manifest], say: Say
) -> None:
    said = say(*words, code=1)
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1


def test_without_its_database(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONTIER_DATABASE", "postgresql://user:hidden@127.0.0.1:1/x")
    said = say("list", code=1)
    assert said.startswith("error: postgresql://127.0.0.1:1/x cannot be reached")
    assert "hidden" not in said
    assert said.count("\n") == 1
