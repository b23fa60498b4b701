"""The inbox under any order of deliveries, copies and years: kept once, and for its time."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deployments.webhooks.inbox import Delivery, Inbox
from models.errors import Conflict
from state.database import Database
from state.places import sqlite_url
from tests.webhooks.test_inbox import NOW, delivery

KEYS, BODIES = st.sampled_from("abc"), st.sampled_from(["1", "2"])


def matches(kept: Delivery, given: Delivery) -> bool:
    same_key = kept.key == given.key
    return same_key or (kept.payload == given.payload and kept.signed == given.signed)


class Machine(RuleBasedStateMachine):
    """Beside the inbox a model of it in a list."""

    template: Path | None = None

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        if Machine.template is not None:
            shutil.copytree(Machine.template, self.folder / "db")
        self.database = self.run(Database.open(sqlite_url(self.folder / "db" / "frontier.db")))
        self.inbox = Inbox(self.database, dedupe_s=10)
        self.now = NOW
        self.kept: list[tuple[int, Delivery, datetime]] = []

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.database.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    @rule(seconds=st.integers(0, 12))
    def wait(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(key=KEYS, body=BODIES, ago=st.integers(0, 2))
    def accept(self, key: str, body: str, ago: int) -> None:
        given = delivery(key, body, signed=self.now - timedelta(seconds=ago))
        fresh = [one for one in self.kept if one[2] > self.now - timedelta(seconds=10)]
        known = [one for one in fresh if matches(one[1], given)]
        if any(one[1].key == key and one[1].payload != body for one in known):
            with pytest.raises(Conflict):
                self.run(self.inbox.accept(given, at=self.now))
            return
        event, duplicate = self.run(self.inbox.accept(given, at=self.now))
        assert duplicate is bool(known)
        if duplicate:
            assert event.id in {one[0] for one in known}
        else:
            self.kept = [one for one in self.kept if not matches(one[1], given)]
            assert all(event.id > one[0] for one in self.kept)
            self.kept.append((event.id, given, self.now))

    @rule()
    def forget(self) -> None:
        left = [one for one in self.kept if one[2] > self.now - timedelta(seconds=10)]
        gone = self.run(self.inbox.forget_expired(at=self.now))
        assert gone == len(self.kept) - len(left)
        self.kept = left

    @invariant()
    def nothing_else_is_there(self) -> None:
        if hasattr(self, "kept"):
            found = self.run(self.inbox.events())
            assert [event.id for event in found] == [one[0] for one in reversed(self.kept)]


@pytest.fixture(scope="module", autouse=True)
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One migrated file that every example copies."""
    folder = tmp_path_factory.mktemp("template")

    async def make_it() -> None:
        await (await Database.open(sqlite_url(folder / "frontier.db"))).close()

    asyncio.run(make_it())
    Machine.template = folder
    yield
    Machine.template = None


class TestQuickly(Machine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=10, stateful_step_count=20)


@pytest.mark.slow
class TestAtLength(Machine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=150, stateful_step_count=40)
