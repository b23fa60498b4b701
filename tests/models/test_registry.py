"""One suite for both databases: versions, aliases, lineage, uses, collection."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from models.collection import Waste
from models.errors import ConfigError, Conflict, InvalidInput, NotFound, Unavailable
from models.promotion import Latency, Measurements
from models.registry import Registry, open_registry
from models.store import Store
from models.versions import LEGAL, State, UseKind, Version
from state.database import Database
from tests.models.artifacts import make

ROOT = Path(__file__).parents[2]
START = datetime(2026, 1, 31, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@dataclass
class World:
    """A registry, its store and its clock."""

    registry: Registry
    store: Store
    clock: Clock
    folder: Path

    async def register(self, content: str = "1", name: str = "digits-cnn", **facts: Any) -> Version:
        folder = self.folder / f"{name}-{content}"
        manifest = make(folder, content, name=name, **facts)
        return await self.registry.register(manifest, self.store.publish(folder), by="me")

    async def approved(self, content: str, **facts: Any) -> Version:
        version = await self.register(content, **facts)
        return await self.registry.transition(str(version), State.APPROVED, by="me")

    async def collect(self, grace: timedelta = timedelta(0)) -> list[Waste]:
        plan = await self.registry.plan(self.store.list(), grace=grace)
        return [
            waste
            for waste in plan.waste
            if await self.registry.collect(waste, self.store.delete, by="gc", grace=grace)
        ]

    def stored(self) -> set[str]:
        return {found.sha256 for found in self.store.list() if found.complete}


@pytest.fixture
async def world(database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    clock = Clock()
    async with await Database.open(database_url) as database:
        yield World(
            Registry(database, now=clock), Store(tmp_path / "store"), clock, tmp_path / "made"
        )


@pytest.fixture
def registry(world: World) -> Registry:
    return world.registry


# Versions


async def test_versions_count_up_within_their_name(world: World) -> None:
    found = [await world.register(content) for content in "123"]
    other = await world.register("1", "other")
    assert [version.number for version in found] == [1, 2, 3]
    assert other.full_name == "other_1_20260131"
    assert {version.state for version in found} == {State.STAGING}
    assert found[0].created_by == "me"
    assert await world.registry.resolve("digits-cnn@2") == found[1]
    assert await world.registry.resolve(found[2].full_name) == found[2]


async def test_registering_again_finds_what_is_there(world: World) -> None:
    folder = world.folder / "one"
    manifest = make(folder)
    uri = world.store.publish(folder)
    first = await world.registry.register(manifest, uri, by="me")
    assert await world.registry.register(manifest, uri, by="you") == first
    other = await world.registry.register(manifest, uri, by="you", name="elsewhere")
    assert (other.name, other.number, other.artifact) == ("elsewhere", 1, first.artifact)
    assert await world.registry.manifest(first.artifact) == manifest


async def test_what_is_not_published_is_not_registered(world: World) -> None:
    folder = world.folder / "one"
    manifest = make(folder)
    with pytest.raises(NotFound, match="publish it first"):
        await world.registry.register(manifest, world.store.uri(manifest.content_sha256), by="me")
    with pytest.raises(ConfigError, match="does not end in"):
        await world.registry.register(manifest, "/somewhere/else", by="me")
    assert (await world.registry.models()).items == ()


async def test_names_that_cannot_be(world: World) -> None:
    with pytest.raises(ConfigError, match="cannot name a model"):
        await world.register("1", "no spaces".replace(" ", "@"))


async def test_what_is_not_there_is_named_with_what_is(world: World) -> None:
    registry = world.registry
    with pytest.raises(NotFound, match="no model nobody; it is empty"):
        await registry.resolve("nobody@1")
    await world.register("1")
    await world.register("2")
    with pytest.raises(NotFound, match="no model nobody; there are digits-cnn"):
        await registry.resolve("nobody@1")
    with pytest.raises(NotFound, match="no version 7; it has 2, 1"):
        await registry.resolve("digits-cnn@7")
    with pytest.raises(NotFound, match="no alias champion; it has none"):
        await registry.resolve("digits-cnn")
    await registry.promote("digits-cnn@1", "canary", expected=0, by="me")
    with pytest.raises(NotFound, match="no alias champion; it has canary"):
        await registry.resolve("digits-cnn@champion")
    with pytest.raises(NotFound, match="no artifact 0000"):
        await registry.manifest("0" * 64)


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
async def test_states_change_as_they_may(world: World, before: State, after: State) -> None:
    version = str(await world.register())
    if before is not State.STAGING:
        await world.registry.transition(version, before, by="me")
    if after is before or after in LEGAL[before]:
        changed = await world.registry.transition(version, after, by="me")
        assert changed.state is after
    else:
        with pytest.raises(ConfigError, match=f"is {before}; it can become .*, not {after}"):
            await world.registry.transition(version, after, by="me")


async def test_pages(world: World) -> None:
    for content in "12345":
        await world.register(content)
    for name in ("a", "b", "c"):
        await world.register("1", name)
    registry = world.registry
    names: list[str] = []
    cursor = None
    for size in (2, 1, 2):
        page = await registry.models(limit=size, cursor=cursor)
        names += [model.name for model in page.items]
        cursor = page.next
    assert (names, cursor) == (["a", "b", "c", "digits-cnn"], None)
    first = await registry.versions("digits-cnn", limit=3)
    await world.register("6")
    rest = await registry.versions("digits-cnn", limit=3, cursor=first.next)
    numbers = [version.number for version in (*first.items, *rest.items)]
    assert (numbers, rest.next) == ([5, 4, 3, 2, 1], None)
    audit = await registry.audit(limit=4)
    more = await registry.audit(limit=500, cursor=audit.next)
    assert [entry.subject for entry in (*audit.items, *more.items)] == [
        *("digits-cnn@6", "c@1", "b@1", "a@1"),
        *(f"digits-cnn@{number}" for number in (5, 4, 3, 2, 1)),
    ]
    for cursor in ("x", "", "%%%", "e30", "WyJhIiwiYiJd"):
        with pytest.raises(InvalidInput, match="is not one that was given out"):
            await registry.models(cursor=cursor)
    for limit in (0, 501):
        with pytest.raises(InvalidInput, match="expected 1 to 500"):
            await registry.models(limit=limit)


# Aliases


async def test_an_alias_points_at_one_version(world: World) -> None:
    registry = world.registry
    one, two = await world.approved("1"), await world.approved("2")
    alias = await registry.promote(str(one), "champion", expected=0, by="me", reason="first")
    assert (alias.number, alias.revision) == (1, 1)
    assert await registry.resolve("digits-cnn") == one
    alias = await registry.promote(str(two), "champion", expected=1, by="me")
    assert (alias.number, alias.revision) == (2, 2)
    assert await registry.aliases() == (alias,)
    again = await registry.promote(str(two), "champion", expected=2, by="me")
    assert again == alias, "where it is already"


async def test_only_what_is_approved_becomes_champion(world: World) -> None:
    registry = world.registry
    version = str(await world.register())
    with pytest.raises(ConfigError, match="is staging; only what is approved"):
        await registry.promote(version, "champion", expected=0, by="me")
    await registry.promote(version, "candidate", expected=0, by="me")
    await registry.promote(version, "champion", expected=0, by="me", approve=True)
    assert (await registry.resolve(version)).state is State.APPROVED


async def test_what_has_moved_is_a_conflict(world: World) -> None:
    registry = world.registry
    one, two = await world.approved("1"), await world.approved("2")
    await registry.promote(str(one), "champion", expected=0, by="her")
    for act in (
        lambda: registry.promote(str(two), "champion", expected=0, by="me"),
        lambda: registry.rollback("digits-cnn", "champion", expected=0, by="me"),
        lambda: registry.remove("digits-cnn", "champion", expected=0, by="me"),
    ):
        with pytest.raises(Conflict, match=r"was moved by her .* and points at version 1"):
            await act()
    assert (await registry.resolve("digits-cnn")).number == 1


async def test_there_and_back_is_a_move_too(world: World) -> None:
    """Comparing versions instead of revisions would let this pass."""
    registry = world.registry
    one, two = await world.approved("1"), await world.approved("2")
    seen = await registry.promote(str(one), "champion", expected=0, by="me")
    await registry.promote(str(two), "champion", expected=None, by="her")
    await registry.promote(str(one), "champion", expected=None, by="her")
    with pytest.raises(Conflict):
        await registry.promote(str(two), "champion", expected=seen.revision, by="me")


async def test_rollback_and_removal(world: World) -> None:
    registry = world.registry
    for content in "123":
        version = await world.approved(content)
        await registry.promote(str(version), "champion", expected=None, by="me")
    name, alias = "digits-cnn", "champion"

    async def roll() -> int | None:
        return (await registry.rollback(name, alias, expected=None, by="me")).number

    assert [await roll(), await roll()] == [2, 1]
    await registry.remove(name, alias, expected=5, by="me")
    assert await registry.aliases(name) == ()
    with pytest.raises(NotFound, match="has no alias champion"):
        await registry.remove(name, alias, expected=None, by="me")
    assert [await roll(), await roll()] == [1, None]
    with pytest.raises(ConfigError, match="has no earlier position"):
        await roll()
    with pytest.raises(NotFound, match="has no alias other"):
        await registry.rollback(name, "other", expected=None, by="me")
    moves = await registry.moves(name, alias)
    assert [move.number for move in moves] == [1, 2, 3, 2, 1, None, 1, None]
    assert [move.previous for move in moves] == [None, 1, 2, 3, 2, 1, None, 1]
    assert [move.revision for move in moves] == [*range(1, 9)]


async def test_a_rollback_to_what_was_archived_is_refused(world: World) -> None:
    registry = world.registry
    one, two = await world.approved("1"), await world.approved("2")
    await registry.promote(str(one), "champion", expected=0, by="me")
    with pytest.raises(ConfigError, match="champion still points at it"):
        await registry.transition(str(one), State.ARCHIVED, by="me")
    await registry.promote(str(two), "champion", expected=1, by="me")
    await registry.transition(str(one), State.ARCHIVED, by="me")
    with pytest.raises(ConfigError, match="digits-cnn@1 is archived"):
        await registry.rollback("digits-cnn", "champion", expected=2, by="me")
    with pytest.raises(ConfigError, match="digits-cnn@1 is archived"):
        await registry.promote(str(one), "canary", expected=0, by="me")
    assert (await registry.resolve("digits-cnn")).number == 2


PROMOTE = """
import asyncio, sys
from models.errors import Conflict
from models.registry import open_registry

async def main(url, number):
    async with open_registry(url) as registry:
        seen = await registry.alias("digits-cnn", "champion")
        print(seen.revision, flush=True)
        sys.stdin.readline()
        try:
            await registry.promote(
                f"digits-cnn@{number}", "champion", expected=seen.revision, by=number
            )
        except Conflict:
            print("lost")
        else:
            print("won")

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


@pytest.mark.slow
async def test_of_processes_that_promote_at_once_one_wins(world: World, database_url: str) -> None:
    numbers = [str((await world.approved(content)).number) for content in "1234"]
    processes = [
        subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", PROMOTE, database_url, number],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]
    for process in processes:  # all have looked before one acts
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "0\n"
    said = await asyncio.gather(
        *(asyncio.to_thread(process.communicate, "\n", 60) for process in processes)
    )
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(out for out, _ in said) == ["lost\n"] * 3 + ["won\n"]
    (move,) = await world.registry.moves("digits-cnn", "champion")
    (winner,) = (n for n, (out, _) in zip(numbers, said, strict=True) if out == "won\n")
    assert (str(move.number), move.by) == (winner, winner)


# Lineage, uses, measurements, audit


async def test_the_whole_lineage(world: World) -> None:
    registry = world.registry
    base = await world.register("1", "base")
    adapter = await world.approved("2", name="adapter", parents=(base.artifact, "f" * 64))
    alias = await registry.promote(str(adapter), "champion", expected=0, by="me")
    await registry.use(adapter.artifact, name="chat", replica="r1")
    found = await registry.lineage("adapter@champion")
    assert found.version == adapter
    assert found.manifest.run is not None
    assert found.manifest.run.id == "20260131-a1"
    assert found.manifest.data.sha256 == "d" * 64
    assert found.aliases == (alias,)
    assert [(use.name, use.replica) for use in found.uses] == [("chat", "r1")]
    known, unknown = found.parents
    assert (known.artifact, known.versions) == (base.artifact, (base,))
    assert known.manifest is not None
    assert (unknown.artifact, unknown.versions, unknown.manifest) == ("f" * 64, (), None)
    assert (await registry.lineage("base@1")).children == (adapter,)


async def test_a_replica_uses_one_artifact_at_a_time(world: World) -> None:
    registry = world.registry
    one, two = await world.register("1"), await world.register("2")
    await registry.use(one.artifact, name="chat", replica="r1")
    (before,) = (await registry.lineage(str(one))).uses
    await registry.use(one.artifact, name="chat", replica="r1")
    (after,) = (await registry.lineage(str(one))).uses
    assert after.since == before.since
    assert after.seen > before.seen
    await registry.use(one.artifact, name="chat", replica="r2")
    await registry.use(two.artifact, name="chat", replica="r1")
    assert [use.replica for use in (await registry.lineage(str(one))).uses] == ["r2"]
    (moved,) = (await registry.lineage(str(two))).uses
    assert moved.since > after.seen
    await registry.disuse(name="chat", replica="r1")
    assert (await registry.lineage(str(two))).uses == ()


async def test_the_last_measurements_count(world: World) -> None:
    version = await world.register()

    def measured(p95: float) -> Measurements:
        return Measurements(
            artifact=version.artifact,
            measured="2026-01-31T12:00:00+00:00",
            golden_set="g" * 64,
            scores={"a": 1.0, "b": 1e-300},
            requests=10,
            errors=0,
            latency=Latency(p50=0.1, p95=p95),
        )

    assert await world.registry.measurements(version.artifact) is None
    for p95 in (1.0, 2.0):
        await world.registry.record(measured(p95))
    assert await world.registry.measurements(version.artifact) == measured(2.0)
    with pytest.raises(NotFound, match="no artifact 0000"):
        await world.registry.record(
            Measurements(
                artifact="0" * 64,
                measured="",
                golden_set="",
                scores={},
                requests=0,
                errors=0,
                latency=Latency(p50=None, p95=None),
            )
        )


async def test_every_change_is_in_the_audit_log(world: World) -> None:
    registry = world.registry
    one = await world.register("1")
    await registry.promote(
        str(one), "champion", expected=0, by="her", reason="good", approve=True, details={"p": 1}
    )
    await registry.remove("digits-cnn", "champion", expected=1, by="him", reason="bad")
    with pytest.raises(Conflict):
        await registry.promote(str(one), "champion", expected=0, by="late")
    entries = (await registry.audit()).items
    assert [(e.who, e.what, e.subject) for e in reversed(entries)] == [
        ("me", "register", "digits-cnn@1"),
        ("her", "transition", "digits-cnn@1"),
        ("her", "promote", "digits-cnn@champion"),
        ("him", "remove", "digits-cnn@champion"),
    ]
    assert entries[1].details == {"before": None, "after": 1, "reason": "good", "p": 1}
    assert all(newer.at > older.at for newer, older in pairwise(entries))
    (only,) = (await registry.audit(subject="digits-cnn@1", limit=1)).items
    assert only.what == "transition"


# Collection


async def test_collection_takes_what_nobody_needs(world: World) -> None:
    registry = world.registry
    parent, child, other, orphan = [await world.register(content) for content in "1234"]
    del child
    folder = world.folder / "child"
    manifest = make(folder, "5", parents=(parent.artifact,))
    child = await registry.register(manifest, world.store.publish(folder), by="me")
    forgotten = make(world.folder / "forgotten", "6")
    world.store.publish(world.folder / "forgotten")
    for version in (parent, other, orphan):
        await registry.transition(str(version), State.ARCHIVED, by="me")
    await registry.use(other.artifact, name="chat", replica="r1")
    await registry.use(orphan.artifact, name="run-7", kind=UseKind.RUN)
    await registry.disuse(name="run-7", kind=UseKind.RUN)
    world.clock.now = datetime.now(UTC)
    assert await world.collect(HOUR) == [], "all of it is new"
    world.clock.now += 2 * HOUR
    await registry.use(other.artifact, name="chat", replica="r1")
    gone = await world.collect(HOUR)
    assert {(waste.sha256, waste.reason) for waste in gone} == {
        (orphan.artifact, f"archived: {orphan}"),
        (forgotten.content_sha256, "never registered"),
    }
    assert {parent.artifact, child.artifact, other.artifact} <= world.stored()
    assert not {orphan.artifact, forgotten.content_sha256} & world.stored()
    with pytest.raises(ConfigError, match=r"the files of digits-cnn@\d are gone"):
        await registry.transition(str(orphan), State.STAGING, by="me")
    world.clock.now += 2 * HOUR
    assert [waste.sha256 for waste in await world.collect(HOUR)] == [other.artifact]


async def test_what_was_collected_can_be_registered_again(world: World) -> None:
    registry = world.registry
    version = await world.register("1")
    await registry.transition(str(version), State.ARCHIVED, by="me")
    world.clock.now = datetime.now(UTC) + HOUR
    assert len(await world.collect()) == 1
    assert (await registry.resolve(str(version))).collected is not None
    folder = world.folder / "digits-cnn-1"
    manifest = await registry.manifest(version.artifact)
    again = await registry.register(manifest, world.store.publish(folder), by="me")
    assert (again.number, again.collected) == (1, None)
    await registry.transition(str(version), State.STAGING, by="me")
    assert version.artifact in world.stored()


async def test_what_came_to_be_needed_after_the_plan_stays(world: World) -> None:
    registry = world.registry
    version = await world.register("1")
    await registry.transition(str(version), State.ARCHIVED, by="me")
    world.clock.now = datetime.now(UTC) + HOUR
    (waste,) = (await registry.plan(world.store.list(), grace=timedelta(0))).waste
    await registry.transition(str(version), State.STAGING, by="me")
    zero = timedelta(0)
    assert not await registry.collect(waste, world.store.delete, by="gc", grace=zero)
    assert version.artifact in world.stored()


async def test_a_deletion_that_fails_leaves_nothing_to_promote(world: World) -> None:
    registry = world.registry
    version = await world.register("1")
    await registry.transition(str(version), State.ARCHIVED, by="me")
    world.clock.now = datetime.now(UTC) + HOUR
    (waste,) = (await registry.plan(world.store.list(), grace=timedelta(0))).waste

    def fails(_: str) -> None:
        raise Unavailable("the store is away")

    with pytest.raises(Unavailable):
        await registry.collect(waste, fails, by="gc", grace=timedelta(0))
    with pytest.raises(ConfigError, match="are gone"):
        await registry.transition(str(version), State.STAGING, by="me")
    assert len(await world.collect()) == 1
    assert world.stored() == set()


# The database


async def test_without_its_database() -> None:
    async def act(opened: AbstractAsyncContextManager[Registry]) -> None:
        async with opened:
            pass

    with pytest.raises(Unavailable, match=r"^postgresql://127\.0\.0\.1:1/x"):
        await act(open_registry("postgresql://user:hidden@127.0.0.1:1/x"))
    with pytest.raises(ConfigError, match="is not supported"):
        await act(open_registry("mysql://user:hidden@127.0.0.1:1/x"))


async def test_manifests_survive_every_number(world: World) -> None:
    """JSONB would turn 1e22 into an integer, and the hash would no longer fit."""
    config = {"a": 1e22, "b": 1.0, "c": 5e-324, "d": 2**63}
    version = await world.register("1", config=config)
    assert (await world.registry.manifest(version.artifact)).config == config
    assert json.loads(json.dumps(config)) == config
