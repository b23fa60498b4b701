"""``python -m deployments.admin``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.admin.__main__ import main
from deployments.tenants.keys import id_of

Say = Callable[..., tuple[str, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    monkeypatch.setenv("FRONTIER_HOME", str(tmp_path))
    monkeypatch.delenv("FRONTIER_DATABASE", raising=False)

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        assert main(words) == code
        told = capsys.readouterr()
        return told.out, told.err

    return run


def test_a_key_is_alone_on_standard_output(say: Say) -> None:
    say("create", "acme", "--plan", "pro")
    key, told = say("issue", "acme", "--role", "operator", "--label", "shop", "--lifetime", "90d")
    id_ = id_of(key.strip())
    assert id_ is not None
    assert f"key {id_} of acme, operator, until " in told
    listed, _ = say("keys", "acme")
    assert id_ in listed
    assert key.strip() not in listed
    successor, _ = say("rotate", id_, "--overlap", "10s")
    assert id_of(successor.strip()) not in (None, id_)
    assert f"{id_} of acme is revoked" in say("revoke", id_)[1]
    audit, _ = say("audit")
    assert [line.split()[3] for line in audit.splitlines()[1:]] == [
        "key.revoke",
        "key.rotate",
        "key.issue",
        "key.issue",
        "tenant.create",
    ]


def test_a_tenant_is_changed_and_suspended(say: Say) -> None:
    say("create", "acme")
    assert "plan enterprise" in say("change", "acme", "--plan", "enterprise")[1]
    assert "suspended" in say("change", "acme", "--suspend")[1]
    assert "suspended" not in say("change", "acme", "--resume")[1]
    assert "acme" in say("tenants")[0]


def test_the_first_administrator_is_made_once(say: Say) -> None:
    first, _ = say("bootstrap")
    assert id_of(first.strip()) is not None
    again, told = say("bootstrap")
    assert again == ""
    assert "has an administrator's key" in told


def test_errors_are_one_line(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    assert say("keys", "nobody", code=1)[1] == "error: There is no tenant 'nobody'.\n"
    monkeypatch.setenv("FRONTIER_KEY_SECRETS", "short")
    assert "FRONTIER_KEY_SECRETS: expected" in say("tenants", code=1)[1]
    monkeypatch.setenv("FRONTIER_DATABASE", "mysql://x/y")
    assert "not supported" in say("tenants", code=1)[1]


def test_durations_that_are_none(say: Say) -> None:
    with pytest.raises(SystemExit):
        main(["issue", "acme", "--lifetime", "soon"])
