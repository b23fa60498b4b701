"""``python -m deployments.admin``."""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from deployments.admin.__main__ import main, parser
from deployments.observability.events import BudgetReached
from deployments.tenants import deletion
from deployments.tenants.alerts import row
from deployments.tenants.keys import id_of
from deployments.tenants.plans import LimitName
from models.commands.terminal import myself
from state import tables
from state.counters import Demand, Limit, Strategy
from state.counters.sqlite import SqliteCounters
from state.database import Database
from tests.tenants.things import NOW, use

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


def test_limits_of_its_own(say: Say) -> None:
    limits = ("--limit", "tokens_per_day=500000", "--limit", "requests_per_hour=none")
    told = say("create", "acme", *limits)[1]
    assert told == "tenant acme, plan free, tokens_per_day=500000, requests_per_hour=none\n"
    assert "tokens_per_day=500000, requests_per_hour=none" in say("tenants")[0]
    assert "tokens_per_day" in say("change", "acme", "--plan", "pro")[1], "they stay as they are"
    told = say("change", "acme", "--limit", "budget_per_month=0.5")[1]
    assert told == "tenant acme, plan pro, budget_per_month=0.5\n"
    assert say("change", "acme", "--no-limits")[1] == "tenant acme, plan pro\n"


@pytest.mark.parametrize(
    "words",
    [
        ("create", "acme", "--limit", "tokens_per_century=5"),
        ("create", "acme", "--limit", "tokens_per_day=many"),
        ("create", "acme", "--limit", "tokens_per_day=-1"),
        ("create", "acme", "--limit", "tokens_per_day"),
        ("change", "acme", "--limit", "tokens_per_day=5", "--no-limits"),
        ("usage", "--by", "colour"),
        ("usage", "--since", "yesterday"),
    ],
)
def test_words_that_mean_nothing(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        main(words)


def test_plans_usage_and_alerts(say: Say, tmp_path: Path) -> None:
    config = configured(tmp_path, "plans: {small: {requests_per_minute: 7, budget_per_month: 0.5}}")
    head, plan = say("plans", "--config", str(config))[0].splitlines()
    assert head.split() == ["plan", *LimitName]
    assert plan.split() == ["small", "7", "0.5"]
    say("create", "acme")
    assert say("usage")[0].split() == ["day", "model", "tenant", "requests"]

    async def use_some() -> None:
        async with await Database.open() as database:
            for tenant in ("acme", "acme", "other"):
                await use(database, tenant)
            alert = row(BudgetReached(tenant="acme", share=0.8), NOW.timestamp())
            async with database.write() as c:
                await c.execute(tables.alerts.insert().values(alert))

    asyncio.run(use_some())
    [head, *lines] = say("usage", "--by", "tenant,model_version")[0].splitlines()
    assert head.split()[:3] == ["tenant", "model_version", "requests"]
    assert [line.split()[:3] for line in lines] == [
        ["acme", "smollm2@1", "2"],
        ["other", "smollm2@1", "1"],
    ]
    table = say("usage", "--by", "day", "--tenant", "acme", "--since", "2026-11-25", "--csv")[0]
    assert [line.split(",")[:2] for line in table.splitlines()[1:]] == [["2026-11-25", "2"]]
    assert say("usage", "--csv", "--until", "2026-11-24")[0] == ""
    assert say("alerts")[0].splitlines()[1].split()[2:] == ["acme", "budget", "2026-11", "80", "%"]
    assert len(say("alerts", "--tenant", "other")[0].splitlines()) == 1


READING = {"plans", "tenants", "keys", "usage", "alerts", "audit"}
"""Commands that change nothing."""


def test_every_command_that_changes_something_says_who_it_was(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "SETTLE_S", 0)
    config = str(configured(tmp_path, ""))
    say("create", "victim")
    key = id_of(say("issue", "victim")[0].strip())
    assert key is not None
    changing = {
        "create": ("newcomer",),
        "change": ("victim", "--plan", "pro"),
        "issue": ("victim",),
        "rotate": (key,),
        "revoke": (key,),
        "visibility": ("smollm2", "--only", "victim"),
        "export": ("victim", "--to", str(tmp_path / "x")),
        "retention": ("--config", config, "--yes"),
        "bootstrap": (),
        "delete": ("victim", "--yes"),
    }
    assert commands() == READING | changing.keys()

    def entries() -> list[tuple[str, str]]:
        with sqlite3.connect(tmp_path / "frontier.db") as database:
            found = database.execute("SELECT who, what FROM audit ORDER BY id").fetchall()
        database.close()
        return found

    for name, words in changing.items():
        before = entries()
        say(name, *words)
        after = entries()[len(before) :]
        assert after, name
        assert {who for who, _ in after} == {myself()}, name


def commands() -> set[str]:
    [found] = [
        action.choices
        for action in parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return set(found)


def configured(folder: Path, gateway: str) -> Path:
    """A configuration of the platform."""
    config = folder / "serve_config.yaml"
    config.write_text(
        "applications:\n- import_path: deployments.app:build\n  args:\n"
        "    models: {m: {task: generate, source: ./m}}\n"
        f"    gateway: {{{gateway}}}\n"
    )
    return config


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


def test_a_model_is_hidden_and_shown(say: Say) -> None:
    say("create", "acme")
    listed, _ = say("visibility", "smollm2:poet", "--only", "acme")
    assert listed.splitlines()[1].split() == ["smollm2:poet", "acme"]
    assert "(nobody)" in say("visibility", "minilm", "--nobody")[0]
    say("visibility", "smollm2:poet", "--all")
    assert [line.split()[0] for line in say("visibility")[0].splitlines()] == ["model", "minilm"]
    assert "no tenant 'acne'" in say("visibility", "minilm", "--only", "acne", code=1)[1]
    assert "a name of its own" in say("visibility", "smollm2:poet@1", "--all", code=1)[1]
    assert "Name the model" in say("visibility", "--nobody", code=1)[1]


def test_a_tenant_is_exported_whole_into_a_new_file(say: Say, tmp_path: Path) -> None:
    say("create", "acme")
    key, _ = say("issue", "acme")
    file = tmp_path / "acme.ndjson"
    assert f"lines about acme in {file}" in say("export", "acme", "--to", str(file))[1]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [lines[0]["data"]["name"], lines[-1]["kind"]] == ["acme", "end"]
    assert key.strip()[-40:] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_bytes()
    assert f"{file}: File exists" in say("export", "acme", "--to", str(file), code=1)[1]
    assert file.read_bytes() == before
    say("export", "nobody", "--to", str(tmp_path / "nobody"), code=1)
    assert [path.name for path in tmp_path.iterdir() if "nobody" in path.name] == []
    missing = tmp_path / "none" / "x"
    assert "No such file" in say("export", "acme", "--to", str(missing), code=1)[1]


def test_a_tenant_is_deleted_when_it_is_meant(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "SETTLE_S", 0)
    say("create", "acme")
    say("issue", "acme")
    counters = SqliteCounters(tmp_path / "counters.db")
    limit = Limit(name="n", strategy=Strategy.FIXED_WINDOW, amount=1, window_ms=60_000)
    asyncio.run(counters.reserve("acme", "a", [Demand(limit=limit, amount=1)], ttl_s=60))
    assert "would delete acme: keys=1, " in say("delete", "acme")[1]
    assert "acme" in say("tenants")[0]
    told = say("delete", "acme", "--yes")[1]
    assert "acme is deleted: " in told
    assert "counters=1, keys=1" in told
    assert "acme" not in say("tenants")[0]
    assert "acme" not in say("audit")[0]
    again = asyncio.run(counters.reserve("acme", "b", [Demand(limit=limit, amount=1)], ttl_s=60))
    assert again.allowed, "what it had used is forgotten"
    asyncio.run(counters.close())
    assert "no tenant 'acme'" in say("delete", "acme", "--yes", code=1)[1]
    assert not (tmp_path / "cache.db").exists(), "nobody has made one"
    first = say("bootstrap")
    assert first
    assert "the only keys" in say("delete", "admin", "--yes", code=1)[1]


def test_what_is_due_is_counted_before_it_goes(say: Say, tmp_path: Path) -> None:
    say("create", "acme")
    config = configured(tmp_path, "retention: {audit_days: 3}")
    with sqlite3.connect(tmp_path / "frontier.db") as database:
        database.execute("UPDATE audit SET at = '2020-01-01 00:00:00.000000'")
    database.close()
    words = ("retention", "--config", str(config))
    assert "would remove usage=0, who asked=0, audit=1, " in say(*words)[1]
    assert "audit=1" in say(*words)[1], "it was only counted"
    assert "removed usage=0, who asked=0, audit=1, " in say(*words, "--yes")[1]
    assert "audit=0" in say(*words)[1]
    assert "cannot be read" in say("retention", "--config", str(tmp_path / "none"), code=1)[1]
    config.write_text("applications: []\n")
    assert "there is no application" in say(*words, code=1)[1]


def test_errors_are_one_line(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    assert say("keys", "nobody", code=1)[1] == "error: There is no tenant 'nobody'.\n"
    monkeypatch.setenv("FRONTIER_KEY_SECRETS", "short")
    assert "FRONTIER_KEY_SECRETS: expected" in say("tenants", code=1)[1]
    monkeypatch.setenv("FRONTIER_DATABASE", "mysql://x/y")
    assert "not supported" in say("tenants", code=1)[1]


def test_durations_that_are_none(say: Say) -> None:
    with pytest.raises(SystemExit):
        main(["issue", "acme", "--lifetime", "soon"])
