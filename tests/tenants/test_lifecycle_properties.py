"""Tenants that come, see models, and go, in any order and with crashes: nobody's rights or bills
become another's, and nothing is left of who is gone.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deployments.config import RetentionConfig
from deployments.tenants import ledger
from deployments.tenants.deletion import Deletion
from deployments.tenants.directory import Directory
from deployments.tenants.keys import Peppers
from deployments.tenants.ledger import By
from deployments.tenants.principal import Role
from deployments.tenants.retention import Retention
from deployments.tenants.sight import Sight
from deployments.tenants.visibility import Visibility
from models.errors import Conflict, NotFound
from state.database import Database
from state.places import sqlite_url
from tests.tenants.things import contents, use

TENANTS = ("tenant-a", "tenant-b", "tenant-c")
MODELS = ("smollm2", "smollm2:poet")
NAMES, SOME = st.sampled_from(TENANTS), st.sets(st.sampled_from(TENANTS))


class Crash(BaseException):
    """The power fails."""


class Machine(RuleBasedStateMachine):
    """Beside the database a model of it in sets."""

    template: Path | None = None

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        if Machine.template is not None:
            shutil.copytree(Machine.template, self.folder / "db")
        self.database = self.run(Database.open(sqlite_url(self.folder / "db" / "frontier.db")))
        self.directory = Directory(
            self.database, Peppers.of({"FRONTIER_KEY_SECRETS": "a secret of the tests"})
        )
        self.visibility = Visibility(self.database)
        self.deletion = Deletion(database=self.database, elsewhere={}, sleep=self.at_once)
        self.there: set[str] = set()
        self.begun: set[str] = set()
        """Of those, the ones whose deletion has begun."""
        self.administrators: set[str] = set()
        self.rules: dict[str, set[str]] = {}
        self.used = 0

    async def at_once(self, _: float) -> None:
        return

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.run(self.database.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    @rule(name=NAMES, administrator=st.booleans())
    def create(self, name: str, administrator: bool) -> None:
        if name in self.there:
            with pytest.raises(Conflict):
                self.run(self.directory.create(name, plan="free", by="me"))
            return
        self.run(self.directory.create(name, plan="free", by="me"))
        role = Role.ADMIN if administrator else Role.DEVELOPER
        self.run(self.directory.issue(name, role=role, label=f"of {name}", by="me"))
        self.there.add(name)
        if administrator:
            self.administrators.add(name)

    @rule(name=NAMES)
    def work(self, name: str) -> None:
        if name in self.there:
            self.run(use(self.database, name, subject=f"oidc:{name}", at=datetime.now(UTC)))
            self.used += 1

    @rule(model=st.sampled_from(MODELS), tenants=SOME | st.none())
    def show(self, model: str, tenants: set[str] | None) -> None:
        if tenants is not None and not tenants <= self.there - self.begun:
            with pytest.raises(NotFound):
                self.run(self.visibility.show(model, tenants, by="me"))
            return
        self.run(self.visibility.show(model, tenants, by="me"))
        self.rules.pop(model, None)
        if tenants is not None:
            self.rules[model] = set(tenants)

    @rule(name=NAMES, crash_at=st.integers(1, 8))
    def delete(self, name: str, crash_at: int) -> None:
        last = self.administrators == {name}
        if name not in self.there or (last and name not in self.begun):
            with pytest.raises(Conflict if name in self.there else NotFound):
                self.run(self.deletion.delete(name, by="me"))
            return
        if self.crashes(crash_at, self.deletion.delete(name, by="me")):
            if crash_at > 1 or name in self.begun:
                self.begun.add(name)
                self.administrators.discard(name)
            return
        self.gone(name)

    @precondition(lambda self: self.begun)
    @rule()
    def go_on(self) -> None:
        assert self.run(self.deletion.resume()) == len(self.begun)
        for name in list(self.begun):
            self.gone(name)

    @rule()
    def keep_house(self) -> None:
        config = RetentionConfig(access_days=1, usage_days=2, audit_days=1)
        gone = self.run(Retention(database=self.database, config=config).enforce())
        assert not any(gone.values()), "all of it is of today"

    @invariant()
    def everybody_sees_what_is_theirs(self) -> None:
        if not hasattr(self, "used"):
            return
        rules = self.run(self.visibility.rules())
        for tenant in TENANTS:
            sight = Sight(rules, tenant)
            model, adapter = (tenant in self.rules.get(name, {tenant}) for name in MODELS)
            if tenant not in self.begun:
                assert sight.sees("smollm2") is model
                assert sight.sees("smollm2", "poet@3") is (model and adapter)

    @invariant()
    def nothing_is_lost_and_nothing_is_left(self) -> None:
        if not hasattr(self, "used"):
            return
        lines = self.run(ledger.report(self.database, by=[By.TENANT]))
        assert sum(line["requests"] for line in lines) == self.used
        text = json.dumps(self.run(contents(self.database)), default=str)
        for name in set(TENANTS) - self.there:
            assert f'"{name}"' not in text
            assert f"oidc:{name}" not in text
            assert f"of {name}" not in text

    def crashes(self, at: int, work: Any) -> bool:
        """Whether ``work`` has not come to its end before its transaction ``at``, which fails."""
        write, count = self.database.write, 0

        @asynccontextmanager
        async def failing(alone: str | None = None) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise Crash
            async with write(alone) as c:
                yield c

        self.database.write = failing  # type: ignore[method-assign]
        try:
            self.run(work)
        except Crash:
            return True
        finally:
            del self.database.write
        return False

    def gone(self, name: str) -> None:
        for having in (self.there, self.begun, self.administrators, *self.rules.values()):
            having.discard(name)


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
@pytest.mark.timeout(900)
class TestAtLength(Machine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=60, stateful_step_count=40)
