"""The registry under any order of calls: nothing an alias points at is ever collected."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from models.errors import ConfigError, Conflict, NotFound
from models.registry import Registry
from models.store import Store
from models.versions import LEGAL, State, positions
from state.database import Database
from state.places import sqlite_url
from tests.models.artifacts import make

NAME = "digits-cnn"
ALIASES = ("champion", "canary")
ZERO = timedelta(0)


class Machine(RuleBasedStateMachine):
    """Beside the registry a model of it in dictionaries."""

    seen = Bundle("seen")
    """Revisions of aliases that somebody looked at a while ago."""

    template: Path | None = None

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.now = datetime.now(UTC) + timedelta(hours=1)
        if Machine.template is not None:
            shutil.copytree(Machine.template, self.folder / "db")
        self.database = self.run(Database.open(sqlite_url(self.folder / "db" / "frontier.db")))
        self.registry = Registry(self.database, now=self.clock)
        self.store = Store(self.folder / "store")
        self.states: dict[int, State] = {}
        self.hashes: dict[int, str] = {}
        self.parents: dict[str, tuple[str, ...]] = {}
        self.gone: set[int] = set()
        self.stacks: dict[str, list[int | None]] = {alias: [None] for alias in ALIASES}
        self.revisions = dict.fromkeys(ALIASES, 0)

    def clock(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.database.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    def reference(self, number: int) -> str:
        return f"{NAME}@{number}"

    @rule(content=st.integers(1, 6), parent=st.none() | st.integers(1, 6))
    def register(self, content: int, parent: int | None) -> None:
        folder = self.folder / "made" / str(content)
        if not folder.exists():
            parents = (self.hashes[parent],) if parent in self.hashes else ()
            make(folder, str(content), parents=parents)
        uri = self.store.publish(folder)
        manifest = self.store.manifest(uri.rpartition("/")[2])
        version = self.run(self.registry.register(manifest, uri, by="me"))
        known = {sha256: number for number, sha256 in self.hashes.items()}
        assert version.number == known.get(manifest.content_sha256, len(self.hashes) + 1)
        self.hashes[version.number] = manifest.content_sha256
        self.parents[manifest.content_sha256] = manifest.parents
        self.states.setdefault(version.number, State.STAGING)
        self.gone.discard(version.number)

    @rule(number=st.integers(1, 6), state=st.sampled_from(State))
    def transition(self, number: int, state: State) -> None:
        if number not in self.states:
            with pytest.raises(NotFound):
                self.run(self.registry.transition(self.reference(number), state, by="me"))
            return
        before = self.states[number]
        held = any(stack[-1] == number for stack in self.stacks.values())
        allowed = state is before or (
            state in LEGAL[before]
            and not (state is State.ARCHIVED and held)
            and number not in self.gone
        )
        if allowed:
            self.run(self.registry.transition(self.reference(number), state, by="me"))
            self.states[number] = state
        else:
            with pytest.raises(ConfigError):
                self.run(self.registry.transition(self.reference(number), state, by="me"))

    @rule(target=seen, alias=st.sampled_from(ALIASES))
    def look(self, alias: str) -> Any:
        found = self.run(self.registry.alias(NAME, alias))
        assert found.revision == self.revisions[alias]
        return multiple((alias, found.revision))

    def may_hold(self, number: int | None, alias: str) -> bool:
        if number is None:
            return True
        if number in self.gone or self.states[number] is State.ARCHIVED:
            return False
        return alias != "champion" or self.states[number] is State.APPROVED

    @rule(looked=consumes(seen), number=st.integers(1, 6), approve=st.booleans())
    def promote(self, looked: tuple[str, int], number: int, approve: bool) -> None:
        alias, revision = looked

        def act() -> Any:
            return self.run(
                self.registry.promote(
                    self.reference(number), alias, expected=revision, by="me", approve=approve
                )
            )

        if number not in self.states:
            with pytest.raises(NotFound):
                act()
        elif revision != self.revisions[alias]:
            with pytest.raises(Conflict):
                act()
        elif self.stacks[alias][-1] == number:
            act()
        else:
            approved = approve and self.states[number] is State.STAGING
            before = self.states[number]
            if approved:
                self.states[number] = State.APPROVED
            if self.may_hold(number, alias):
                act()
                self.stacks[alias].append(number)
                self.revisions[alias] += 1
            else:
                self.states[number] = before  # the whole transaction is undone
                with pytest.raises(ConfigError):
                    act()

    @rule(alias=st.sampled_from(ALIASES))
    def rollback(self, alias: str) -> None:
        def act() -> Any:
            return self.run(self.registry.rollback(NAME, alias, expected=None, by="me"))

        stack = self.stacks[alias]
        if self.revisions[alias] == 0:
            with pytest.raises(NotFound):
                act()
        elif len(stack) < 2 or not self.may_hold(stack[-2], alias):
            with pytest.raises(ConfigError):
                act()
        else:
            stack.pop()
            self.revisions[alias] += 1
            assert act().number == stack[-1]

    @rule(alias=st.sampled_from(ALIASES))
    def remove(self, alias: str) -> None:
        def act() -> Any:
            return self.run(self.registry.remove(NAME, alias, expected=None, by="me"))

        if self.stacks[alias][-1] is None:
            with pytest.raises(NotFound):
                act()
        else:
            act()
            self.stacks[alias].append(None)
            self.revisions[alias] += 1

    def ancestry(self, sha256: str) -> set[str]:
        """What an artifact was made from, however far back."""
        found: set[str] = set()
        left = [sha256]
        while left:
            fresh = set(self.parents.get(left.pop(), ())) - found
            found |= fresh
            left += fresh
        return found

    @rule()
    def collect(self) -> None:
        plan = self.run(self.registry.plan(self.store.list(), grace=ZERO))
        # A parent may have gone before its child came; from then on none goes any more.
        gone = {waste.sha256 for waste in plan.waste}
        for number, state in self.states.items():
            if state is not State.ARCHIVED:
                assert not gone & self.ancestry(self.hashes[number])
        for waste in plan.waste:
            work = self.registry.collect(waste, self.store.delete, by="gc", grace=ZERO)
            assert self.run(work), "nothing happened in between"
        numbers = {sha256: number for number, sha256 in self.hashes.items()}
        self.gone |= {numbers[waste.sha256] for waste in plan.waste if waste.sha256 in numbers}

    @invariant()
    def what_is_in_use_is_there(self) -> None:
        if not hasattr(self, "runner"):
            return
        stored = {found.sha256 for found in self.store.list() if found.complete}
        for number, state in self.states.items():
            if state is not State.ARCHIVED:
                assert self.hashes[number] in stored
        for alias, stack in self.stacks.items():
            if stack[-1] is not None:
                version = self.run(self.registry.resolve(f"{NAME}@{alias}"))
                assert version.number == stack[-1]
                assert version.artifact in stored
                assert version.collected is None

    @invariant()
    def history_tells_the_present(self) -> None:
        if not hasattr(self, "runner"):
            return
        for alias in ALIASES:
            moves = self.run(self.registry.moves(NAME, alias))
            assert [move.revision for move in moves] == [*range(1, self.revisions[alias] + 1)]
            assert positions(moves) == self.stacks[alias]
        for number, state in self.states.items():
            version = self.run(self.registry.resolve(self.reference(number)))
            assert (version.state, version.collected is not None) == (state, number in self.gone)


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
    settings = settings(max_examples=8, stateful_step_count=20)


@pytest.mark.slow
class TestAtLength(Machine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=150, stateful_step_count=40)
